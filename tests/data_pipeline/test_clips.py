"""Raw shards read and decoded ahead, as precompute does it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from landiff.data_pipeline.format.shards import read_manifest
from landiff.data_pipeline.precompute.clips import ClipReader
from tests.data_pipeline.precompute_data import pan, write_clips


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("raw")
    write_clips(data, [5, 3])
    return data


@pytest.mark.parametrize("backend", ["decord", "pyav"])
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_decoder_that_crashes_costs_one_clip_and_says_which_signal(
    raw: Path, backend: str, number: signal.Signals
) -> None:
    reader = ClipReader(raw, read_manifest(raw).shards, decoder=backend, threads=1)
    reader._decoders[0].process._start()
    os.kill(reader._decoders[0].process.pid, number)
    clips = []
    for piece in reader.stream([(0, True), (1, True)], size=3):
        clips += piece.batch
    reader.close()
    assert [(clip.problem.reason, clip.problem.detail) for clip in clips if clip.problem] == [
        ("decoder_died", number.name)
    ]
    assert clips[0].problem and len(clips) == 8
    for number, clip in enumerate(clips):
        if clip.problem is None:
            # chroma has half the resolution; another clip differs by 80
            assert np.abs(clip.frames.astype(int) - pan(number)).mean() < 20
    assert reader.decode_cpu_s > 0.0
