"""Generates the videos of `landiff sample` with models from the zoo and frozen encoders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch

from landiff.data_pipeline.video.codec import Mp4Writer
from landiff.launchers.config import SampleConfig
from landiff.launchers.progress import ProgressLine
from landiff.launchers.results.gallery import CONTACT_SHEET, GALLERY
from landiff.launchers.results.preview import log_videos
from landiff.launchers.results.prompts import SampleUnit, sample_units
from landiff.launchers.results.sample_folder import (
    SampleFolder,
    agree_on_batch_size,
    common_settings,
    recorded_batch_size,
)
from landiff.launchers.results.sampling.given import (
    GivenFiles,
    key_of_codes,
    read_codes,
    write_codes,
)
from landiff.launchers.results.sampling.loading import PARTS, load_models
from landiff.model_zoo import frozen, registry
from landiff.model_zoo.device import pick_device
from landiff.model_zoo.evaluate.drift import DriftMeter
from landiff.model_zoo.frozen.base import VisionFeatures
from landiff.model_zoo.sample.batch_size import fastest, measure_batch_sizes
from landiff.model_zoo.sample.generate import Models
from landiff.model_zoo.sample.given import Given
from landiff.model_zoo.sample.latents import OnStep, SamplerOptions
from landiff.model_zoo.sample.stream import Request, VideoStream
from landiff.model_zoo.sample.stream_store import StreamStore
from landiff.training.checkpoint.run_folder import TENSORBOARD

Load = Callable[[SampleConfig, torch.device, Collection[str]], Models]
MAX_TAG = 60  # characters of a prompt in its TensorBoard tag
MAX_LOGGED = 32  # videos that are also written to TensorBoard
MAX_LOGGED_FRAMES = 128  # of each


def model_references(config: SampleConfig) -> dict[str, str]:
    """Reference with fingerprint of each model of a config. Raises ZooError."""
    references = {}
    for kind in ("lm", "tokenizer", "diffusion"):
        entry = registry.resolve(config.zoo, getattr(config, kind), kind)
        references[kind] = entry.reference
    return references


def sample_videos(
    config: SampleConfig,
    task: tuple[int, int] = (0, 1),
    units: Sequence[SampleUnit] | None = None,
    load: Load | None = None,
) -> list[str]:
    """Writes one mp4 for each unit of this task into `config.out`. Returns the file names.

    units: those of the config's prompts if None.
    load: loads the models; `load_models` if None.

    Videos that are finished are kept. `task` is (number, number of tasks): a task takes every n-th
    batch, so that the batches are the same for any number of tasks.

    Raises ConfigError if the folder holds videos that were made with other settings.
    """
    if units is None:
        units = sample_units(config)
    load = load or load_models
    models = None
    if config.batch_size == "auto":
        config, models = choose_batch_size(config, units, load)
    folder = SampleFolder(config.out, common_settings(config, model_references(config)), units)
    own = batches(units, size_of(config))[task[0] :: task[1]]
    is_done = partial(has_codes, folder) if config.tokens_only else folder.is_finished
    missing = [batch for batch in own if not all(is_done(unit) for unit in batch)]
    names = [unit.name for batch in own for unit in batch]
    total = len(names)
    left = sum(len(batch) for batch in missing)
    if left < total:
        print(f"sample: {total - left} of {total} videos are finished in {config.out}")
    if missing:
        if models is None:
            needed = needed_parts(config, folder, missing)
            models = load(config, pick_device(config.device), needed)
        sampler = Sampler(config, folder, models, UnitProgress(total, total - left))
        for batch in missing:
            if config.tokens_only:
                sampler.write_codes(batch)
            else:
                sampler.write_videos(batch)
    if not config.tokens_only:
        folder.write_pages()
        print(f"sample: look at {config.out / GALLERY} and {config.out / CONTACT_SHEET}")
    return names


def size_of(config: SampleConfig) -> int:
    """The batch size of a config in which it is chosen."""
    assert isinstance(config.batch_size, int), config.batch_size
    return config.batch_size


def choose_batch_size(
    config: SampleConfig, units: Sequence[SampleUnit], load: Load
) -> tuple[SampleConfig, Models | None]:
    """The config with a number for `batch_size: auto`, and the models if they had to be loaded.

    The number is that of the folder, or measured and recorded there.
    """
    recorded = recorded_batch_size(config.out)
    if recorded is not None:
        return config.model_copy(update={"batch_size": recorded}), None
    models = load(config, pick_device(config.device), PARTS)
    one = config.model_copy(update={"batch_size": 1})
    print("sample: measuring which batch_size is fastest")
    seconds = measure_batch_sizes(models, request_of(one, units[:1]), len(units))
    size = agree_on_batch_size(config.out, fastest(seconds), seconds)
    shown = ", ".join(f"{number}: {value:.3g}" for number, value in seconds.items())
    print(f"sample: batch_size = {size}, recorded in {config.out} (seconds per video {shown})")
    return config.model_copy(update={"batch_size": size}), models


def needed_parts(
    config: SampleConfig, folder: SampleFolder, missing: Sequence[Sequence[SampleUnit]]
) -> tuple[str, ...]:
    """Names of the models and text encoders that the missing videos, or their tokens, need."""
    if config.tokens_only:
        return "lm_text", "lm"
    for batch in missing:
        for unit in batch:
            if unit.given is None and not has_codes(folder, unit):
                return PARTS
            if unit.given is not None and unit.given.kind != "tokens_from":
                return PARTS
    return "tokenizer", "diffusion_text", "diffusion"


def has_codes(folder: SampleFolder, unit: SampleUnit) -> bool:
    """Whether the codes of a unit were sampled before, with the settings of its folder."""
    return key_of_codes(folder.tokens_path(unit)) == folder.batch_key([unit])


def batches(units: Sequence[SampleUnit], size: int) -> list[list[SampleUnit]]:
    """Consecutive units of equal length, at most `size` at once.

    Units whose prompt changes are separate, because their tokens are sampled by segment, and so are
    units that are given other parts of the video.
    """
    found: list[list[SampleUnit]] = []
    latest: tuple[int, bool, str] | None = None
    for unit in units:
        given = unit.given.kind if unit.given is not None else ""
        kind = unit.num_latent_frames, bool(unit.schedule), given
        if kind == latest and len(found[-1]) < size:
            found[-1].append(unit)
        else:
            found.append([unit])
        latest = kind
    return found


class Sampler:
    """Models that generate the units of a folder, batch by batch."""

    def __init__(
        self,
        config: SampleConfig,
        folder: SampleFolder,
        models: Models,
        progress: UnitProgress,
        on_step: OnStep | None = None,
    ) -> None:
        """on_step: called after each sampling step of the diffusion model."""
        self.config = config
        self.folder = folder
        self.models = models
        self.vision: VisionFeatures | None = None
        if config.vision is not None:
            self.vision = frozen.build(config.vision, pick_device(config.device))
        size = None if config.shape is None else (config.shape.height, config.shape.width)
        self._files = GivenFiles(self.models, self.vision, config.fps, config.clean_frames, size)
        self._progress = progress
        self._on_step = on_step

    def write_videos(self, units: Sequence[SampleUnit]) -> None:
        """Writes the videos of a batch. Long ones continue where a killed run has ended."""
        given = self._files.of_batch(units)
        if units[0].given is None and all(has_codes(self.folder, unit) for unit in units):
            codes = [read_codes(self.folder.tokens_path(unit)) for unit in units]
            given = Given(torch.stack(codes))
        window = self.models.diffusion.config.transformer.latent_frames
        store = None
        if units[0].num_latent_frames > window:
            store = StreamStore(self.folder.unfinished(units), self.folder.batch_key(units))
        stream = stream_batch(
            self.models, self.config, units, self._progress, store, given, self._on_step
        )
        write_batch(stream, self.folder, units, self.config, self.vision)
        if store is not None:
            store.remove()
        for unit in units:
            self._progress.finish(self.folder.folder / unit.name)

    def write_codes(self, units: Sequence[SampleUnit]) -> None:
        """Writes the codes of a batch, one file for each unit."""
        given = self._files.of_batch(units)
        stream = stream_batch(self.models, self.config, units, self._progress, None, given)
        for unit, codes_K in zip(units, stream.draw_codes(), strict=False):  # less filled ones
            path = self.folder.tokens_path(unit)
            write_codes(path, codes_K, self.folder.batch_key([unit]))
            self._progress.finish(path)


def stream_batch(
    models: Models,
    config: SampleConfig,
    units: Sequence[SampleUnit],
    progress: UnitProgress,
    store: StreamStore | None = None,
    given: Given | None = None,
    on_step: OnStep | None = None,
) -> VideoStream:
    """The chunks of a batch. An incomplete one is filled with copies of its last unit.

    The batch size affects rounding, so that a video would else depend on its place in the list.
    """
    request = request_of(config, units, given)
    return VideoStream(models, request, progress=progress, on_step=on_step, store=store)


def request_of(
    config: SampleConfig, units: Sequence[SampleUnit], given: Given | None = None
) -> Request:
    """Units of one length as a batch of the size of the config."""
    filled = [*units, *[units[-1]] * (size_of(config) - len(units))]
    return Request(
        prompts=[unit.texts for unit in filled],
        num_latent_frames=units[0].num_latent_frames,
        tokens=config.tokens,
        sampler=sampler_options(config),
        seeds=[unit.seed for unit in filled],
        motion_score=[unit.motion_score for unit in filled],
        negatives=[unit.negative for unit in filled],
        clean_frames=config.clean_frames,
        given=(given or Given()).filled(len(filled)),
        grid=None if config.shape is None else config.shape.grid,
    )


def write_batch(
    stream: VideoStream,
    folder: SampleFolder,
    units: Sequence[SampleUnit],
    config: SampleConfig,
    vision: VisionFeatures | None = None,
) -> None:
    """Writes the videos of a batch frame by frame as they come, and measures long ones."""
    logged: list[list[torch.Tensor]] = [[] for _ in units]
    meters = [drift_meter(stream, vision) for _ in units]
    with contextlib.ExitStack() as stack:
        writers: list[Mp4Writer] = []
        for chunk in stream:
            if not writers:
                # Closed in reverse order: the first unit, which names the store, is committed last.
                for unit in units:
                    writers.append(stack.enter_context(folder.writing(unit, chunk.num_frames)))
            for number, writer in enumerate(writers):
                frames_THWC = chunk.frames_BTHWC[number]
                meters[number].add(frames_THWC)
                frames_THWC = frames_THWC.cpu()
                writer.add(frames_THWC.numpy())
                room = MAX_LOGGED_FRAMES - sum(len(part) for part in logged[number])
                logged[number].append(frames_THWC[:room].clone())
        for unit, meter in zip(units, meters, strict=True):
            chunks = meter.report()
            if len(chunks) > 1:
                folder.write_drift(unit, chunks)
    for unit, parts in zip(units, logged, strict=True):
        log_sample(config, unit, torch.cat(parts))


def drift_meter(stream: VideoStream, vision: VisionFeatures | None) -> DriftMeter:
    """What measures a video of a stream."""
    return DriftMeter(
        time=stream.models.codec.time,
        window=stream.models.diffusion.config.transformer.latent_frames,
        clean=stream.request.clean_frames,
        features=vision,
    )


def sampler_options(config: SampleConfig) -> SamplerOptions:
    """Options of the sampler of latents."""
    return SamplerOptions(
        num_steps=config.steps,
        guidance=config.guidance,
        dynamic=config.guidance_schedule,
        guidance_interval=config.guidance_interval,
        guidance_rescale=config.guidance_rescale,
        control_guidance=config.control_guidance,
        solver=config.solver,
    )


class UnitProgress:
    """Progress of the videos, and of the tokens and sampling steps of the current batch."""

    def __init__(self, total: int, finished: int) -> None:
        self.total = total
        self.finished = finished
        self._videos = ProgressLine("sample", "videos")
        self._videos(finished, total)
        self._parts: dict[str, ProgressLine] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Reports tokens or sampling steps of the current batch."""
        if what not in self._parts:
            self._parts[what] = ProgressLine(f"sample {what}")
        self._parts[what](done, total)

    def finish(self, path: Path) -> None:
        """Reports a finished video."""
        self.finished += 1
        print(f"sample: {path}")
        self._videos(self.finished, self.total)


def log_sample(config: SampleConfig, unit: SampleUnit, frames_THWC: torch.Tensor) -> None:
    """Writes the start of one of the first videos to TensorBoard."""
    if unit.number >= MAX_LOGGED:
        return
    events = config.out.parent / "runs" / "sample" / TENSORBOARD
    tag = f"sample/{unit.number:02d} {unit.prompt[:MAX_TAG]}"
    log_videos(events, 0, {tag: frames_THWC}, config.fps)
