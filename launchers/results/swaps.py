"""Captions of the shapes world that differ in one attribute, for the instruments of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from landiff.data_pipeline.synthetic.world import ATTRIBUTES, parse_caption

MIN_CLIPS = 4  # with a partner, below which an attribute is not measured


@dataclass(frozen=True)
class Swap:
    """Clips, and for each another clip whose caption differs in one attribute alone."""

    attribute: str
    clips: list[int]
    partners: list[int]


def find_swaps(captions: Sequence[str]) -> list[Swap]:
    """Swaps among clips, by attribute.

    Clips with other captions than those of the shapes world are left out, and so are attributes
    for which fewer than `MIN_CLIPS` clips have a partner.
    """
    labels = [parse_caption(caption) for caption in captions]
    found = []
    for attribute in ATTRIBUTES:
        others = [name for name in ATTRIBUTES if name != attribute]
        by_others: dict[tuple[str, ...], list[int]] = {}
        for index, label in enumerate(labels):
            if label is not None:
                by_others.setdefault(tuple(label[name] for name in others), []).append(index)
        clips = []
        partners = []
        for group in by_others.values():
            for place, index in enumerate(group):
                following = group[place + 1 :] + group[:place]
                different = [one for one in following if captions[one] != captions[index]]
                if different:
                    clips.append(index)
                    partners.append(different[0])
        if len(clips) >= MIN_CLIPS:
            found.append(Swap(attribute, clips, partners))
    return found
