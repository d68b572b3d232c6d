"""Sizes of models that generate a video together, and the lengths they can generate. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from landiff.configs.base import ConfigError
from landiff.model_zoo.config import DiffusionConfig, LMConfig, TokenizerConfig


@dataclass(frozen=True)
class _Pair:
    """Two sizes that must be equal; None = not known."""

    name: str
    value: int | None
    other_name: str
    other_value: int | None

    @property
    def differs(self) -> bool:
        """Whether both sizes are known and differ."""
        if self.value is None or self.other_value is None:
            return False
        return self.value != self.other_value

    def __str__(self) -> str:
        return f"{self.name} = {self.value}, {self.other_name} = {self.other_value}"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the models and encoders that generate a video; None = not known."""

    lm: LMConfig | None
    tokenizer: TokenizerConfig | None
    diffusion: DiffusionConfig | None
    lm_text_width: int | None = None
    diffusion_text_width: int | None = None
    codec_channels: int | None = None

    def differences(self) -> list[str]:
        """Descriptions of known sizes that must be equal and are not."""
        pairs = []
        if self.lm is not None:
            if self.tokenizer is not None:
                pairs += _lm_and_tokenizer(self.lm, self.tokenizer)
            pairs.append(
                _Pair(
                    "text width of the language model",
                    self.lm.text_dim,
                    "of its text encoder",
                    self.lm_text_width,
                )
            )
        if self.diffusion is not None:
            pairs += self._diffusion_and_encoders(self.diffusion)
            if self.tokenizer is not None:
                pairs += _diffusion_and_tokenizer(self.diffusion, self.tokenizer)
        return [str(pair) for pair in pairs if pair.differs]

    def _diffusion_and_encoders(self, diffusion: DiffusionConfig) -> list[_Pair]:
        return [
            _Pair(
                "text width of the diffusion model",
                diffusion.transformer.text_dim,
                "of its text encoder",
                self.diffusion_text_width,
            ),
            _Pair(
                "latent channels of the diffusion model",
                diffusion.transformer.latent_channels,
                "of the codec",
                self.codec_channels,
            ),
        ]


def _lm_and_tokenizer(lm: LMConfig, tokenizer: TokenizerConfig) -> list[_Pair]:
    fields = {
        "codebook_size": "codebook",
        "iframe_tokens": "I-frame tokens",
        "pframe_tokens": "P-frame tokens",
        "segment_frames": "frames of a segment",
    }
    pairs = []
    for field, name in fields.items():
        pairs.append(
            _Pair(
                f"{name} of the language model",
                getattr(lm, field),
                "of the tokenizer",
                getattr(tokenizer, field),
            )
        )
    return pairs


def _diffusion_and_tokenizer(diffusion: DiffusionConfig, tokenizer: TokenizerConfig) -> list[_Pair]:
    scale = diffusion.semantic.scale
    return [
        _Pair(
            "features of the diffusion model",
            diffusion.semantic.feature_channels,
            "of the tokenizer",
            tokenizer.feature_channels,
        ),
        _Pair(
            "latent rows of the diffusion model",
            diffusion.transformer.latent_height,
            f"of the tokenizer's grid, {scale} for each row",
            tokenizer.grid_height * scale,
        ),
        _Pair(
            "latent columns of the diffusion model",
            diffusion.transformer.latent_width,
            f"of the tokenizer's grid, {scale} for each column",
            tokenizer.grid_width * scale,
        ),
    ]


def num_chunks(num_frames: int, window: int = 13, clean: int = 7) -> int:
    """Whole chunks in `num_frames` semantic frames; 1 for a video shorter than the window.

    Raises ConfigError if a chunk of `window` frames has no other frames than its `clean` ones.
    """
    if not 0 <= clean < window:
        raise ConfigError(f"clean = {clean} must be at least 0 and less than window = {window}")
    return 1 + max(0, num_frames - window) // (window - clean)


def stream_lengths(num_frames: int, window: int = 13, clean: int = 7) -> tuple[int, int]:
    """The nearest lengths of whole chunks, one at most and one at least `num_frames`."""
    if num_frames <= window:
        return num_frames, num_frames
    stride = window - clean
    shorter = window + (num_chunks(num_frames, window, clean) - 1) * stride
    if shorter == num_frames:
        return shorter, shorter
    return shorter, shorter + stride


def check_length(num_latent_frames: int, window: int, clean_frames: int) -> None:
    """Raises ConfigError for a length that is not a whole number of chunks."""
    num_chunks(num_latent_frames, window, clean_frames)  # checks clean_frames
    shorter, longer = stream_lengths(num_latent_frames, window, clean_frames)
    if shorter != num_latent_frames:
        raise ConfigError(
            f"{num_latent_frames} latent frames are not a window of {window} and whole chunks of "
            f"{window - clean_frames} more; the nearest that are: {shorter} and {longer}"
        )
