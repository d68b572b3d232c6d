"""Previews in the TensorBoard folder of a run, as pictures for a page. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from landiff.training.checkpoint.run_folder import TENSORBOARD
from landiff.training.observe.event_file import read_event_files

SIGNATURES = {b"GIF8": "gif", b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}
"""Kind of a picture by its first bytes."""
TEXT = "/text"  # end of the tag of a preview's text


@dataclass(frozen=True)
class StoredPreview:
    """A picture or animation of one step.

    kind: `gif`, `png` or `jpeg`.
    text: the prompt or caption.
    """

    tag: str
    step: int
    data: bytes
    kind: str
    text: str


def read_previews(run: Path, steps: int) -> list[StoredPreview]:
    """The previews of the newest `steps` of each tag, by tag, the newest first. Raises OSError."""
    pictures: dict[tuple[str, int], bytes] = {}
    texts: dict[tuple[str, int], str] = {}
    for event in read_event_files(run / TENSORBOARD):
        if event.HasField("session_log"):  # an attempt that resumed before this step
            _drop_from(pictures, event.step)
        for value in event.summary.value:
            place = (value.tag, event.step)
            if value.HasField("image"):
                pictures[place] = value.image.encoded_image_string
            elif value.HasField("tensor") and value.tag.endswith(TEXT):
                texts[place] = b"\n".join(value.tensor.string_val).decode("utf-8", "replace")
    found = []
    for tag in sorted({tag for tag, _ in pictures}):
        of_tag = sorted((step for name, step in pictures if name == tag), reverse=True)
        for step in of_tag[:steps]:
            kind = kind_of(pictures[tag, step])
            if kind:
                text = texts.get((f"{tag}{TEXT}", step), "")
                found.append(StoredPreview(tag, step, pictures[tag, step], kind, text))
    return found


def _drop_from(pictures: dict[tuple[str, int], bytes], first: int) -> None:
    """Remove the pictures of this step and later ones."""
    for place in [place for place in pictures if place[1] >= first]:
        del pictures[place]


def kind_of(data: bytes) -> str:
    """Kind of a picture, or an empty text if it is unknown."""
    for signature, kind in SIGNATURES.items():
        if data.startswith(signature):
            return kind
    return ""
