"""Cost of training the diffusion model with DeepSpeed ZeRO."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from landiff.launchers.budget.budget_plan import (
    GIB,
    NODE,
    RUNTIME_BYTES,
    BudgetPlan,
    average_memory,
    element_bytes,
    layout_text,
    with_update,
)
from landiff.launchers.budget.meta import (
    count_adapter_parameters,
    count_parameters,
    diffusion_on_meta,
)
from landiff.model_zoo.config import DiffusionConfig
from landiff.training.diffusion.config import DiffusionTrainConfig, ZeroConfig
from landiff.training.layout import check_batch
from landiff.training.observe.flops import (
    Flops,
    control_flops,
    main_flops,
    num_tokens,
    semantic_flops,
)

# What autograd keeps of a block for each token, in model widths.
KEPT = 22
KEPT_ONCE = 4  # of input and output layers
KEPT_FROZEN = 12  # all but the inputs of frozen linear layers
KEPT_CONTROL = KEPT + 1  # with the projection to the main transformer


@dataclass(frozen=True)
class DiffusionCost:
    """Cost of a training phase, for one clip where it depends on the number of clips."""

    trained: int  # parameters
    frozen: int  # parameters
    flops: Flops
    recomputed_flops: float  # forward pass of what `recompute` runs again
    semantic_elements: int  # that autograd keeps of the semantic condition
    num_layers: int  # of all transformers
    kept_widths: int  # that autograd keeps of all blocks for each token, without recomputation


def plan_diffusion(config: DiffusionTrainConfig, gpus: int) -> BudgetPlan:
    """The cost of `config` on `gpus` GPUs. Raises ConfigError if they do not divide."""
    transformer = config.model.transformer
    micro_batches = check_batch(config, gpus)
    tokens = num_tokens(transformer)
    cost = phase_cost(config)
    batch = config.data.global_batch_size
    recomputed = cost.recomputed_flops if config.recompute else 0.0
    sequence = config.sequence_parallel
    layout = f"ZeRO-{config.zero.stage} over {gpus}"
    if sequence > 1:
        layout += f", sequence {sequence} x data {gpus // sequence}"
    traffic = Traffic()
    if gpus > 1:
        traffic = zero_traffic(config, cost, micro_batches, gpus)
    return BudgetPlan(
        trainer=f"diffusion {config.phase}",
        gpus=gpus,
        layout=layout_text(
            layout,
            micro_batches,
            config.data.micro_batch_size,
            config.recompute,
        ),
        parameters={"all": cost.frozen + cost.trained, "trained": cost.trained},
        memory=memory_by_part(config, cost, gpus),
        model_flops=batch * cost.flops.total,
        hardware_flops=batch * (cost.flops.total + recomputed),
        clips_per_step=batch,
        tokens_per_step=batch * tokens,
        copies=gpus,  # ZeRO reduces over all of them
        layer_bytes=micro_batches * traffic_of_layers(config, cost),
        layer_group=sequence,
        gradient_bytes=traffic.between_nodes,
        node_bytes=traffic.in_node,
        overlap=config.zero.overlap_communication,
        notes=(
            f"{tokens} tokens a clip, {transformer.text_length} of them text",
            *hierarchy_notes(config, cost, micro_batches, gpus),
        ),
    )


def phase_cost(config: DiffusionTrainConfig) -> DiffusionCost:
    """Cost of a phase; with `lora`, of training an adapter of what the phase trains.

    Autograd then keeps what it keeps for training the weights, since most layers have an adapter.
    """
    control = config.phase == "control"
    cost = control_cost(config) if control else main_cost(config)
    if config.lora is None:
        return cost
    module = diffusion_on_meta(config.model)
    if control:
        trained = count_adapter_parameters(module, "diffusion", config.lora)
    else:
        trained = count_adapter_parameters(module.transformer, "transformer", config.lora)
    frozen = cost.frozen + cost.trained
    return replace(cost, trained=trained, frozen=frozen, semantic_elements=0)


def main_cost(config: DiffusionTrainConfig) -> DiffusionCost:
    """Cost of phase `main`, which trains the main transformer."""
    module = diffusion_on_meta(config.model)
    transformer = config.model.transformer
    flops = main_flops(transformer, adapter=config.lora is not None)
    return DiffusionCost(
        trained=count_parameters(module.transformer),
        frozen=0,
        flops=flops,
        recomputed_flops=flops.forward,
        semantic_elements=0,
        num_layers=transformer.num_layers,
        kept_widths=transformer.num_layers * KEPT + KEPT_ONCE,
    )


def control_cost(config: DiffusionTrainConfig) -> DiffusionCost:
    """Cost of phase `control`, which trains the control branch and the semantic condition."""
    module = diffusion_on_meta(config.model)
    transformer = config.model.transformer
    layers = config.model.control_layers
    flops = control_flops(config.model, adapter=config.lora is not None)
    return DiffusionCost(
        trained=count_parameters(module.control) + count_parameters(module.semantic),
        frozen=count_parameters(module.transformer),
        flops=flops,
        recomputed_flops=flops.forward - semantic_flops(config.model.semantic, transformer).forward,
        semantic_elements=semantic_elements(config.model),
        num_layers=transformer.num_layers + layers,
        # Nothing trained comes before the first frozen block.
        kept_widths=(transformer.num_layers - 1) * KEPT_FROZEN + layers * KEPT_CONTROL + KEPT_ONCE,
    )


@functools.cache
def semantic_elements(config: DiffusionConfig) -> int:
    """Elements that autograd keeps of one clip in the semantic condition.

    Counted by running it on the meta device.
    """
    module = diffusion_on_meta(config).semantic
    transformer = config.transformer
    features_BTChw = torch.empty(
        1,
        transformer.latent_frames,
        module.config.feature_channels,
        transformer.latent_height // module.scale,
        transformer.latent_width // module.scale,
        device="meta",
    )
    num_elements = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal num_elements
        if not isinstance(tensor, nn.Parameter):
            num_elements += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        module(features_BTChw)
    return num_elements


def memory_by_part(config: DiffusionTrainConfig, cost: DiffusionCost, gpus: int) -> dict[str, int]:
    """Bytes on one GPU, by part."""
    stage = config.zero.stage
    element = element_bytes(config.precision)
    optimizer_bytes = 12 if config.precision == "bf16" else 8
    # ZeRO 1 divides the optimizer over the GPUs, 2 also gradients, 3 also weights.
    weight_parts = gpus if stage == 3 else 1
    clips = config.data.micro_batch_size
    # The ranks of a sequence divide its positions.
    rows = clips * math.ceil(num_tokens(config.model.transformer) / config.sequence_parallel)
    # Recomputation keeps the input of every block, and all activations of the block in work.
    widths = cost.kept_widths
    if config.recompute:
        inputs = 0 if config.offload_activations else cost.num_layers
        widths = inputs + KEPT_CONTROL + KEPT_ONCE
    blocks = rows * config.model.transformer.hidden_size * element * widths
    trained = cost.trained
    gradients = 4 * trained  # summed in float32
    if stage > 1:
        gradients //= gpus
    gathered = 0
    if stage == 3:
        gathered = element * min(cost.frozen + trained, config.zero.max_live_parameters)
    memory = {
        "weights": (cost.frozen + trained) * element // weight_parts,
        "gathered": gathered,
        "node copy": node_copy(config, cost, gpus),
        "gradients": gradients,
        "optimizer": trained * optimizer_bytes // gpus,
        **average_memory(config.ema, trained // gpus),
        "buckets": zero_buckets(config.zero, trained, element) if gpus > 1 else 0,
        "activations": blocks + clips * cost.semantic_elements * element,
        "runtime": RUNTIME_BYTES,
    }
    # In stage 3 DeepSpeed joins the gradients of this part. torch's fused AdamW takes nothing.
    return with_update(memory, 4 * trained // gpus if stage == 3 else 0)


def traffic_of_layers(config: DiffusionTrainConfig, cost: DiffusionCost) -> float:
    """Bytes that a rank sends within its blocks for a micro-batch.

    Sequence parallelism exchanges queries, keys, values and outputs of attention. The backward pass
    does the same, recomputation once more.
    """
    size = config.sequence_parallel
    transformer = config.model.transformer
    own = config.data.micro_batch_size * num_tokens(transformer) / size * transformer.hidden_size
    passes = 3 if config.recompute else 2
    element = element_bytes(config.precision)
    return passes * cost.num_layers * 4 * own * element * (size - 1) / size


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in one step to all other ranks, and to those of its node alone."""

    between_nodes: int = 0
    in_node: int = 0


def zero_traffic(
    config: DiffusionTrainConfig, cost: DiffusionCost, micro_batches: int, gpus: int
) -> Traffic:
    """Traffic of ZeRO: gradients in float32, weights in their own precision.

    Stages 1 and 2 all-reduce gradients, stage 3 scatters their sums; stages 2 and 3 after every
    micro-batch. Stage 3 gathers weights for each pass. Hierarchical ZeRO gathers trained weights
    from all ranks in the first pass after an update only, and frozen ones never again.
    """
    element = element_bytes(config.precision)
    gradients = 4 * cost.trained
    weights = element * cost.trained
    if config.zero.stage == 3:
        gathered = micro_batches * 2 * element * (cost.trained + cost.frozen)
        reduced = micro_batches * gradients
        if not config.zero.node_copies(gpus):
            return Traffic(reduced + gathered)
        in_node = gathered - weights
        if config.zero.hpz_partition_size > NODE:
            return Traffic(reduced + weights + in_node)
        return Traffic(reduced + weights, in_node)
    gradients *= 2
    if config.zero.stage == 2:
        gradients *= micro_batches
    return Traffic(gradients + weights)


def node_copy(config: DiffusionTrainConfig, cost: DiffusionCost, gpus: int) -> int:
    """Bytes of a rank's part of the copy of the weights that hierarchical ZeRO keeps in a node."""
    if not config.zero.node_copies(gpus):
        return 0
    weights = element_bytes(config.precision) * (cost.frozen + cost.trained)
    return weights // config.zero.hpz_partition_size


def hierarchy_notes(
    config: DiffusionTrainConfig, cost: DiffusionCost, micro_batches: int, gpus: int
) -> tuple[str, ...]:
    """Text on the memory and traffic of hierarchical ZeRO; none without it."""
    memory = node_copy(config, cost, gpus)
    if not memory:
        return ()
    zero = config.zero.model_copy(update={"hpz_partition_size": 1})
    flat = config.model_copy(update={"zero": zero})
    before = zero_traffic(flat, cost, micro_batches, gpus).between_nodes
    after = zero_traffic(config, cost, micro_batches, gpus).between_nodes
    return (
        f"hierarchical ZeRO keeps {memory / GIB:.2f} GiB of weights more on each GPU; "
        f"{after / 1e9:.1f} GB a step between nodes, {before / 1e9:.1f} GB without it",
    )


def zero_buckets(zero: ZeroConfig, trained: int, element: int) -> int:
    """Bytes of the buckets in which gradients are reduced over several ranks.

    Stage 1 reduces the vector that sums them. Stage 2 fills float32 buckets (`FlatGradients`), the
    next one while one is reduced if it overlaps. In stage 3 DeepSpeed has one in the precision of
    the weights, of the whole size, and a float32 copy of what it reduces.
    """
    reduced = 4 * min(trained, zero.reduce_bucket_size)
    if zero.stage == 1:
        return 0
    if zero.stage == 2:
        return reduced * (2 if zero.overlap_communication else 1)
    return element * zero.reduce_bucket_size + reduced
