"""Clip shapes, and the sizes that follow from them in every encoder. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from landiff.model_zoo.frozen.checks import CELL, TIME

LATENT_CELL = 8  # pixels of a latent along one side, in every codec


@dataclass(frozen=True)
class ClipShape:
    """Frames, height and width of a clip."""

    num_frames: int
    height: int
    width: int

    @staticmethod
    def parse(name: str) -> ClipShape:
        """The shape of a bucket's name, "17x64x64" for example."""
        num_frames, height, width = map(int, name.split("x"))
        return ClipShape(num_frames, height, width)

    @property
    def name(self) -> str:
        """The shape as text, "17x64x64" for example."""
        return f"{self.num_frames}x{self.height}x{self.width}"

    @property
    def latent_frames(self) -> int:
        """Latent frames, of which there are as many as semantic frames."""
        return (self.num_frames - 1) // TIME + 1

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.height // LATENT_CELL, self.width // LATENT_CELL

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the vision features."""
        return self.height // CELL, self.width // CELL
