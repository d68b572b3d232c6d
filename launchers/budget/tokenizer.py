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

KEPT = 18  # what autograd keeps of a block for each token, in model widths


def plan_tokenizer(config: TokenizerTrainConfig, gpus: int) -> BudgetPlan:
    """The cost of `config` on `gpus` GPUs. Raises ConfigError if they do not divide."""
    sizes = config.model
    micro_batches = check_batch(config, gpus)
    parameters = count_parameters(tokenizer_on_meta(sizes))
    visual = sizes.segment_frames * sizes.grid_height * sizes.grid_width
    codes = sizes.iframe_tokens + (sizes.segment_frames - 1) * sizes.pframe_tokens
    tokens = visual + codes
    width = sizes.hidden_size
    layers = 2 * sizes.num_layers  # encoder and decoder
    clip = tokenizer_flops(sizes, sizes.segment_frames)
    # Under autocast, norms and the residual stream stay float32.
    element = 4 if config.precision == "fp32" else 3
    kept = layers * KEPT
    if config.recompute:
        kept = layers + KEPT
    gradient_bytes = 0
    if gpus > 1:
        gradient_bytes = 8 * parameters
    rows = config.data.micro_batch_size * tokens
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
            "activations": rows * width * element * kept,
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
