"""The PCA codec: geometry, fit, and the packaged codec of the shapes world."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from landiff.configs.base import ConfigError
from landiff.data_pipeline.synthetic import world
from landiff.data_pipeline.synthetic.judge import judge
from landiff.model_zoo.frozen import build
from landiff.model_zoo.frozen.base import LatentCodec
from landiff.model_zoo.frozen.checks import check_encoder, width_of
from landiff.model_zoo.frozen.config import EfficientNetConfig, PcaConfig
from landiff.model_zoo.frozen.pca import PcaCodec, fit, write
from tests.model_zoo.frozen.clips import moving_blobs, psnr

SHAPES = PcaConfig(path="shapes")


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    labels = world.labels(held_out=True)[::18]
    return torch.from_numpy(
        np.stack([world.video(label, (5, i)) for i, label in enumerate(labels)])
    )


def test_the_packaged_codec_keeps_what_the_judge_looks_at(videos):
    codec = build(SHAPES)
    assert isinstance(codec, LatentCodec)
    latents = codec.encode(videos)
    assert latents.shape == (3, 5, 16, 8, 8) and codec.channels == width_of(SHAPES) == 16
    decoded = codec.decode(latents)
    for before, after in zip(videos, decoded, strict=True):
        assert judge(after.numpy()).found == judge(before.numpy()).found
    assert 0.7 < float(latents.std()) < 1.4


def test_all_components_lose_nothing_and_fewer_lose_the_least_variance(tmp_path):
    video = moving_blobs(num_frames=9, height=32, width=32)[None]
    rates = []
    for channels in (4, 16, 64):
        codec = PcaCodec(fit([video], channels))
        rates.append(psnr(codec.decode(codec.encode(video))[0], video[0]))
    assert rates == sorted(rates)
    assert rates[-1] > 40  # 64 components span the 16 first and 32 later cells of this video
    weights = fit([video], 8)
    basis = weights["first_basis"]
    # a rotation of eigenvectors, computed in float64 and rounded
    torch.testing.assert_close(basis @ basis.T, torch.eye(8), atol=1e-5, rtol=0)
    write(weights, tmp_path / "codec.safetensors")
    loaded = build(PcaConfig(path=str(tmp_path / "codec.safetensors")))
    assert loaded.fingerprint == PcaCodec(weights).fingerprint


def test_whitening_changes_the_scales_of_the_latents_and_not_the_videos():
    video = moving_blobs(num_frames=9, height=64, width=64)[None]
    plain, half, full = (PcaCodec(fit([video], 8, whiten)) for whiten in (0.0, 0.5, 1.0))
    assert plain.later_scale.ndim == 0 and half.later_scale.shape == (8,)
    for codec in (plain, half, full):
        latents = codec.encode(video)[:, 1:]
        variances = latents.var(dim=(0, 1, 3, 4), unbiased=False)
        # The variance of all cells of the fitted clip, in float32.
        torch.testing.assert_close(variances.mean(), torch.tensor(1.0), atol=1e-4, rtol=0)
        spread = float(variances.max() / variances.min())
        assert (spread < 1.001) == (codec is full)
        decoded = codec.decode(codec.encode(video)).int()
        difference = decoded - plain.decode(plain.encode(video)).int()
        assert int(difference.abs().max()) <= 1  # rounding of a value between two integers


def test_the_balanced_codec_shows_the_same_videos(videos):
    codec = build(PcaConfig(path="shapes-balanced"))
    latents = codec.encode(videos)
    stds = latents.std(dim=(0, 1, 3, 4))
    assert 0.5 < float(stds.min()) < float(stds.max()) < 3
    plain = build(SHAPES)
    difference = codec.decode(latents).int() - plain.decode(plain.encode(videos)).int()
    assert float(difference.abs().float().mean()) < 1


def test_a_missing_codec_is_reported_with_the_way_to_make_it(tmp_path):
    config = PcaConfig(path=str(tmp_path / "none.safetensors"))
    assert "landiff fit-codec" in check_encoder("codec", config)[0].text
    assert width_of(config) is None
    (tmp_path / "none.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build(config)
    with pytest.raises(ValueError, match="1 \\+ 4"):
        build(SHAPES).encode(torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8))


def test_early_features_have_cells_of_16_pixels_as_well():
    config = EfficientNetConfig(blocks=5)
    encoder = build(config)
    frames = moving_blobs(num_frames=2, height=32, width=48)[None]
    assert encoder(frames).shape == (1, 2, 40, 2, 3)
    assert encoder.channels == width_of(config) == 40
    assert encoder.fingerprint != build(EfficientNetConfig()).fingerprint


def test_stacked_features_hold_each_position_of_the_averaged_ones():
    config = EfficientNetConfig(blocks=5, pooling="stack")
    stacked = build(config)
    averaged = build(EfficientNetConfig(blocks=5))
    frames = moving_blobs(num_frames=2, height=32, width=48)[None]
    features = stacked(frames)
    assert features.shape == (1, 2, 160, 2, 3)
    assert stacked.channels == width_of(config) == 160
    positions = features.unflatten(2, (40, 4))
    torch.testing.assert_close(positions.mean(dim=3), averaged(frames))
    assert float(positions.std(dim=3).mean()) > 0.1
    assert stacked.fingerprint != averaged.fingerprint
    with pytest.raises(ValueError, match="needs blocks = 5"):
        EfficientNetConfig(pooling="stack")
