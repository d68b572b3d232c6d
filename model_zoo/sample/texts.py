"""Texts of a video: one prompt, or prompts that change at given frames. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from landiff.configs.base import ConfigError

SCHEDULE_LINE = re.compile(r"\s*([0-9]{1,9})\s*:(.*)", re.DOTALL)

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


def parse_schedule(text: str, place: str) -> dict[int, str]:
    """Texts by frame, from lines `FRAME: TEXT` in rising order. Blank lines are skipped.

    place: where the lines are from, for messages. Raises ConfigError.
    """
    texts: dict[int, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = SCHEDULE_LINE.fullmatch(line)
        if match is None:
            raise ConfigError(
                f"{place}: line {number}, {line!r}, does not begin with a frame number and a "
                'colon, as in "97: the fox jumps"'
            )
        frame = int(match[1])
        if not match[2].strip():
            raise ConfigError(f"{place}: the text at frame {frame} is empty")
        if texts and frame <= max(texts):
            raise ConfigError(
                f"{place}: frame {frame} follows frame {max(texts)}; write the frames in rising "
                "order, each once"
            )
        if not texts and frame != 0:
            raise ConfigError(f"{place}: the first text is at frame {frame}; begin with frame 0")
        texts[frame] = match[2].strip()
    if not texts:
        raise ConfigError(f"{place}: there is no text; write lines such as 0: a fox walks")
    return texts


def schedule_text(texts: Mapping[int, str]) -> str:
    """Texts by frame in one line, for people to read."""
    return " | ".join(f"{frame}: {text}" for frame, text in sorted(texts.items()))


def check_schedule(
    prompt: Prompt, num_latent_frames: int, *, time: int, window: int, clean: int
) -> None:
    """Checks the frames of prompts that change.

    time: RGB frames per latent frame after the first. window, clean: latent frames of a chunk, and
    those that it takes from the chunk before.

    Raises ConfigError for a frame after the end, and for a text that no chunk would use.
    """
    num_frames = 1 + time * (num_latent_frames - 1)
    before: dict[int, int] = {}
    for frame in texts_of(prompt):
        if frame >= num_frames:
            raise ConfigError(
                f"the prompt changes at frame {frame}, but the video has {num_frames} frames "
                f"({num_latent_frames} latent frames); make it longer, or remove the text"
            )
        chunk = chunk_of(latent_frame(frame, time), window, clean)
        if chunk in before:
            raise ConfigError(
                f"the prompt changes at frames {before[chunk]} and {frame}, which are in the same "
                f"chunk, number {chunk}, so that the first text has no effect; a chunk begins at "
                f"frame 0 and at {chunk_start(1, time, window, clean)} + "
                f"{time * (window - clean)} k"
            )
        before[chunk] = frame


def chunk_start(chunk: int, time: int, window: int, clean: int) -> int:
    """The first RGB frame that a chunk adds."""
    if not chunk:
        return 0
    return 1 + time * (window - 1 + (chunk - 1) * (window - clean))
