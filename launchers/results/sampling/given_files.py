"""Input files of videos in addition to text: which part of them is needed. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from landiff.configs.base import ConfigError
from landiff.configs.documents import DocumentError
from landiff.configs.problems import Problem, problems_of
from landiff.configs.safetensors_header import read_header
from landiff.data_pipeline.video.codec import SafeDecoder, VideoFile
from landiff.data_pipeline.video.protocol import DecodeFailure, VideoInfo
from landiff.launchers.config import SampleConfig
from landiff.launchers.results.prompts import TOKENS_SUFFIX, GivenFile, SampleUnit
from landiff.model_zoo.config import LMConfig
from landiff.model_zoo.frozen.checks import TIME
from landiff.model_zoo.token_layout import TokenLayout

CODES = "codes"  # name of the tensor in a file of tokens


def given_length(
    kind: str, num_latent_frames: int, clean_frames: int, *, odd_only: bool = False
) -> int:
    """Latent frames that are read from a file for a video of `num_latent_frames`.

    odd_only: whether the codec encodes odd numbers of latent frames only.
    """
    if kind == "tokens_from":
        return num_latent_frames
    if kind == "first_frame":
        return 1
    length = max(1, clean_frames)
    if odd_only:
        length -= 1 - length % 2
    return length


def probe(decoder: SafeDecoder, given: GivenFile) -> VideoInfo:
    """Shape and duration of a given video or image. Raises ConfigError if it cannot be read."""
    info = decoder.probe(VideoFile(Path(given.path)))
    if isinstance(info, DecodeFailure):
        raise unreadable(given, info)
    return info


def start_s(given: GivenFile, info: VideoInfo, num_frames: int, fps: float) -> float:
    """Time at which the needed frames begin: those of a continued video are its last.

    Raises ConfigError if the file has fewer than `num_frames` frames.
    """
    if given.kind == "first_frame":
        return 0.0
    available = 1 if info.is_image else round(info.duration_s * fps)
    if available < num_frames:
        raise ConfigError(
            f"{given.kind} = {given.path} has {available} frame(s) at {fps:g} frames per second, "
            f"and {num_frames} are needed; give a longer video, or make that of the prompt shorter "
            "(num_latent_frames)"
        )
    if given.kind == "tokens_from" or info.is_image:
        return 0.0
    return (available - num_frames + 0.25) / fps  # within the display of the frame


def unreadable(given: GivenFile, failure: DecodeFailure) -> ConfigError:
    """The error for a file that cannot be decoded."""
    return ConfigError(
        f"{given.kind} = {given.path} cannot be decoded: {failure.reason}: {failure.detail}"
    )


def check_num_codes(given: GivenFile, num_codes: int, num_latent_frames: int, lm: LMConfig) -> None:
    """Raises ConfigError unless a file of tokens holds those of a video of this length."""
    expected = TokenLayout.of(lm).num_codes(num_latent_frames)
    if num_codes != expected:
        raise ConfigError(
            f"tokens_from = {given.path} holds {num_codes} tokens, but {num_latent_frames} latent "
            f"frames have {expected}; set num_latent_frames to the length they were sampled for"
        )


def check_given(
    config: SampleConfig, units: Sequence[SampleUnit], lm: LMConfig | None, window: int | None
) -> list[Problem]:
    """Problems with the given files: unreadable ones, and too short ones.

    window: latent frames of the diffusion model. None, like `lm`: not known.
    """
    wanted: dict[tuple[GivenFile, int], None] = {}
    for unit in units:
        if unit.given is not None:
            wanted[unit.given, unit.num_latent_frames] = None
    problems: list[Problem] = []
    if not wanted:
        return problems
    with SafeDecoder() as decoder:
        for given, length in wanted:
            if Path(given.path).suffix == TOKENS_SUFFIX:
                problems += problems_of(partial(_check_tokens, given, length, lm))
            else:
                problems += problems_of(
                    partial(_check_video, decoder, config, given, length, window)
                )
    return problems


def _check_tokens(given: GivenFile, num_latent_frames: int, lm: LMConfig | None) -> None:
    try:
        entry = read_header(Path(given.path)).entries.get(CODES)
    except (OSError, DocumentError) as error:
        raise ConfigError(f"{given.path} is no file of tokens: {error}") from None
    if entry is None or len(entry.shape) != 1 or entry.dtype != "I64":
        raise ConfigError(f"{given.path} is no file of tokens, as `--tokens-only` writes them")
    if lm is not None:
        check_num_codes(given, entry.shape[0], num_latent_frames, lm)


def _check_video(
    decoder: SafeDecoder,
    config: SampleConfig,
    given: GivenFile,
    num_latent_frames: int,
    window: int | None,
) -> None:
    length = given_length(
        given.kind,
        num_latent_frames,
        config.clean_frames,
        odd_only=config.codec.kind == "cogvideox-vae",
    )
    info = probe(decoder, given)
    start_s(given, info, 1 + TIME * (length - 1), config.fps)
    if given.kind == "tokens_from" or window is None:
        return
    chunk = min(window, num_latent_frames)
    if length >= chunk:
        raise ConfigError(
            f"{given.kind} = {given.path}: the first {length} latent frame(s) are given, so that a "
            f"chunk of {chunk} has no other; make the video longer (num_latent_frames), or lower "
            "clean_frames"
        )
