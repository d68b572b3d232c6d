"""The convolutional refinement of the PCA codec: training, decoding and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.data_pipeline.synthetic import world
from landiff.data_pipeline.video.codec import write_mp4
from landiff.launchers.cli import main
from landiff.model_zoo.diffusers.encoders import LanDiffCodec
from landiff.model_zoo.frozen import build
from landiff.model_zoo.frozen.config import PcaConfig
from landiff.model_zoo.frozen.pca import REFINEMENT, PcaCodec, refine, write
from landiff.model_zoo.frozen.refinement import Refinement, RefinementOptions, perturbed_latents
from landiff.model_zoo.health import UnhealthyError
from tests.model_zoo.frozen.clips import moving_blobs

PLAIN = PcaConfig(path="shapes-balanced")


def shapes_clips(number: int, seed: int) -> Tensor:
    """Clips of the shapes world, uint8 [B, 17, 64, 64, 3]."""
    labels = world.balanced(world.labels(held_out=False), number, seed)
    videos = [world.video(label, (seed, i)) for i, label in enumerate(labels)]
    return torch.from_numpy(np.stack(videos))


@pytest.fixture(scope="module")
def plain() -> PcaCodec:
    return build(PLAIN)


@pytest.fixture(scope="module")
def weights(plain: PcaCodec) -> dict[str, Tensor]:
    return trained(plain, RefinementOptions(steps=40))


def trained(plain: PcaCodec, options: RefinementOptions) -> dict[str, Tensor]:
    clips = list(shapes_clips(16, seed=1))
    return refine(plain.state_dict(), clips, options, lambda done, total, note: None)


def error_on_other_clips(plain: PcaCodec, codec: PcaCodec) -> float:
    """Mean absolute error in grey levels of frames from perturbed latents."""
    clips = shapes_clips(12, seed=2)
    options = RefinementOptions(steps=0)
    generator = torch.Generator().manual_seed(3)
    errors = []
    for clip in clips.split(1):
        latents = perturbed_latents(plain.encode, clip, options, generator)
        errors.append((codec.decode(latents).float() - clip.float()).abs().mean())
    return float(torch.stack(errors).mean())


def test_a_short_training_lowers_the_error_on_other_clips(plain, weights):
    assert error_on_other_clips(plain, PcaCodec(weights)) < error_on_other_clips(plain, plain)


def test_the_packaged_refinement_removes_a_quarter_of_the_error_and_fits_the_same_data(plain):
    refined = build(PcaConfig(path="shapes-refined"))
    assert refined.fingerprint == plain.fingerprint
    before = error_on_other_clips(plain, plain)
    assert error_on_other_clips(plain, refined) < 0.75 * before


def test_latents_and_fingerprint_do_not_depend_on_the_refinement(plain, weights):
    refined = PcaCodec(weights)
    clips = shapes_clips(2, seed=2)
    assert refined.fingerprint == plain.fingerprint
    assert torch.equal(refined.encode(clips), plain.encode(clips))
    latents = plain.encode(clips)
    assert not torch.equal(refined.decode(latents), plain.decode(latents))


def test_an_untrained_refinement_changes_no_frame(plain):
    untrained = {REFINEMENT + name: value for name, value in Refinement().state_dict().items()}
    codec = PcaCodec(plain.state_dict() | untrained)
    latents = plain.encode(shapes_clips(2, seed=2))
    assert plain.refinement is None and codec.refinement is not None
    assert torch.equal(codec.decode(latents), plain.decode(latents))


def test_a_stream_is_the_whole_video_and_frames_do_not_depend_on_each_other(plain, weights):
    codec = PcaCodec(weights)
    latents = torch.randn(2, 5, 16, 3, 5, generator=torch.Generator().manual_seed(0))
    whole = codec.decode(latents)
    assert whole.shape == (2, 17, 24, 40, 3)
    streamed = torch.cat(list(codec.decode_stream(latents.split([1, 3, 1], dim=1))), dim=1)
    assert torch.equal(streamed, whole)
    changed = latents.clone()
    changed[:, 2] += 1  # frames 5 to 8
    same = (codec.decode(changed) == whole).all(dim=(0, 2, 3, 4))
    assert same.tolist() == [frame not in range(5, 9) for frame in range(17)]


def test_weights_depend_on_the_seed_only(plain):
    small = {"steps": 3, "clips_per_step": 1, "frames_per_clip": 1}
    state = torch.get_rng_state()
    first = trained(plain, RefinementOptions(seed=5, **small))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again = trained(plain, RefinementOptions(seed=5, **small))
    other = trained(plain, RefinementOptions(seed=6, **small))
    name = REFINEMENT + "output.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert float(first[name].abs().max()) > 0
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("damage", ["missing", "shape", "unknown", "nan"])
def test_a_damaged_refinement_is_refused(weights, tmp_path: Path, damage: str):
    weights = dict(weights)
    name = REFINEMENT + "blocks.1.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "shape":
        weights[name] = weights[name][:, :8].contiguous()
    elif damage == "unknown":
        weights[REFINEMENT + "other"] = torch.zeros(1)
    else:
        weights[name] = torch.full_like(weights[name], float("nan"))
    path = tmp_path / "codec.safetensors"
    write(weights, path)
    expected = UnhealthyError if damage == "nan" else ConfigError
    with pytest.raises(expected, match="blocks|refinement"):
        build(PcaConfig(path=str(path)))


def test_the_component_of_a_pipeline_keeps_the_refinement(weights, tmp_path: Path):
    codec = PcaCodec(weights)
    LanDiffCodec.of(codec).save_pretrained(tmp_path)
    loaded = LanDiffCodec.from_pretrained(tmp_path).to(torch.bfloat16).model
    latents = torch.randn(1, 2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.decode(latents), codec.decode(latents))


def test_the_command_trains_a_refinement_of_a_new_or_a_given_codec(tmp_path: Path, capsys):
    clips, others = tmp_path / "clips", tmp_path / "others"
    for folder, side in ((clips, 80), (others, 64)):
        folder.mkdir()
        frames = moving_blobs(num_frames=9, height=side, width=side).numpy()
        write_mp4(folder / "0.mp4", frames, 8, crf=10)
    plain, refined, given = (tmp_path / f"{name}.safetensors" for name in "abc")
    words = ["fit-codec", "--clips", str(clips), "--channels", "4", "--out"]
    assert main([*words, str(plain)]) == 0
    assert main([*words, str(refined), "--refine", "1"]) == 0
    assert "fit-codec: 1/1 steps" in capsys.readouterr().out
    assert main([*words, str(given), "--refine", "1", "--codec", str(plain)]) == 0
    assert refined.read_bytes() == given.read_bytes()
    rounded = tmp_path / "d.safetensors"
    assert main([*words, str(rounded), "--refine", "1", "--bf16"]) == 0
    assert rounded.read_bytes() != refined.read_bytes()
    components = load_file(plain)
    stored = load_file(refined)
    assert all(torch.equal(stored[name], tensor) for name, tensor in components.items())
    assert all(name in components or name.startswith(REFINEMENT) for name in stored)
    assert build(PcaConfig(path=str(refined))).refinement is not None
    capsys.readouterr()
    assert main([*words, str(given), "--codec", str(plain)]) == 2
    assert "needs --refine" in capsys.readouterr().err
    two = ["fit-codec", "--clips", str(clips), str(others), "--codec", str(plain)]
    assert main([*two, "--refine", "1", "--out", str(given)]) == 2
    assert "give clips of one size" in capsys.readouterr().err
