"""Memory, FLOPs and traffic of a training config on GPUs, and the disk of its checkpoints.

Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from landiff.launchers.stages import AnyTrainConfig
from landiff.training.config import EmaConfig, LoopConfig
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig

GIB = 1 << 30
NODE = 8  # GPUs of a node, which share fast links
RUNTIME_BYTES = int(1.2 * GIB)  # CUDA context, buffers of cuBLAS and NCCL


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """What one optimizer step of a config takes on `gpus` GPUs."""

    trainer: str
    gpus: int
    layout: str  # human-readable parallel layout
    parameters: dict[str, int]
    memory: dict[str, int]  # bytes on the fullest GPU, by part
    model_flops: float  # of one optimizer step on all GPUs, without recomputation
    hardware_flops: float  # the same, with recomputation
    clips_per_step: int
    tokens_per_step: int
    copies: int  # data-parallel copies of the model
    gradient_bytes: int  # sent by a data-parallel rank in one step
    overlap: bool  # gradients and weights are sent during forward and backward passes
    node_bytes: float = 0  # sent by a data-parallel rank to those of its node alone in one step
    layer_bytes: float = 0  # sent by a rank within the layers of the model in one step
    layer_group: int = 1  # ranks that divide each layer
    bubble: float = 0.0  # idle fraction of pipeline parallelism
    notes: tuple[str, ...] = ()

    @property
    def total_memory(self) -> int:
        """Bytes on the fullest GPU."""
        return sum(self.memory.values())


def element_bytes(precision: Literal["fp32", "bf16"]) -> int:
    """Bytes of one weight or activation."""
    return 2 if precision == "bf16" else 4


def average_memory(ema: EmaConfig | None, weights: int) -> dict[str, int]:
    """Bytes of the float32 moving average of `weights` weights, by part; none without `ema`."""
    return {} if ema is None else {"moving average": 4 * weights}


def with_update(memory: dict[str, int], update_bytes: int) -> dict[str, int]:
    """The parts of the memory, with what the optimizer's update takes beyond the activations.

    The update runs when the activations are freed. update_bytes: of its temporary tensors.
    """
    freed = memory["activations"] + memory.get("logits", 0)
    return {**memory, "update": max(0, update_bytes - freed)}


def layout_text(layout: str, micro_batches: int, micro_batch_size: int, recompute: bool) -> str:
    """The parallel layout of a plan, with micro-batches and recomputation."""
    text = f"{layout}, {micro_batches} micro-batch(es) of {micro_batch_size}"
    if recompute:
        text += ", recompute"
    return text


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of checkpoints on disk.

    own: of each one alone. shared: of the file of frozen weights, of which all checkpoints that a
    process writes hold hard links.
    """

    own: int
    shared: int = 0

    def of(self, count: int) -> int:
        """Bytes of `count` checkpoints in a run folder."""
        return count * self.own + min(count, 1) * self.shared


def checkpoint_bytes(config: AnyTrainConfig, weights: int, trained: int) -> CheckpointSize:
    """Size of a checkpoint: all weights, and of the trained ones moments, averages and copies.

    weights, trained: numbers of all weights and of those that are trained.
    """
    each = 8  # Adam's moments
    element = 4
    if not isinstance(config, TokenizerTrainConfig):
        element = element_bytes(config.precision)
        if config.precision == "bf16" or isinstance(config, DiffusionTrainConfig):
            each += 4  # float32 weights
        elif config.parallel.distributed_optimizer:
            each += 4
    if config.ema is not None:
        each += 4
    if isinstance(config, DiffusionTrainConfig):
        # ZeRO 3 does not store the working copy of trained weights.
        each += 0 if config.zero.stage == 3 else element
        return CheckpointSize(trained * each, (weights - trained) * element)
    if isinstance(config, LMTrainConfig):
        trained *= config.parallel.pipeline if config.lora is not None else 1
    return CheckpointSize(weights * element + trained * each)


def kept_checkpoints(loop: LoopConfig, steps: int) -> int:
    """Checkpoints that a run of `steps` steps leaves."""
    kept = min(loop.keep_last, -(-steps // loop.save_every))
    if loop.keep_every:
        kept += max(0, steps - loop.keep_last * loop.save_every) // loop.keep_every
    return kept
