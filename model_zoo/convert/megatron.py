"""Our language model <-> Megatron-core's `GPTModel` (specification §6.4), and its checkpoints read without Megatron.

"Theirs" are the names in a `dist_checkpointing` folder, which are also those of a model with Transformer Engine's
layers: the norm before a linear layer belongs to that layer. A model with Megatron's own layers has the
norms beside them; `module_name` tells where. Condition modules have no counterpart in Megatron and keep their
names. Tensors are whole: `shard` cuts one for a tensor-parallel rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from model_zoo.config import LMConfig
from model_zoo.convert.rules import ConversionError, Rule, check_against, convert
from model_zoo.token_layout import TokenLayout

# Where the optimizer keeps the float32 weights of a bfloat16 model; the more exact ones, so they are read first.
MAIN_WEIGHTS = ("optimizer.state.fp32_param.", "optimizer.state.param.")

_BESIDE = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def rules(config: LMConfig, padded_vocab: int) -> list[Rule]:
    """The table. `padded_vocab` rows stand in Megatron's token table and head; those beyond the vocabulary are zero."""
    vocab, heads = TokenLayout.of(config).vocab_size, config.num_heads
    head_dim = config.hidden_size // heads
    assert padded_vocab >= vocab, (padded_vocab, vocab)

    def pad(weight: Tensor) -> tuple[Tensor]:
        return (torch.cat([weight, weight.new_zeros(padded_vocab - vocab, weight.shape[1])]),)

    def cut(weight: Tensor) -> tuple[Tensor]:
        return (weight[:vocab].clone(),)

    def by_head(weight: Tensor) -> tuple[Tensor]:  # [q heads | k heads | v heads] -> per head q, k, v
        return (weight.unflatten(0, (3, heads, head_dim)).transpose(0, 1).flatten(0, 2),)

    def by_matrix(weight: Tensor) -> tuple[Tensor]:
        return (weight.unflatten(0, (heads, 3, head_dim)).transpose(0, 1).flatten(0, 2),)

    layer, block = "decoder.layers.{i}.", "blocks.{i}."
    return [
        Rule("token_embedding.weight", "embedding.word_embeddings.weight", pad, cut),
        Rule("text.{rest*}", "text.{rest*}"),
        Rule("micro.{rest*}", "micro.{rest*}"),
        Rule(block + "norm0.weight", layer + "self_attention.linear_qkv.layer_norm_weight"),
        Rule(block + "wqkv.weight", layer + "self_attention.linear_qkv.weight", by_head, by_matrix),
        Rule(block + "wo.weight", layer + "self_attention.linear_proj.weight"),
        Rule(block + "norm1.weight", layer + "mlp.linear_fc1.layer_norm_weight"),
        Rule((block + "w1.weight", block + "w3.weight"), (layer + "mlp.linear_fc1.weight",),
             lambda gate, up: (torch.cat([gate, up]),), lambda both: tuple(half.clone() for half in both.chunk(2))),
        Rule(block + "w2.weight", layer + "mlp.linear_fc2.weight"),
        Rule("final_norm.{kind}", "decoder.final_layernorm.{kind}"),
        Rule("head.weight", "output_layer.weight", pad, cut),
    ]


def module_name(theirs: str) -> str:
    """The name of a weight in a model with Megatron's own ("local") layers."""
    for inside, beside in _BESIDE.items():
        theirs = theirs.replace(inside, beside)
    return theirs


def to_megatron(source: Mapping[str, Tensor], config: LMConfig, padded_vocab: int,
                layers: range, first: bool, last: bool) -> Iterator[tuple[str, Tensor]]:
    """(their name, whole tensor) of one pipeline stage: `layers` of the model, counted from 0 over all stages.

    A block at a time, so a lazy `source` is never whole in memory. Raises ConversionError where one lacks keys.
    """
    prefixes = ["token_embedding.", "text.", "micro."] if first else []
    prefixes += [f"blocks.{i}." for i in layers]
    prefixes += ["final_norm.", "head."] if last else []
    table = rules(config, padded_vocab)
    for prefix in prefixes:
        part = {name: source[name] for name in source if name.startswith(prefix)}
        if not part:
            raise ConversionError(f"the weights have no {prefix}*; they are not of a language model with this config")
        yield from convert(part, table, "to_theirs").items()


def shard(whole: Tensor, dim: int, stride: int, rank: int, size: int) -> Tensor:
    """The part of tensor-parallel rank `rank` of `size`. `stride` matrices are stacked in `dim`, each is cut alone."""
    parts = whole.chunk(stride * size, dim)
    return torch.cat(parts[rank::size], dim)


def read_megatron(folder: Path) -> dict[str, Tensor]:
    """The weights of a `dist_checkpointing` folder, whole, under their names, layers apart; float32 where kept.

    Needs neither Megatron nor a process group. Raises ConversionError where `folder` is no such checkpoint.
    """
    if not (folder / ".metadata").is_file():
        raise ConversionError(f"{folder} is not a Megatron checkpoint: it has no .metadata")
    reader = dcp.FileSystemReader(folder)
    stored = {key: entry for key, entry in reader.read_metadata().state_dict_metadata.items()
              if isinstance(entry, TensorStorageMetadata)}
    wanted = {key: key for key in stored if not key.startswith("optimizer.")}
    for prefix in MAIN_WEIGHTS:
        wanted |= {key.removeprefix(prefix): key for key in stored if key.startswith(prefix)}
    state = {key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype) for key in wanted.values()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return dict(_unstack({name: state[key] for name, key in wanted.items()}))


def _unstack(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """`decoder.layers.x` [L, ...] -> `decoder.layers.0.x`, ...: how Megatron stores layers unless told otherwise."""
    for name, tensor in state.items():
        stacked = re.fullmatch(r"decoder\.layers\.(?!\d+\.)(.+)", name)
        if stacked:
            yield from ((f"decoder.layers.{i}.{stacked[1]}", part.clone()) for i, part in enumerate(tensor))
        else:
            yield name, tensor


def export_lm(folder: Path, config: LMConfig) -> dict[str, Tensor]:
    """The weights of a checkpoint of `config`, in float32 under our names, ready for `LanguageModel` and the zoo.

    `folder` is where the engine wrote (a step's folder). The same for every parallel layout it was trained with.
    Raises ConversionError when the checkpoint is of another model.
    """
    from model_zoo.lm import LanguageModel  # only here: the table alone needs no model

    theirs = read_megatron(folder)
    if "output_layer.weight" not in theirs:
        raise ConversionError(f"{folder} holds no language model: output_layer.weight is missing")
    padded_vocab = len(theirs["output_layer.weight"])
    vocab = TokenLayout.of(config).vocab_size
    if padded_vocab < vocab:
        raise ConversionError(f"{folder} holds a vocabulary of {padded_vocab}, the config needs {vocab}: another model")
    ours = convert(theirs, rules(config, padded_vocab), "to_ours")
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in LanguageModel(config).state_dict().items()}
    check_against(ours, expected, str(folder))
    return {name: tensor.float() for name, tensor in ours.items()}
