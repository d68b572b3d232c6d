"""The language model as a Megatron-core GPT: packed rows in, loss of every token out.

The same model as `model_zoo.lm.LanguageModel`, whose condition modules it uses, spread over tensor-parallel
ranks and pipeline stages.

Letters: N tokens of a packed row, S samples in it, M text states, W model width, V vocabulary of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from model_zoo.config import LMConfig
from model_zoo.convert.megatron import Padded, module_name, shard, to_megatron
from model_zoo.lm import INIT_STD, LanguageModel, MicroConditions, TextProjection, rotary_table
from model_zoo.token_layout import IGNORE, TokenLayout
from training import rng
from training.lm.batch import Row, pad_to
from training.lm.config import LMTrainConfig
from training.lm.layers import PackedRow, block_spec, transformer_config


class MegatronLM(GPTModel):
    """One rank's part. Weights are whatever the memory held until `load_full` fills them."""

    def __init__(self, config: LMTrainConfig) -> None:
        sizes = config.model
        vocab = TokenLayout.of(sizes).vocab_size
        padded = Padded(pad_to(vocab, config.vocab_multiple), pad_to(sizes.num_heads, config.head_multiple))
        core = transformer_config(config, padded.heads)
        super().__init__(
            config=core, transformer_layer_spec=block_spec(core, config.layers),
            vocab_size=padded.vocab, max_sequence_length=sizes.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
            position_embedding_type="none",  # PackedAttention rotates
            scatter_embedding_sequence_parallel=False,  # only after the conditions are mixed in
        )
        self.sizes, self.vocab, self.padded = sizes, vocab, padded
        if self.pre_process:
            # Replicated on all tensor-parallel ranks: equal inputs and, by the all-reduce (or gather) behind them,
            # equal gradients, so they stay equal without further ado.
            device = self.embedding.word_embeddings.weight.device
            self.text, self.micro = (module.to(device, core.params_dtype) for module in condition_modules(sizes))

    def embed(self, row: Row) -> Tensor:
        """Token embeddings with the condition vectors in their places -> [N (this rank's share), 1, W]"""
        ids_1N = row.ids_N.masked_fill(row.ids_N == IGNORE, 0)[None]
        tokens_NW = self.embedding(input_ids=ids_1N, position_ids=None)[:, 0]
        text_MW = self.text(row.text_MD.to(tokens_NW.dtype), row.drop_text_M)
        frames_SW, motion_SW = self.micro(row.frames_S, row.motion_score_S).unbind(1)
        places = torch.cat([row.text_at_M, row.frames_at_S, row.motion_at_S])
        vectors = torch.cat([text_MW, frames_SW, motion_SW]).to(tokens_NW.dtype)
        mixed_N1W = tokens_NW.index_copy(0, places, vectors)[:, None]
        if self.config.sequence_parallel:
            mixed_N1W = tensor_parallel.scatter_to_sequence_parallel_region(mixed_N1W)
        return mixed_N1W

    def forward(self, row: Row, *, logits: bool = False) -> Tensor:
        """Loss per token [1, N]; with `logits` float32 [N, vocabulary], whole on all ranks of the stage.

        Stages before the last return hidden states, which Megatron's schedule passes on.
        """
        packed = PackedRow(
            qkv_format="thd", cu_seqlens_q=row.cu_seqlens, cu_seqlens_kv=row.cu_seqlens,
            max_seqlen_q=row.max_seqlen, max_seqlen_kv=row.max_seqlen,
            rotary=rotary_table(row.positions_N, self.config.kv_channels, self.sizes.rope_theta),
        )
        out = super().forward(
            input_ids=None, position_ids=None, attention_mask=None,
            decoder_input=self.embed(row) if self.pre_process else None,
            labels=None if logits else row.targets_N[None], packed_seq_params=packed, runtime_gather_output=logits,
        )
        return out[0, :, : self.vocab].float() if logits and self.post_process else out

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """As core's, with the rows that only pad the vocabulary left out of the softmax."""
        rank, rows = parallel_state.get_tensor_model_parallel_rank(), logits.shape[-1]
        real = max(0, self.vocab - rank * rows)  # of this rank's rows
        if real < rows:
            padding_V = torch.arange(rows, device=logits.device) >= real
            logits = logits.masked_fill(padding_V, -torch.inf)
        return super().compute_language_model_loss(labels, logits)

    @torch.no_grad()
    def load_full(self, source: Mapping[str, Tensor]) -> None:
        """Take this rank's part of whole weights under our names (`LanguageModel`'s). Raises ConversionError."""
        offset = get_transformer_layer_offset(self.config)
        layers = range(offset, offset + len(self.decoder.layers))
        rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
        parameters = dict(self.named_parameters())
        for theirs, whole in to_megatron(source, self.sizes, self.padded, layers, self.pre_process, self.post_process):
            name = _local_name(theirs, offset)
            parameter = parameters.pop(name if name in parameters else module_name(name))
            if getattr(parameter, "tensor_model_parallel", False):
                stride = 2 if "linear_fc1" in name else 1  # gate and up are cut one by one
                whole = shard(whole, parameter.partition_dim, stride, rank, size)
            assert whole.shape == parameter.shape, (name, whole.shape, parameter.shape)
            parameter.copy_(whole)
        assert not parameters, f"no weights for {sorted(parameters)}"


def condition_modules(config: LMConfig) -> tuple[TextProjection, MicroConditions]:
    return (
        TextProjection(config.text_dim, config.hidden_size),
        MicroConditions(config.hidden_size, config.micro_hidden_size, config.micro_frequency_dim),
    )


class InitialWeights(Mapping):
    """Fresh weights under our names (specification §4.3-§4.5), drawn when asked for and not kept.

    A tensor depends on seed, name and shape alone, so every layout starts from the same model, and a rank draws
    only what it holds.
    """

    def __init__(self, config: LMConfig, seed: int) -> None:
        with torch.device("meta"):
            self._shapes = {name: tensor.shape for name, tensor in LanguageModel(config).state_dict().items()}
        self._seed = seed
        text, micro = condition_modules(config)
        text.init_weights(rng.generator(seed, "init/text"))
        micro.init_weights(rng.generator(seed, "init/micro"))
        self._small = nn.ModuleDict({"text": text, "micro": micro}).state_dict()

    def __getitem__(self, name: str) -> Tensor:
        if name in self._small:
            return self._small[name]
        shape = self._shapes[name]
        if len(shape) == 1:  # norms
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        return torch.empty(shape).normal_(std=INIT_STD, generator=rng.generator(self._seed, f"init/{name}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _local_name(name: str, offset: int) -> str:
    """Megatron counts layers from 0 in every stage."""
    if not name.startswith("decoder.layers."):
        return name
    head, index, rest = name[: len("decoder.layers.")], *name[len("decoder.layers.") :].split(".", 1)
    return f"{head}{int(index) - offset}.{rest}"
