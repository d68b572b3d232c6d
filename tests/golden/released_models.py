"""Models with the sizes and weights of golden cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from landiff.model_zoo.config import LMConfig, TokenizerConfig
from landiff.model_zoo.convert.formats import release_lm, release_tokenizer
from landiff.model_zoo.convert.rules import apply_rules
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.tokenizer import SemanticTokenizer
from tests.golden.conftest import Case

# The README of the cases allows 1e-4. Float32 implementations differ by 1e-6 to 1e-5, wider models
# by more.
TOLERANCE = 5e-5


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compares with an absolute tolerance."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def lm_config(sizes: dict[str, Any]) -> LMConfig:
    """Config of a case's language model."""
    return LMConfig(
        codebook_size=sizes["codebook_size"],
        iframe_tokens=sizes["iframe_len"],
        pframe_tokens=sizes["pframe_len"],
        segment_frames=sizes["segment_length"],
        hidden_size=sizes["hidden_dim"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        ffn_size=sizes["mlp_dim"],
        rope_theta=sizes["rope_theta"],
        max_positions=sizes["max_len"],
        text_dim=sizes["text_dim"],
        max_text_tokens=sizes["text_len"],
        micro_hidden_size=sizes["micro_hidden_dim"],
        micro_frequency_dim=sizes["freq_dim"],
    )


def load_lm(case: Case) -> LanguageModel:
    """Language model of a case. Checks the ids of the structural tokens."""
    sizes = case.config
    model = LanguageModel(lm_config(sizes)).eval().requires_grad_(False)
    model.load_state_dict(apply_rules(case.weights, release_lm.RULES, "to_ours"))
    layout = model.layout
    assert sizes["vocab"] == {
        "EOS": layout.eos,
        "BOS": layout.bos,
        "START_OF_IFrame": layout.start_iframe,
        "END_OF_IFrame": layout.end_iframe,
        "START_OF_PFrame": layout.start_pframe,
        "END_OF_PFrame": layout.end_pframe,
        "PAD": layout.pad,
    }
    assert layout.vocab_size == sizes["vocab_size"]
    return model


def tokenizer_config(sizes: dict[str, Any], num_frames: int) -> TokenizerConfig:
    """Config of a case's tokenizer for clips of `num_frames`.

    A case contains one window of any length, so the segment is at least that long.
    """
    return TokenizerConfig(
        feature_channels=sizes["channels"],
        grid_height=sizes["grid"][0],
        grid_width=sizes["grid"][1],
        hidden_size=sizes["width"],
        num_heads=sizes["num_heads"],
        num_layers=sizes["num_layers"],
        token_size=sizes["token_size"],
        codebook_size=sizes["codebook_size"],
        codebook_dim=sizes["codebook_dim"],
        iframe_tokens=sizes["iframe_tokens"],
        pframe_tokens=sizes["pframe_tokens"],
        segment_frames=max(sizes["temporal_size"], num_frames),
    )


def load_tokenizer(
    sizes: dict[str, Any], weights: dict[str, Tensor], num_frames: int
) -> SemanticTokenizer:
    """Tokenizer of a case."""
    model = SemanticTokenizer(tokenizer_config(sizes, num_frames))
    model.load_state_dict(apply_rules(weights, release_tokenizer.RULES, "to_ours"), strict=True)
    return model
