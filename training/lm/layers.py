"""What of the language model's block Megatron-core does not have as the specification (§4.5, §6.4) wants it.

Letters: N tokens of a packed row, H heads of this rank, D head size.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from configs.base import ConfigError
from model_zoo.attention import attention_varlen
from model_zoo.lm import rotate
from training.lm.config import LMTrainConfig


@dataclass
class PackedRow(PackedSeqParams):
    """core's description of a packed row, plus the rotations of its tokens: every layer needs the same ones."""

    rotary: tuple[Tensor, Tensor] | None = None  # float32 cosines and sines [N, D / 2]


class RMSNorm(nn.Module):
    """float32 inside, weight multiplied in float32, cast back. core's own refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class FinalNorm(nn.Module):
    """LayerNorm with weight and bias: after RMSNorm blocks, what core's one `normalization` setting cannot say."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, torch.ones(hidden_size))
        self.bias = _parameter(config, torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (x.shape[-1],), self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def _parameter(config: TransformerConfig, value: Tensor) -> nn.Parameter:
    device = "cpu" if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
    parameter = nn.Parameter(value.to(device=device, dtype=config.params_dtype))
    # each rank sees a part of the row only, so finalize_model_grads must add up the gradients
    parameter.sequence_parallel = config.sequence_parallel
    return parameter


class PackedAttention(MegatronModule):
    """Rotary embedding and causal attention inside the samples of a packed row; no mask, no padding.

    The rotation is here and not in core because core rotates in the activations' dtype (§6.4 c) and reads the
    samples' lengths back from the device in every layer.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str,
                 **_: Any) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and config.context_parallel_size == 1, (attn_mask_type, config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *,
                packed_seq_params: PackedRow, **_: Any) -> Tensor:
        """query, key, value [N, H, D] -> [N, H * D]"""
        row = packed_seq_params
        query, key = rotate(query, *row.rotary), rotate(key, *row.rotary)
        return attention_varlen(query, key, value, row.cu_seqlens_q, row.max_seqlen_q, causal=True).flatten(1)


class GatedMLP(MLP):
    """w2(gelu_tanh(w1 x) * w3 x). core's own would add a constant 0 to the second factor, a pass over all of it."""

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
        gate, up = self.linear_fc1(hidden_states)[0].chunk(2, dim=-1)
        return self.linear_fc2(self.activation_func(gate) * up)


def gelu_tanh(x: Tensor) -> Tensor:
    """The gate's activation (§6.4 b); `F.gelu` alone is the exact form."""
    return F.gelu(x, approximate="tanh")


def transformer_config(config: LMTrainConfig, num_heads: int) -> TransformerConfig:
    """The same model in Megatron's words. Fusions that need a compiler, apex or Transformer Engine are off."""
    model, parallel = config.model, config.parallel
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    saved = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if config.recompute else {}
    return TransformerConfig(
        num_layers=model.num_layers, hidden_size=model.hidden_size,
        num_attention_heads=num_heads, kv_channels=model.hidden_size // model.num_heads,
        ffn_hidden_size=model.ffn_size, normalization="RMSNorm", layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True, activation_func=gelu_tanh, bias_activation_fusion=False, add_bias_linear=False,
        attention_dropout=0.0, hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor, pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=config.precision == "bf16",
        use_cpu_initialization=not torch.cuda.is_available(),
        # weights come from `model.load_full`, fresh ones too: equal for every layout
        init_method=_leave, output_layer_init_method=_leave, embedding_init_method=_leave,
        calculate_per_token_loss=True,  # the loss is a sum; gradients are divided by the global number of tokens
        variable_seq_lengths=True, moe_token_dispatcher_type="alltoall",  # rows differ in length; core ties the two
        batch_p2p_comm=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        bias_dropout_fusion=False, apply_rope_fusion=False, cross_entropy_loss_fusion=False, persist_layer_norm=False,
        **saved,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


def block_spec(config: TransformerConfig, layers: Literal["local", "te"]) -> TransformerBlockSubmodules:
    """The one place that chooses between Megatron's own linear layers and Transformer Engine's.

    Raises ConfigError where Transformer Engine is asked for and not installed.
    """
    if layers == "te":
        if importlib.util.find_spec("transformer_engine") is None:
            raise ConfigError("layers = 'te' needs Transformer Engine, which is not installed; use layers = 'local'")
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.input_layernorm = RMSNorm
        spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    spec.submodules.mlp.module = GatedMLP
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=FinalNorm)
