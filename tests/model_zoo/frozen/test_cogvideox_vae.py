"""The CogVideoX VAE from files in their real layouts, with tiny random weights."""

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from landiff.configs import ConfigError
from landiff.model_zoo.convert.formats.release_vae import vae_to_release
from landiff.model_zoo.frozen import build
from landiff.model_zoo.frozen.base import LatentCodec, posterior_mean, posterior_sample
from landiff.model_zoo.frozen.config import CogVideoXVaeConfig
from tests.model_zoo.frozen.clips import moving_blobs


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=4
    ).eval()


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    """A pipeline's folder: the VAE in its subfolder."""
    path = tmp_path_factory.mktemp("CogVideoX-2b")
    network.save_pretrained(path / "vae")
    return path


@pytest.fixture(scope="module")
def codec(folder):
    return build(CogVideoXVaeConfig(path=str(folder), dtype="float32"))


def test_geometry_and_values_are_those_of_one_whole_pass(codec, network):
    assert isinstance(codec, LatentCodec) and (codec.channels, codec.space, codec.time) == (4, 8, 4)
    video = moving_blobs(num_frames=17, height=16, width=24)[None]
    latents = codec.encode(video)
    assert (latents.shape, latents.dtype) == ((1, 5, 4, 2, 3), torch.float32)
    with torch.no_grad():
        moments, _ = network.encoder(video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
        chunked = network.encode(
            video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        ).latent_dist.mode()
    torch.testing.assert_close(latents.transpose(1, 2), moments[:, :4] * 1.15258426)
    assert (
        latents.transpose(1, 2) / 1.15258426 - chunked
    ).abs().max() > 1e-3  # diffusers' own chunks differ
    decoded = codec.decode(latents)
    assert (decoded.shape, decoded.dtype) == ((1, 17, 16, 24, 3), torch.uint8)
    levels = (codec.decode_pixels(latents).permute(0, 2, 3, 4, 1) + 1) * 127.5
    assert (decoded - levels.clamp(0, 255)).abs().max() <= 0.5  # the nearest of 256 levels


def test_noise_moves_the_latent_by_the_clamped_standard_deviation(codec):
    video = moving_blobs(num_frames=9, height=16, width=16)[None]
    mean = codec.encode(video)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    moments = codec.moments(video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    std = (0.5 * moments[:, 4:].clamp(-30, 20)).exp().transpose(1, 2)
    torch.testing.assert_close(codec.encode(video, noise), mean + 1.15258426 * std * noise)
    assert torch.equal(codec.encode(video, torch.zeros_like(mean)), mean)


def test_moments_are_those_of_the_scaled_latents(codec):
    video = moving_blobs(num_frames=9, height=16, width=16)[None]
    mean = codec.encode(video)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    moments = codec.encode_moments(video)
    assert torch.equal(posterior_mean(moments, codec.channels), mean)
    torch.testing.assert_close(posterior_sample(moments, noise), codec.encode(video, noise))


def test_clips_of_a_batch_are_coded_alone(codec):
    videos = torch.stack([moving_blobs(num_frames=9, height=16, width=16, seed=s) for s in (0, 1)])
    latents = codec.encode(videos)
    assert torch.equal(latents[1:], codec.encode(videos[1:]))
    assert torch.equal(codec.decode(latents)[1:], codec.decode(latents[1:]))


def test_lengths_that_would_not_come_back_are_refused(codec):
    with pytest.raises(ValueError, match=r"1 \+ 8 \* k"):
        codec.encode(torch.zeros(1, 5, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="2 latent frames"):
        codec.decode(torch.zeros(1, 2, 4, 2, 2))


def test_the_released_file_gives_the_same_codec_as_the_diffusers_folder(codec, network, tmp_path):
    torch.save({"state_dict": vae_to_release(network.state_dict())}, tmp_path / "3d-vae.pt")
    other = build(CogVideoXVaeConfig(path=str(tmp_path / "3d-vae.pt"), dtype="float32"))
    assert other.fingerprint == codec.fingerprint
    video = moving_blobs(num_frames=9, height=16, width=16)[None]
    assert torch.equal(other.encode(video), codec.encode(video))


def test_fingerprint_follows_weights_and_dtype_but_not_the_folder(codec, folder, network, tmp_path):
    network.save_pretrained(tmp_path / "elsewhere")
    assert (
        build(CogVideoXVaeConfig(path=str(tmp_path / "elsewhere"), dtype="float32")).fingerprint
        == codec.fingerprint
    )
    assert build(CogVideoXVaeConfig(path=str(folder))).fingerprint != codec.fingerprint
    changed = AutoencoderKLCogVideoX.from_pretrained(folder / "vae")
    with torch.no_grad():
        changed.decoder.conv_out.conv.bias[0] += 1e-3
    changed.save_pretrained(tmp_path / "changed")
    assert (
        build(CogVideoXVaeConfig(path=str(tmp_path / "changed"), dtype="float32")).fingerprint
        != codec.fingerprint
    )


def test_bfloat16_stays_near_float32(codec, folder):
    video = moving_blobs(num_frames=9, height=16, width=16)[None]
    half = build(CogVideoXVaeConfig(path=str(folder)))
    latents = half.encode(video)
    assert (
        latents.dtype == torch.float32 and next(half.network.parameters()).dtype == torch.bfloat16
    )
    torch.testing.assert_close(
        latents, codec.encode(video), atol=0.05, rtol=0.05
    )  # 8 bits of mantissa, 20 layers


def test_a_folder_without_the_model_says_which_path_to_set(tmp_path):
    with pytest.raises(ConfigError, match=r"cogvideox-vae: path = .*set path to"):
        build(CogVideoXVaeConfig(path=str(tmp_path)))
