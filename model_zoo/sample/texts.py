"""Texts of a video: one prompt, or prompts that change at given frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping

# A text, or texts by the RGB frame from which on they hold; the first is 0.
Prompt = str | Mapping[int, str]


def texts_of(prompt: Prompt) -> dict[int, str]:
    """The texts of a prompt by their first RGB frame, in order."""
    if isinstance(prompt, str):
        return {0: prompt}
    return dict(sorted(prompt.items()))


def text_at(prompt: Prompt, part: int, part_of: Callable[[int], int]) -> str:
    """The text of a part (chunk or segment) of a video: the last that begins in it or before.

    part_of: maps an RGB frame to the part that contains it.
    """
    found = ""
    for frame, text in texts_of(prompt).items():
        if not found or part_of(frame) <= part:
            found = text
    return found


def latent_frame(frame: int, time: int) -> int:
    """The latent frame that contains an RGB frame: the first has one RGB frame, others `time`."""
    return -(-frame // time)


def chunk_of(frame: int, window: int, clean: int) -> int:
    """The chunk that adds a latent frame."""
    return 0 if frame < window else 1 + (frame - window) // (window - clean)
