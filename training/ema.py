"""Exponential moving average of the weights (`ema` in a trainer's config).

Each rank averages the float32 weights that its optimizer updates, so the averages are sharded over
the ranks in the same way as Adam's moments: whole tensors under DDP, partitions of flat vectors
under ZeRO, shards of Megatron-core's distributed optimizer. Buffers are not averaged: the codebook
of the tokenizer is a moving average already, and the other buffers are constants.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from landiff.training.config import EmaConfig

log = logging.getLogger(__name__)

SWAP_ELEMENTS = 2**26  # copied at once when weights and averages are exchanged


class Ema:
    """The averages of one rank. Without a config there are none, and `update` does nothing."""

    def __init__(self, config: EmaConfig | None, weights: Sequence[Tensor]) -> None:
        """`weights`: float32 tensors that the optimizer updates in place. May be empty on a rank.

        The averages start as copies of them.
        """
        self.config = config
        self.weights = list(weights)
        self.averages: list[Tensor] = []
        if config is not None:
            self.averages = [weight.detach().clone() for weight in self.weights]

    @property
    def enabled(self) -> bool:
        """Whether the config asks for averages. Equal on all ranks."""
        return self.config is not None

    @torch.no_grad()
    def restart(self) -> None:
        """Set the averages to the weights."""
        if self.averages:
            torch._foreach_copy_(self.averages, self.weights)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after `step` finished steps. Call after an update of the weights.

        Up to step `from_step` the averages are copies of the weights. After that they change in
        steps that `every` divides, by the weight 1 - decay ** every. Nothing is copied to the host.
        """
        if self.config is None or not self.averages:
            return
        if step <= self.config.from_step:
            self.restart()
        elif step % self.config.every == 0:
            new = 1 - self.config.decay**self.config.every
            torch._foreach_lerp_(self.averages, self.weights, weight=new)

    @contextmanager
    def applied(self, ema: bool, publish: Callable[[], None]) -> Iterator[None]:
        """Context in which the weights hold the averages, if `ema`; else nothing changes.

        Weights and averages are exchanged in place, without a further copy of the model, and
        exchanged back at the end. `publish` brings the weights to what forward passes read, and is
        called after each exchange; it may be collective.
        """
        if not ema:
            yield
            return
        assert self.enabled, "this run has no moving average: ema = null"
        self._exchange()
        try:
            publish()
            yield
        finally:
            self._exchange()
            publish()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in zip(self.weights, self.averages, strict=True):
            parts = average.view(-1).split(SWAP_ELEMENTS)
            for mine, other in zip(weight.view(-1).split(SWAP_ELEMENTS), parts, strict=True):
                kept = mine.clone()
                mine.copy_(other)
                other.copy_(kept)

    def loaded(self, folder: Path, *, found: bool) -> None:
        """Report and complete a restart from checkpoint `folder`, whose weights are loaded.

        found: the checkpoint holds averages, which are loaded too if the config asks for them.
        """
        if self.enabled and not found:
            self.restart()
            log.info(
                "checkpoint %s holds no moving average (ema); it starts from the weights of this "
                "checkpoint",
                folder,
            )
        if found and not self.enabled:
            log.info("ema = null: the moving average in checkpoint %s is dropped", folder)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The averages by number, for checks of their values."""
        for number, average in enumerate(self.averages):
            yield f"moving average {number}", average
