"""`landiff sample quantize=int8`, and the memory that `--memory` counts for it."""

from __future__ import annotations

import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from landiff.configs.base import ConfigError
from landiff.launchers.budget.sampling import memory_of_parts
from landiff.launchers.config import SampleConfig
from landiff.launchers.results.sample import sample_videos
from landiff.launchers.results.sampling.checks import check_sample
from landiff.launchers.results.sampling.loading import models_on_demand
from landiff.model_zoo.sample.placement.quantized import plain_tensors
from landiff.training.checks import Launch
from tests.launchers.random_zoo import sample_config, write_random_zoo
from tests.quantize_package import torchao  # noqa: F401 - a fixture

needs_torchao = pytest.mark.usefixtures("torchao")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return write_random_zoo(tmp_path_factory.mktemp("quantize") / "zoo")


def config_of(zoo, out, **options) -> SampleConfig:
    values = {"prompts": ("a fox",), "num_latent_frames": 5, "steps": 3, "quantize": "int8"}
    return sample_config(zoo, out, **values | options)


@needs_torchao
def test_videos_differ_by_rounding_and_not_with_offload(zoo, tmp_path):
    """Given the same tokens: with other weights the language model may draw others."""
    tokens = config_of(zoo, tmp_path / "whole", quantize="none", tokens_only=True)
    sample_videos(tokens)
    (path,) = (tmp_path / "whole" / "tokens").glob("*.safetensors")
    whole = config_of(zoo, tmp_path / "whole", quantize="none")
    sample_videos(whole)
    videos = {}
    for offload in ("none", "group", "disk"):
        out = tmp_path / offload
        sample_videos(config_of(zoo, out, offload=offload, tokens_from=path))
        (videos[offload],) = out.glob("*.mp4")
    assert videos["group"].read_bytes() == videos["none"].read_bytes()
    assert videos["disk"].read_bytes() == videos["none"].read_bytes()
    (wanted,) = (tmp_path / "whole").glob("*.mp4")
    difference = frames_of(videos["none"]) - frames_of(wanted)
    error = float((difference**2).mean())
    assert error > 0 and 10 * math.log10(255**2 / error) > 25
    with pytest.raises(ConfigError, match=r'quantize = null there, "int8" here'):
        sample_videos(config_of(zoo, tmp_path / "whole"))


def frames_of(path: Path) -> np.ndarray:
    """float64 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).astype(np.float64)


@needs_torchao
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_counted_memory_is_that_of_the_loaded_models(zoo, tmp_path, precision):
    config = config_of(zoo, tmp_path, precision=precision)
    models = models_on_demand(config, torch.device("cpu"))
    counted = memory_of_parts(config)
    plain = memory_of_parts(config.model_copy(update={"quantize": "none"}))
    for kind in ("lm", "diffusion"):
        found = 0
        for tensor in getattr(models, kind).module().state_dict().values():
            found += sum(part.nbytes for part in plain_tensors(tensor))
        # Norms and head of the language model stay in float32, which is not counted.
        assert counted[kind].loaded == found or (kind, precision) == ("lm", "bf16")
        assert counted[kind].loaded < plain[kind].loaded
        assert counted[kind].loading == plain[kind].loading
    assert counted["tokenizer"] == plain["tokenizer"]


def test_what_quantization_needs_is_checked_before_the_start(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "landiff.model_zoo.sample.placement.quantized.PACKAGE", "torchao_that_is_missing"
    )
    use = {"adapter": "none-here"}
    config = config_of(zoo, tmp_path, adapters=(use,), merge_adapters=False)
    texts = "\n".join(str(problem) for problem in check_sample(config, Launch()))
    assert "quantize = int8 needs the package torchao_that_is_missing" in texts
    assert "landiff-pretrain[quantize]" in texts and "set merge_adapters=true" in texts
    unquantized = config.model_copy(update={"quantize": "none"})
    assert "int8" not in "\n".join(str(problem) for problem in check_sample(unquantized, Launch()))
