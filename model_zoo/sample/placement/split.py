"""One video on two devices: a second process computes half of the diffusion model's rows.

With guidance, the rows of a batch are the unconditional and the conditional branch of each video.
The first process runs everything else. The second one holds the diffusion model only and answers
(`serve_rows`).

Shape letters (docs/glossary.md): B rows of a batch, T latent frames, C channels, H, W height and
width in latent cells, L text rows, D width of text states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from landiff.model_zoo.dit import ControlledDiffusion

FIRST = 0  # the process that samples
SECOND = 1  # the one that answers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIMS = 5
# Of a header: for each of four tensors dtype, number of dimensions and sizes.
HEADER = 4 * (2 + MAX_DIMS)


class PartnerLost(RuntimeError):
    """The other process of the pair has ended, or cannot be reached."""


@contextmanager
def partner_needed() -> Iterator[None]:
    """Turns errors of communication with the other process into PartnerLost."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip() or type(error).__name__
        raise PartnerLost(text.splitlines()[0]) from error


class SplitDiffusion:
    """Stands for a diffusion model. Halves of batches with an even number of rows are sent.

    The result differs by rounding from that of one process, as with another batch size. The
    process group has two ranks, and the other one is in `serve_rows`.
    """

    def __init__(self, model: ControlledDiffusion, device: torch.device) -> None:
        self._model = model
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(
        self,
        latents_BTCHW: Tensor,
        timestep_B: Tensor,
        text_BLD: Tensor,
        *,
        semantic_BTCHW: Tensor | None = None,
    ) -> Tensor:
        """As `ControlledDiffusion.forward`. Raises PartnerLost.

        Without `semantic_BTCHW` all rows are computed here.
        """
        if semantic_BTCHW is None:
            return self._model(latents_BTCHW, timestep_B, text_BLD)
        inputs = (latents_BTCHW, timestep_B, text_BLD, semantic_BTCHW)
        rows = len(latents_BTCHW)
        if rows % 2:
            return self._model(*inputs[:3], semantic_BTCHW=semantic_BTCHW)
        half = rows // 2
        _send([tensor[half:].contiguous() for tensor in inputs], self._device)
        latents, timestep, text, semantic = [tensor[:half] for tensor in inputs]
        first = self._model(latents, timestep, text, semantic_BTCHW=semantic)
        second = torch.empty_like(first)
        with partner_needed():
            dist.recv(second, SECOND)
        return torch.cat([first, second])

    @staticmethod
    def close(device: torch.device) -> None:
        """Ends `serve_rows` of the other process. Raises PartnerLost."""
        with partner_needed():
            dist.send(torch.zeros(HEADER, dtype=torch.int64, device=device), SECOND)


@torch.no_grad()
def serve_rows(model: ControlledDiffusion, device: torch.device) -> int:
    """Computes the rows that a `SplitDiffusion` sends, until it is closed. Returns their number.

    Raises PartnerLost if the other process ends before.
    """
    rows = 0
    while True:
        header = torch.empty(HEADER, dtype=torch.int64, device=device)
        with partner_needed():
            dist.recv(header, FIRST)
        if not header.any():
            return rows
        latents, timestep, text, semantic = _receive(header.tolist(), device)
        computed = model(latents, timestep, text, semantic_BTCHW=semantic).contiguous()
        with partner_needed():
            dist.send(computed, FIRST)
        rows += len(latents)


def _send(tensors: Sequence[Tensor], device: torch.device) -> None:
    header: list[int] = []
    for tensor in tensors:
        sizes = list(tensor.shape) + [0] * (MAX_DIMS - tensor.ndim)
        header += [DTYPES.index(tensor.dtype), tensor.ndim, *sizes]
    with partner_needed():
        dist.send(torch.tensor(header, device=device), SECOND)
        for tensor in tensors:
            dist.send(tensor, SECOND)


def _receive(header: Sequence[int], device: torch.device) -> list[Tensor]:
    tensors = []
    for start in range(0, HEADER, 2 + MAX_DIMS):
        dtype, num_dims, *sizes = header[start : start + 2 + MAX_DIMS]
        tensor = torch.empty(sizes[:num_dims], dtype=DTYPES[dtype], device=device)
        with partner_needed():
            dist.recv(tensor, FIRST)
        tensors.append(tensor)
    return tensors
