"""Golden cases of the frozen encoders, through the code that precompute and sampling use."""

import pytest
import torch

from landiff.model_zoo.convert.formats.release_vae import to_diffusers, vae_to_release
from landiff.model_zoo.frozen.cogvideox_vae import CogVideoXCodec, network_of, wrap
from landiff.model_zoo.frozen.config import TheiaConfig
from landiff.model_zoo.frozen.theia import (
    LAYER_NORM_EPS,
    PAD_VALUE,
    from_tensors,
    pad_to_square,
    quantize,
)
from tests.golden.conftest import Case
from tests.golden.released_models import close


def _codec(case: Case) -> CogVideoXCodec:
    """The codec of a case. Its sizes are read from the tensors and equal those of the config."""
    sizes, state = case.config, to_diffusers(case.weights)
    downsamplings = len(sizes["ch_mult"]) - 1
    network = network_of(
        state,
        scaling_factor=sizes["scale_factor"],
        temporal_compression_ratio=2 ** min(2, downsamplings),
    )
    assert network.config.block_out_channels == tuple(sizes["ch"] * m for m in sizes["ch_mult"])
    assert (network.config.layers_per_block, network.config.latent_channels) == (
        sizes["res"],
        sizes["z_channels"],
    )
    network.load_state_dict(state)
    codec = wrap(network, "float32")
    assert case.inputs["video"].shape[-2:] == (sizes["h"], sizes["w"])
    assert case.inputs["latent_scaled"].shape[2] == sizes["latent_frames"]
    return codec


@pytest.mark.golden("vae")
def test_vae_encodes_in_one_pass_and_decodes_three_then_pairs(case):
    codec = _codec(case)
    video, noise, latents = (case.inputs[k] for k in ("video", "posterior_noise", "latent_scaled"))
    close(codec.moments(video), case.outputs["encoder_moments"])
    encoded = codec.encode_pixels(video, noise.transpose(1, 2))
    close(encoded.transpose(1, 2), case.outputs["encoded_scaled_latent"])
    close(codec.decode_pixels(latents.transpose(1, 2)), case.outputs["decoded_chunked"])
    # what the codec does not do: all frames at once, whose group norms see other frames
    codec.network.num_latent_frames_batch_size = latents.shape[2]
    close(codec.decode_pixels(latents.transpose(1, 2)), case.outputs["decoded_whole"])


@pytest.mark.golden("vae")
def test_vae_conversion_is_two_way(case):
    back = vae_to_release(to_diffusers(case.weights))
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[k], v) for k, v in case.weights.items())


@pytest.mark.golden("feature_extractor")
def test_features_from_float_video_to_cropped_grid(case):
    video_BTHWC = case.inputs["video"].permute(0, 1, 3, 4, 2)
    sizes, frames = case.config, quantize(case.inputs["video"])
    assert (sizes["pad_value"], sizes["layer_norm_eps"]) == (PAD_VALUE, LAYER_NORM_EPS)
    assert sizes["qkv_bias"] is True and sizes["hidden_act"] == "gelu"  # as in DeiT-base
    assert frames.shape[-4:] == (sizes["frames"], 3, sizes["h"], sizes["w"])
    assert torch.equal(frames, case.outputs["frames_uint8"])
    assert torch.equal(
        pad_to_square(frames.flatten(0, 1)), case.outputs["frames_padded_uint8"].flatten(0, 1)
    )
    encoder = from_tensors(
        case.weights, TheiaConfig(num_heads=case.config["heads"], dtype="float32")
    )
    assert (encoder.channels, encoder.cell, encoder.network.config.num_hidden_layers) == (
        sizes["hidden"],
        sizes["patch_size"],
        sizes["layers"],
    )
    side = max(frames.shape[-2:])
    embeddings = encoder.network.embeddings
    patches = embeddings.patch_embeddings(torch.zeros(1, 3, side, side))
    table = embeddings.interpolate_pos_encoding(
        torch.cat([embeddings.cls_token, patches], 1), side, side
    )
    close(table, case.outputs["interpolated_position_embeddings"])
    assert case.outputs["features"].shape[-2:] == tuple(sizes["output_shape"])
    close(encoder(video_BTHWC), case.outputs["features"])
    close(encoder(frames.permute(0, 1, 3, 4, 2)), case.outputs["features"])
