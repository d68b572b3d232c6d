"""The language model as a Megatron-core GPT: packed rows in, loss of each token out.

It computes the same as `landiff.model_zoo.lm.LanguageModel`, whose condition modules it uses,
sharded over tensor-parallel ranks and pipeline stages.

Without `parallel.virtual_pipeline` a rank holds one chunk of layers: its pipeline stage. With it, a
rank holds several chunks, and a row passes through chunk 0 of all ranks, then chunk 1 of all ranks,
and so on. Training uses Megatron-core's interleaved schedule, which has a smaller pipeline bubble
(`train_rows`).

Shape letters (docs/glossary.md): N tokens of a packed row, B samples in it, M text rows of all
samples, D width of a vector (of text states or of the model), V vocabulary of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from landiff.model_zoo import keyed_random
from landiff.model_zoo.config import LMConfig
from landiff.model_zoo.convert.formats.megatron import (
    Padded,
    megatron_rules,
    module_name,
    shard,
    to_megatron,
)
from landiff.model_zoo.convert.rules import rule_groups
from landiff.model_zoo.layers import compile_blocks, rotary_table
from landiff.model_zoo.lm import (
    INIT_STD,
    LanguageModel,
    MicroConditions,
    TextProjection,
    micro_conditions,
)
from landiff.model_zoo.token_layout import IGNORE, TokenLayout
from landiff.training.lm.batch import LMRow, RowCache, pad_to
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.layers import (
    PackedRow,
    RowPart,
    block_spec,
    transformer_config,
)
from landiff.training.lm.lora import add_layers, freeze_base
from landiff.training.lm.validation import ValidationRow
from landiff.training.replace import replaced


class MegatronLM(GPTModel):
    """This rank's part of the model, or one chunk of it (`ModelChunks`).

    The weights are undefined until `load_full` sets them.
    """

    def __init__(self, config: LMTrainConfig, chunk: int = 0) -> None:
        """`chunk`: number of the chunk, below `parallel.virtual_pipeline`."""
        sizes = config.model
        vocab = TokenLayout.of(sizes).vocab_size
        padded = Padded(
            pad_to(vocab, config.vocab_multiple), pad_to(sizes.num_heads, config.head_multiple)
        )
        core = transformer_config(config, padded.heads)
        blocks = block_spec(core, config.layers, config.fp8)
        if config.lora is not None:
            add_layers(blocks.layer_specs[0].submodules, config.lora)
        last_chunk = config.parallel.virtual_pipeline - 1
        super().__init__(
            config=core,
            transformer_layer_spec=blocks,
            vocab_size=padded.vocab,
            max_sequence_length=sizes.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage() and chunk == 0,
            post_process=parallel_state.is_pipeline_last_stage() and chunk == last_chunk,
            position_embedding_type="none",  # PackedAttention rotates
            # `embed` scatters the sequence after it has inserted the conditions.
            scatter_embedding_sequence_parallel=False,
            vp_stage=chunk,
        )
        self.sizes = sizes
        self.vocab = vocab
        self.padded = padded
        if self.pre_process:
            # Replicated on all tensor-parallel ranks. Inputs are equal, and gradients are equal
            # after the all-reduce or gather, so the weights stay equal.
            device = self.embedding.word_embeddings.weight.device
            text, micro = condition_modules(sizes)
            self.text = text.to(device, core.params_dtype)
            self.micro = micro.to(device, core.params_dtype)
        self.fp8 = config.fp8
        if config.selective_recompute:
            for layer in self.decoder.layers:
                layer.selective_recompute = True
        self.adapted = config.lora is not None
        if self.adapted:
            freeze_base(self)

    def compile_blocks(self, **options: Any) -> None:
        """Compiles norms, rotations, activations and float8 layers at their first call.

        options: those of torch.compile. Megatron-core's linear layers are not compiled: their hooks
        gather weights and add gradients, and the compiler would trace them anew for each layer. Nor
        is attention of a packed row, which has its own kernels, or on the CPU one call for each
        length.
        """
        if self.post_process:
            compile_blocks([self.decoder.final_layernorm], **options)
        for layer in self.decoder.layers:
            attention = layer.self_attention
            compile_blocks([layer.input_layernorm, layer.pre_mlp_layernorm], **options)
            layer.mlp.compile_activation(**options)
            attention.core_attention.compile_rotation(**options)
            if self.fp8:  # uncompiled, scaling and rounding are passes over memory of their own
                linears = [attention.linear_qkv, attention.linear_proj]
                compile_blocks([*linears, layer.mlp.linear_fc1, layer.mlp.linear_fc2], **options)

    def embed(self, row: LMRow, part: RowPart | None = None) -> Tensor:
        """Token embeddings, with the condition vectors at their positions.

        Returns [N, 1, D], under sequence or context parallelism this rank's part of the N
        positions.
        """
        ids_1N = row.ids_N.masked_fill(row.ids_N == IGNORE, 0)[None]
        tokens_ND = self.embedding(input_ids=ids_1N, position_ids=None)[:, 0]
        text_MD = self.text(row.text_MD.to(tokens_ND.dtype), row.drop_text_M)
        frames_BD, motion_BD = self.micro(row.frames_B, row.motion_score_B, row.grid_B2).unbind(1)
        positions = torch.cat([row.text_at_M, row.frames_at_B, row.motion_at_B])
        vectors = torch.cat([text_MD, frames_BD, motion_BD]).to(tokens_ND.dtype)
        mixed_N1D = tokens_ND.index_copy(0, positions, vectors)[:, None]
        if part is not None:
            mixed_N1D = part.own(mixed_N1D)
        if self.config.sequence_parallel:
            mixed_N1D = tensor_parallel.scatter_to_sequence_parallel_region(mixed_N1D)
        if self.adapted and torch.is_grad_enabled():
            # With `recompute`, Megatron-core computes no gradients of a layer whose input needs
            # none, and all that comes before the first adapter is frozen.
            mixed_N1D.requires_grad_()
        return mixed_N1D

    def forward(
        self,
        row: LMRow,
        part: RowPart | None = None,
        *,
        logits: bool = False,
        cache: RowCache | None = None,
    ) -> Tensor:
        """Loss of each token, [1, N], or of the tokens of `part`, which is this rank's.

        With `logits` it returns logits instead, float32 [N, vocabulary], complete on all
        tensor-parallel ranks. Pipeline stages before the last return hidden states, which
        Megatron's schedule sends to the next stage.

        cache: of a longer row, of which `row` holds the positions `cache.parts`.
        """
        positions_N = row.positions_N
        targets_N = row.targets_N
        if part is not None:
            positions_N = part.own(positions_N)
            targets_N = part.own(targets_N)
        cos_Nd, sin_Nd = rotary_table(positions_N, self.config.kv_channels, self.sizes.rope_theta)
        packed = PackedRow(
            qkv_format="thd",
            cu_seqlens_q=row.cu_seqlens,
            cu_seqlens_kv=row.cu_seqlens,
            max_seqlen_q=row.max_seqlen,
            max_seqlen_kv=row.max_seqlen,
            cos_Nd=cos_Nd,
            sin_Nd=sin_Nd,
            rotary=torch.complex(cos_Nd, sin_Nd)[:, None],
            part=part,
            cache=cache,
        )
        embedded = None
        if self.pre_process:
            embedded = self.embed(row, part)
        labels = None
        if not logits:
            labels = targets_N[None]
        out = super().forward(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=embedded,
            labels=labels,
            packed_seq_params=packed,
            runtime_gather_output=logits,
        )
        if logits and self.post_process:
            return out[0, :, : self.vocab].float()
        return out

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of each token, without the rows that pad the vocabulary (§6.4 d).

        labels: [1, N]. logits: [N, 1, V]. Returns [1, N].
        """
        rank = parallel_state.get_tensor_model_parallel_rank()
        rows = logits.shape[-1]
        real = max(0, self.vocab - rank * rows)  # rows of this rank that are not padding
        if real < rows:
            padding_V = torch.arange(rows, device=logits.device) >= real
            logits = logits.masked_fill(padding_V, -torch.inf)
        return super().compute_language_model_loss(labels, logits)

    def own_names(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Names of this rank's parameters -> the one or two of `names` that they hold.

        `names`: of all weights of `LanguageModel`, and of an adapter.
        """
        offset = get_transformer_layer_offset(self.config, self.vp_stage)
        parameters = dict(self.named_parameters())
        found = {}
        for group in rule_groups(names, megatron_rules(self.sizes, self.padded), "to_theirs"):
            (theirs,) = group.targets
            name = _local_name(theirs, offset)
            name = name if name in parameters else module_name(name)
            if name in parameters:
                found[name] = group.sources
        return found

    @torch.no_grad()
    def load_full(self, source: Mapping[str, Tensor]) -> None:
        """Loads this rank's part of complete weights with the names of `LanguageModel`.

        Raises ConversionError for names or shapes that do not fit.
        """
        offset = get_transformer_layer_offset(self.config, self.vp_stage)
        layers = range(offset, offset + len(self.decoder.layers))
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        parameters = dict(self.named_parameters())
        weights = to_megatron(
            source, self.sizes, self.padded, layers, self.pre_process, self.post_process
        )
        for theirs, whole in weights:
            name = _local_name(theirs, offset)
            parameter = parameters.pop(name if name in parameters else module_name(name))
            if getattr(parameter, "tensor_model_parallel", False):
                stride = 2 if "linear_fc1" in name else 1  # gate and up are divided one by one
                whole = shard(whole, parameter.partition_dim, stride, rank, size)
            assert whole.shape == parameter.shape, (name, whole.shape, parameter.shape)
            parameter.copy_(whole)
        assert not parameters, f"no weights for {sorted(parameters)}"


class ModelChunks(nn.ModuleList):
    """This rank's chunks of the model, in the order in which a row passes through them."""

    def __init__(self, config: LMTrainConfig) -> None:
        """Build `parallel.virtual_pipeline` chunks, with undefined weights."""
        count = config.parallel.virtual_pipeline
        super().__init__(MegatronLM(config, number) for number in range(count))

    @property
    def models(self) -> list[MegatronLM]:
        """The chunks."""
        return cast(list[MegatronLM], list(self))

    def sharded_state_dict(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Entries of all chunks by local name. Their keys on disk do not depend on the layout."""
        found = {}
        for number, model in enumerate(self.models):
            for name, entry in model.sharded_state_dict(metadata=metadata).items():
                found[f"{number}.{name}"] = entry
        return found

    def own_names(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Names of this rank's parameters -> the one or two of `names` that they hold."""
        all_names = list(names)
        found = {}
        for number, model in enumerate(self.models):
            for name, sources in model.own_names(all_names).items():
                found[f"{number}.{name}"] = sources
        return found

    def load_full(self, source: Mapping[str, Tensor]) -> None:
        """Load this rank's part of complete weights, see `MegatronLM.load_full`."""
        for model in self.models:
            model.load_full(source)


class _Neighbors(P2PCommunicator):
    """Exchanges activations with the pipeline stages before and after this one.

    With two stages both neighbors are the same rank. Megatron-core's own exchange of shapes then
    takes the shape of a forward activation for that of a gradient if one call exchanges both, as in
    the interleaved schedule. Here shapes are exchanged in the order in which it exchanges tensors.
    """

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """Shapes of the tensors to receive from the stage before and from the one after."""
        received = [torch.zeros(3, dtype=torch.int64, device="cuda") for _ in range(2)]
        from_prev, from_next = received
        requests = _p2p_ops(
            tensor_send_prev=_shape_of(tensor_send_prev),
            tensor_recv_prev=from_prev if recv_prev else None,
            tensor_send_next=_shape_of(tensor_send_next),
            tensor_recv_next=from_next if recv_next else None,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for request in requests.values():
            request.wait()
        return from_prev.tolist(), from_next.tolist()


def _shape_of(tensor: Tensor | None) -> Tensor | None:
    """The shape of a tensor as a tensor on its device."""
    if tensor is None:
        return None
    return torch.tensor(tensor.shape, dtype=torch.int64, device=tensor.device)


Step = Callable[..., tuple[Tensor, Callable]]
"""Forward of the next row of an iterator through a chunk -> output and function of the loss."""


def train_rows(
    step: Step, rows: Sequence[LMRow], chunks: Sequence[DistributedDataParallel]
) -> list[Tensor]:
    """Forward and backward of each row in Megatron-core's schedule, and sums of gradients.

    Returns the report of each row on the last pipeline stage, and nothing on the others.
    """
    return _run_schedule(step, rows, chunks, forward_only=False)


@torch.no_grad()
def evaluate_rows(
    step: Step,
    rows: Sequence[LMRow | ValidationRow],
    chunks: Sequence[DistributedDataParallel],
) -> list[Tensor]:
    """Forward of each row. Returns as `train_rows`."""
    if len(chunks) == 1:
        return _run_schedule(step, rows, chunks, forward_only=True)
    # Megatron-core's interleaved schedule runs a multiple of `parallel.pipeline` rows only.
    reports = []
    for row in rows:
        reports += _pass_through(step, row, chunks)
    return reports


def _run_schedule(
    step: Step,
    rows: Sequence[LMRow | ValidationRow],
    chunks: Sequence[DistributedDataParallel],
    *,
    forward_only: bool,
) -> list[Tensor]:
    with replaced(schedules, "P2PCommunicator", _Neighbors):
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(rows) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(rows),
            seq_length=len(rows[0].ids_N),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _pass_through(
    step: Step, row: LMRow | ValidationRow, chunks: Sequence[DistributedDataParallel]
) -> list[Tensor]:
    """Forward of one row through all chunks of all ranks, one after the other."""
    ring = _Neighbors(parallel_state.get_pipeline_model_parallel_group(), chunks[0].module.config)
    # Only says that a shape follows: rows differ in length, and the sender tells it.
    shape = (len(row.ids_N), 1, chunks[0].module.config.hidden_size)
    reports = []
    for chunk in chunks:
        model = cast(MegatronLM, chunk.module)
        hidden_N1D = ring.recv_forward(shape, is_first_stage=model.pre_process)
        model.set_input_tensor(hidden_N1D)
        out, loss = step(iter([row]), chunk)
        if model.post_process:
            reports.append(loss(out)[-1])
        ring.send_forward(out, is_last_stage=model.post_process)
    return reports


def condition_modules(config: LMConfig) -> tuple[TextProjection, MicroConditions]:
    """The modules that turn text states and micro-conditions into vectors."""
    return TextProjection(config.text_dim, config.hidden_size), micro_conditions(config)


class InitialWeights(Mapping[str, Tensor]):
    """Initial weights with the names of `LanguageModel` (§4.3 to §4.5), generated on access.

    A tensor depends on seed, name and shape only, so that every parallel layout starts from the
    same model and a rank generates only its own part.
    """

    def __init__(self, config: LMConfig, seed: int) -> None:
        with torch.device("meta"):
            state = LanguageModel(config).state_dict()
        self._shapes = {name: tensor.shape for name, tensor in state.items()}
        self._seed = seed
        text, micro = condition_modules(config)
        text.init_weights(keyed_random.generator(seed, "init/text"))
        micro.init_weights(keyed_random.generator(seed, "init/micro"))
        self._conditions = nn.ModuleDict({"text": text, "micro": micro}).state_dict()

    def __getitem__(self, name: str) -> Tensor:
        """Generates the tensor `name`."""
        if name in self._conditions:
            return self._conditions[name]
        shape = self._shapes[name]
        if len(shape) == 1:  # of a norm
            if name.endswith(".bias"):
                return torch.zeros(shape)
            return torch.ones(shape)
        generator = keyed_random.generator(self._seed, f"init/{name}")
        return torch.empty(shape).normal_(std=INIT_STD, generator=generator)

    def __iter__(self) -> Iterator[str]:
        """Names of all weights."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Number of weights."""
        return len(self._shapes)


def _local_name(name: str, offset: int) -> str:
    """Name of a weight in this pipeline stage or chunk, where Megatron counts layers from 0."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    index, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{int(index) - offset}.{rest}"
