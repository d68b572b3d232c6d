"""Cost of a training config: parameters, memory and FLOPs, computed without running a step.

Parameters are counted on the real modules, built on the meta device. Memory and FLOPs follow from
the sizes:

* weights, gradients, optimizer: bytes per parameter of the engine's mixed precision, divided by the
  parallel layout;
* activations: what autograd keeps of each block, in multiples of the model width, with
  memory-efficient attention. With `recompute`, the input of each block and all activations of one;
* FLOPs: of all matrix multiplications, see `landiff.training.observe.flops`.

Allocator fragmentation and library workspaces are not included. Keep a tenth of a GPU free for
them.
"""

from __future__ import annotations

from landiff.launchers.budget.budget_plan import BudgetPlan
from landiff.launchers.budget.diffusion import plan_diffusion
from landiff.launchers.budget.lm import plan_lm
from landiff.launchers.budget.tokenizer import plan_tokenizer
from landiff.launchers.stages import AnyTrainConfig
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig


def make_plan(config: AnyTrainConfig, gpus: int, shape: ClipShape | None = None) -> BudgetPlan:
    """The cost of `config` on `gpus` GPUs.

    shape: of all clips. None for the one that model and data have.

    Raises ConfigError if ranks, model and batch do not divide; the message names the nearest sizes
    that do.
    """
    if isinstance(config, LMTrainConfig):
        return plan_lm(config, gpus, shape)
    if isinstance(config, TokenizerTrainConfig):
        if shape is not None:
            frames = min(shape.latent_frames, config.model.segment_frames)
            sized = config.model.sized(*shape.grid).model_copy(update={"segment_frames": frames})
            config = config.model_copy(update={"model": sized})
        return plan_tokenizer(config, gpus)
    if shape is not None:
        frames = min(shape.latent_frames, config.model.transformer.latent_frames)
        transformer = config.model.transformer.sized(frames, *shape.latent_size)
        model = config.model.model_copy(update={"transformer": transformer})
        config = config.model_copy(update={"model": model})
    return plan_diffusion(config, gpus)
