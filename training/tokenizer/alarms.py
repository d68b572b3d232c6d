"""Alarms of the tokenizer: signs of a collapsing codebook, each with what to do. Torch-free."""

from __future__ import annotations

from landiff.training.observe.alarms import AlarmRule
from landiff.training.tokenizer.config import AlarmConfig

USED = "codebook/used_fraction"
PERPLEXITY = "codebook/perplexity"
DEAD = "codebook/dead_fraction"
COMMITMENT = "codebook/commitment_ratio"

FEW_CODES = (
    "few codes carry all information. Raise quantize_from_step so that k-means starts from trained "
    "latents, set model.normalize_features=true if channels differ in scale, or lower optim.lr"
)
DEAD_CODES = (
    "many codes are hardly used and get replaced. Use a smaller model.codebook_size, a larger "
    "data.global_batch_size, or a lower model.dead_code_threshold"
)
COMMITMENT_GROWS = (
    "the latents run away from their codes. Lower optim.lr or set optim.clip_grad, or raise "
    "model.commitment_weight"
)


def alarm_rules(config: AlarmConfig, codebook_size: int, num_codes: int) -> list[AlarmRule]:
    """The rules for a step with `num_codes` codes, of which a small batch cannot use all."""
    reachable = min(1.0, num_codes / codebook_size)
    return [
        AlarmRule(
            "code usage",
            USED,
            config.min_used_fraction * reachable,
            "alarms.min_used_fraction",
            FEW_CODES,
        ),
        AlarmRule(
            "perplexity", PERPLEXITY, config.min_perplexity, "alarms.min_perplexity", FEW_CODES
        ),
        AlarmRule(
            "dead codes",
            DEAD,
            config.max_dead_fraction,
            "alarms.max_dead_fraction",
            DEAD_CODES,
            above=True,
        ),
        AlarmRule(
            "commitment explosion",
            COMMITMENT,
            config.max_commitment_ratio,
            "alarms.max_commitment_ratio",
            COMMITMENT_GROWS,
            above=True,
        ),
    ]
