"""Theia from a file in the real layout, with tiny random weights."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

from landiff.configs import ConfigError
from landiff.model_zoo.frozen import build
from landiff.model_zoo.frozen.base import VisionFeatures
from landiff.model_zoo.frozen.config import TheiaConfig
from tests.model_zoo.frozen.clips import moving_blobs

HIDDEN, MLP, LAYERS, TABLE = 32, 64, 2, 14


def vit_tensors() -> dict[str, torch.Tensor]:
    """Random weights under the keys that ViT checkpoints hold."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    tensors = {
        "embeddings.cls_token": draw(1, 1, HIDDEN),
        "embeddings.position_embeddings": draw(1, TABLE * TABLE + 1, HIDDEN),
        "embeddings.patch_embeddings.projection.weight": draw(HIDDEN, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": draw(HIDDEN),
        "layernorm.weight": 1 + draw(HIDDEN),
        "layernorm.bias": draw(HIDDEN),
    }
    for i in range(LAYERS):
        for part, rows, columns in (
            ("attention.attention.query", HIDDEN, HIDDEN),
            ("attention.attention.key", HIDDEN, HIDDEN),
            ("attention.attention.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", MLP, HIDDEN),
            ("output.dense", HIDDEN, MLP),
        ):
            tensors[f"encoder.layer.{i}.{part}.weight"] = draw(rows, columns)
            tensors[f"encoder.layer.{i}.{part}.bias"] = draw(rows)
        for norm in ("layernorm_before", "layernorm_after"):
            tensors[f"encoder.layer.{i}.{norm}.weight"] = 1 + draw(HIDDEN)
            tensors[f"encoder.layer.{i}.{norm}.bias"] = draw(HIDDEN)
    return tensors


def write(folder, tensors, prefix):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {prefix + k: v for k, v in tensors.items()} | {"translator.head.weight": torch.ones(3)},
        folder / "model.safetensors",
    )
    return folder


def config(folder, **options) -> TheiaConfig:
    return TheiaConfig(path=str(folder), **({"num_heads": 2, "dtype": "float32"} | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("theia"), vit_tensors(), "backbone.model.")


@pytest.fixture(scope="module")
def encoder(folder):
    return build(config(folder))


def test_compiled_blocks_give_the_same_features_for_every_size(folder, encoder):
    compiled = build(config(folder))
    compiled.compile_blocks(backend="aot_eager", fullgraph=True)
    for height, width in ((32, 48), (48, 48)):
        frames = torch.randint(0, 256, (1, 3, height, width, 3), dtype=torch.uint8)
        torch.testing.assert_close(compiled(frames), encoder(frames), atol=1e-5, rtol=1e-4)


def test_features_equal_a_direct_vit_on_the_padded_square_cropped(encoder, tmp_path):
    assert isinstance(encoder, VisionFeatures) and (encoder.channels, encoder.cell) == (HIDDEN, 16)
    save_file(vit_tensors(), tmp_path / "model.safetensors")
    ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=MLP,
        layer_norm_eps=1e-12,
        image_size=16 * TABLE,
    ).save_pretrained(tmp_path)
    direct = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    frames = moving_blobs(num_frames=3, height=48, width=80)
    square = torch.full((3, 80, 80, 3), 127, dtype=torch.uint8)
    square[:, :48] = frames
    with torch.no_grad():
        states = direct(
            (square.permute(0, 3, 1, 2).float() - 127.5) / 127.5, interpolate_pos_encoding=True
        ).last_hidden_state
    expected = states[:, 1:].reshape(3, 5, 5, HIDDEN)[:, :3].permute(0, 3, 1, 2)
    features = encoder(frames[None])
    assert features.shape == (1, 3, HIDDEN, 3, 5)
    torch.testing.assert_close(features[0], expected, atol=1e-5, rtol=0)  # float32


def test_tall_frames_are_padded_at_the_right(encoder):
    frames = moving_blobs(num_frames=1, height=80, width=48)[None]
    padded = torch.full((1, 1, 80, 80, 3), 127, dtype=torch.uint8)
    padded[:, :, :, :48] = frames
    torch.testing.assert_close(encoder(frames), encoder(padded)[..., :3], atol=1e-5, rtol=0)


def test_frames_are_independent_of_how_many_run_at_once(encoder, folder):
    frames = moving_blobs(num_frames=5, height=32, width=32)[None]
    one_by_one = build(config(folder, frames_per_pass=1))
    assert one_by_one.fingerprint == encoder.fingerprint
    torch.testing.assert_close(
        one_by_one(frames), encoder(frames), atol=1e-5, rtol=0
    )  # other matrix shapes


@pytest.mark.parametrize("prefix", ["", "vit.", "model."])
def test_plain_vit_files_give_the_same_encoder(prefix, encoder, tmp_path):
    other = build(config(write(tmp_path, vit_tensors(), prefix)))
    assert other.fingerprint == encoder.fingerprint
    frames = moving_blobs(num_frames=1, height=32, width=32)[None]
    assert torch.equal(other(frames), encoder(frames))


def test_autocast_is_near_float32_and_has_another_fingerprint(encoder, folder):
    half = build(config(folder, dtype="bfloat16"))
    frames = moving_blobs(num_frames=1, height=32, width=32)[None]
    assert half.fingerprint != encoder.fingerprint and half(frames).dtype == torch.float32
    difference = (half(frames) - encoder(frames)).abs()
    assert 0 < difference.max() < 0.1  # LayerNorm output of about unit size, 8 bits of mantissa


def test_fingerprint_follows_a_single_weight(encoder, tmp_path):
    tensors = vit_tensors()
    tensors["encoder.layer.1.output.dense.bias"][3] += 1e-4
    assert (
        build(config(write(tmp_path, tensors, "backbone.model."))).fingerprint
        != encoder.fingerprint
    )


def test_files_that_are_no_vit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors"):
        build(config(tmp_path))
    with pytest.raises(ConfigError, match="holds no ViT"):
        build(config(write(tmp_path / "other", {"weight": torch.zeros(1)}, "")))
    tensors = vit_tensors()
    del tensors["encoder.layer.0.output.dense.bias"]
    with pytest.raises(ConfigError, match=r"do not fill a ViT.*missing_keys"):
        build(config(write(tmp_path / "partial", tensors, "")))
    with pytest.raises(ConfigError, match="num_heads = 3"):
        build(config(write(tmp_path / "heads", vit_tensors(), ""), num_heads=3))


def test_sides_that_are_no_multiple_of_the_cell_are_refused(encoder):
    with pytest.raises(ValueError, match="multiples of 16"):
        encoder(torch.zeros(1, 1, 40, 32, 3, dtype=torch.uint8))
