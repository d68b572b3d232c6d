"""Sizes that follow from the frames, height and width of the clips. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from landiff.configs import ConfigError
from landiff.model_zoo.config import ModelConfig
from landiff.model_zoo.frozen.checks import CELL, TIME
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.model_zoo.token_layout import TokenLayout

LARGEST_WINDOW = 13  # latent frames of the released models
RELEASED_PREFIX = 7  # of 13 latent frames
RELEASED_ROWS = 16  # rows of patches for which positions are not interpolated
POSITION_STEP = 256
DECORD_REFUSES = (8, 16, 24, 48, 72)  # widths of clips, see data_pipeline/video/decord_child.py


@dataclass(frozen=True)
class ClipSizes(ClipShape):
    """A clip shape of a project."""

    def problems(self) -> list[str]:
        """Why no model can have this size, with the nearest sizes that divide."""
        found = []
        for name in ("num_frames", "height", "width"):
            if getattr(self, name) < 1:
                found.append(f"{name} = {getattr(self, name)} must be at least 1")
        if found:
            return found
        if (self.num_frames - 1) % TIME:
            lower, upper = nearest_multiples(self.num_frames - 1, TIME)
            found.append(
                f"num_frames = {self.num_frames} is not a multiple of {TIME} plus 1; "
                f"the nearest that are: {choices(lower + 1, upper + 1, 1)}"
            )
        for name in ("height", "width"):
            size = getattr(self, name)
            if size % CELL:
                lower, upper = nearest_multiples(size, CELL)
                found.append(
                    f"{name} = {size} is not a multiple of {CELL}; the nearest that are: "
                    f"{choices(lower, upper, CELL)}"
                )
        return found


def nearest_multiples(value: int, step: int) -> tuple[int, int]:
    """The nearest multiples of `step` below and above `value`."""
    lower = value // step * step
    return lower, lower + step


def choices(lower: int, upper: int, least: int) -> str:
    """Two sizes as text, without the lower one if it is below `least`."""
    return f"{lower} and {upper}" if lower >= least else f"{upper}"


def frames_of(latent_frames: int) -> int:
    """Video frames of a clip with that many latent frames."""
    return (latent_frames - 1) * TIME + 1


def prefix_frames(window: int) -> int:
    """Largest clean prefix of a window of latent frames: the released 7 of 13, in proportion."""
    return max(1, window * RELEASED_PREFIX // LARGEST_WINDOW)


@dataclass(frozen=True)
class ProjectSizes:
    """Sizes of the models of a project, as they follow from its clips and the preset it extends."""

    clip: ClipSizes
    window: int
    iframe_tokens: int
    pframe_tokens: int
    max_positions: int
    spatial_interpolation: float

    @property
    def prefix(self) -> int:
        """Latent frames of the largest clean prefix."""
        return prefix_frames(self.window)


def project_sizes(clip: ClipSizes, base: ModelConfig) -> ProjectSizes:
    """Sizes for clips of `clip` with the widths and depths of `base`.

    Tokens of a frame grow with the cells of the grid. Clips longer than the released models'
    window are several segments, and the diffusion model trains on windows. Raises ConfigError with
    all sizes that do not divide.
    """
    problems = clip.problems()
    window = min(clip.latent_frames, LARGEST_WINDOW)
    if clip.num_frames >= 1 and window < 2:
        problems.append(
            f"num_frames = {clip.num_frames} is a single latent frame, but the models are of "
            f"videos; the nearest that are: {frames_of(2)}"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    rows, columns = clip.grid
    share = rows * columns / (base.tokenizer.grid_height * base.tokenizer.grid_width)
    iframe = max(1, round(base.tokenizer.iframe_tokens * share))
    pframe = max(1, round(base.tokenizer.pframe_tokens * share))
    layout = TokenLayout(base.tokenizer.codebook_size, iframe, pframe, window)
    needed = layout.sequence_length(clip.latent_frames, base.lm.max_text_tokens)
    rounded = -(-needed // POSITION_STEP) * POSITION_STEP
    patch = base.diffusion.transformer.patch_size
    return ProjectSizes(
        clip=clip,
        window=window,
        iframe_tokens=iframe,
        pframe_tokens=pframe,
        max_positions=max(base.lm.max_positions, rounded),
        spatial_interpolation=clip.latent_size[0] / patch / RELEASED_ROWS,
    )
