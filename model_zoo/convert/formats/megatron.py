"""Our language model and Megatron-core's `GPTModel` (docs/specification.md §6.4).

The module holds the rules between both, and reads and writes checkpoints without Megatron.

"Theirs" are the names in a `dist_checkpointing` folder. They are also those of a model with layers
of Transformer Engine, in which a linear layer owns the norm before it. A model with Megatron's own
layers has separate norms; `module_name` translates. The condition modules have no counterpart in
Megatron and keep our names. All tensors are whole; `shard` returns the part of a tensor-parallel
rank.
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
from landiff.model_zoo.convert.rules import (
    Change,
    ConversionError,
    Rule,
    apply_rules,
    check_against,
)
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.token_layout import TokenLayout

# Prefixes under which the two kinds of optimizer store float32 master weights. These are preferred
# over the weights of the model, which may be bfloat16.
MASTER_PREFIXES = ("optimizer.state.fp32_param.", "optimizer.state.param.")

# Prefix under which our trainer stores the moving averages of the weights.
EMA_PREFIX = "optimizer.state.ema."

COMMON = "common.pt"
CONFIG = "config.yaml"  # in a checkpoint folder; its section `model` is an LMConfig

# Names of norms with Transformer Engine -> with Megatron's own layers
_SEPARATE_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class Padded:
    """Sizes in Megatron, padded to multiples of the tensor-parallel size.

    Padding is zero. Padded heads stay zero in training: their outputs and gradients are zero.
    """

    vocab: int
    heads: int


def megatron_rules(config: LMConfig, padded: Padded) -> list[Rule]:
    """The rules between our names and Megatron's, for a model with these padded sizes."""
    vocab = TokenLayout.of(config).vocab_size
    heads = config.num_heads
    head_dim = config.hidden_size // heads
    assert padded.vocab >= vocab and padded.heads >= heads, (padded, vocab, heads)

    def pad_rows(weight: Tensor) -> tuple[Tensor]:
        return (functional.pad(weight, (0, 0, 0, padded.vocab - vocab)),)

    def cut_rows(weight: Tensor) -> tuple[Tensor]:
        return (weight[:vocab].clone(),)

    def by_head(weight: Tensor) -> tuple[Tensor]:
        """Rows [all q | all k | all v] -> rows [q, k, v] of each head."""
        per_head = weight.unflatten(0, (3, heads, head_dim)).transpose(0, 1)
        return (functional.pad(per_head, (0,) * 7 + (padded.heads - heads,)).flatten(0, 2),)

    def by_matrix(weight: Tensor) -> tuple[Tensor]:
        """The inverse of `by_head`."""
        per_head = weight.unflatten(0, (padded.heads, 3, head_dim))[:heads]
        return (per_head.transpose(0, 1).flatten(0, 2),)

    def pad_columns(weight: Tensor) -> tuple[Tensor]:
        return (functional.pad(weight, (0, (padded.heads - heads) * head_dim)),)

    def cut_columns(weight: Tensor) -> tuple[Tensor]:
        return (weight[:, : heads * head_dim].clone(),)

    def stack_gate_and_up(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        return (torch.cat([gate, up]),)

    ours = "blocks.{i}."
    attention = "decoder.layers.{i}.self_attention."
    mlp = "decoder.layers.{i}.mlp."
    return [
        Rule("token_embedding.weight", "embedding.word_embeddings.weight", pad_rows, cut_rows),
        Rule("text.{rest*}", "text.{rest*}"),
        Rule("micro.{rest*}", "micro.{rest*}"),
        Rule(f"{ours}norm0.weight", f"{attention}linear_qkv.layer_norm_weight"),
        Rule(f"{ours}wqkv.weight", f"{attention}linear_qkv.weight", by_head, by_matrix),
        Rule(f"{ours}wo.weight", f"{attention}linear_proj.weight", pad_columns, cut_columns),
        Rule(f"{ours}norm1.weight", f"{mlp}linear_fc1.layer_norm_weight"),
        Rule(
            (f"{ours}w1.weight", f"{ours}w3.weight"),
            (f"{mlp}linear_fc1.weight",),
            stack_gate_and_up,
            lambda both: both.chunk(2),
            stacked="theirs",
        ),
        Rule(f"{ours}w2.weight", f"{mlp}linear_fc2.weight"),
        *_adapter_rules(by_head, by_matrix, pad_columns, cut_columns),
        Rule("final_norm.{kind}", "decoder.final_layernorm.{kind}"),
        Rule("head.weight", "output_layer.weight", pad_rows, cut_rows),
    ]


def _adapter_rules(
    by_head: Change, by_matrix: Change, pad_columns: Change, cut_columns: Change
) -> list[Rule]:
    """The rules for the matrices of a LoRA adapter.

    B has the rows of the weight, and A its columns, so each is changed as they are. Gate and up
    share A; it is stored twice under our names. Raises ConversionError if they do not.
    """

    def shared(gate: Tensor, up: Tensor) -> tuple[Tensor]:
        if gate.device.type != "meta" and not torch.equal(gate, up):
            raise ConversionError("w1 and w3 of an adapter must have the same lora_A for Megatron")
        return (gate,)

    rules = []
    names = {
        "wqkv": ("self_attention.linear_qkv", None, (by_head, by_matrix)),
        "wo": ("self_attention.linear_proj", (pad_columns, cut_columns), None),
        "w2": ("mlp.linear_fc2", None, None),
    }
    for ours, (theirs, change_A, change_B) in names.items():
        for matrix, change in (("lora_A", change_A), ("lora_B", change_B)):
            to_theirs, to_ours = change or (None, None)
            rules.append(
                Rule(
                    f"blocks.{{i}}.{ours}.{matrix}.weight",
                    f"decoder.layers.{{i}}.{theirs}.{matrix}",
                    to_theirs,
                    to_ours,
                )
            )
    fc1 = "decoder.layers.{i}.mlp.linear_fc1"
    changes: dict[str, tuple[Change, Change]] = {
        "lora_A": (shared, lambda both: (both, both.clone())),
        "lora_B": (lambda gate, up: (torch.cat([gate, up]),), lambda both: both.chunk(2)),
    }
    for matrix, (to_theirs, to_ours) in changes.items():
        ours_both = (f"blocks.{{i}}.w1.{matrix}.weight", f"blocks.{{i}}.w3.{matrix}.weight")
        rules.append(Rule(ours_both, f"{fc1}.{matrix}", to_theirs, to_ours))
    return rules


def module_name(theirs: str) -> str:
    """The name of a weight in a model with Megatron's own ("local") layers."""
    for fused, separate in _SEPARATE_NORMS.items():
        theirs = theirs.replace(fused, separate)
    return theirs


def to_megatron(
    source: Mapping[str, Tensor],
    config: LMConfig,
    padded: Padded,
    layers: range,
    first: bool,
    last: bool,
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over (Megatron's name, whole tensor) of one pipeline-parallel stage.

    `layers` are those of the stage, counted over the whole model. `first` and `last` say whether it
    is the first or the last stage. One block is converted at a time, so a lazy `source` is never
    whole in memory. Raises ConversionError if weights are missing.
    """
    prefixes = [f"blocks.{i}." for i in layers]
    if first:
        prefixes = ["token_embedding.", "text.", "micro.", *prefixes]
    if last:
        prefixes += ["final_norm.", "head."]
    table = megatron_rules(config, padded)
    for prefix in prefixes:
        block = {name: source[name] for name in source if name.startswith(prefix)}
        if not block:
            raise ConversionError(
                f"the weights have no {prefix}*; they are not of a language model with this config"
            )
        yield from apply_rules(block, table, "to_theirs").items()


def shard(whole: Tensor, dim: int, stride: int, rank: int, size: int) -> Tensor:
    """The part of tensor-parallel rank `rank` of `size` ranks.

    `stride` matrices are stacked in `dim`; each of them is divided by itself.
    """
    parts = whole.chunk(stride * size, dim)
    return torch.cat(parts[rank::size], dim)


# ---------------------------------------------------------------- reading


def read_megatron(folder: Path) -> dict[str, Tensor]:
    """All weights of a `dist_checkpointing` folder in memory; see `open_megatron`."""
    return dict(open_megatron(folder))


def has_averages(folder: Path) -> bool:
    """Whether a `dist_checkpointing` folder of our trainer holds moving averages of the weights."""
    return any(key.startswith(EMA_PREFIX) for key in DistReader(folder).entries)


def open_megatron(folder: Path, *, ema: bool = False) -> LazyTensors:
    """The weights of a `dist_checkpointing` folder under Megatron's names, read on access.

    Tensors are whole and layers are separate. Master weights of the optimizer, which are float32,
    replace the weights of the model; with `ema`, moving averages of the weights do. Raises
    ConversionError if `folder` is no such checkpoint.
    """
    reader = DistReader(folder)
    key_of = {key: key for key in reader.entries if not key.startswith("optimizer.")}
    for prefix in (EMA_PREFIX,) if ema else MASTER_PREFIXES:
        for key in reader.entries:
            if key.startswith(prefix):
                key_of[key.removeprefix(prefix)] = key
    return separate_layers(reader, key_of)


def separate_layers(reader: DistReader, key_of: Mapping[str, str]) -> LazyTensors:
    """The tensors of a checkpoint by name, one for each layer.

    `key_of` gives the key in the checkpoint for each name. By default, Megatron stacks a weight of
    all layers in one tensor, whose name has no layer number.
    """
    meta: dict[str, Tensor] = {}
    places: dict[str, tuple[str, int | None]] = {}
    for name, key in key_of.items():
        whole = reader.meta(key)
        stacked = re.fullmatch(r"decoder\.layers\.(?!\d+\.)(.+)", name)
        if not stacked:
            meta[name] = whole
            places[name] = (key, None)
            continue
        for layer in range(len(whole)):
            layer_name = f"decoder.layers.{layer}.{stacked[1]}"
            meta[layer_name] = whole[layer]
            places[layer_name] = (key, layer)
    return LazyTensors(meta, lambda name: reader.read(*places[name]))


def export_lm(folder: Path) -> tuple[LMConfig, LazyTensors]:
    """Config and weights of a checkpoint of a run, the folder of a step; see `read_lm`."""
    config = stored_config(folder)
    return config, read_lm(folder, config)


def stored_config(folder: Path) -> LMConfig:
    """The config that the trainer and `write_megatron` store beside the weights.

    Raises ConversionError if there is none.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConversionError(
            f"{folder} is not a checkpoint of a run: it has no {path.name}; name the model with "
            "--model"
        )
    return validate(LMConfig, model_section(read_yaml(path), path), str(path))


def model_section(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The section `model` of the run config at `path`. Raises ConversionError without it."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        raise ConversionError(f"{path} is not the config of a run: it has no section model")
    return model


def read_lm(folder: Path, config: LMConfig) -> LazyTensors:
    """The weights of a checkpoint under our names, for `LanguageModel` and the zoo.

    They are read on access, do not depend on the parallel layout of the training, and are float32
    where the optimizer kept float32. Raises ConversionError for a checkpoint of another model.
    """
    theirs = open_megatron(folder)
    padded = padding_of(theirs, config, folder)
    return under_our_names(theirs, config, padded, str(folder))


def padding_of(theirs: LazyTensors, config: LMConfig, folder: Path) -> Padded:
    """The padded sizes of the weights in a checkpoint.

    Raises ConversionError for a checkpoint of another model.
    """

    def rows(name: str) -> int:
        return len(theirs.meta.get(name, ()))

    vocab_rows = max(rows("output_layer.weight"), rows("embedding.word_embeddings.weight"))
    qkv_rows = rows("decoder.layers.0.self_attention.linear_qkv.weight")
    heads = qkv_rows // (3 * config.hidden_size // config.num_heads)
    vocab = TokenLayout.of(config).vocab_size
    if vocab_rows < vocab or heads < config.num_heads:
        raise ConversionError(
            f"{folder} holds a vocabulary of {vocab_rows} and {heads} heads; the config has "
            f"{vocab} and {config.num_heads}: it is of another model"
        )
    return Padded(vocab_rows, heads)


def under_our_names(
    theirs: LazyTensors, config: LMConfig, padded: Padded, what: str
) -> LazyTensors:
    """Weights, or the optimizer's values for each weight, under our names.

    Raises ConversionError, in which they are called `what`, if keys or shapes do not fit.
    """
    check_against(theirs.meta, _shapes(config, padded), what)
    return converted(theirs, megatron_rules(config, padded), "to_ours")


def _shapes(config: LMConfig, padded: Padded) -> dict[str, torch.Size]:
    """Shapes of all weights under Megatron's names."""
    with torch.device("meta"):
        ours = LanguageModel(config).state_dict()
        theirs = apply_rules(ours, megatron_rules(config, padded), "to_theirs")
    return {name: tensor.shape for name, tensor in theirs.items()}


# ---------------------------------------------------------------- writing


def extra_states(config: LMConfig) -> dict[str, Any]:
    """What Megatron stores for each linear layer: the state of its FP8 scaling, which is empty."""
    names = (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    states: dict[str, Any] = {}
    for layer in range(config.num_layers):
        for name in names:
            states[f"decoder.layers.{layer}.{name}._extra_state/shard_0_1"] = [None]
    return states


def default_padding(config: LMConfig, vocab_multiple: int = 128, head_multiple: int = 1) -> Padded:
    """The padded sizes for these multiples; the defaults are those of Megatron."""
    vocab = TokenLayout.of(config).vocab_size
    return Padded(
        vocab=-(-vocab // vocab_multiple) * vocab_multiple,
        heads=-(-config.num_heads // head_multiple) * head_multiple,
    )


def write_megatron(
    folder: Path,
    config: LMConfig,
    tensors: LazyTensors,
    padded: Padded | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Write weights (our names) that `megatron.core.dist_checkpointing` loads.

    The folder stores whole tensors, so it loads into any tensor- and pipeline-parallel layout.
    `padded` must be that of the model that loads it: vocabulary and heads, multiples of its
    tensor-parallel size.

    There is no optimizer state: a run can start from the folder, but not resume from it. Our own
    trainer starts from zoo entries (`init_from`) instead.
    """
    rules = megatron_rules(config, padded or default_padding(config))
    write_dist(folder, converted(tensors, rules, "to_theirs"), extra_states(config), progress)
    write_documents(folder, {"checkpoint_version": 3.0, "iteration": 0})
    write_megatron_config(folder, config)


def write_megatron_config(folder: Path, config: LMConfig) -> None:
    """Write the config file that `stored_config` reads."""
    text = yaml.safe_dump({"model": config.model_dump(mode="json")}, sort_keys=False)
    write_text(folder / CONFIG, text)


def write_documents(folder: Path, common: Mapping[str, Any]) -> None:
    """Write the files that Megatron keeps beside the tensors; `common` is its common state."""
    with atomic_file(folder / COMMON) as file:
        torch.save(dict(common), file)
    metadata = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    write_text(folder / "metadata.json", json.dumps(metadata))
