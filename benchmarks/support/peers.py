"""Reference implementations that `benchmarks.gpu` measures beside the trainers.

Each function returns a training step of a model of the same sizes, with autocast and torch's fused
AdamW.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, current_flash_attention_impl, sdpa_kernel

from benchmarks.support.case import Case
from benchmarks.support.models import autocast
from landiff.model_zoo.token_layout import TokenLayout


def training_peer(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A step of AdamW on `loss`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def megatron_peer(case: Case, length: int) -> Callable[[], None]:
    """A step of Megatron-core's own GPT, in a process whose engine has set up its groups."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = case.sizes.lm
    vocabulary = -(-TokenLayout.of(sizes).vocab_size // 8) * 8
    if importlib.util.find_spec("transformer_engine") is not None and case.device.type == "cuda":
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    config = TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_heads,
        ffn_hidden_size=sizes.ffn_size,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=nn.functional.gelu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=case.device.type != "cuda",
    )
    model = GPTModel(
        config, spec, vocabulary, max_sequence_length=length, position_embedding_type="rope"
    ).to(case.device)
    ids_BS = torch.randint(0, vocabulary, (case.samples, length), device=case.device)
    positions_BS = torch.arange(length, device=case.device).expand(case.samples, -1)

    def loss() -> Tensor:
        with autocast(case.precision, case.device):
            return model(ids_BS, positions_BS, None, labels=ids_BS).mean()

    return training_peer(model, loss)


def best_attention(device: torch.device) -> AbstractContextManager[object]:
    """Context in which SDPA tries its fastest kernels first, as far as they are known."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if current_flash_attention_impl() is not None:  # FlashAttention-3 or 4
        order.reverse()
    return sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


def diffusers_peer(case: Case) -> Callable[[], None]:
    """A step of diffusers' transformer of the same size."""
    from diffusers import CogVideoXTransformer3DModel

    from landiff.model_zoo.convert.formats.diffusers_transformer import diffusers_config

    sizes = case.sizes.diffusion.transformer
    model = CogVideoXTransformer3DModel(**diffusers_config(sizes)).to(case.device)
    shape = (sizes.latent_frames, sizes.latent_channels, sizes.latent_height, sizes.latent_width)
    latents_BTCHW = torch.randn(case.samples, *shape, device=case.device)
    text_shape = (case.samples, sizes.text_length, sizes.text_dim)
    text_BLD = torch.randn(text_shape, device=case.device)
    timestep_B = torch.randint(0, 1000, (case.samples,), device=case.device)

    def loss() -> Tensor:
        with autocast(case.precision, case.device), best_attention(case.device):
            (out,) = model(latents_BTCHW, text_BLD, timestep_B, return_dict=False)
        return (out.float() - latents_BTCHW).square().mean()

    return training_peer(model, loss)
