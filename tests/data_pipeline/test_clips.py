"""Raw shards read and decoded ahead, as precompute does it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.clips import ClipReader
from data_pipeline.shards import read_manifest
from tests.data_pipeline.test_precompute import pan, write_clips


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("raw")
    write_clips(data, [5, 3])
    return data


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_decoder_that_crashes_costs_one_clip_and_says_which_signal(raw: Path, backend: str, number: signal.Signals) -> None:
    reader = ClipReader(raw, read_manifest(raw).shards, decoder=backend, threads=1)
    clips = []
    for piece in reader.stream([(0, True), (1, True)], size=1):
        if not clips:
            os.kill(reader._decoders[0].process.pid, number)
        clips += piece.batch
    reader.close()
    failed = [clip.problem for clip in clips if clip.problem]
    assert [(problem.reason, problem.detail) for problem in failed] == [("decoder_died", number.name)]
    for at, clip in enumerate(clips):
        assert clip.problem or np.abs(clip.frames.astype(int) - pan(at)).mean() < 20  # halved chroma; another clip is 80 off
    assert reader.decode_cpu_s > 0.0
