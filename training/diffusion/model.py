"""The module that a phase trains, with its initial weights and its frozen parts.

torch creates modules in float32 on the CPU, to be cast and moved afterwards. That takes 4 bytes of
host memory per weight in each rank. In `weights_in`, each weight is allocated where it stays. Its
random numbers are drawn in float32 on the CPU and then copied, so the weights are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from landiff.model_zoo import registry
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.parts import MAIN
from landiff.model_zoo.convert.rules import check_against
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.model_zoo.lora.base import base_fingerprint
from landiff.model_zoo.lora.config import AdapterConfig, BaseKind
from landiff.model_zoo.lora.modules import add_layers
from landiff.model_zoo.registry import ZooEntry
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training import rng
from landiff.training.diffusion.config import START_KINDS, DiffusionTrainConfig
from landiff.training.float8 import layers as float8

CPU = torch.device("cpu")
DRAWS = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)
# The other layers are small, or like modulations multiply one row for each clip.
FLOAT8_LAYERS = re.compile(r"(?:.*\.)?blocks\.\d+\.(?:qkv|out|mlp_in|mlp_out)")


def build_phase_model(
    config: DiffusionTrainConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> DiffusionTransformer | ControlledDiffusion:
    """The module of a phase, with weights in `dtype` on `device`. ZeRO partitions it afterwards.

    Weights are drawn in float32 or read one at a time, and host memory holds only one of them that
    does not stay there.

    Phase main: the main transformer. Phase control: the whole model with the main transformer
    frozen. If `init_from` is a main transformer, the control branch starts as a copy of its first
    blocks, and its zero projections leave the output unchanged at first. If it is a whole diffusion
    model, all parts start from it.

    With `lora` only the adapter is trained, whose update is initialized to zero.

    The weights are a function of loop.seed and `init_from`. Raises ZooError.
    """
    control = config.phase == "control"
    model: DiffusionTransformer | ControlledDiffusion
    start: ZooEntry | None = None
    if config.init_from is not None:
        start = registry.resolve(config.zoo, config.init_from, kind=START_KINDS)
    drawing = start is None or (control and start.kind == "transformer")
    with (
        rng.seeded(config.loop.seed, "weights", control),
        weights_in(dtype, device, drawing=drawing),
    ):
        if control:
            model = ControlledDiffusion(config.model)
        else:
            model = DiffusionTransformer(config.model.transformer)
    model.recompute = config.recompute
    model.keep_inputs_on_host = config.offload_activations
    if start is not None:
        load_start(model, start)
    with rng.seeded(config.loop.seed, "lora", control), weights_in(dtype, device):
        _select_trained(model, config)
    if config.fp8:
        float8.convert(model, lambda name: FLOAT8_LAYERS.fullmatch(name) is not None)
    if config.compiles:
        model.compile_blocks()
    return model


def _select_trained(
    model: DiffusionTransformer | ControlledDiffusion, config: DiffusionTrainConfig
) -> None:
    """Add an adapter if the config has one, and freeze what is not trained."""
    adapter = adapter_of(config)
    if adapter is not None:
        add_layers(model, adapter)
    elif isinstance(model, ControlledDiffusion):
        freeze_main(model)


def trained_names(config: DiffusionTrainConfig) -> list[str]:
    """Names of the parameters that are trained, from a model without memory. Raises ZooError."""
    model: DiffusionTransformer | ControlledDiffusion
    with torch.device("meta"):
        if config.phase == "control":
            model = ControlledDiffusion(config.model)
        else:
            model = DiffusionTransformer(config.model.transformer)
        _select_trained(model, config)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def adapter_of(config: DiffusionTrainConfig) -> AdapterConfig | None:
    """The adapter that a config trains, with the fingerprint of its base. None without `lora`."""
    if config.lora is None:
        return None
    assert config.init_from is not None  # the config class requires it
    entry = registry.resolve(config.zoo, config.init_from, kind=START_KINDS)
    kind: BaseKind = "transformer" if config.phase == "main" else "diffusion"
    return AdapterConfig(
        base_kind=kind,
        base=base_fingerprint(entry, kind),
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        targets=config.lora.targets,
    )


def load_start(model: DiffusionTransformer | ControlledDiffusion, entry: ZooEntry) -> None:
    """Set the weights before the first step from a main transformer or a whole diffusion model.

    Raises ConfigError for damaged files, NaN and infinity.
    """
    registry.require_intact(entry)
    weights = entry.lazy()
    if entry.kind == "diffusion" and isinstance(model, DiffusionTransformer):
        copy_weights(model, weights.without_prefix(MAIN), entry.reference)
    elif entry.kind == "transformer" and isinstance(model, ControlledDiffusion):
        copy_weights(model.transformer, weights, entry.reference)
        model.copy_main_to_control()
    else:
        copy_weights(model, weights, entry.reference)


def freeze_main(model: ControlledDiffusion) -> None:
    """Freeze what phase control does not train (§5.4)."""
    model.transformer.requires_grad_(False)
    # This norm has no effect on the output, and with ZeRO weight decay would shrink it.
    model.control.final_norm.requires_grad_(False)


def load_tokenizer(config: DiffusionTrainConfig, device: torch.device) -> SemanticTokenizer | None:
    """The frozen tokenizer of phase control, in the working dtype (§3.10). None in phase main."""
    if config.phase == "main":
        return None
    assert config.tokenizer is not None  # the config class requires it in phase control
    entry = registry.resolve(config.zoo, config.tokenizer, kind="tokenizer")
    cast = None
    if config.precision == "bf16":
        cast = SemanticTokenizer.bfloat16
    tokenizer = registry.load_model(entry, device, cast)
    assert isinstance(tokenizer, SemanticTokenizer), type(tokenizer)
    return tokenizer


class _DrawnOnCpu(TorchDispatchMode):
    """Draws the random numbers of in-place initializations in float32 on the CPU.

    drawing: whether numbers are drawn. Otherwise the weights stay undefined.
    """

    def __init__(self, drawing: bool) -> None:
        super().__init__()
        self.drawing = drawing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func` with these changes."""
        if func not in DRAWS:
            # Its numbers would depend on dtype and device.
            assert torch.Tag.nondeterministic_seeded not in func.tags, func
            return func(*args, **(kwargs or {}))
        weight, *limits = args
        if self.drawing:
            numbers = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
            weight.copy_(func(numbers, *limits, **(kwargs or {})))
        return weight


@contextmanager
def weights_in(dtype: torch.dtype, device: torch.device, *, drawing: bool = True) -> Iterator[None]:
    """Context in which modules are created with weights in `dtype` on `device`.

    The weights are those of a float32 module on the CPU that is cast and moved afterwards, and
    torch's global generator draws the same numbers. Host memory beside the weights: one of them in
    float32.

    drawing: False leaves random weights undefined, for modules whose weights are all replaced.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, _DrawnOnCpu(drawing):
            yield
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def copy_weights(model: nn.Module, weights: LazyTensors, source: str) -> None:
    """Read all weights of a model, one at a time, into its own dtypes and device.

    source: what `weights` are, for messages. Raises ConversionError if names or shapes do not fit.
    """
    state = model.state_dict()
    check_against(weights.meta, {name: tensor.shape for name, tensor in state.items()}, source)
    for name, tensor in state.items():
        tensor.copy_(weights[name])
