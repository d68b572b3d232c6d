"""Cost of training the language model with Megatron-core."""

from __future__ import annotations

import math

from landiff.configs.base import ConfigError
from landiff.configs.problems import require_none
from landiff.data_pipeline.format.shards import read_manifest
from landiff.launchers.budget.budget_plan import (
    RUNTIME_BYTES,
    BudgetPlan,
    average_memory,
    element_bytes,
    layout_text,
    with_update,
)
from landiff.launchers.budget.meta import (
    count_adapter_parameters,
    count_linear_weights,
    count_parameters,
    lm_on_meta,
)
from landiff.model_zoo.frozen.clip_shape import ClipShape
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.layout import check_batch, model_copies
from landiff.training.lm.checks import check_rows
from landiff.training.lm.config import LMTrainConfig
from landiff.training.observe.flops import lm_flops

TEXT_TOKENS = 64  # assumed length of a caption; only real text rows are kept
# What autograd keeps of a block for each token, in model widths.
NORMS = 2  # not divided by tensor parallelism: inputs in float32, outputs in the working precision
KEPT_DIVIDED = 6  # divided: output of wqkv, of which values are a part, rotated queries and keys,
# and the output of attention
KEPT_SELECTIVE = 7  # with `selective_recompute`: input of the block, output of wqkv, of attention,
# of wo and of w2
KEPT_FFN_SELECTIVE = 2  # gate and up
KEPT_FFN = 4  # divided, in widths of the feed-forward layer: gate, up, activated gate, product


def plan_lm(config: LMTrainConfig, gpus: int, shape: ClipShape | None = None) -> BudgetPlan:
    """The cost of `config` on `gpus` GPUs, with clips of `shape` or of the data.

    Raises ConfigError if the GPUs do not divide.
    """
    require_none(check_rows(config, gpus))
    model = config.model
    parallel = config.parallel
    copies = model_copies(config, gpus)
    micro_batches = check_batch(config, gpus)
    module = lm_on_meta(model)
    text = min(TEXT_TOKENS, model.max_text_tokens)
    frames, origin = clip_frames(config)
    if shape is not None:
        frames = shape.latent_frames
        origin = f"bucket {shape.name}"
    length = TokenLayout.of(model).sequence_length(frames, text)
    rows = config.data.micro_batch_size * length  # tokens of a packed row
    own = parameters_of_fullest_rank(config, module)
    trained = own
    if config.lora is not None:
        # As if no matrix of the adapter were divided over tensor-parallel ranks: half of them are.
        trained = count_adapter_parameters(module, "lm", config.lora) // parallel.pipeline
    clip = lm_flops(model, length, text, adapter=config.lora is not None)
    batch = config.data.global_batch_size
    element = element_bytes(config.precision)

    gradient_bytes = 0
    if copies > 1:
        # Gradients are all-reduced in float32, or reduce-scattered and the parameters all-gathered.
        gathered = element if parallel.distributed_optimizer else 4
        gradient_bytes = trained * (4 + gathered)
    counts = {"all": count_parameters(module), "per GPU": own}
    if config.lora is not None:
        counts["trained"] = trained
    return BudgetPlan(
        trainer="lm",
        gpus=gpus,
        layout=layout_text(
            layout_sizes(config, copies),
            micro_batches,
            config.data.micro_batch_size,
            config.recompute,
        ),
        parameters=counts,
        memory=memory_of_fullest_rank(config, own, trained, rows, copies, micro_batches),
        model_flops=batch * clip.total,
        hardware_flops=batch * (clip.total + config.recompute * clip.forward),
        clips_per_step=batch,
        tokens_per_step=batch * length,
        copies=copies,
        gradient_bytes=gradient_bytes,
        overlap=parallel.overlap,
        layer_bytes=micro_batches * traffic_of_layers(config, rows),
        layer_group=parallel.tensor * parallel.context,
        bubble=pipeline_bubble(config, micro_batches),
        notes=(f"{length} tokens a clip of {frames} frames ({origin}), {text} of them text",),
    )


def pipeline_bubble(config: LMTrainConfig, micro_batches: int) -> float:
    """Fraction of a step in which a pipeline stage waits for others.

    Stages fill and drain in `pipeline - 1` passes of a row through one chunk of layers.
    """
    parallel = config.parallel
    waits = parallel.pipeline - 1
    return waits / (micro_batches * parallel.virtual_pipeline + waits)


def layout_sizes(config: LMTrainConfig, copies: int) -> str:
    """The parallel layout as text."""
    parallel = config.parallel
    text = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
    if parallel.virtual_pipeline > 1:
        text += f" ({parallel.virtual_pipeline} chunks)"
    if parallel.context > 1:
        text += f" x context {parallel.context}"
    return f"{text} x data {copies}"


def traffic_of_layers(config: LMTrainConfig, rows: int) -> float:
    """Bytes that a rank sends within its layers for a packed row of `rows` tokens.

    Tensor parallelism all-reduces two outputs of each layer, or gathers and scatters them. Context
    parallelism gathers keys and values. The backward pass does the same, recomputation once more.
    """
    parallel = config.parallel
    own = rows / parallel.context * config.model.hidden_size * element_bytes(config.precision)
    passes = 3 if config.recompute or config.selective_recompute else 2
    sent = 2 * 2 * own * (parallel.tensor - 1) / parallel.tensor
    sent += 2 * own / parallel.tensor * (parallel.context - 1)
    return passes * sent * config.model.num_layers / parallel.pipeline


def clip_frames(config: LMTrainConfig) -> tuple[int, str]:
    """Semantic frames of a clip, all segments together, and where the number is from.

    A clip of the data if all have equally many tokens of this model. Otherwise one segment.
    """
    segment = config.model.segment_frames
    if config.data.remote:
        return segment, "one segment, as the data are remote"
    try:
        manifest = read_manifest(config.data.manifest)
    except (OSError, ConfigError):
        return segment, "one segment, without data"
    tokens = manifest.columns.get(config.tokens_column)
    num_codes = tokens.shape[-1] if tokens is not None else 0
    if not num_codes:
        return segment, "one segment, as clips differ or have no tokens yet"
    try:
        frames = TokenLayout.of(config.model).num_frames(num_codes)
    except ValueError:
        return segment, f"one segment, as the tokens of {config.data.manifest} are of another model"
    return frames, f"clips of {config.data.manifest}"


def padded_vocabulary(config: LMTrainConfig) -> int:
    """Vocabulary size of embedding and head, rounded up to `vocab_multiple`."""
    size = TokenLayout.of(config.model).vocab_size
    return math.ceil(size / config.vocab_multiple) * config.vocab_multiple


def parameters_of_fullest_rank(config: LMTrainConfig, module: LanguageModel) -> int:
    """Parameters on the rank that holds the most.

    Tensor parallelism divides all matrices, pipeline parallelism the layers. The first stage holds
    embedding and conditions, the last one the head.
    """
    tensor = config.parallel.tensor
    pipeline = config.parallel.pipeline
    matrices = count_linear_weights(module.blocks)
    norms = count_parameters(module.blocks) - matrices
    embedding = padded_vocabulary(config) * config.model.hidden_size // tensor
    first = embedding + count_parameters(module.text) + count_parameters(module.micro)
    last = embedding + count_parameters(module.final_norm)
    layers = (matrices // tensor + norms) // pipeline
    if pipeline == 1:
        return layers + first + last
    return layers + max(first, last)


def memory_of_fullest_rank(
    config: LMTrainConfig, own: int, trained: int, rows: int, copies: int, micro_batches: int
) -> dict[str, int]:
    """Bytes by part, on the rank that holds `own` parameters, `trained` of which are trained.

    rows: tokens in a packed row.
    """
    parallel = config.parallel
    element = element_bytes(config.precision)
    optimizer_bytes = 12 if config.precision == "bf16" else 8
    optimizer_parts = copies * parallel.context if parallel.distributed_optimizer else 1
    own_rows = rows / parallel.context
    logits = own_rows * padded_vocabulary(config) / parallel.tensor
    memory = {
        "weights": own * element,
        "gradients": trained * 4,
        "optimizer": trained * optimizer_bytes // optimizer_parts,
        **average_memory(config.ema, own // optimizer_parts),
        "activations": int(own_rows * activations_per_token(config, micro_batches)),
        # Of the model, masked where the vocabulary is padded, and in float32.
        "logits": int(logits * (2 * element + 4)),
        "runtime": RUNTIME_BYTES,
    }
    fused = bool(config.optim.fused)
    return with_update(memory, 0 if fused else trained * 4 // optimizer_parts)


def activations_per_token(config: LMTrainConfig, micro_batches: int) -> float:
    """Bytes of activations that a rank keeps for each of its tokens of a packed row."""
    model = config.model
    tensor = config.parallel.tensor
    element = element_bytes(config.precision)
    sequence_parts = tensor if config.parallel.sequence else 1
    attention: float = KEPT_DIVIDED
    context = config.parallel.context
    if context > 1:
        # Own rotated queries, output, and keys and values of the whole row.
        attention = 2 + 2 * context
    divided = attention * model.hidden_size + KEPT_FFN * model.ffn_size
    norms = NORMS * model.hidden_size * (4 + element) / sequence_parts
    if config.fp8:  # keeps gathered inputs of two layers, which Megatron-core would gather again
        norms += 2 * model.hidden_size * element * (1 - 1 / sequence_parts)
    block = norms + divided / tensor * element
    layers = kept_layers(config, micro_batches)
    if config.selective_recompute:
        kept = KEPT_SELECTIVE * model.hidden_size + KEPT_FFN_SELECTIVE * model.ffn_size
        return kept * element * layers + block
    if not config.recompute:
        return block * layers
    block_input = model.hidden_size * element / sequence_parts
    return block_input * layers + block


def kept_layers(config: LMTrainConfig, micro_batches: int) -> float:
    """Layers times rows of which the first pipeline stage keeps activations at the same time.

    In the interleaved schedule it is more layers ahead of the backward pass.
    """
    pipeline = config.parallel.pipeline
    virtual = config.parallel.virtual_pipeline
    ahead = pipeline  # passes of a row through a chunk
    if virtual > 1:
        ahead = 2 * (pipeline - 1) + (virtual - 1) * pipeline + 1
    chunk = config.model.num_layers / (pipeline * virtual)
    return chunk * min(ahead, micro_batches * virtual)
