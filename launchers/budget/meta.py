"""Modules on the meta device, for counting parameters without memory."""

from __future__ import annotations

import functools
import re

import torch
from torch import nn

from landiff.model_zoo.config import DiffusionConfig, LMConfig, TokenizerConfig
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.lora.config import BaseKind, target_pattern
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.diffusion.config import DiffusionLoRAConfig
from landiff.training.lm.config import LMLoRAConfig

TrainedLoRA = LMLoRAConfig | DiffusionLoRAConfig

# A search over layouts asks for the same few modules many times.


@functools.cache
def lm_on_meta(config: LMConfig) -> LanguageModel:
    """The language model without memory."""
    with torch.device("meta"):
        return LanguageModel(config)


@functools.cache
def diffusion_on_meta(config: DiffusionConfig) -> ControlledDiffusion:
    """The diffusion model without memory."""
    with torch.device("meta"):
        return ControlledDiffusion(config)


@functools.cache
def tokenizer_on_meta(config: TokenizerConfig) -> SemanticTokenizer:
    """The tokenizer without memory."""
    with torch.device("meta"):
        return SemanticTokenizer(config)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_adapter_parameters(module: nn.Module, kind: BaseKind, lora: TrainedLoRA) -> int:
    """Number of parameters of the LoRA adapter of a base model of `kind`, which is `module`."""
    pattern = target_pattern(kind, lora.targets)
    count = 0
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and re.fullmatch(pattern, name):
            count += lora.rank * (child.in_features + child.out_features)
    return count


def count_linear_weights(module: nn.Module) -> int:
    """Number of elements in the weight matrices of all linear layers."""
    linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
    return sum(linear.weight.numel() for linear in linears)
