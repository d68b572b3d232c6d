"""Long videos: the same as at once, in constant memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from landiff.configs.base import ConfigError
from landiff.configs.loader import load
from landiff.model_zoo.config import ScheduleConfig, TokenSamplingConfig
from landiff.model_zoo.frozen.cogvideox_vae import CogVideoXCodec, wrap
from landiff.model_zoo.frozen.dct import DctCodec
from landiff.model_zoo.frozen.pca import PcaCodec, fit
from landiff.model_zoo.registry import build_module
from landiff.model_zoo.sample.chunks import ChunkConditions, sample_chunks, windows
from landiff.model_zoo.sample.generate import Models, draw_codes, draw_latents
from landiff.model_zoo.sample.given import Given, first_frames
from landiff.model_zoo.sample.latents import SamplerOptions, seeded_noise
from landiff.model_zoo.sample.stream import Request, VideoStream, generate
from landiff.model_zoo.sample.stream_store import StreamStore
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig
from tests.model_zoo.convert.tiny import MODELS
from tests.model_zoo.frozen.clips import moving_blobs

CODES = TokenSamplingConfig(guidance=2.0)
STEPS = SamplerOptions(num_steps=2)


class OneText:
    """Text states that depend on the text's length only."""

    name = fingerprint = "length"

    def __init__(self, dim: int, rows: int) -> None:
        self.dim = dim
        self.rows = self.max_length = rows

    def cut_off(self, texts: list[str]) -> list[str]:
        return [""] * len(texts)

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        states = [torch.full((self.rows, self.dim), len(text) / 8) for text in texts]
        return torch.stack(states), torch.full((len(texts),), self.rows)


def codecs():
    torch.manual_seed(0)
    yield DctCodec()
    yield PcaCodec(fit([moving_blobs(num_frames=9, height=32, width=32)[None]], 8))
    network = AutoencoderKLCogVideoX(
        block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=4
    )
    yield wrap(network.eval(), "float32")


@pytest.mark.parametrize("codec", codecs(), ids=lambda codec: codec.name)
@pytest.mark.parametrize("lengths", [(4, 1, 2), (1, 2, 2), (1,)], ids=str)
def test_a_codec_decodes_parts_like_the_whole(codec, lengths):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, sum(lengths), codec.channels, 2, 4, generator=generator)
    parts = list(codec.decode_stream(latents.split(lengths, dim=1)))
    whole = torch.cat([codec.decode(clip) for clip in latents.split(1)])
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.fixture(scope="module")
@torch.no_grad()
def models() -> Models:
    torch.manual_seed(0)
    parts = {}
    for kind in ("lm", "tokenizer", "diffusion"):
        model = build_module(kind, getattr(MODELS, kind)).eval()
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("initted"):
                buffer.fill_(True)
            elif name.endswith("embed"):  # the codebook
                buffer.normal_()
        parts[kind] = model
    sizes = MODELS.diffusion.transformer
    videos = [moving_blobs(num_frames=9, height=32, width=48)[None]]
    return Models(
        **parts,
        schedule=NoiseSchedule(ScheduleConfig()),
        lm_text=OneText(MODELS.lm.text_dim, 2),
        diffusion_text=OneText(sizes.text_dim, sizes.text_length),
        codec=PcaCodec(fit(videos, sizes.latent_channels)),
    )


def request(frames: int, *, prompts=("a fox",), seeds=(1,), **options) -> Request:
    tokens = CODES.model_copy(update=options)
    return Request(prompts, frames, tokens, STEPS, seeds, clean_frames=1)


def frames_of(stream: VideoStream) -> torch.Tensor:
    return torch.cat([chunk.frames_BTHWC for chunk in stream], dim=1)


def test_chunks_are_the_video_that_is_generated_at_once(models):
    """All codes, then the features of all segments, then all latents, then all frames."""
    prompts, seeds = ["a fox", "an owl"], [1, 2]
    found = generate(models, prompts, 9, CODES, STEPS, seeds=seeds, clean_frames=1)
    text = models.lm_text(prompts)
    with torch.no_grad():
        codes_BK = draw_codes(models.lm, text, 9, CODES, seeds=seeds)
        features_BTChw = models.tokenizer.decode(codes_BK, 9)
        latents_BTCHW = draw_latents(
            models.diffusion,
            models.schedule,
            models.diffusion_text(prompts)[0],
            features_BTChw,
            STEPS,
            seeds=seeds,
            clean_frames=1,
        )
    assert torch.equal(found.codes_BK, codes_BK)
    assert torch.equal(found.latents_BTCHW, latents_BTCHW)
    assert torch.equal(found.frames_BTHWC, models.codec.decode(latents_BTCHW))
    assert found.frames_BTHWC.shape == (2, 33, 32, 48, 3)


def test_segments_after_all_others_are_drawn_like_the_whole(models):
    """Bit for bit at this size; in general, prefilling a prefix rounds otherwise."""
    whole = VideoStream(models, request(9))
    by_segment = VideoStream(models, request(9, context_segments=2))
    assert torch.equal(frames_of(by_segment), frames_of(whole))
    assert torch.equal(by_segment.codes_BK, whole.codes_BK)
    with pytest.raises(ConfigError, match="predict_end"):
        VideoStream(models, request(9, context_segments=1, predict_end=True))


def test_a_prompt_changes_at_its_chunk(models):
    """The frames before are unchanged bit for bit. A text for all frames is no change."""
    changing = {0: "a fox", 17: "a very long sentence about an owl"}  # chunk 2 of 4, segment 2 of 3
    same = VideoStream(models, request(9, prompts=({0: "a fox", 17: "a fox"},)))
    always = frames_of(same)
    assert torch.equal(always, frames_of(VideoStream(models, request(9))))
    changed = frames_of(VideoStream(models, request(9, prompts=(changing,))))
    assert torch.equal(changed[:, :17], always[:, :17])
    assert not torch.equal(changed[:, 17:21], always[:, 17:21])
    with pytest.raises(ConfigError, match="frame 33, but the video has 33 frames"):
        VideoStream(models, request(9, prompts=({0: "a", 33: "b"},)))


class Corners:
    """Vision features of the corner pixels of cells, as many channels as the tokenizer has."""

    name = fingerprint = "corners"
    channels = MODELS.tokenizer.feature_channels
    cell = 16

    def __call__(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        cells = frames_BTHWC[:, :, :: self.cell, :: self.cell].movedim(-1, 2).float() / 255
        return cells.repeat(1, 1, -(-self.channels // 3), 1, 1)[:, :, : self.channels]


def given_frames(models, count: int) -> tuple[torch.Tensor, Given]:
    """Two videos that others begin with."""
    shape = {"num_frames": count, "height": 32, "width": 48}
    videos = torch.stack([moving_blobs(**shape), moving_blobs(**shape).flip(-1)])
    return videos, first_frames(models.tokenizer, Corners(), models.codec, videos)


@pytest.mark.parametrize("frames", [1, 5])
def test_a_video_begins_with_the_given_frames(models, tmp_path, frames):
    """An image, and a video that is continued: in tokens and latents, in all ways of drawing."""
    videos, given = given_frames(models, frames)
    latent_frames = 1 + (frames - 1) // 4
    wanted = request(9, prompts=("a fox", "an owl"), seeds=(1, 2))
    found = {}
    for context in (None, 3):
        tokens = wanted.tokens.model_copy(update={"context_segments": context})
        stream = VideoStream(models, replace(wanted, given=given, tokens=tokens))
        chunks = list(stream)
        latents_BTCHW = torch.cat([chunk.latents_BTCHW for chunk in chunks], dim=1)
        assert torch.equal(latents_BTCHW[:, :latent_frames], models.codec.encode(videos))
        assert torch.equal(stream.codes_BK[:, : given.num_codes()], given.codes_BK)
        found[context] = stream.codes_BK, latents_BTCHW
    assert torch.equal(found[None][0], found[3][0]) and torch.equal(found[None][1], found[3][1])
    free = VideoStream(models, wanted).draw_codes()
    assert not torch.equal(found[None][0][:, given.num_codes() :], free[:, given.num_codes() :])
    with pytest.raises(ConfigError, match="latent frames are given, so that a chunk of 3"):
        three = replace(given, latents_BTCHW=torch.zeros(2, 3, 4, 4, 6))
        VideoStream(models, replace(wanted, given=three))


@pytest.mark.parametrize("context", [None, 1])
def test_the_language_model_is_told_the_grid_of_the_videos(models, context):
    config = models.lm.config.model_copy(update={"grid_condition": True})
    lm = build_module("lm", config).eval().requires_grad_(False)
    lm.load_state_dict(models.lm.state_dict(), strict=False)
    told = []
    for scalar in (lm.micro.rows, lm.micro.columns):
        scalar.register_forward_pre_hook(
            lambda _scalar, inputs: told.append(set(inputs[0].tolist()))
        )
    tokens = CODES.model_copy(update={"context_segments": context})
    for grid, expected in ((None, (2, 3)), ((4, 3), (4, 3))):  # that of the tokenizer is 2 x 3
        told.clear()
        wanted = replace(request(5), tokens=tokens, grid=grid)
        VideoStream(replace(models, lm=lm), wanted).draw_codes()
        assert len(told) >= 2
        assert told[:2] == told[-2:] == [{float(size)} for size in expected]


def test_given_tokens_are_rendered_without_the_language_model(models):
    """The same video as when the model draws them; another prompt gives another video."""
    drawn = VideoStream(models, request(9))
    frames_BTHWC = frames_of(drawn)
    reports = []
    given = Given(drawn.codes_BK)
    for prompt, is_equal in (("a fox", True), ("a long tale", False)):
        wanted = replace(request(9, prompts=(prompt,)), given=given)
        stream = VideoStream(models, wanted, progress=lambda what, *_: reports.append(what))
        assert torch.equal(frames_of(stream), frames_BTHWC) == is_equal
    assert set(reports) == {"latents"}
    with pytest.raises(ConfigError, match="set num_latent_frames=9"):
        VideoStream(models, replace(request(7), given=given))


def test_each_step_of_each_chunk_is_seen_and_may_be_replaced(models):
    wanted = request(9)  # four chunks of a window of 3, the last state of each is its latents
    steps = []

    def seen(step):
        steps.append(step)

    plain = list(VideoStream(models, wanted, on_step=seen))
    assert [step.step for step in steps] == list(range(STEPS.num_steps)) * 4
    first_BTCHW = plain[0].latents_BTCHW
    assert torch.equal(steps[STEPS.num_steps - 1].denoised, first_BTCHW)
    zeros = VideoStream(models, wanted, on_step=lambda step: torch.zeros_like(step.state))
    for chunk in zeros:
        assert not chunk.latents_BTCHW.any()


@pytest.mark.parametrize("context", [1, None])
def test_a_stream_continues_after_its_saved_chunks(models, tmp_path, context):
    """Bit for bit, and also when the last saved chunk is damaged."""
    wanted = request(11, context_segments=context, prompts=("a fox", "an owl"), seeds=(1, 2))
    whole = VideoStream(models, wanted)
    whole_BTHWC = frames_of(whole)
    stopped = iter(VideoStream(models, wanted, store=StreamStore(tmp_path / "store", "a")))
    for _ in range(3):
        next(stopped)
    stopped.close()
    last = tmp_path / "store" / "chunk-00002.safetensors"
    last.write_bytes(last.read_bytes()[:-1])

    reports = []
    store = StreamStore(tmp_path / "store", "a")
    resumed = VideoStream(models, wanted, store=store, progress=lambda *seen: reports.append(seen))
    assert torch.equal(frames_of(resumed), whole_BTHWC)
    assert torch.equal(resumed.codes_BK, whole.codes_BK)
    sampled = [done for what, done, _ in reports if what == "latents"]
    assert sampled == list(range(2 * STEPS.num_steps, 5 * STEPS.num_steps + 1))
    assert store.num_chunks == 5
    assert StreamStore(tmp_path / "store", "b").num_chunks == 0


def ignore_present_objects() -> None:
    """`gc.get_objects` then lists what is made later; a process of tests has many others."""
    gc.collect()
    gc.freeze()


def held_bytes() -> int:
    """Bytes of all new tensors that are alive, each storage counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def test_memory_does_not_grow_with_the_length(models):
    """Tensors held after a chunk: between 6 seconds and a minute only the codes may differ."""
    most = {}
    for chunks in (6, 60):
        ignore_present_objects()
        stream = VideoStream(models, request(3 + 2 * (chunks - 1), context_segments=1))
        held = [held_bytes() for number, _ in enumerate(stream) if number % 5 == 4]
        most[chunks] = max(held)
        codes = stream.codes_BK
    assert 0 < most[60] - most[6] <= codes.nbytes


@torch.no_grad()
def test_held_memory_is_that_of_one_chunk_at_the_released_sizes():
    """Latents, features and the cache of the VAE, allocated on the meta device.

    Only the number of layers is small, which no tensor between two chunks depends on.
    """
    config = load(DiffusionTrainConfig, "landiff/diffusion-control").model
    transformer = config.transformer.model_copy(update={"num_layers": 2})
    config = config.model_copy(update={"transformer": transformer, "control_layers": 1})
    grid = load(TokenizerTrainConfig, "landiff/tokenizer").model
    with torch.device("meta"):
        diffusion = build_module("diffusion", config).eval()
        codec = CogVideoXCodec(AutoencoderKLCogVideoX(), "meta")
        text_BLD = torch.zeros(1, transformer.text_length, transformer.text_dim)
    schedule = NoiseSchedule(ScheduleConfig())

    def conditions(chunks: int) -> Iterator[ChunkConditions]:
        sides = (grid.feature_channels, grid.grid_height, grid.grid_width)
        counts = [13] + [6] * (chunks - 1)  # all features that are held belong to the next chunk
        parts = (torch.zeros(1, count, *sides, device="meta") for count in counts)
        for features_BTChw in windows(parts, chunks, 13, 7):
            yield ChunkConditions(text_BLD, features_BTChw)

    held = []
    ignore_present_objects()
    parts = sample_chunks(
        diffusion, schedule, conditions(4), lambda _: seeded_noise([0]), clean=7, options=STEPS
    )
    for frames_BTHWC in codec.decode_stream(parts):
        assert frames_BTHWC.shape[2:] == (480, 720, 3)
        held.append(held_bytes())
    assert held[1] == held[2] == held[3]
