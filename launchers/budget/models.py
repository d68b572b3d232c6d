"""Parameters, memory and FLOPs of each trainer, counted without a step being made.

Parameters are counted on the real modules, built without memory. Memory and FLOPs follow from the sizes:

* weights, gradients, optimizer: bytes per parameter of the engine's own mixed precision, divided as its layout says;
* activations: what autograd keeps of each block, in units of the model width (`KEPT`), with memory-saving
  attention; with `recompute` one block input per layer and one block in full;
* FLOPs: 2 per weight and row, 4 S^2 D per attention (half where causal); backward costs twice the forward, once
  where weights are frozen; `hardware` counts what recompute does again.

Allocator waste and library workspaces are not in it: keep a tenth of a GPU free.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from landiff.configs import Config
from landiff.model_zoo.config import TransformerConfig
from landiff.model_zoo.registry import build_module
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.diffusion.config import DiffusionTrainConfig, ZeroConfig
from landiff.training.layout import check_batch, model_copies
from landiff.training.lm.config import LMTrainConfig
from landiff.training.tokenizer.config import TokenizerTrainConfig

GIB = 1 << 30
RUNTIME_BYTES = int(1.2 * GIB)  # CUDA context, cuBLAS and NCCL buffers
TEXT_TOKENS = 64  # of a caption on the language model's side, where real rows alone are kept
# What autograd keeps of a block, in widths per token: (not split by tensor parallel, split)
KEPT_LM, KEPT_LM_FFN = (
    (4, 4),
    3,
)  # both norms' and both matrices' inputs | q k v, attention out; 3 ffn widths
KEPT_DIT, KEPT_DIT_FROZEN = 22, 14
KEPT_TOKENIZER = 18


@dataclass(frozen=True)
class BudgetPlan:
    """What a config costs on `gpus` GPUs."""

    trainer: str
    gpus: int
    layout: str
    parameters: dict[str, int]
    memory: dict[str, int]  # bytes on the fullest GPU, by part
    model_flops: float  # of one optimizer step, all GPUs
    hardware_flops: float
    clips_per_step: int
    tokens_per_step: int
    copies: int  # of the model: data-parallel ranks
    gradient_bytes: int  # that a data-parallel rank sends per step
    overlap: bool  # of that with the backward
    layer_bytes: int = 0  # that a tensor-parallel rank sends per step
    tensor: int = 1
    bubble: float = 0.0  # idle share of a pipeline
    notes: tuple[str, ...] = field(default=())

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())


def make_plan(config: Config, gpus: int) -> BudgetPlan:
    """Raises ConfigError for a layout that does not divide, with the nearest that do."""
    if isinstance(config, LMTrainConfig):
        return plan_lm(config, gpus)
    if isinstance(config, DiffusionTrainConfig):
        return plan_diffusion(config, gpus)
    assert isinstance(config, TokenizerTrainConfig), type(config)
    return plan_tokenizer(config, gpus)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@functools.cache  # a search asks for the same few modules again and again
def on_meta(kind: str, config: Config) -> nn.Module:
    with torch.device("meta"):
        return build_module(kind, config)


# -------------------------------------------------------------------- language model


def plan_lm(config: LMTrainConfig, gpus: int) -> BudgetPlan:
    model, parallel = config.model, config.parallel
    tensor, pipeline = parallel.tensor, parallel.pipeline
    copies = model_copies(config, gpus)
    micro_batches = check_batch(config, gpus)
    module, layout = on_meta("lm", model), TokenLayout.of(model)
    width, layers = model.hidden_size, model.num_layers
    vocabulary = math.ceil(layout.vocab_size / config.vocab_multiple) * config.vocab_multiple
    text = min(TEXT_TOKENS, model.max_text_tokens)
    length = layout.sequence_length(model.segment_frames, text)
    rows = config.data.micro_batch_size * length  # tokens of a packed row

    split = sum(linear.weight.numel() for block in module.blocks for linear in block.linears)
    conditions = count(module.text) + count(module.micro)
    norms = count(module.blocks) - split
    ends = [
        vocabulary * width // tensor + conditions,
        vocabulary * width // tensor + count(module.final_norm),
    ]
    own = (split // tensor + norms) // pipeline + (sum(ends) if pipeline == 1 else max(ends))

    bf16 = config.precision == "bf16"
    shared = copies if parallel.distributed_optimizer else 1
    element = 2 if bf16 else 4
    kept = (
        KEPT_LM[0] * width / (tensor if parallel.sequence else 1)
        + (KEPT_LM[1] * width + KEPT_LM_FFN * model.ffn_size) / tensor
    ) * element
    inputs = width * element / (tensor if parallel.sequence else 1)
    in_flight = min(pipeline, micro_batches)
    per_row = (
        inputs * layers / pipeline * in_flight + kept
        if config.recompute
        else kept * layers / pipeline * in_flight
    )
    memory = {
        "weights": own * element,
        "gradients": own * 4,
        "optimizer": own * (12 if bf16 else 8) // shared,
        "activations": int(rows * per_row),
        "logits": rows * vocabulary // tensor * (4 + 4 + element),
        "runtime": RUNTIME_BYTES,
    }
    forward = (
        2 * length * (split + layout.vocab_size * width)
        + 2 * text * count_weights(module.text)
        + layers * 2 * length**2 * width
    )
    batch = config.data.global_batch_size
    bubble = (pipeline - 1) / (micro_batches + pipeline - 1)
    return BudgetPlan(
        "lm",
        gpus,
        f"tensor {tensor} x pipeline {pipeline} x data {copies}, {micro_batches} micro-batch(es) of {config.data.micro_batch_size}"
        + (", recompute" if config.recompute else ""),
        {"all": count(module), "per GPU": own},
        memory,
        3.0 * forward * batch,
        (4.0 if config.recompute else 3.0) * forward * batch,
        batch,
        batch * length,
        # gradients in float32, all-reduced; or scattered, and the parameters gathered
        copies=copies,
        gradient_bytes=own * (4 + (element if parallel.distributed_optimizer else 4))
        if copies > 1
        else 0,
        overlap=parallel.overlap,
        layer_bytes=4 * layers // pipeline * micro_batches * rows * width * element
        if tensor > 1
        else 0,
        tensor=tensor,
        bubble=bubble,
        notes=(f"{length} tokens a clip, {text} of them text",),
    )


def count_weights(module: nn.Module) -> int:
    """Elements of the matrices below `module`."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


# -------------------------------------------------------------------- diffusion


def dit_forward(config: TransformerConfig, layers: int) -> tuple[int, float]:
    """(tokens of a clip, FLOPs of its forward through `layers` blocks)."""
    grid = (config.latent_height // config.patch_size) * (config.latent_width // config.patch_size)
    tokens = config.latent_frames * grid + config.text_length
    width, patch = config.hidden_size, config.latent_channels * config.patch_size**2
    ends = (
        2 * config.text_length * config.text_dim * width
        + 2 * (tokens - config.text_length) * 2 * patch * width
    )
    modulation = 2 * config.time_embed_dim * 12 * width
    return tokens, ends + layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width + modulation)


def semantic_cost(module: nn.Module, transformer: TransformerConfig) -> tuple[float, int]:
    """(FLOPs, elements that autograd keeps) of one clip through the upsampler, measured without memory."""
    scale, channels = module.scale, module.config.feature_channels
    features = torch.empty(
        1,
        transformer.latent_frames,
        channels,
        transformer.latent_height // scale,
        transformer.latent_width // scale,
        device="meta",
    )
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        module(features)
    return counter.get_total_flops(), kept


def zero_traffic(stage: int, trained: int, frozen: int, micro_batches: int, element: int) -> int:
    """Bytes that a rank sends per step. Gradients travel in float32, weights in `element` bytes.

    Stages 2 and 3 reduce gradients after every micro-batch, 3 gathers weights for each pass.
    """
    gradients, weights = 4 * trained, element * trained
    if stage == 3:
        return micro_batches * (gradients + 2 * weights + 2 * element * frozen)
    return gradients * (micro_batches if stage == 2 else 1) + weights


def zero_buckets(zero: ZeroConfig, trained: int, element: int) -> int:
    """Bytes of the buffers for communication: gradients in float32, weights in `element` bytes."""
    reduced = min(trained, zero.reduce_bucket_size)
    gathered = min(trained, zero.allgather_bucket_size)
    return 4 * reduced + element * gathered


def plan_diffusion(config: DiffusionTrainConfig, gpus: int) -> BudgetPlan:
    sizes, control = config.model.transformer, config.phase == "control"
    micro_batches = check_batch(config, gpus)
    module = on_meta("diffusion", config.model)
    tokens, forward = dit_forward(sizes, sizes.num_layers)
    frozen, trained = (
        (count(module.transformer), count(module.control) + count(module.semantic))
        if control
        else (0, count(module.transformer))
    )
    rows, element = config.data.micro_batch_size * tokens, 2 if config.precision == "bf16" else 4
    width = sizes.hidden_size * element
    blocks = sizes.num_layers * (KEPT_DIT_FROZEN if control else KEPT_DIT) + (
        config.model.control_layers * (KEPT_DIT + 2) if control else 0
    )
    layers = sizes.num_layers + (config.model.control_layers if control else 0)
    semantic_flops, semantic_kept = semantic_cost(module.semantic, sizes) if control else (0.0, 0)
    _, branch = dit_forward(sizes, config.model.control_layers) if control else (0, 0.0)
    branch += 2 * tokens * config.model.control_layers * sizes.hidden_size**2 if control else 0.0

    stage = config.zero.stage
    memory = {
        "weights": (frozen + trained) * element // (gpus if stage == 3 else 1),
        "gradients": trained * 4 // (gpus if stage >= 2 else 1),  # summed in float32
        "optimizer": trained * (12 if element == 2 else 8) // gpus,
        "buckets": zero_buckets(config.zero, trained, element) if gpus > 1 else 0,
        "activations": int(
            rows * width * (layers + KEPT_DIT + 2 if config.recompute else blocks)
            + config.data.micro_batch_size * semantic_kept * element
        ),
        "runtime": RUNTIME_BYTES,
    }
    again = 1 if config.recompute else 0
    batch = config.data.global_batch_size
    learned = branch + (0 if control else forward)
    still = forward if control else 0.0
    model_flops = batch * (3 * (learned + semantic_flops) + 2 * still)
    hardware = model_flops + batch * again * (learned + still)
    return BudgetPlan(
        f"diffusion {config.phase}",
        gpus,
        f"ZeRO-{stage} over {gpus}, {micro_batches} micro-batch(es) of {config.data.micro_batch_size}"
        + (", recompute" if config.recompute else ""),
        {"all": frozen + trained, "trained": trained},
        memory,
        model_flops,
        hardware,
        batch,
        batch * tokens,
        copies=gpus,
        overlap=config.zero.overlap_communication,
        gradient_bytes=zero_traffic(stage, trained, frozen, micro_batches, element)
        if gpus > 1
        else 0,
        notes=(f"{tokens} tokens a clip, {sizes.text_length} of them text",),
    )


# -------------------------------------------------------------------- tokenizer


def plan_tokenizer(config: TokenizerTrainConfig, gpus: int) -> BudgetPlan:
    sizes = config.model
    micro_batches = check_batch(config, gpus)
    module = on_meta("tokenizer", sizes)
    parameters = count(module)
    visual = sizes.segment_frames * sizes.grid_height * sizes.grid_width
    codes = sizes.iframe_tokens + (sizes.segment_frames - 1) * sizes.pframe_tokens
    tokens, width, layers = visual + codes, sizes.hidden_size, 2 * sizes.num_layers
    rows = config.data.micro_batch_size * tokens
    element = (
        4 if config.precision == "fp32" else 3
    )  # autocast: norms and the residual stream stay float32
    forward = layers * (
        2 * tokens * 12 * width**2 + 4 * tokens**2 * width / 2
    )  # a frame attends about half of the others
    batch = config.data.global_batch_size
    again = 1 if config.recompute else 0
    memory = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "activations": int(
            rows
            * width
            * element
            * (layers + KEPT_TOKENIZER if config.recompute else layers * KEPT_TOKENIZER)
        ),
        "runtime": RUNTIME_BYTES,
    }
    return BudgetPlan(
        "tokenizer",
        gpus,
        f"data {gpus}, {micro_batches} micro-batch(es) of {config.data.micro_batch_size}"
        + (", recompute" if config.recompute else ""),
        {"all": parameters},
        memory,
        3.0 * forward * batch,
        (3.0 + again) * forward * batch,
        batch,
        batch * codes,
        copies=gpus,
        gradient_bytes=8 * parameters if gpus > 1 else 0,
        overlap=True,
        notes=(f"{visual} visual and {codes} code tokens a clip",),
    )
