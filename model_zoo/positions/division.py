"""Sequence parallelism: several ranks process one sequence together.

A rank holds a part of the positions. Before attention, an all-to-all exchanges all heads of the
rank's positions for all positions of the rank's heads; another one reverses it afterwards
(DeepSpeed-Ulysses, arXiv 2309.14509). Neither the positions nor the heads need to be a multiple of
the number of ranks.

The backward pass of each exchange is its adjoint. So if every rank of a group computes the whole
loss from gathered outputs, the gradients of the weights, averaged over the ranks, are those of one
rank that has the whole sequence.

Shape letters (docs/glossary.md): B batch, S all positions, s positions of this rank, A all heads,
a heads of this rank, d width of a head, N video tokens, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from landiff.model_zoo.positions.tables import Rotation


def shares(length: int, parts: int) -> list[int]:
    """`length` divided into `parts` numbers that differ by at most 1, the larger ones first."""
    least, rest = divmod(length, parts)
    return [least + 1] * rest + [least] * (parts - rest)


@dataclass(frozen=True)
class SequencePart:
    """The part of a sequence of `length` positions that this rank of `group` computes."""

    group: dist.ProcessGroup
    length: int

    @property
    def lengths(self) -> list[int]:
        """Number of positions of each rank."""
        return shares(self.length, self.group.size())

    def span(self, rank: int | None = None) -> tuple[int, int]:
        """First position of a rank, by default of this one, and the first of the next rank."""
        if rank is None:
            rank = self.group.rank()
        start = sum(self.lengths[:rank])
        return start, start + self.lengths[rank]

    def of(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's positions of a tensor with all positions in `dim`."""
        start, end = self.span()
        return x.narrow(dim, start, end - start)

    def positions_of_heads(self, x_BsAd: Tensor) -> Tensor:
        """All heads of this rank's positions to all positions of this rank's heads: [B, S, a, d].

        The number of heads is at least the number of ranks.
        """
        batch, _, num_heads, width = x_BsAd.shape
        heads = shares(num_heads, self.group.size())
        assert heads[-1] > 0, (num_heads, self.group.size())
        own = heads[self.group.rank()]
        shapes = [(batch, length, own, width) for length in self.lengths]
        return torch.cat(exchange(x_BsAd.split(heads, dim=2), shapes, self.group), dim=1)

    def heads_of_positions(self, x_BSad: Tensor, num_heads: int) -> Tensor:
        """The reverse of `positions_of_heads`: [B, s, A, d], with `num_heads` heads in all."""
        batch, _, _, width = x_BSad.shape
        start, end = self.span()
        heads = shares(num_heads, self.group.size())
        shapes = [(batch, end - start, count, width) for count in heads]
        return torch.cat(exchange(x_BSad.split(self.lengths, dim=1), shapes, self.group), dim=2)

    def gather(self, x_BsD: Tensor, lengths: Sequence[int]) -> Tensor:
        """Vectors of all ranks on every rank, in the order of the ranks.

        lengths: number of vectors that each rank has.
        """
        batch, _, width = x_BsD.shape
        shapes = [(batch, length, width) for length in lengths]
        return torch.cat(exchange([x_BsD] * len(shapes), shapes, self.group), dim=1)


@dataclass(frozen=True)
class Positions:
    """What blocks and output layers know of the positions that this rank computes.

    text_length: number of text rows among them, which come first.
    rotation: rotary embedding of the video tokens among them, None if the config has none.
    part: the place of these positions in a sequence that several ranks share, None if there is
        only this rank.
    text_lengths: number of text rows of each of these ranks.
    """

    text_length: int
    rotation: Rotation | None = None
    part: SequencePart | None = None
    text_lengths: tuple[int, ...] = ()

    def shared_by(self, group: dist.ProcessGroup, num_video: int) -> Positions:
        """This rank's part of these positions, `num_video` of which are video tokens."""
        part = SequencePart(group, self.text_length + num_video)
        texts = []
        for rank in range(group.size()):
            start, end = part.span(rank)
            texts.append(min(end, self.text_length) - min(start, self.text_length))
        rotation = self.rotation
        if rotation is not None:
            start, end = part.span()
            video = slice(max(start - self.text_length, 0), max(end - self.text_length, 0))
            rotation = Rotation(rotation.cos_Nd[video], rotation.sin_Nd[video])
        return Positions(texts[group.rank()], rotation, part, tuple(texts))

    def own(self, x_BSD: Tensor) -> Tensor:
        """The vectors of this rank of those of the whole sequence."""
        return x_BSD if self.part is None else self.part.of(x_BSD)

    def whole_video(self, x_BND: Tensor) -> Tensor:
        """The vectors of all video tokens, from those of this rank. Collective."""
        if self.part is None:
            return x_BND
        lengths = []
        for length, text in zip(self.part.lengths, self.text_lengths, strict=True):
            lengths.append(length - text)
        return self.part.gather(x_BND, lengths)


@torch.compiler.disable
def exchange(
    sent: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: dist.ProcessGroup
) -> list[Tensor]:
    """Sends `sent[r]` to rank r of `group`. Returns what each rank has sent, with these `shapes`.

    Collective. Gradients take the way back.
    """
    sent_sizes = [x.numel() for x in sent]
    flat = torch.cat([x.reshape(-1) for x in sent])
    sizes = [torch.Size(shape).numel() for shape in shapes]
    received = _AllToAll.apply(flat, sizes, sent_sizes, group)
    parts = received.split(sizes)
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


class _AllToAll(torch.autograd.Function):
    """all_to_all_single of vectors with parts of any sizes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: list[int], sent_sizes: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sizes = sizes
        ctx.sent_sizes = sent_sizes
        ctx.group = group
        received = x.new_empty(sum(sizes))
        dist.all_to_all_single(received, x, sizes, sent_sizes, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        sent = gradient.new_empty(sum(ctx.sent_sizes))
        dist.all_to_all_single(
            sent, gradient.contiguous(), ctx.sent_sizes, ctx.sizes, group=ctx.group
        )
        return sent, None, None, None
