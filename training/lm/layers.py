"""LM transformer layers that Megatron-core does not provide as the specification requires them.

The requirements are in docs/specification.md §4.5 and §6.4.

Shape letters (docs/glossary.md): N tokens of a packed row, S of them that are new to a cache, A
heads of this rank, d width of a head, D width of a vector.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.nn import functional

from landiff.configs.base import ConfigError
from landiff.model_zoo.attention import attention_varlen
from landiff.model_zoo.device import to_device
from landiff.model_zoo.layers import RMSNorm, gated_gelu, rotate, rotate_pairs, run_selectively
from landiff.training.float8 import layers as float8
from landiff.training.lm.batch import RowCache, Span
from landiff.training.lm.config import CHUNKS, LMTrainConfig

ACCUMULATING_KERNEL = "fused_weight_gradient_mlp_cuda"  # module of apex


def has_accumulating_kernel() -> bool:
    """Whether matrix multiplications can add to the float32 gradients of weights.

    Megatron-core and Transformer Engine then need no separate pass that adds them.
    """
    return importlib.util.find_spec(ACCUMULATING_KERNEL) is not None


@dataclass(frozen=True)
class RowPart:
    """The tokens of a packed row that this rank of `group` computes, in two spans.

    Context parallelism: a row is cut into twice as many chunks as there are ranks. Rank r has chunk
    r from the front and chunk r from the end, which balances causal attention. Norms, linear layers
    and loss process only a rank's own tokens (n of N). In attention every rank gathers keys and
    values of the row, and computes its own queries. Megatron-core sums gradients
    and numbers of targets over the ranks. Validation and sampling run whole rows on each rank.
    """

    group: dist.ProcessGroup
    spans: tuple[Span, ...]
    cu_seqlens: tuple[tuple[Tensor, Tensor], ...]  # of queries and of keys, by span

    @staticmethod
    def of(bounds: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> RowPart | None:
        """The part of this rank, None if the group has only this rank.

        bounds: start of each sample of the row, followed by the length of the row, a multiple of
        the chunks.
        """
        size = group.size()
        if size == 1:
            return None
        chunks = CHUNKS * size
        assert bounds[-1] % chunks == 0, (bounds[-1], chunks)
        length = bounds[-1] // chunks
        spans = []
        cu_seqlens = []
        for chunk in (group.rank(), chunks - 1 - group.rank()):
            span = Span.of(bounds, chunk * length, (chunk + 1) * length)
            ends = [(0, *span.query_ends), (0, *span.key_ends)]
            queries, keys = to_device(torch.tensor(ends, dtype=torch.int32), device).unbind()
            spans.append(span)
            cu_seqlens.append((queries, keys))
        return RowPart(group, tuple(spans), tuple(cu_seqlens))

    def own(self, x: Tensor) -> Tensor:
        """This rank's tokens of a tensor whose first dimension is N: [n, ...]."""
        return torch.cat([x[span.start : span.end] for span in self.spans])

    def whole(self, x: Tensor) -> Tensor:
        """All tokens, from those of each rank: [n, ...] -> [N, ...]. Collective."""
        gathered = gather_from_sequence_parallel_region(x, group=self.group)
        chunks = gathered.chunk(CHUNKS * self.group.size())
        # Of each rank the first chunk comes from the front of the row, the second from its end.
        return torch.cat([*chunks[::CHUNKS], *reversed(chunks[1::CHUNKS])])

    def attend(self, q_nAd: Tensor, k_nAd: Tensor, v_nAd: Tensor) -> Tensor:
        """Causal attention of this rank's tokens within their samples: [n, A, d]. Collective."""
        k_NAd, v_NAd = self.whole(torch.cat([k_nAd, v_nAd], dim=-1)).chunk(2, dim=-1)
        attended = []
        queries = q_nAd.chunk(CHUNKS)
        for q, span, (of_queries, of_keys) in zip(
            queries, self.spans, self.cu_seqlens, strict=True
        ):
            keys = slice(span.first_key, span.end)
            attended.append(
                attention_varlen(
                    q,
                    k_NAd[keys],
                    v_NAd[keys],
                    of_queries,
                    span.longest,
                    causal=True,
                    cu_seqlens_k=of_keys,
                )
            )
        return torch.cat(attended)


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron-core's description of a packed row, with the rotations that all layers share.

    cos_Nd, sin_Nd: float32 [N, d/2].
    rotary: cosines as real and sines as imaginary parts, complex64 [N, 1, d/2].
    part: with context parallelism, the tokens of this rank. N is then their number.
    cache: of the row that these positions belong to, if they are not a whole row.
    """

    cos_Nd: Tensor | None = None
    sin_Nd: Tensor | None = None
    rotary: Tensor | None = None
    part: RowPart | None = None
    cache: RowCache | None = None


class MegatronRMSNorm(RMSNorm):
    """RMSNorm with the constructor that Megatron-core calls.

    Megatron-core's own class refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        self.weight = _parameter(config, self.weight.detach())


class FinalNorm(nn.Module):
    """LayerNorm with weight and bias, float32 inside.

    Megatron-core has one `normalization` setting for all norms (§6.4 a).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(config, torch.ones(hidden_size))
        self.bias = _parameter(config, torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in the dtype of `x`."""
        shape = (x.shape[-1],)
        weight = self.weight.float()
        bias = self.bias.float()
        return functional.layer_norm(x.float(), shape, weight, bias, self.eps).to(x.dtype)


def _parameter(config: TransformerConfig, value: Tensor) -> nn.Parameter:
    """A parameter on the device and in the dtype of the config."""
    device = torch.device("cpu")
    if not config.use_cpu_initialization:
        device = torch.device("cuda", torch.cuda.current_device())
    parameter = nn.Parameter(value.to(device=device, dtype=config.params_dtype))
    # With sequence parallelism a rank has a part of the row only. The attribute tells
    # finalize_model_grads to sum the gradients over ranks.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


class PackedAttention(MegatronModule):
    """Rotary embedding and causal attention inside the samples of a packed row.

    There is neither mask nor padding. The rotation is done here because Megatron-core rotates in
    the dtype of the activations (§6.4 c) and copies the lengths of the samples from the device in
    every layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        self.layer_number = layer_number
        self._compiled_rotation: Callable[..., tuple[Tensor, Tensor]] | None = None

    def compile_rotation(self, **options: Any) -> None:
        """Compiles the rotation. options: those of torch.compile."""
        self._compiled_rotation = torch.compile(rotate_both, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedRow,
        **_: Any,
    ) -> Tensor:
        """query, key, value: [N, A, d]. Returns [N, A · d]."""
        row = packed_seq_params
        assert row.rotary is not None
        if self._compiled_rotation is not None:
            q_NAd, k_NAd = self._compiled_rotation(query, key, row.cos_Nd, row.sin_Nd)
        else:
            q_NAd = rotate_pairs(query, row.rotary)
            k_NAd = rotate_pairs(key, row.rotary)
        if row.part is not None:
            return row.part.attend(q_NAd, k_NAd, value).flatten(1)
        if row.cache is not None:
            return row.cache.attend(self.layer_number, q_NAd, k_NAd, value).flatten(1)
        attended_NAd = attention_varlen(
            q_NAd, k_NAd, value, row.cu_seqlens_q, row.max_seqlen_q, causal=True
        )
        return attended_NAd.flatten(1)


def rotate_both(
    query: Tensor, key: Tensor, cos_Nd: Tensor, sin_Nd: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotated query and key, [N, A, d], without complex numbers, which the compiler cannot fuse."""
    return rotate(query, cos_Nd, sin_Nd), rotate(key, cos_Nd, sin_Nd)


class ColumnLinear(ColumnParallelLinear):
    """Megatron-core's layer, without its overhead where the weight is not divided.

    Megatron-core's forward then runs two autograd functions in Python around the same product. With
    fused accumulation of gradients they are needed.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[N, 1, D] -> this rank's columns of the output, and the bias."""
        whole = self.tp_group.size() == 1 and self.bias is None and weight is None
        if not whole or self.gradient_accumulation_fusion:
            return super().forward(input_, weight, runtime_gather_output)
        return functional.linear(input_, self.weight), None


class RowLinear(RowParallelLinear):
    """Megatron-core's layer, without its overhead where the weight is not divided."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """This rank's columns of the input -> [N, 1, D], and the bias."""
        whole = self.tp_group.size() == 1 and self.bias is None
        if not whole or self.gradient_accumulation_fusion:
            return super().forward(input_)
        return functional.linear(input_, self.weight), None


class Float8ColumnLinear(ColumnLinear):
    """The layer with float8 matrix multiplication. Each rank scales its shard of the weight."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # In a tuple, so that it is no submodule, which would have the weight under a second name.
        self._product = (float8.product(self.weight),)

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """[N, 1, D] -> this rank's columns of the output, and no bias."""
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True)
        elif self.tp_group.size() > 1:
            input_ = copy_to_tensor_model_parallel_region(input_)
        return self._product[0](input_), None


class Float8RowLinear(RowLinear):
    """The layer with float8 matrix multiplication. Ranks reduce results in their own dtype."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._product = (float8.product(self.weight),)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """This rank's columns of the input -> [N, 1, D], and no bias."""
        output = self._product[0](input_)
        if self.sequence_parallel:
            output = reduce_scatter_to_sequence_parallel_region(output)
        elif self.tp_group.size() > 1:
            output = reduce_from_tensor_model_parallel_region(output)
        return output, None


class GatedMLP(MLP):
    """w2(gelu_tanh(w1 · x) * (w3 · x)).

    Megatron-core's own forward adds a constant 0 to the second factor, one more pass over it.
    """

    activate: Callable[[Tensor], Tensor] = staticmethod(gated_gelu)

    def compile_activation(self, **options: Any) -> None:
        """Compiles what is between the matrix multiplications. options: those of torch.compile."""
        self.activate = torch.compile(gated_gelu, **options)

    def forward(
        self, hidden_states: Tensor, per_token_scale: None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[N, 1, D] -> [N, 1, D] and the bias of the second layer, which is None here."""
        return self.linear_fc2(self.activate(self.linear_fc1(hidden_states)[0]))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron-core's, in which B of an adapter is divided like the weight: gate and up."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        name = f"{prefix}linear_fc1.lora_B"
        if name in state:
            state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets)
        return state


class Attention(SelfAttention):
    """Megatron-core's attention module, reduced to what a packed row needs.

    Megatron-core's forward also serves inference, grouped queries and offloading. On small models
    its code takes longer than the operators.
    """

    def forward(self, hidden_states: Tensor, packed_seq_params: PackedRow) -> Tensor:
        """[N, 1, D] -> [N, 1, D], under sequence parallelism this rank's part of the positions."""
        mixed = self.linear_qkv(hidden_states)[0]
        head_dim = self.hidden_size_per_attention_head
        # Rows of a head: query, key, value.
        query, key, value = mixed.view(len(mixed), -1, 3 * head_dim).split(head_dim, dim=-1)
        attended_ND = self.core_attention(
            query, key, value, None, packed_seq_params=packed_seq_params
        )
        return self.linear_proj(attended_ND[:, None])[0]


class Layer(TransformerLayer):
    """Megatron-core's layer, reduced to pre-norm attention and MLP without biases and dropout.

    selective_recompute: whether the backward pass computes again what `run_selectively` does not
        keep. `MegatronLM` sets it.
    """

    selective_recompute = False

    def forward(
        self, hidden_states: Tensor, *_: Any, packed_seq_params: PackedRow, **__: Any
    ) -> tuple[Tensor, None]:
        """[N, 1, D] -> [N, 1, D], and the context that layers with cross-attention return."""
        if self.selective_recompute and torch.is_grad_enabled():
            return run_selectively(self._run, hidden_states, packed_seq_params), None
        return self._run(hidden_states, packed_seq_params), None

    def _run(self, hidden_states: Tensor, packed_seq_params: PackedRow) -> Tensor:
        """[N, 1, D] -> [N, 1, D]."""
        attended = self.self_attention(self.input_layernorm(hidden_states), packed_seq_params)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states))[0]


def gelu_tanh(x: Tensor) -> Tensor:
    """tanh-GELU, the activation of the gate (§6.4 b), elementwise."""
    return functional.gelu(x, approximate="tanh")


def transformer_config(config: LMTrainConfig, num_heads: int) -> TransformerConfig:
    """Megatron-core's config of the model, with `num_heads` heads after padding.

    Fusions that need a compiler or Transformer Engine are off. Gradients of weights are added to
    the float32 sum in the matrix multiplication where apex is installed with its kernel for that.
    """
    model = config.model
    parallel = config.parallel
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    recompute: dict[str, Any] = {}
    if config.recompute:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=num_heads,
        kv_channels=model.hidden_size // model.num_heads,
        ffn_hidden_size=model.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=gelu_tanh,
        bias_activation_fusion=False,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.precision == "bf16",
        use_cpu_initialization=not torch.cuda.is_available(),
        # All weights, initial ones too, come from `MegatronLM.load_full`, so that they are equal in
        # every parallel layout.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # The loss is a sum, and gradients are divided by the global number of tokens.
        calculate_per_token_loss=True,
        # Rows differ in length. Megatron-core allows that only with this dispatcher.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=has_accumulating_kernel(),
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        cross_entropy_loss_fusion=False,
        persist_layer_norm=False,
        **recompute,
    )


def _leave(weight: Tensor) -> Tensor:
    """Initialization that leaves a weight as it is."""
    return weight


def block_spec(
    config: TransformerConfig, layers: Literal["local", "te"], fp8: bool
) -> TransformerBlockSubmodules:
    """Layers of the transformer, with Megatron-core's linear layers or with Transformer Engine's.

    All layers share one spec. Raises ConfigError if Transformer Engine is requested and not
    installed. `fp8`: local layers with float8 matrix multiplications.
    """
    if layers == "te":
        if importlib.util.find_spec("transformer_engine") is None:
            raise ConfigError(
                "layers = 'te' needs Transformer Engine, which is not installed; use layers = "
                "'local'"
            )
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.input_layernorm = MegatronRMSNorm
        spec.submodules.pre_mlp_layernorm = MegatronRMSNorm
        spec.module = Layer
        spec.submodules.self_attention.module = Attention
        column = Float8ColumnLinear if fp8 else ColumnLinear
        row = Float8RowLinear if fp8 else RowLinear
        spec.submodules.self_attention.submodules.linear_qkv = column
        spec.submodules.self_attention.submodules.linear_proj = row
        spec.submodules.mlp.submodules.linear_fc1 = column
        spec.submodules.mlp.submodules.linear_fc2 = row
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    spec.submodules.mlp.module = GatedMLP
    layer_specs = [spec] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layer_specs, layer_norm=FinalNorm)
