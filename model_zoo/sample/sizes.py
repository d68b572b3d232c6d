"""Which models make a video together, and which lengths they can make. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from landiff.configs.base import ConfigError
from landiff.model_zoo.config import DiffusionConfig, LMConfig, TokenizerConfig


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parts that make a video. None: not known."""

    lm: LMConfig | None
    tokenizer: TokenizerConfig | None
    diffusion: DiffusionConfig | None
    lm_text_width: int | None = None
    diffusion_text_width: int | None = None
    codec_channels: int | None = None

    def differences(self) -> list[str]:
        """Every pair of known sizes that must be equal and is not."""
        pairs = []
        lm, tokenizer, diffusion = self.lm, self.tokenizer, self.diffusion
        if lm is not None and tokenizer is not None:
            for what, name in (
                ("codebook", "codebook_size"),
                ("I-frame tokens", "iframe_tokens"),
                ("P-frame tokens", "pframe_tokens"),
                ("frames of a segment", "segment_frames"),
            ):
                ours, theirs = getattr(lm, name), getattr(tokenizer, name)
                pairs.append((f"{what} of the language model", ours, "of the tokenizer", theirs))
        if lm is not None:
            pairs.append(
                (
                    "text width of the language model",
                    lm.text_dim,
                    "of its text encoder",
                    self.lm_text_width,
                )
            )
        if diffusion is not None:
            main = diffusion.transformer
            pairs += [
                (
                    "text width of the diffusion model",
                    main.text_dim,
                    "of its text encoder",
                    self.diffusion_text_width,
                ),
                (
                    "latent channels of the diffusion model",
                    main.latent_channels,
                    "of the codec",
                    self.codec_channels,
                ),
            ]
        if diffusion is not None and tokenizer is not None:
            scale = 2 ** (len(diffusion.semantic.channel_multipliers) - 1)
            pairs += [
                (
                    "features of the diffusion model",
                    diffusion.semantic.feature_channels,
                    "of the tokenizer",
                    tokenizer.feature_channels,
                ),
                (
                    "latent rows of the diffusion model",
                    diffusion.transformer.latent_height,
                    f"of the tokenizer's grid, {scale} for each row",
                    tokenizer.grid_height * scale,
                ),
                (
                    "latent columns of the diffusion model",
                    diffusion.transformer.latent_width,
                    f"of the tokenizer's grid, {scale} for each column",
                    tokenizer.grid_width * scale,
                ),
            ]
        return [
            f"{a} = {x}, {b} = {y}"
            for a, x, b, y in pairs
            if x is not None and y is not None and x != y
        ]


def num_chunks(num_frames: int, window: int = 13, clean: int = 7) -> int:
    """Chunks that `num_frames` semantic frames fill; a clip shorter than the window is one."""
    if not 0 <= clean < window:
        raise ConfigError(f"clean = {clean} must be at least 0 and less than window = {window}")
    return 1 + max(0, num_frames - window) // (window - clean)


def stream_lengths(num_frames: int, window: int = 13, clean: int = 7) -> tuple[int, int]:
    """The nearest lengths, not above and not below `num_frames`, that whole chunks fill."""
    if num_frames <= window:
        return num_frames, num_frames
    stride = window - clean
    shorter = window + (num_chunks(num_frames, window, clean) - 1) * stride
    return shorter, shorter + stride * (shorter < num_frames)


def check_length(num_latent_frames: int, window: int, clean_frames: int) -> None:
    """Raise ConfigError where whole chunks do not have that length, with the nearest that do."""
    num_chunks(num_latent_frames, window, clean_frames)  # whether the clean frames leave new ones
    shorter, longer = stream_lengths(num_latent_frames, window, clean_frames)
    if shorter != num_latent_frames:
        raise ConfigError(
            f"{num_latent_frames} latent frames are no window of {window} and whole chunks of "
            f"{window - clean_frames} more; the nearest that are: {shorter} and {longer}"
        )
