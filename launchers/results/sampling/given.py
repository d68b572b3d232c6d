"""Input files of videos in addition to text: images, videos, and files of semantic tokens.

Shape letters (docs/glossary.md): B batch, K codes of a clip, T RGB frames, H, W height and width in
pixels, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from landiff.configs.base import ConfigError
from landiff.configs.files import atomic_file
from landiff.data_pipeline.video.codec import SafeDecoder, VideoFile, Wanted
from landiff.data_pipeline.video.protocol import DecodeFailure, VideoInfo
from landiff.launchers.results.prompts import TOKENS_SUFFIX, GivenFile, SampleUnit
from landiff.launchers.results.sampling.given_files import (
    CODES,
    check_num_codes,
    given_length,
    probe,
    start_s,
    unreadable,
)
from landiff.model_zoo.frozen.base import VisionFeatures
from landiff.model_zoo.sample.generate import Models
from landiff.model_zoo.sample.given import Given, codes_of, first_frames


class GivenFiles:
    """Reads the files of units for models, at the size and rate of the videos."""

    def __init__(
        self,
        models: Models,
        vision: VisionFeatures | None,
        fps: float,
        clean_frames: int,
        size: tuple[int, int] | None = None,
    ) -> None:
        """`size`: height and width of the videos in pixels. None: those of the models."""
        sizes = models.diffusion.config.transformer
        self._models = models
        self._vision = vision
        self._fps = fps
        self._clean_frames = clean_frames
        space = models.codec.space
        own = (sizes.latent_height * space, sizes.latent_width * space)
        self._height, self._width = size or own

    def of_batch(self, units: Sequence[SampleUnit]) -> Given:
        """What the units of a batch are given, all the same kind or nothing.

        Raises ConfigError for a file that cannot be read or is too short.
        """
        found = [self._of(unit) for unit in units]
        codes = [given.codes_BK for given in found if given.codes_BK is not None]
        latents = [given.latents_BTCHW for given in found if given.latents_BTCHW is not None]
        return Given(torch.cat(codes) if codes else None, torch.cat(latents) if latents else None)

    def _of(self, unit: SampleUnit) -> Given:
        """What one unit is given."""
        given = unit.given
        if given is None:
            return Given()
        if given.kind == "tokens_from":
            return Given(self._all_codes(given, unit.num_latent_frames))
        num_latent_frames = given_length(
            given.kind,
            unit.num_latent_frames,
            self._clean_frames,
            odd_only=self._models.codec.name == "cogvideox-vae",
        )
        frames_1THWC = self._frames(given, num_latent_frames)
        assert self._vision is not None, given
        return first_frames(self._models.tokenizer, self._vision, self._models.codec, frames_1THWC)

    def _all_codes(self, given: GivenFile, num_latent_frames: int) -> Tensor:
        """The codes of a whole video, int64 [1, K]."""
        if Path(given.path).suffix == TOKENS_SUFFIX:
            codes_1K = read_codes(Path(given.path))[None]
            check_num_codes(given, codes_1K.shape[1], num_latent_frames, self._models.lm.config)
            return codes_1K.to(next(self._models.lm.parameters()).device)
        frames_1THWC = self._frames(given, num_latent_frames)
        assert self._vision is not None, given
        return codes_of(self._models.tokenizer, self._vision, frames_1THWC, self._models.codec.time)

    def _frames(self, given: GivenFile, num_latent_frames: int) -> Tensor:
        """The frames of a video that are needed, in the shape of ours, uint8 [1, T, H, W, 3]."""
        num_frames = 1 + self._models.codec.time * (num_latent_frames - 1)
        with SafeDecoder() as decoder:
            info = probe(decoder, given)
            start = start_s(given, info, num_frames, self._fps)
            wanted = Wanted(num_frames, self._fps, self._height, self._width, self._crop(info))
            (found,) = decoder.decode(VideoFile(Path(given.path)), [start], wanted)
            if isinstance(found, DecodeFailure):
                raise unreadable(given, found)
            return torch.from_numpy(found.copy())[None]

    def _crop(self, info: VideoInfo) -> tuple[float, float, float, float]:
        """Fractions to cut off, so that the middle of the picture has the shape of ours."""
        aspect = info.aspect or info.width / info.height
        ratio = self._width / self._height / aspect
        if ratio < 1:
            side = (1 - ratio) / 2
            return side, 0.0, side, 0.0
        side = (1 - 1 / ratio) / 2
        return 0.0, side, 0.0, side


def write_codes(path: Path, codes_K: Tensor, key: str) -> None:
    """Writes a file of tokens. key: of everything that they depend on."""
    data = save({CODES: codes_K.cpu().contiguous()}, {"landiff": json.dumps({"key": key})})
    with atomic_file(path) as file:
        file.write(data)


def read_codes(path: Path) -> Tensor:
    """The codes of a file of tokens, int64 [K]. Raises ConfigError."""
    try:
        with safe_open(path, "pt") as file:
            codes_K = file.get_tensor(CODES)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is no file of tokens: {error}") from None
    if codes_K.ndim != 1 or codes_K.dtype != torch.int64 or not len(codes_K):
        raise ConfigError(f"{path} holds {codes_K.dtype} {list(codes_K.shape)} and no tokens")
    return codes_K


def key_of_codes(path: Path) -> str | None:
    """The key with which a file of tokens was written; None if there is no whole file."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("landiff", "{}")).get("key")
    except (OSError, SafetensorError):
        return None
