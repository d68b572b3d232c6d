"""Components of `LanDiffPipeline`: the models as diffusers and transformers classes.

Each class wraps a module of model_zoo. Folders are written and read by model_zoo/convert, so
`save_pretrained` and `landiff convert --to diffusers` write the same files.

The classes give `landiff` as their module, where `landiff/__init__.py` offers them. diffusers
writes this name to model_index.json and looks the class up there when it loads the folder, so
folders stay valid when this file moves. A folder that names one of `EARLIER_MODULES` still loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from diffusers import CogVideoXTransformer3DModel, ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from landiff.configs import Config
from landiff.model_zoo.config import DiffusionConfig, LMConfig, ScheduleConfig
from landiff.model_zoo.convert.formats import diffusers_folder, diffusers_transformer
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.parts import CONTROL, Part
from landiff.model_zoo.convert.rules import apply_rules
from landiff.model_zoo.diffusers.encoders import PUBLIC_MODULE, refuse_quantization
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.registry import build_module
from landiff.model_zoo.sample.latents import SamplerOptions
from landiff.model_zoo.sample.placement.quantized import refuse_quantized
from landiff.model_zoo.sample.solvers import Solver
from landiff.model_zoo.schedule import NoiseSchedule

GuidanceSchedule = Literal["timestep", "step", "constant"]
EARLIER_MODULES = ("model_zoo.pipeline", "landiff.model_zoo.diffusers.pipeline")


class ModelComponent(ModelMixin, ConfigMixin):
    """Base class: a module of model_zoo as a diffusers model, in eval mode and without gradients.

    model: the wrapped module, whose `config` holds its sizes.
    """

    kind: str
    """The kind of the model in model_zoo/convert/parts.py."""
    config_name = "config.json"
    folder: Path | None = None
    """The folder that the weights were loaded from."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.register_to_config(landiff=self.sizes.model_dump(mode="json"))

    @property
    def sizes(self) -> Config:
        """Config of the wrapped module."""
        return cast(Config, self.model.config)

    @classmethod
    def from_tensors(cls, sizes: Config, tensors: Mapping[str, Tensor]) -> ModelComponent:
        """Builds a module of these sizes that uses the given tensors without copying them."""
        with torch.device("meta"):
            model = cls.build(sizes)
        model.load_state_dict(dict(tensors), strict=True, assign=True)
        return cls(model)

    @classmethod
    def build(cls, sizes: Config) -> nn.Module:
        """Builds an untrained module."""
        return build_module(cls.kind, sizes)

    def save_pretrained(self, save_directory: str | Path, **_options: Any) -> None:
        """Writes config and weights as `landiff convert` does. Options of diffusers are ignored."""
        part = Part(self.kind, self.sizes, LazyTensors.of(self.model.state_dict()))
        diffusers_folder.write_model(Path(save_directory), part)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        quantization_config: Any = None,
        **_options: Any,
    ) -> ModelComponent:
        """Loads the model of a local folder. Other options of diffusers are ignored.

        Raises ConversionError if the folder holds another model, UnhealthyError for weights with
        NaN or infinity, ValueError for a quantization.
        """
        refuse_quantization(cls, quantization_config)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        part = diffusers_folder.read_model(folder)
        sizes = cast(Config, part.config)
        component = cls.from_tensors(sizes, part.tensors.checked(str(folder)))
        component.folder = folder
        if torch_dtype is None:
            return component
        return component.to(torch_dtype)


class LanDiffTransformer(ModelComponent):
    """Main transformer. Its folder is in the format of diffusers' CogVideoXTransformer3DModel."""

    __module__ = PUBLIC_MODULE
    kind = "transformer"

    @classmethod
    def from_stock(cls, stock: CogVideoXTransformer3DModel) -> ModelComponent:
        """Converts diffusers' class to this one.

        Raises ValueError for variants that the main transformer does not compute.
        """
        sizes = diffusers_transformer.config_from_diffusers(dict(stock.config))
        tensors = apply_rules(stock.state_dict(), diffusers_transformer.RULES, "to_ours")
        return cls.from_tensors(sizes, tensors)


class ControlParts(nn.Module):
    """Control branch and semantic condition of a ControlledDiffusion, without main transformer."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            whole = ControlledDiffusion(config)
        self.control = whole.control
        self.semantic = whole.semantic

    def with_main(self, transformer: DiffusionTransformer) -> ControlledDiffusion:
        """Builds the whole model from these parts and a main transformer, without copies."""
        with torch.device("meta"):
            whole = ControlledDiffusion(self.config)
        whole.transformer = transformer
        whole.control = self.control
        whole.semantic = self.semantic
        return whole.eval()


class LanDiffControl(ModelComponent):
    """Control branch and semantic condition of the diffusion model."""

    __module__ = PUBLIC_MODULE
    kind = CONTROL

    @classmethod
    def build(cls, sizes: Config) -> nn.Module:
        """Builds control branch and semantic condition on the meta device."""
        return ControlParts(cast(DiffusionConfig, sizes))


class LanDiffTokenizer(ModelComponent):
    """Semantic tokenizer. Its quantizer stays in float32 whatever the component is cast to."""

    __module__ = PUBLIC_MODULE
    kind = "tokenizer"


class LanDiffLMConfig(PretrainedConfig):
    """Config of `LanDiffLM`.

    landiff: the fields of LMConfig; the defaults if None.
    """

    __module__ = PUBLIC_MODULE
    model_type = "landiff-lm"

    def __init__(self, landiff: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.landiff = LMConfig.model_validate(landiff or {}).model_dump(mode="json")


class LanDiffLM(PreTrainedModel):
    """Language model as a transformers model."""

    __module__ = PUBLIC_MODULE
    config_class = LanDiffLMConfig
    base_model_prefix = "model"
    main_input_name = "ids_BS"
    # These stay in float32 if the model is loaded with torch_dtype=bfloat16, as in
    # `LanguageModel.to_inference` (docs/specification.md §4.5).
    _keep_in_fp32_modules_strict = ("norm0", "norm1", "final_norm", "head")

    def __init__(self, config: LanDiffLMConfig) -> None:
        super().__init__(config)
        model = LanguageModel(LMConfig.model_validate(config.landiff))
        self.model = model.eval().requires_grad_(False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: `LanguageModel` initializes its weights itself."""

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """As in transformers. Raises ConfigError for quantized weights."""
        refuse_quantized(self.state_dict(), "saved or exported")
        super().save_pretrained(*args, **options)

    def forward(self, *args: Any, **named: Any) -> Tensor:
        """Logits of the next tokens, see `landiff.model_zoo.lm.LanguageModel.forward`."""
        return self.model(*args, **named)


class LanDiffScheduler(SchedulerMixin, ConfigMixin):
    """Noise schedule and options of the sampler.

    The first four arguments are those of ScheduleConfig. `clean_frames` is the number of latent
    frames that a chunk of a long video shares with the chunk before. The others are those of
    SamplerOptions, and defaults of the pipeline's calls.
    """

    __module__ = PUBLIC_MODULE
    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(
        self,
        num_timesteps: int = 1000,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        shift_scale: float = 3.0,
        guidance_exponent: float = 5.0,
        dynamic: GuidanceSchedule = "timestep",
        clean_frames: int = 7,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        solver: Solver = "sde-dpm++",
        control_guidance: float = 0.0,
    ) -> None:
        config = ScheduleConfig(
            num_timesteps=num_timesteps,
            linear_start=linear_start,
            linear_end=linear_end,
            shift_scale=shift_scale,
        )
        self.schedule = NoiseSchedule(config)

    @classmethod
    def of(
        cls, schedule: NoiseSchedule, sampler: SamplerOptions, clean_frames: int
    ) -> LanDiffScheduler:
        """A scheduler with these options. Number of steps and guidance are not part of it."""
        return cls(
            **schedule.config.model_dump(),
            guidance_exponent=sampler.guidance_exponent,
            dynamic=sampler.dynamic,
            clean_frames=clean_frames,
            guidance_interval=sampler.guidance_interval,
            guidance_rescale=sampler.guidance_rescale,
            solver=sampler.solver,
            control_guidance=sampler.control_guidance,
        )

    def options(
        self,
        num_steps: int,
        guidance: float,
        *,
        dynamic: GuidanceSchedule | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        control_guidance: float | None = None,
        solver: Solver | None = None,
    ) -> SamplerOptions:
        """Sampler options with this number of steps and guidance scale.

        Others are those of the scheduler where they are None. Raises ValueError for a value that
        the sampler does not have.
        """
        changed = {
            "dynamic": dynamic,
            "guidance_interval": guidance_interval,
            "guidance_rescale": guidance_rescale,
            "control_guidance": control_guidance,
            "solver": solver,
        }
        values: dict[str, Any] = {}
        for name, value in changed.items():
            values[name] = self.config[name] if value is None else value
        values["guidance_interval"] = tuple(values["guidance_interval"])
        _check_sampler(**values)
        return SamplerOptions(
            num_steps=num_steps,
            guidance=guidance,
            guidance_exponent=self.config.guidance_exponent,
            **values,
        )


def _check_sampler(
    dynamic: str,
    guidance_interval: tuple[float, float],
    guidance_rescale: float,
    control_guidance: float,
    solver: str,
) -> None:
    """Raises ValueError for a value that the sampler does not have."""
    if dynamic not in get_args(GuidanceSchedule):
        known = ", ".join(get_args(GuidanceSchedule))
        raise ValueError(f"guidance_schedule = {dynamic!r} must be one of {known}")
    if solver not in get_args(Solver):
        raise ValueError(f"solver = {solver!r} must be one of {', '.join(get_args(Solver))}")
    if len(guidance_interval) != 2 or not all(0 <= edge <= 1 for edge in guidance_interval):
        raise ValueError(f"guidance_interval = {guidance_interval} must be two numbers in 0 ... 1")
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale = {guidance_rescale} must lie in 0 ... 1")
    if control_guidance < 0:
        raise ValueError(f"control_guidance = {control_guidance} must be at least 0")
