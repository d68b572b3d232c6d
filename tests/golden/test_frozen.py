"""Golden cases of the frozen encoders, through the code that precompute and sampling use."""

import pytest
import torch

from model_zoo.convert.release_vae import to_diffusers, to_release
from model_zoo.frozen.cogvideox_vae import CogVideoXCodec, network_of, wrap
from model_zoo.frozen.config import TheiaConfig
from model_zoo.frozen.theia import from_tensors, pad_to_square, quantise
from tests.golden.conftest import Case

TOLERANCE = 1e-4


def _codec(case: Case) -> CogVideoXCodec:
    state = to_diffusers(case.weights)
    video, latents = case.inputs["video"], case.inputs["latent_scaled"]
    network = network_of(
        state,
        scaling_factor=case.config["scale_factor"],
        # of a single latent frame any ratio gives the same
        temporal_compression_ratio=(video.shape[2] - 1) // (latents.shape[2] - 1) if latents.shape[2] > 1 else 4,
    )
    network.load_state_dict(state)
    return wrap(network, "float32")


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.golden("vae")
def test_vae_encodes_in_one_pass_and_decodes_three_then_pairs(case):
    codec = _codec(case)
    video, noise, latents = (case.inputs[k] for k in ("video", "posterior_noise", "latent_scaled"))
    _close(codec.moments(video), case.outputs["encoder_moments"])
    encoded = codec.encode_pixels(video, noise.transpose(1, 2))
    _close(encoded.transpose(1, 2), case.outputs["encoded_scaled_latent"])
    _close(codec.decode_pixels(latents.transpose(1, 2)), case.outputs["decoded_chunked"])


@pytest.mark.golden("vae")
def test_vae_conversion_is_two_way(case):
    back = to_release(to_diffusers(case.weights))
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[k], v) for k, v in case.weights.items())


@pytest.mark.golden("feature_extractor")
def test_features_from_float_video_to_cropped_grid(case):
    video_BTHWC = case.inputs["video"].permute(0, 1, 3, 4, 2)
    frames = quantise(case.inputs["video"])
    assert torch.equal(frames, case.outputs["frames_uint8"])
    assert torch.equal(pad_to_square(frames.flatten(0, 1)), case.outputs["frames_padded_uint8"].flatten(0, 1))
    encoder = from_tensors(case.weights, TheiaConfig(num_heads=case.config["heads"], dtype="float32"))
    side = max(frames.shape[-2:])
    embeddings = encoder.network.embeddings
    patches = embeddings.patch_embeddings(torch.zeros(1, 3, side, side))
    table = embeddings.interpolate_pos_encoding(torch.cat([embeddings.cls_token, patches], 1), side, side)
    _close(table, case.outputs["interpolated_position_embeddings"])
    _close(encoder(video_BTHWC), case.outputs["features"])
    _close(encoder(frames.permute(0, 1, 3, 4, 2)), case.outputs["features"])
