"""Files of DeepSpeed checkpoints, laid out by hand for three ranks."""

from __future__ import annotations

import collections
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

RANKS = 3
WEIGHTS = {
    "a.weight": torch.arange(35.0).view(5, 7),
    "a.bias": torch.arange(4.0) + 100,
    "b": torch.tensor(7.0),
}
SHAPES = [{name: tensor.shape for name, tensor in WEIGHTS.items()}]
FROZEN = torch.arange(10.0).view(2, 5).bfloat16()
BUFFER = torch.tensor([True, False])


def cut(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """End to end, padded, in equal parts: a group of ZeRO 1 and 2."""
    flat = torch.cat([t.flatten() for t in tensors])
    size = -(-len(flat) // RANKS)
    return list(torch.cat([flat, torch.zeros(size * RANKS - len(flat))]).split(size))


def slices(tensor: torch.Tensor) -> list[torch.Tensor]:
    """One parameter of ZeRO 3, padded, in equal parts."""
    return cut([tensor])


def adam(vectors: list[torch.Tensor], steps: int) -> dict:
    return {
        "state": {
            i: {"step": torch.tensor(float(steps)), "exp_avg": 2 * v, "exp_avg_sq": 3 * v}
            for i, v in enumerate(vectors)
        }
    }


def write(folder: Path, rank: int, stage: int, optimizer: dict, model: dict | None) -> None:
    folder.mkdir(exist_ok=True)
    optimizer |= {"zero_stage": ZeroStageEnum(stage), "loss_scaler": LossScaler(1)}
    torch.save(
        {"optimizer_state_dict": optimizer},
        folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
    )
    if model is not None:
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        torch.save(
            {"param_shapes": SHAPES, "buffer_names": ["mask"], **model},
            folder / f"{name}_model_states.pt",
        )


def write_stage_2(folder: Path, steps: tuple[int, ...] = (5, 5, 5)) -> Path:
    parts = cut(list(WEIGHTS.values()))
    size = len(parts[0])
    for rank, part in enumerate(parts):
        mapping, start = collections.OrderedDict(), 0
        for name, tensor in WEIGHTS.items():
            first, last = max(start, rank * size), min(start + tensor.numel(), (rank + 1) * size)
            if first < last:
                mapping[name] = fragment_address(start=first - rank * size, numel=last - first)
            start += tensor.numel()
        held = part[
            : sum(address.numel for address in mapping.values())
        ]  # DeepSpeed drops the padding of weights only
        write(
            folder,
            rank,
            2,
            {
                "single_partition_of_fp32_groups": [held],
                "base_optimizer_state": adam([part], steps[rank]),
                "param_slice_mappings": [mapping],
                "partition_count": [RANKS],
                "param_alignment_paddings": [[0, 0, 0]],
            },
            {
                "module": {
                    **{n: t.bfloat16() for n, t in WEIGHTS.items()},
                    "frozen": FROZEN,
                    "mask": BUFFER,
                }
            }
            if rank == 0
            else None,
        )
    return folder


def write_stage_3(folder: Path) -> Path:
    for rank in range(RANKS):
        groups = [
            slices(WEIGHTS["a.weight"])[rank],
            torch.cat([slices(WEIGHTS[n])[rank] for n in ("a.bias", "b")]),
        ]
        write(
            folder,
            rank,
            3,
            {
                "fp32_flat_groups": groups,
                "optimizer_state_dict": adam(groups, 5),
                "partition_count": RANKS,
            },
            {
                "module": {"mask": BUFFER, "frozen": torch.empty(0)},
                "frozen_param_shapes": {"frozen": FROZEN.shape},
                "frozen_param_fragments": {"frozen": slices(FROZEN.float())[rank].bfloat16()},
            },
        )
    return folder
