"""Our language model <-> Megatron-core's `GPTModel` (specification §6.4), and its checkpoints read without Megatron.

"Theirs" are the names in a `dist_checkpointing` folder, which are also those of a model with Transformer Engine's
layers: the norm before a linear layer belongs to that layer. A model with Megatron's own layers has the
norms beside them; `module_name` tells where. Condition modules have no counterpart in Megatron and keep their
names. Tensors are whole: `shard` cuts one for a tensor-parallel rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional

from landiff.configs import validate
from landiff.configs.documents import read_yaml
from landiff.configs.files import atomic_file, write_text
from landiff.model_zoo.config import LMConfig
from landiff.model_zoo.convert.formats.dist_checkpoint import DistReader, write_dist
from landiff.model_zoo.convert.lazy import LazyTensors, ProgressCallback, converted
from landiff.model_zoo.convert.rules import ConversionError, Rule, apply_rules, check_against
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.token_layout import TokenLayout

# Where the optimizer keeps the float32 weights of a bfloat16 model; the more exact ones, so they are read first.
MAIN_WEIGHTS = ("optimizer.state.fp32_param.", "optimizer.state.param.")

COMMON = "common.pt"
CONFIG = "config.yaml"  # in a checkpoint folder; its section `model` is an LMConfig

_BESIDE = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class Padded:
    """Sizes in Megatron, where they must divide by the tensor-parallel ranks. What is beyond the model's is zero.

    A head of zeros stays one in training: its output is zero, and so are all its gradients.
    """

    vocab: int
    heads: int


def megatron_rules(config: LMConfig, padded: Padded) -> list[Rule]:
    """The table."""
    vocab, heads = TokenLayout.of(config).vocab_size, config.num_heads
    head_dim = config.hidden_size // heads
    assert padded.vocab >= vocab and padded.heads >= heads, (padded, vocab, heads)

    def pad(weight: Tensor) -> tuple[Tensor]:
        return (functional.pad(weight, (0, 0, 0, padded.vocab - vocab)),)

    def cut(weight: Tensor) -> tuple[Tensor]:
        return (weight[:vocab].clone(),)

    def by_head(
        weight: Tensor,
    ) -> tuple[Tensor]:  # rows [q heads | k heads | v heads] -> per head q, k, v
        per_head = weight.unflatten(0, (3, heads, head_dim)).transpose(0, 1)
        return (functional.pad(per_head, (0,) * 7 + (padded.heads - heads,)).flatten(0, 2),)

    def by_matrix(weight: Tensor) -> tuple[Tensor]:
        return (
            weight.unflatten(0, (padded.heads, 3, head_dim))[:heads].transpose(0, 1).flatten(0, 2),
        )

    def pad_columns(weight: Tensor) -> tuple[Tensor]:
        return (functional.pad(weight, (0, (padded.heads - heads) * head_dim)),)

    def cut_columns(weight: Tensor) -> tuple[Tensor]:
        return (weight[:, : heads * head_dim].clone(),)

    layer, block = "decoder.layers.{i}.", "blocks.{i}."
    return [
        Rule("token_embedding.weight", "embedding.word_embeddings.weight", pad, cut),
        Rule("text.{rest*}", "text.{rest*}"),
        Rule("micro.{rest*}", "micro.{rest*}"),
        Rule(block + "norm0.weight", layer + "self_attention.linear_qkv.layer_norm_weight"),
        Rule(block + "wqkv.weight", layer + "self_attention.linear_qkv.weight", by_head, by_matrix),
        Rule(
            block + "wo.weight",
            layer + "self_attention.linear_proj.weight",
            pad_columns,
            cut_columns,
        ),
        Rule(block + "norm1.weight", layer + "mlp.linear_fc1.layer_norm_weight"),
        Rule(
            (block + "w1.weight", block + "w3.weight"),
            (layer + "mlp.linear_fc1.weight",),
            lambda gate, up: (torch.cat([gate, up]),),
            lambda both: both.chunk(2),
            stacked="theirs",
        ),
        Rule(block + "w2.weight", layer + "mlp.linear_fc2.weight"),
        Rule("final_norm.{kind}", "decoder.final_layernorm.{kind}"),
        Rule("head.weight", "output_layer.weight", pad, cut),
    ]


def module_name(theirs: str) -> str:
    """The name of a weight in a model with Megatron's own ("local") layers."""
    for inside, beside in _BESIDE.items():
        theirs = theirs.replace(inside, beside)
    return theirs


def to_megatron(
    source: Mapping[str, Tensor],
    config: LMConfig,
    padded: Padded,
    layers: range,
    first: bool,
    last: bool,
) -> Iterator[tuple[str, Tensor]]:
    """(their name, whole tensor) of one pipeline stage: `layers` of the model, counted from 0 over all stages.

    A block at a time, so a lazy `source` is never whole in memory. Raises ConversionError where one lacks keys.
    """
    prefixes = ["token_embedding.", "text.", "micro."] if first else []
    prefixes += [f"blocks.{i}." for i in layers]
    prefixes += ["final_norm.", "head."] if last else []
    table = megatron_rules(config, padded)
    for prefix in prefixes:
        part = {name: source[name] for name in source if name.startswith(prefix)}
        if not part:
            raise ConversionError(
                f"the weights have no {prefix}*; they are not of a language model with this config"
            )
        yield from apply_rules(part, table, "to_theirs").items()


def shard(whole: Tensor, dim: int, stride: int, rank: int, size: int) -> Tensor:
    """The part of tensor-parallel rank `rank` of `size`. `stride` matrices are stacked in `dim`, each is cut alone."""
    parts = whole.chunk(stride * size, dim)
    return torch.cat(parts[rank::size], dim)


def read_megatron(folder: Path) -> dict[str, Tensor]:
    """All weights of a `dist_checkpointing` folder at once; see `open_megatron`."""
    return dict(open_megatron(folder))


def open_megatron(folder: Path) -> LazyTensors:
    """The weights of a `dist_checkpointing` folder, whole, under their names, layers apart; float32 where kept.

    Needs neither Megatron nor a process group. Raises ConversionError where `folder` is no such checkpoint.
    """
    reader = DistReader(folder)
    wanted = {key: key for key in reader.entries if not key.startswith("optimizer.")}
    for prefix in MAIN_WEIGHTS:
        wanted |= {
            key.removeprefix(prefix): key for key in reader.entries if key.startswith(prefix)
        }
    return layers_apart(reader, wanted)


def layers_apart(reader: DistReader, wanted: Mapping[str, str]) -> LazyTensors:
    """name -> the tensor of its key; a name that stands for all layers, as Megatron stacks them unless told otherwise, becomes one for each."""
    meta: dict[str, Tensor] = {}
    places: dict[str, tuple[str, int | None]] = {}
    for name, key in wanted.items():
        whole = reader.meta(key)
        stacked = re.fullmatch(r"decoder\.layers\.(?!\d+\.)(.+)", name)
        if stacked:
            for i in range(len(whole)):
                (
                    meta[f"decoder.layers.{i}.{stacked[1]}"],
                    places[f"decoder.layers.{i}.{stacked[1]}"],
                ) = whole[i], (key, i)
        else:
            meta[name], places[name] = whole, (key, None)
    return LazyTensors(meta, lambda name: reader.read(*places[name]))


def export_lm(folder: Path) -> tuple[LMConfig, LazyTensors]:
    """Config and weights of one checkpoint of a run, the folder of a step; see `read_lm`."""
    config = stored_config(folder)
    return config, read_lm(folder, config)


def stored_config(folder: Path) -> LMConfig:
    """What the trainer and `write_megatron` put beside the weights. Raises ConversionError without it."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConversionError(
            f"{folder} is not a checkpoint of a run: it has no {path.name}; say with --model which one it is of"
        )
    return validate(LMConfig, model_section(read_yaml(path), path), str(path))


def model_section(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The section `model` of the run config at `path`. Raises ConversionError without it."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        raise ConversionError(f"{path} is not the config of a run: it has no section model")
    return model


def read_lm(folder: Path, config: LMConfig) -> LazyTensors:
    """The weights of a checkpoint of `config` under our names, ready for `LanguageModel` and the zoo; read when asked for.

    The same for every parallel layout it was trained with, and float32 wherever the optimizer kept float32.
    Raises ConversionError when it is of another model.
    """
    theirs = open_megatron(folder)
    padded = padding_of(theirs, config, folder)
    return under_our_names(theirs, config, padded, str(folder))


def padding_of(theirs: LazyTensors, config: LMConfig, folder: Path) -> Padded:
    """The sizes that a checkpoint's weights have. Raises ConversionError for those of another model."""
    head_rows = max(
        len(theirs.meta.get(name, ()))
        for name in ("output_layer.weight", "embedding.word_embeddings.weight")
    )
    qkv_rows = len(theirs.meta.get("decoder.layers.0.self_attention.linear_qkv.weight", ()))
    padded = Padded(vocab=head_rows, heads=qkv_rows // (3 * config.hidden_size // config.num_heads))
    vocab = TokenLayout.of(config).vocab_size
    if padded.vocab < vocab or padded.heads < config.num_heads:
        raise ConversionError(
            f"{folder} holds a vocabulary of {padded.vocab} and {padded.heads} heads; the config has {vocab} and "
            f"{config.num_heads}: it is of another model"
        )
    return padded


def under_our_names(
    theirs: LazyTensors, config: LMConfig, padded: Padded, what: str
) -> LazyTensors:
    """One tensor for every weight: the weights themselves, or what an optimizer keeps for each of them."""
    check_against(theirs.meta, _shapes(config, padded), what)
    return converted(theirs, megatron_rules(config, padded), "to_ours")


def _shapes(config: LMConfig, padded: Padded) -> dict[str, torch.Size]:
    with torch.device("meta"):
        ours = LanguageModel(config).state_dict()
        return {
            name: tensor.shape
            for name, tensor in apply_rules(
                ours, megatron_rules(config, padded), "to_theirs"
            ).items()
        }


# ---------------------------------------------------------------- writing


def extra_states(config: LMConfig) -> dict[str, Any]:
    """What Megatron stores beside each linear layer: the state of its FP8 scaling, which is none."""
    layers = (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    return {
        f"decoder.layers.{i}.{layer}._extra_state/shard_0_1": [None]
        for i in range(config.num_layers)
        for layer in layers
    }


def default_padding(config: LMConfig, vocab_multiple: int = 128, head_multiple: int = 1) -> Padded:
    """Megatron pads the vocabulary to a multiple of 128 rows, and no heads."""
    vocab = TokenLayout.of(config).vocab_size
    return Padded(
        -(-vocab // vocab_multiple) * vocab_multiple,
        -(-config.num_heads // head_multiple) * head_multiple,
    )


def write_megatron(
    folder: Path,
    config: LMConfig,
    tensors: LazyTensors,
    padded: Padded | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """`tensors` (our names) as weights that `megatron.core.dist_checkpointing` loads into any tensor- and pipeline-parallel
    layout: such a folder stores whole tensors, so one serves all.

    `padded` must be that of the model which loads them (vocabulary and heads, multiples of its tensor-parallel size).
    There is no optimizer state: it starts a run, it does not resume one. Our own trainer starts
    from zoo entries (`init_from`) and does the same cutting itself.
    """
    theirs = converted(
        tensors, megatron_rules(config, padded or default_padding(config)), "to_theirs"
    )
    write_dist(folder, theirs, extra_states(config), progress)
    write_documents(folder, {"checkpoint_version": 3.0, "iteration": 0})
    write_megatron_config(folder, config)


def write_megatron_config(folder: Path, config: LMConfig) -> None:
    """What `stored_config` reads."""
    write_text(
        folder / CONFIG, yaml.safe_dump({"model": config.model_dump(mode="json")}, sort_keys=False)
    )


def write_documents(folder: Path, common: Mapping[str, Any]) -> None:
    """What Megatron keeps beside the tensors."""
    with atomic_file(folder / COMMON) as file:
        torch.save(dict(common), file)
    write_text(
        folder / "metadata.json",
        json.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        ),
    )
