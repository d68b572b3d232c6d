"""Gradients under ZeRO 1 and 2: summed in flat float32 vectors and reduced over the ranks.

DeepSpeed reads or writes all gradients about ten times between backward pass and AdamW: it copies
them into a bucket, out of it and into a partition, divides them, computes a float64 norm of each
and flattens them. `FlatGradients` replaces that. Each gradient is added once to the vector that
AdamW reads, which has the layout of DeepSpeed's flat weights.

    stage 1, or one rank    a vector with all gradients sums the micro-batches; it is reduced over
                            the ranks once a step
    stage 2                 each micro-batch is reduced in buckets; a rank keeps its partition
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

NORM_ELEMENTS = 2**20  # whose float32 norm is computed at once; the rest is summed in float64


@dataclass(frozen=True)
class FlatPartition:
    """This rank's gradients of one parameter group, in the form that DeepSpeed's `step` accepts."""

    flat_partition: Tensor


@dataclass
class _Bucket:
    """Consecutive parameters of a group, which are reduced together.

    start, end: in the group's flat vector.
    parameters: positions in `FlatGradients._places`.
    missing: parameters without a gradient of this micro-batch so far.
    values: gradients, None before the first one.
    """

    group: int
    start: int
    end: int
    parameters: list[int]
    missing: set[int] = field(default_factory=set)
    values: Tensor | None = None


@dataclass(frozen=True)
class _Place:
    """Where the gradient of a parameter is in its bucket."""

    bucket: _Bucket
    start: int
    shape: torch.Size


class FlatGradients:
    """Sums the gradients of one step. Installed in a DeepSpeed engine of stage 1 or 2."""

    def __init__(self, engine: Any, bucket_size: int, overlap: bool) -> None:
        """Replace the gradient handling of `engine`.

        bucket_size: elements that are reduced at once. A larger parameter has its own bucket.
        overlap: reduce a bucket while the backward pass computes the next one.
        """
        optimizer = engine.optimizer
        self.engine = engine
        self.overlap = overlap
        self.rank = dist.get_rank(optimizer.dp_process_group)
        self.size = dist.get_world_size(optimizer.dp_process_group)
        self.whole = self.size == 1 or not optimizer.partition_gradients
        self._first = True  # of the micro-batches of a step
        self._vectors: list[Tensor] = []  # of all gradients if `whole`, else this rank's partitions
        self._running: tuple[_Bucket, dist.Work] | None = None
        self._next = 0  # bucket to reduce
        self._places: list[_Place] = []
        self._buckets = self._divide(bucket_size)
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks = [
            parameter.register_post_accumulate_grad_hook(self._adder(number))
            for number, parameter in enumerate(self._parameters())
        ]
        engine.allreduce_gradients = self._end_backward
        optimizer.backward_epilogue = lambda: None
        optimizer.scaled_global_norm = self.norm

    def _parameters(self) -> list[nn.Parameter]:
        """The trained parameters, by group."""
        return [p for group in self.engine.optimizer.bit16_groups for p in group]

    def _divide(self, bucket_size: int) -> list[_Bucket]:
        """Divide all parameters into buckets, in the order in which backward passes fill them.

        The order is the same on all ranks, whatever gradients a rank's micro-batch has.
        """
        order = {id(p): number for number, p in enumerate(self.engine.module.parameters())}
        first: list[tuple[int, _Bucket]] = []  # parameter of a bucket in the module
        for group, parameters in enumerate(self.engine.optimizer.bit16_groups):
            bucket: _Bucket | None = None
            position = 0
            for parameter in parameters:
                end = position + parameter.numel()
                if bucket is None or end - bucket.start > bucket_size:
                    bucket = _Bucket(group, position, end, [])
                    first.append((order[id(parameter)], bucket))
                bucket.end = end
                bucket.parameters.append(len(self._places))
                self._places.append(_Place(bucket, position - bucket.start, parameter.shape))
                position = end
        first.sort(key=lambda pair: pair[0], reverse=True)
        buckets = [bucket for _, bucket in first]
        for bucket in buckets:
            bucket.missing = set(bucket.parameters)
        return buckets

    def _adder(self, number: int) -> Callable[[nn.Parameter], None]:
        """The hook of a parameter, which is called when its gradient is complete."""
        place = self._places[number]
        bucket = place.bucket
        end = place.start + place.shape.numel()

        def add(parameter: nn.Parameter) -> None:
            assert number in bucket.missing, "a backward pass computed a gradient twice"
            gradient = parameter.grad
            assert gradient is not None, "the hook of a parameter without gradient"
            parameter.grad = None
            sums = self._values(bucket)[place.start : end].view(place.shape)
            if self._is_fresh():
                sums.copy_(gradient)
            else:
                sums.add_(gradient)
            bucket.missing.remove(number)
            if not bucket.missing:
                self._reduce_complete()

        return add

    def _is_fresh(self) -> bool:
        """Whether a bucket holds no gradients of earlier micro-batches."""
        return self._first or not self.whole

    def _values(self, bucket: _Bucket) -> Tensor:
        """The gradients of a bucket, whose memory is allocated at the first call."""
        if bucket.values is not None:
            return bucket.values
        if not self._vectors:
            self._vectors = [self._vector(group) for group in range(self._num_groups())]
        if self.whole:
            bucket.values = self._vectors[bucket.group][bucket.start : bucket.end]
        else:
            like = self._vectors[bucket.group]
            bucket.values = like.new_empty(bucket.end - bucket.start)
        return bucket.values

    def _num_groups(self) -> int:
        return len(self.engine.optimizer.bit16_groups)

    def _vector(self, group: int) -> Tensor:
        """A float32 vector for the gradients of a group: of all ranks if `whole`, else of this one.

        It is zero where padding follows the parameters.
        """
        flat = self.engine.optimizer.bit16_groups_flat[group]
        if not self.whole:
            size = flat.numel() // self.size
            return torch.zeros(size, dtype=torch.float32, device=flat.device)
        vector = torch.empty(flat.numel(), dtype=torch.float32, device=flat.device)
        used = sum(p.numel() for p in self.engine.optimizer.bit16_groups[group])
        vector[used:] = 0
        return vector

    def _reduce_complete(self) -> None:
        """Reduce the buckets that are complete, in the order that all ranks have."""
        if self.size == 1:
            return
        if self.whole and not self.engine.is_gradient_accumulation_boundary():
            return
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            bucket = self._buckets[self._next]
            self._next += 1
            self._wait()
            group = self.engine.optimizer.dp_process_group
            work = dist.all_reduce(self._values(bucket), group=group, async_op=True)
            self._running = bucket, work
            if not self.overlap:
                self._wait()

    def _wait(self) -> None:
        """Wait for the bucket that is being reduced, and take this rank's part of it."""
        if self._running is None:
            return
        bucket, work = self._running
        self._running = None
        work.wait()
        if self.whole:
            return
        partition = self._vectors[bucket.group]
        begin = self.rank * partition.numel()
        low = max(bucket.start, begin)
        high = min(bucket.end, begin + partition.numel())
        if low < high:
            part = self._values(bucket)[low - bucket.start : high - bucket.start]
            partition[low - begin : high - begin] += part
        bucket.values = None

    def _end_backward(self) -> None:
        """Complete a micro-batch. DeepSpeed's engine calls it after each backward pass."""
        for bucket in self._buckets:
            self._complete(bucket)
        self._reduce_complete()
        self._wait()
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = set(bucket.parameters)
        self._first = False
        if self.engine.is_gradient_accumulation_boundary():
            self._hand_over()

    def _complete(self, bucket: _Bucket) -> None:
        """Set gradients that the micro-batch does not have to zero."""
        if not bucket.missing:
            return
        values = self._values(bucket)
        if self._is_fresh():
            for number in bucket.missing:
                place = self._places[number]
                values[place.start : place.start + place.shape.numel()] = 0
        bucket.missing = set()

    def _hand_over(self) -> None:
        """Give the mean over the ranks to DeepSpeed's optimizer, which frees it in its step."""
        optimizer = self.engine.optimizer
        for group, vector in enumerate(self._vectors):
            partition = vector
            if self.whole:
                partition = vector.chunk(self.size)[self.rank]
            if self.size > 1:
                partition /= self.size
            optimizer.averaged_gradients[group] = FlatPartition(partition)
        self._vectors = []
        for bucket in self._buckets:
            bucket.values = None
        self._first = True

    def norm(self) -> Tensor:
        """Norm of the gradients of all ranks, float32; infinite if one is NaN or infinite.

        Collective.
        """
        optimizer = self.engine.optimizer
        partitions: list[Tensor] = []
        for group in range(self._num_groups()):
            partitions.append(optimizer.averaged_gradients[group].flat_partition)
        return _norm(partitions, optimizer.dp_process_group, self.size)


def _norm(partitions: Sequence[Tensor], group: Any, size: int) -> Tensor:
    """Norm of vectors that `size` ranks hold parts of."""
    parts: list[Tensor] = []
    for partition in partitions:
        parts += partition.split(NORM_ELEMENTS)
    total = torch.stack(torch._foreach_norm(parts)).double().square().sum()
    if size > 1:
        dist.all_reduce(total, group=group)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, math.inf))
