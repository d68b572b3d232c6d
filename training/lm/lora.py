"""LoRA adapters of the language model's linear layers, for every parallel layout.

peft has layers for Megatron-core too (`peft/tuners/lora/tp_layer.py`). They do not fit version
0.16.1: they use the output of Megatron's layers as a tensor, where it is a pair of output and bias,
change the dtype of the model's config to float32, lose the gradients of A and B under sequence
parallelism, and have no `sharded_state_dict`. Names, files and merging of adapters are peft's.

A layer that tensor-parallel ranks divide by rows (columns of the input stay whole) has a whole A
and its rows of B. A layer that they divide by columns has its columns of A and a whole B. Matrices
that are stacked in one layer (q, k and v; gate and up) share A.

Shape letters (docs/glossary.md): N tokens of a packed row, D width of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional

from landiff.model_zoo import keyed_random, registry
from landiff.model_zoo.config import LMConfig
from landiff.model_zoo.lora.config import AdapterConfig
from landiff.training.lm.config import LMLoRAConfig, LMTrainConfig
from landiff.training.lm.layers import ColumnLinear, RowLinear


class LoRAColumnLinear(ColumnLinear):
    """A column-parallel layer with an adapter: A is whole on every rank, B is divided by rows."""

    def __init__(self, *args: Any, rank: int, scaling: float, **named: Any) -> None:
        super().__init__(*args, **named)
        self.scaling = scaling
        self.lora_A = _matrix(self.weight, rank, self.input_size)
        self.lora_B = _matrix(self.weight, self.output_size_per_partition, rank)
        # Each rank computes A on its part of the row only.
        self.lora_A.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(self.lora_B, True, 0, 1)

    def forward(self, input_: Tensor, *args: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """[N, 1, D] -> this rank's columns of the output, and the bias."""
        output, bias = super().forward(input_, *args, **named)
        narrow = functional.linear(input_, self.lora_A)
        if self.sequence_parallel:
            narrow = gather_from_sequence_parallel_region(narrow, tensor_parallel_output_grad=True)
        else:
            narrow = copy_to_tensor_model_parallel_region(narrow)
        return output + functional.linear(narrow, self.lora_B) * self.scaling, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight and B are divided along dimension 0."""
        return _sharded(self, prefix, {"weight": 0, "lora_B": 0}, sharded_offsets, metadata)


class LoRARowLinear(RowLinear):
    """A row-parallel layer with an adapter: A is divided by columns, B is whole on every rank."""

    def __init__(self, *args: Any, rank: int, scaling: float, **named: Any) -> None:
        super().__init__(*args, **named)
        self.scaling = scaling
        self.lora_A = _matrix(self.weight, rank, self.input_size_per_partition)
        self.lora_B = _matrix(self.weight, self.output_size, rank)
        # Each rank computes B on its part of the row only.
        self.lora_B.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(self.lora_A, True, 1, 1)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """This rank's columns of the input -> [N, 1, D], and the bias."""
        output, bias = super().forward(input_)
        narrow = functional.linear(input_, self.lora_A)
        if self.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow)
        return output + functional.linear(narrow, self.lora_B) * self.scaling, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight and A are divided along dimension 1."""
        return _sharded(self, prefix, {"weight": 1, "lora_A": 1}, sharded_offsets, metadata)


def _matrix(like: Tensor, rows: int, columns: int) -> nn.Parameter:
    """An undefined parameter; `MegatronLM.load_full` sets its values."""
    return nn.Parameter(torch.empty(rows, columns, dtype=like.dtype, device=like.device))


def _sharded(
    layer: Any,
    prefix: str,
    dims: dict[str, int],
    sharded_offsets: tuple,
    metadata: dict | None,
) -> dict[str, Any]:
    """This rank's part of a layer in a checkpoint. `dims`: the divided dimension of tensors."""
    assert metadata is not None
    return make_sharded_tensors_for_checkpoint(
        layer.state_dict(prefix="", keep_vars=True),
        prefix,
        dims,
        sharded_offsets,
        tp_group=layer.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )


def add_layers(submodules: TransformerLayerSubmodules, lora: LMLoRAConfig) -> None:
    """Replace the linear layers of a layer's spec that have an update."""
    options = {"rank": lora.rank, "scaling": lora.alpha / lora.rank}
    column = ModuleSpec(module=LoRAColumnLinear, params=options)
    row = ModuleSpec(module=LoRARowLinear, params=options)
    attention = submodules.self_attention.submodules
    mlp = submodules.mlp.submodules
    if "wqkv" in lora.targets:
        attention.linear_qkv = column
    if "wo" in lora.targets:
        attention.linear_proj = row
    if "w1" in lora.targets:
        mlp.linear_fc1 = column
    if "w2" in lora.targets:
        mlp.linear_fc2 = row


def freeze_base(model: nn.Module) -> None:
    """Freeze all weights but those of adapters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".lora_A", ".lora_B")))


def adapter_of(config: LMTrainConfig) -> AdapterConfig | None:
    """The adapter that a config trains, with the fingerprint of its base. None without `lora`."""
    if config.lora is None:
        return None
    assert config.init_from is not None  # the config class requires it
    entry = registry.resolve(config.zoo, config.init_from, kind="lm")
    return AdapterConfig(
        base_kind="lm",
        base=entry.fingerprint,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        targets=config.lora.targets,
    )


class InitialAdapter(Mapping[str, Tensor]):
    """An untrained adapter, under our names: A is initialized on access as in peft, B is zero.

    A depends only on seed, name and shape, so it is the same in every parallel layout.
    """

    def __init__(self, config: LMConfig, lora: LMLoRAConfig, seed: int) -> None:
        size = config.hidden_size
        rows = {"wqkv": 3 * size, "wo": size, "w1": config.ffn_size, "w3": config.ffn_size}
        columns = {"w2": config.ffn_size}
        self._seed = seed
        self._shapes: dict[str, tuple[int, int]] = {}
        for layer in range(config.num_layers):
            for target in lora.targets:
                name = f"blocks.{layer}.{target}"
                width = columns.get(target, size)
                self._shapes[f"{name}.lora_A.weight"] = (lora.rank, width)
                self._shapes[f"{name}.lora_B.weight"] = (rows.get(target, size), lora.rank)

    def __getitem__(self, name: str) -> Tensor:
        """Draws the tensor `name`."""
        shape = self._shapes[name]
        if name.endswith(".lora_B.weight"):
            return torch.zeros(shape)
        drawn = name.replace(".w3.", ".w1.")  # they share A
        generator = keyed_random.generator(self._seed, f"init/{drawn}")
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._shapes)
