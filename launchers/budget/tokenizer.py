"""Cost of training the semantic tokenizer with torch DDP."""

from __future__ import annotations

from landiff.launchers.budget.budget_plan import (
    RUNTIME_BYTES,
    BudgetPlan,
    average_memory,
    layout_text,
)
from landiff.launchers.budget.meta import count_parameters, tokenizer_on_meta
from landiff.training.layout import check_batch
from landiff.training.observe.flops import tokenizer_flops
from landiff.training.tokenizer.config import TokenizerTrainConfig

# What autograd keeps of a block for each token, in model widths, beside copies of keys and values.
NORMS = 2  # inputs in float32, outputs in the working precision
KEPT_ENCODER = 15  # queries, keys and values, outputs of attention by span and joined, both of MLP
KEPT_DECODER = 11  # the same without keys and values, of which all spans have copies


def plan_tokenizer(config: TokenizerTrainConfig, gpus: int) -> BudgetPlan:
    """The cost of `config` on `gpus` GPUs. Raises ConfigError if they do not divide."""
    sizes = config.model
    micro_batches = check_batch(config, gpus)
    parameters = count_parameters(tokenizer_on_meta(sizes))
    frames = sizes.segment_frames
    visual = frames * sizes.grid_height * sizes.grid_width
    codes = sizes.iframe_tokens + (frames - 1) * sizes.pframe_tokens
    clip = tokenizer_flops(sizes, frames)
    gradient_bytes = 0
    if gpus > 1:
        gradient_bytes = 8 * parameters
    batch = config.data.global_batch_size
    return BudgetPlan(
        trainer="tokenizer",
        gpus=gpus,
        layout=layout_text(
            f"data {gpus}", micro_batches, config.data.micro_batch_size, config.recompute
        ),
        parameters={"all": parameters},
        memory={
            "weights": 4 * parameters,
            "gradients": 4 * parameters,
            "optimizer": 8 * parameters,
            **average_memory(config.ema, parameters),
            "activations": config.data.micro_batch_size * activations_per_clip(config),
            "runtime": RUNTIME_BYTES,
        },
        model_flops=batch * clip.total,
        hardware_flops=batch * (clip.total + config.recompute * clip.forward),
        clips_per_step=batch,
        tokens_per_step=batch * codes,
        copies=gpus,
        gradient_bytes=gradient_bytes,
        overlap=True,
        notes=(f"{visual} visual and {codes} code tokens a clip",),
    )


def activations_per_clip(config: TokenizerTrainConfig) -> int:
    """Bytes of activations that a rank keeps for each segment of a micro-batch."""
    model = config.model
    frames = model.segment_frames
    cells = model.grid_height * model.grid_width
    codes = model.iframe_tokens + (frames - 1) * model.pframe_tokens
    tokens = frames * cells + codes
    # The keys of a span with visual tokens and latents are laid end to end. Every frame has such a
    # span, of the tokens up to its end.
    copied = 0
    for frame in range(frames):
        copied += (frame + 1) * cells + model.iframe_tokens + frame * model.pframe_tokens
    element = 4 if config.precision == "fp32" else 2
    norms = NORMS * tokens * (4 + element)
    encoder = norms + (KEPT_ENCODER * tokens + 2 * copied) * element
    decoder = norms + (KEPT_DECODER * tokens + 2 * copied) * element
    if config.recompute:
        inputs = 2 * model.num_layers * tokens * 4
        return model.hidden_size * (inputs + max(encoder, decoder))
    return model.hidden_size * model.num_layers * (encoder + decoder)
