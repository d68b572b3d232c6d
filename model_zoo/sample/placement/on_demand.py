"""Parts of a sampler that are in memory only while they are used, one at a time.

The five large parts run one after the other: text encoder and language model, tokenizer, the other
text encoder, diffusion model. `OnDemand` is a proxy for a part. When a part is used, the previous
one is moved to host memory (offload.py) or freed.
"""

from __future__ import annotations

import ctypes
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from landiff.model_zoo.sample.placement.offload import Level, OffloadedModule

MAX_TEXTS = 64  # whose states are kept, some megabytes each


class Place:
    """The memory that parts take on `device`: one at a time, or all if it is `shared`."""

    def __init__(self, device: torch.device, *, shared: bool = False) -> None:
        self.device = device
        self.shared = shared
        self.occupant: OnDemand | None = None

    def give(self, part: OnDemand) -> None:
        """Releases the part before, unless it is this one or may stay."""
        if self.shared or self.occupant is part:
            return
        if self.occupant is not None:
            self.occupant.release()
        self.occupant = part
        release_freed(self.device)

    def clear(self) -> None:
        """Releases the part that is there, if any."""
        if self.occupant is not None:
            self.occupant.release()
        self.occupant = None


def release_freed(device: torch.device) -> None:
    """Returns freed memory to the system and to other programs of the GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library, which has its own rules
        return


class OnDemand:
    """Stands for a module, whose methods and attributes it has.

    place: shared by all parts of which one may be in memory.
    load: returns the module: on the device, or with a `level` on the CPU.
    level: the module stays in the memory of the host, and so much of it moves to the device at
        once. None: it is deleted when it is released.
    known: attributes that are answered without the module.
    """

    def __init__(
        self,
        place: Place,
        load: Callable[[], nn.Module],
        *,
        level: Level | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        self._place = place
        self._load = load
        self._level = level
        self._offloaded: Sequence[OffloadedModule] = ()
        self._known = dict(known or {})
        self._module: Any = None

    @classmethod
    def of(
        cls,
        place: Place,
        module: Any,
        offloaded: Sequence[OffloadedModule],
        known: Mapping[str, Any] | None = None,
    ) -> Self:
        """Stands for a module in the memory of the host, whose weights are in `offloaded`."""
        part = cls(place, lambda: module, known=known)
        part._module = module
        part._offloaded = offloaded
        return part

    @property
    def is_loaded(self) -> bool:
        """Whether this object holds the module now, on any device."""
        return self._module is not None

    def module(self) -> Any:
        """The module on the device, after the part before was released."""
        is_here = self._module is not None and self._place.occupant is self
        self._place.give(self)
        if self._module is None:
            self._module = self._load()
            if self._level is not None:
                self._offloaded = [OffloadedModule(self._module, self._place.device, self._level)]
        if not is_here:
            for offloaded in self._offloaded:
                offloaded.enter()
        return self._module

    def release(self) -> None:
        """Frees the memory of the device, or forgets the module."""
        for offloaded in self._offloaded:
            offloaded.leave()
        if not self._offloaded and self._module is not None:
            self._module = None
            gc.collect()

    def parameters(self) -> Iterator[Tensor]:
        """One empty tensor, which tells the device without loading the module."""
        yield torch.empty(0, device=self._place.device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._known:
            return self._known[name]
        return getattr(self.module(), name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Calls the module."""
        return self.module()(*args, **options)


class OnDemandText(OnDemand):
    """Stands for a text encoder. What it said about a text is kept, so that it stays released."""

    def __init__(self, place: Place, load: Callable[[], nn.Module], **options: Any) -> None:
        super().__init__(place, load, **options)
        self._states: OrderedDict[tuple[str, ...], tuple[Tensor, Tensor]] = OrderedDict()
        self._ends: OrderedDict[str, str] = OrderedDict()

    def cut_off(self, texts: list[str]) -> list[str]:
        """As `TextEncoder.cut_off`."""
        ends = []
        for text in texts:
            if text not in self._ends:
                (self._ends[text],) = self.module().cut_off([text])
            ends.append(self._ends[text])
            _forget(self._ends)
        return ends

    def __call__(self, *args: Any, **options: Any) -> Any:
        """As `TextEncoder.__call__`."""
        (texts,) = args
        key = tuple(texts)
        if key not in self._states:
            self._states[key] = self.module()(texts)
            _forget(self._states)
        return self._states[key]


class OnDemandCodec(OnDemand):
    """Stands for a codec, which leaves the device between the parts of a video."""

    def decode_stream(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """As `LatentCodec.decode_stream`. Clears the place at the end, also if it is closed."""

        def decoded_here() -> Iterator[Tensor]:
            for part_BtChw in parts:
                self.module()  # after other modules have computed the part
                yield part_BtChw
            self.module()  # for frames that follow after the last part

        try:
            yield from self.module().decode_stream(decoded_here())
        finally:
            self._place.clear()


def _forget(answers: OrderedDict[Any, Any]) -> None:
    """Removes the oldest answers beyond `MAX_TEXTS`."""
    while len(answers) > MAX_TEXTS:
        answers.popitem(last=False)
