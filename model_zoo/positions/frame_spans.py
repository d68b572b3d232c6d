"""Layout of the semantic tokenizer's sequence: positions, attention masks, attention over spans.

    [visual tokens of all frames | I latents | P latents of frame 1 | … | P latents of frame T - 1]

Shape letters (docs/glossary.md): B batch, T frames, N latent tokens of a segment, which are
iframe_tokens + (T - 1) · pframe_tokens, S sequence positions, which are T · h · w + N, A heads,
d width of a head.

Source: semantic tokenizer of LanDiff (arXiv 2503.04606), with the masks of the released code
(docs/specification.md §3.1, §3.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from landiff.model_zoo.attention import attention
from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.layers import rotary_angles


@dataclass(frozen=True)
class Sequence:
    """Positions of the tokens of one segment.

    `frame_tokens` is the number of visual tokens of a frame, h · w.
    """

    num_frames: int
    frame_tokens: int
    iframe_tokens: int
    pframe_tokens: int

    @property
    def num_visual(self) -> int:
        """Visual tokens of all frames."""
        return self.num_frames * self.frame_tokens

    @property
    def num_latent(self) -> int:
        """Latent tokens of all frames."""
        return self.latents_until(self.num_frames - 1)

    @property
    def length(self) -> int:
        """Positions of the whole sequence."""
        return self.num_visual + self.num_latent

    def latents_until(self, frame: int) -> int:
        """Number of latents of the frames 0 to `frame`, the latter included; 0 for frame -1."""
        if frame < 0:
            return 0
        return self.iframe_tokens + frame * self.pframe_tokens

    def visual(self, first: int, last: int) -> slice:
        """Positions of the visual tokens of the frames `first` to `last`, both included."""
        return slice(first * self.frame_tokens, (last + 1) * self.frame_tokens)

    def latent(self, first: int, last: int) -> slice:
        """Positions of the latent tokens of the frames `first` to `last`, both included."""
        start = self.num_visual + self.latents_until(first - 1)
        stop = self.num_visual + self.latents_until(last)
        return slice(start, stop)


@dataclass(frozen=True)
class AttentionSpan:
    """Queries and the keys they attend to.

    Each query attends to all keys, or with `causal` to the keys up to its own position; queries and
    keys then end at the same position.

    A mask given as a list of spans costs one attention call per span over the visible keys alone.
    At the released size this is 3 to 4 times faster than one call with a dense mask of
    18 768 x 18 768.
    """

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    causal: bool = False


@dataclass(frozen=True)
class LatentGrid:
    """The latents of a frame as a grid that is spread evenly over the frame's cells.

    rows, columns: of the latents. height, width: of the cells. Latents are numbered row by row.
    """

    rows: int
    columns: int
    height: int
    width: int

    @staticmethod
    def of(count: int, height: int, width: int) -> LatentGrid:
        """The division of `count` latents whose shape is closest to that of the cells."""
        best = 1
        for rows in range(1, count + 1):
            if count % rows == 0 and _skew(rows, count, height, width) < _skew(
                best, count, height, width
            ):
                best = rows
        return LatentGrid(best, count // best, height, width)

    def centers(self) -> Tensor:
        """Row and column of the centre of each latent in cells, float64 [rows · columns, 2]."""
        row = (torch.arange(self.rows, dtype=torch.float64) + 0.5) * self.height / self.rows - 0.5
        column = torch.arange(self.columns, dtype=torch.float64) + 0.5
        column = column * self.width / self.columns - 0.5
        return torch.cartesian_prod(row, column)

    def overlap(self) -> Tensor:
        """Area of each cell that each latent covers, float32 [rows · columns, height · width]."""
        over_rows = _overlap(self.rows, self.height)
        over_columns = _overlap(self.columns, self.width)
        return torch.einsum("ry,cx->rcyx", over_rows, over_columns).flatten(2).flatten(0, 1)


def _skew(rows: int, count: int, height: int, width: int) -> float:
    """Factor, at least 1, between the shapes of a latent's region and of a square."""
    ratio = (height / rows) / (width * rows / count)
    return max(ratio, 1 / ratio)


def _overlap(parts: int, cells: int) -> Tensor:
    """Length of each cell that each of `parts` equal parts covers, float32 [parts, cells]."""
    edges = torch.arange(parts + 1, dtype=torch.float64) * cells / parts
    cell = torch.arange(cells, dtype=torch.float64)
    stop = torch.minimum(edges[1:, None], cell + 1)
    start = torch.maximum(edges[:-1, None], cell)
    return (stop - start).clamp(min=0).float()


def sequence_angles(
    sequence: Sequence, grid_width: int, head_dim: int, theta: float, device: torch.device
) -> Tensor:
    """Angles of the rotary embedding over time, row and column, in that order (§3.4).

    Returns float32 [S, d/2]. A visual token has the position (frame, row, column), latent m of a
    segment has (m, m, m). Latent positions start at 0 and overlap with visual ones, as in the
    reference.
    """
    visual = torch.arange(sequence.num_visual, device=device)
    latent = torch.arange(sequence.num_latent, device=device)
    cell = visual % sequence.frame_tokens
    visual_axes = (visual // sequence.frame_tokens, cell // grid_width, cell % grid_width)
    dims = (head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)
    angles = []
    for visual_positions, dim in zip(visual_axes, dims, strict=True):
        positions_S = torch.cat([visual_positions, latent])
        angles.append(rotary_angles(positions_S, dim, theta, dtype=torch.float64))
    return torch.cat(angles, dim=1)


def grid_angles(sequence: Sequence, config: TokenizerConfig, device: torch.device) -> Tensor:
    """Angles of the rotary embedding with latents spread over the cells of their frame.

    Returns float32 [S, d/2]. Visual tokens have the position (frame, row, column).
    """
    height = config.grid_height
    width = config.grid_width
    visual = torch.arange(sequence.num_visual)
    cell = visual % sequence.frame_tokens
    parts = [
        torch.stack([visual // sequence.frame_tokens, cell // width, cell % width], 1).double()
    ]
    for frame in range(sequence.num_frames):
        count = sequence.pframe_tokens if frame else sequence.iframe_tokens
        centers = LatentGrid.of(count, height, width).centers()
        parts.append(torch.cat([centers.new_full((count, 1), frame), centers], dim=1))
    positions_S3 = torch.cat(parts).to(device)
    head_dim = config.hidden_size // config.num_heads
    dims = (head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8)
    angles = []
    for axis, dim in enumerate(dims):
        angles.append(
            rotary_angles(positions_S3[:, axis], dim, config.rope_theta, dtype=torch.float64)
        )
    return torch.cat(angles, dim=1)


def covering(config: TokenizerConfig, sequence: Sequence, device: torch.device) -> Tensor:
    """Area of each visual position that each latent covers, float32 [N, T · h · w].

    A latent covers cells of its own frame only.
    """
    blocks = []
    for frame in range(sequence.num_frames):
        count = sequence.pframe_tokens if frame else sequence.iframe_tokens
        blocks.append(LatentGrid.of(count, config.grid_height, config.grid_width).overlap())
    return torch.block_diag(*blocks).to(device)


def encoder_spans(sequence: Sequence) -> list[AttentionSpan]:
    """Attention of the encoder.

    Visual tokens attend to the visual tokens of all frames up to their own. Latents attend to those
    too, and causally to the latents.
    """
    spans = []
    for frame in range(sequence.num_frames):
        queries = sequence.visual(frame, frame)
        keys = sequence.visual(0, frame)
        spans.append(AttentionSpan((queries,), (keys,)))
    for frame in range(sequence.num_frames):
        queries = sequence.latent(frame, frame)
        visual_keys = sequence.visual(0, frame)
        latent_keys = sequence.latent(0, frame)
        spans.append(AttentionSpan((queries,), (visual_keys, latent_keys), causal=True))
    return spans


def decoder_spans(sequence: Sequence) -> list[AttentionSpan]:
    """Attention of the decoder: every token attends to all tokens of the frames up to its own."""
    spans = []
    for frame in range(sequence.num_frames):
        queries = (sequence.visual(frame, frame), sequence.latent(frame, frame))
        keys = (sequence.visual(0, frame), sequence.latent(0, frame))
        spans.append(AttentionSpan(queries, keys))
    return spans


def encoder_mask(
    num_frames: int, frame_tokens: int, iframe_tokens: int, pframe_tokens: int
) -> Tensor:
    """The encoder's spans as a dense mask, see `dense_mask`."""
    sequence = Sequence(num_frames, frame_tokens, iframe_tokens, pframe_tokens)
    return dense_mask(encoder_spans(sequence), sequence.length)


def decoder_mask(
    num_frames: int, frame_tokens: int, iframe_tokens: int, pframe_tokens: int
) -> Tensor:
    """The decoder's spans as a dense mask, see `dense_mask`."""
    sequence = Sequence(num_frames, frame_tokens, iframe_tokens, pframe_tokens)
    return dense_mask(decoder_spans(sequence), sequence.length)


def dense_mask(spans: list[AttentionSpan], length: int) -> Tensor:
    """Spans as a mask, bool [S, S], true where the row may attend to the column. S is `length`."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    positions = torch.arange(length)
    for span in spans:
        rows = torch.cat([positions[part] for part in span.queries])
        columns = torch.cat([positions[part] for part in span.keys])
        visible = torch.ones(len(rows), len(columns), dtype=torch.bool)
        if span.causal:
            visible = visible.tril(len(columns) - len(rows))
        mask[rows[:, None], columns] = visible
    return mask


def span_attention(
    q_BSAd: Tensor, k_BSAd: Tensor, v_BSAd: Tensor, spans: list[AttentionSpan]
) -> Tensor:
    """Attention where `spans` say which query attends to which keys. Returns [B, S, A, d].

    The spans together must contain every query exactly once.
    """
    own = _partition(q_BSAd, [part for span in spans for part in span.queries])
    all_keys = _gather(k_BSAd, [span.keys for span in spans])
    all_values = _gather(v_BSAd, [span.keys for span in spans])
    pieces: dict[int, Tensor] = {}  # by first position
    for span, keys, values in zip(spans, all_keys, all_values, strict=True):
        queries = _joined([own[part.start] for part in span.queries])
        result = attention(queries, keys, values, causal=span.causal)
        lengths = [part.stop - part.start for part in span.queries]
        for part, piece in zip(span.queries, result.split(lengths, dim=1), strict=True):
            pieces[part.start] = piece
    return torch.cat([pieces[start] for start in sorted(pieces)], dim=1)


def _partition(x_BSAd: Tensor, parts: Iterable[slice]) -> dict[int, Tensor]:
    """The sequence divided into `parts`, which contain each position once, by first position."""
    ordered = sorted(parts, key=lambda part: part.start)
    pieces = x_BSAd.split([part.stop - part.start for part in ordered], dim=1)
    return {part.start: piece for part, piece in zip(ordered, pieces, strict=True)}


def _joined(pieces: list[Tensor]) -> Tensor:
    """Pieces laid end to end, without a copy if there is only one."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _gather(x_BSAd: Tensor, groups: list[tuple[slice, ...]]) -> tuple[Tensor, ...]:
    """For each group, its slices of the sequence laid end to end."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x_BSAd.requires_grad):
        return _slices(x_BSAd, groups)
    return _Gather.apply(x_BSAd, groups)


def _slices(x_BSAd: Tensor, groups: list[tuple[slice, ...]]) -> tuple[Tensor, ...]:
    joined = []
    for parts in groups:
        joined.append(_joined([x_BSAd[:, part] for part in parts]))
    return tuple(joined)


class _Gather(torch.autograd.Function):
    """`_slices` whose backward pass adds all gradients into one tensor.

    autograd makes a gradient of the whole length for each slice. The order of the sums is the same.
    """

    @staticmethod
    def forward(ctx: Any, x_BSAd: Tensor, groups: list[tuple[slice, ...]]) -> tuple[Tensor, ...]:
        ctx.groups = groups
        ctx.shape = x_BSAd.shape
        return _slices(x_BSAd, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total_BSAd = gradients[0].new_zeros(ctx.shape)
        for parts, gradient in reversed(list(zip(ctx.groups, gradients, strict=True))):
            lengths = [part.stop - part.start for part in parts]
            for part, piece in zip(parts, gradient.split(lengths, dim=1), strict=True):
                total_BSAd[:, part] += piece
        return total_BSAd, None
