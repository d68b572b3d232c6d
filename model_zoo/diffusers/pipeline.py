"""LanDiff as a diffusers pipeline: the whole system in one folder, for people who work with diffusers.

    pipe = LanDiffPipeline.from_pretrained("LanDiff", torch_dtype=torch.bfloat16).to("cuda")
    frames = pipe("a rabbit runs over a meadow", generator=torch.Generator().manual_seed(42)).frames[0]

The components are thin shells around our own modules. Their folders hold the stock formats where there are such:
`transformer/` is read by `CogVideoXTransformer3DModel`, `vae/` and the text encoders are the stock classes.
`landiff convert ... --to diffusers` writes the other folders. Sampling is model_zoo/sample/generate.py's, so the numbers are
those of `landiff sample` at the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXTransformer3DModel,
    ConfigMixin,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from landiff.configs import Config
from landiff.configs.files import write_text
from landiff.model_zoo.config import DiffusionConfig, LMConfig, ScheduleConfig, TokenSamplingConfig
from landiff.model_zoo.convert.formats import diffusers_folder, diffusers_transformer
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.parts import CONTROL, Part
from landiff.model_zoo.convert.rules import apply_rules
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.model_zoo.frozen.cogvideox_vae import CogVideoXCodec
from landiff.model_zoo.frozen.config import FlanT5Config, T5V11Config
from landiff.model_zoo.frozen.t5 import T5Text
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.sample.generate import (
    Models,
    check_prompts,
    draw_codes,
    draw_latents,
    warn_of_cut_prompts,
)
from landiff.model_zoo.sample.latents import SamplerOptions, SamplerStep, latent_shape
from landiff.model_zoo.sample.sizes import num_chunks, stream_lengths
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.model_zoo.tokenizer import SemanticTokenizer

EARLIER_MODULE = "model_zoo.pipeline"  # of this file, in folders that version 0.1.0 saved

# ---------------------------------------------------------------- components


class _Shell(ModelMixin, ConfigMixin):
    """One of our modules as a diffusers model. Saved and loaded by model_zoo/convert, so a folder has one format."""

    kind: str  # of model_zoo/convert/parts.py
    config_name = "config.json"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.register_to_config(landiff=self.sizes.model_dump(mode="json"))

    @property
    def sizes(self) -> Config:
        return self.model.config

    def part(self) -> Part:
        return Part(self.kind, self.sizes, LazyTensors.of(self.model.state_dict()))

    @classmethod
    def of(cls, sizes: Config, tensors: Mapping[str, Tensor]) -> _Shell:
        """Around a new module that takes over these tensors."""
        with torch.device("meta"):
            model = cls.build(sizes)
        model.load_state_dict(dict(tensors), strict=True, assign=True)
        return cls(model)

    @staticmethod
    def build(sizes: Config) -> nn.Module:
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, **_options: Any) -> None:
        diffusers_folder.write_model(Path(save_directory), self.part())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        **_options: Any,
    ) -> _Shell:
        """Raises ConversionError for another model in the folder, UnhealthyError for NaN or infinity."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        part = diffusers_folder.read_model(folder)
        shell = cls.of(part.config, part.tensors.checked(str(folder)))
        return shell if torch_dtype is None else shell.to(torch_dtype)


class LanDiffTransformer(_Shell):
    """The main transformer. On disk it is diffusers' CogVideoXTransformer3DModel."""

    kind = "transformer"
    build = staticmethod(DiffusionTransformer)

    @classmethod
    def from_stock(cls, stock: CogVideoXTransformer3DModel) -> LanDiffTransformer:
        sizes = diffusers_transformer.config_from_diffusers(dict(stock.config))
        return cls.of(
            sizes, apply_rules(stock.state_dict(), diffusers_transformer.RULES, "to_ours")
        )


class ControlParts(nn.Module):
    """Control branch and semantic condition of a ControlledDiffusion, without its main transformer."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            whole = ControlledDiffusion(config)
        self.control, self.semantic = whole.control, whole.semantic

    def with_main(self, transformer: DiffusionTransformer) -> ControlledDiffusion:
        """The whole model; parameters are shared, not copied."""
        with torch.device("meta"):
            whole = ControlledDiffusion(self.config)
        whole.transformer, whole.control, whole.semantic = transformer, self.control, self.semantic
        return whole.eval()


class LanDiffControl(_Shell):
    kind = CONTROL
    build = staticmethod(ControlParts)


class LanDiffTokenizer(_Shell):
    """The semantic tokenizer; its quantiser stays float32 whatever the shell is cast to."""

    kind = "tokenizer"
    build = staticmethod(SemanticTokenizer)


class LanDiffLMConfig(PretrainedConfig):
    model_type = "landiff-lm"

    def __init__(self, landiff: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.landiff = LMConfig.model_validate(landiff or {}).model_dump(mode="json")


class LanDiffLM(PreTrainedModel):
    """The language model as transformers lays models out."""

    config_class = LanDiffLMConfig
    base_model_prefix = "model"
    main_input_name = "ids_BS"
    # loaded with torch_dtype=bfloat16 these stay float32, as in the release (specification §4.5): `LanguageModel.to_inference`
    _keep_in_fp32_modules_strict = ("norm0", "norm1", "final_norm", "head")

    def __init__(self, config: LanDiffLMConfig) -> None:
        super().__init__(config)
        self.model = (
            LanguageModel(LMConfig.model_validate(config.landiff)).eval().requires_grad_(False)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The modules start themselves."""

    def forward(self, *args: Any, **named: Any) -> Tensor:
        """See `landiff.model_zoo.lm.LanguageModel.forward`."""
        return self.model(*args, **named)


class LanDiffScheduler(SchedulerMixin, ConfigMixin):
    """The noise schedule and its sampler's options."""

    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(
        self,
        num_timesteps: int = 1000,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        shift_scale: float = 3.0,
        guidance_exponent: float = 5.0,
        dynamic: str = "timestep",
        clean_frames: int = 7,
    ) -> None:
        self.schedule = NoiseSchedule(
            ScheduleConfig(
                num_timesteps=num_timesteps,
                linear_start=linear_start,
                linear_end=linear_end,
                shift_scale=shift_scale,
            )
        )

    def options(self, num_steps: int, guidance: float) -> SamplerOptions:
        return SamplerOptions(
            num_steps, guidance, self.config.guidance_exponent, self.config.dynamic
        )


# ---------------------------------------------------------------- the pipeline


@dataclass
class LanDiffPipelineOutput(BaseOutput):
    frames: Any  # as output_type says
    codes: Tensor  # int64 [B, K]


# callback(pipe, step, timestep, {"latents": ...}) -> {} or {"latents": what to go on with}
Callback = Callable[["LanDiffPipeline", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


class LanDiffPipeline(DiffusionPipeline):
    """Prompts -> videos. See `__call__`."""

    _num_timesteps = 0
    _interrupt = False
    model_cpu_offload_seq = (
        "lm_text_encoder->lm->semantic_tokenizer->text_encoder->control->transformer->vae"
    )
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        lm: LanDiffLM,
        semantic_tokenizer: LanDiffTokenizer,
        control: LanDiffControl,
        transformer: LanDiffTransformer,
        vae: AutoencoderKLCogVideoX,
        lm_text_encoder: T5EncoderModel,
        lm_tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: LanDiffScheduler,
    ) -> None:
        """`transformer` may be a stock CogVideoXTransformer3DModel; its weights are copied then."""
        super().__init__()
        if isinstance(transformer, CogVideoXTransformer3DModel):
            transformer = LanDiffTransformer.from_stock(transformer)
        self.register_modules(
            lm=lm,
            semantic_tokenizer=semantic_tokenizer,
            control=control,
            transformer=transformer,
            vae=vae,
            lm_text_encoder=lm_text_encoder,
            lm_tokenizer=lm_tokenizer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        self._offload_device: torch.device | None = None

    @classmethod
    def from_models(cls, models: Models, clean_frames: int = 7) -> LanDiffPipeline:
        """What `landiff sample` has loaded, as a pipeline that shares its weights. Raises ValueError for encoders that
        are no T5 and codecs that are no CogVideoX VAE."""
        if not (
            isinstance(models.lm_text, T5Text)
            and isinstance(models.diffusion_text, T5Text)
            and isinstance(models.codec, CogVideoXCodec)
        ):
            raise ValueError(
                "a LanDiffPipeline holds two T5 encoders and the CogVideoX VAE; others are for `landiff sample` alone"
            )
        whole, lm_config = (
            models.diffusion,
            LanDiffLMConfig(models.lm.config.model_dump(mode="json")),
        )
        with torch.device("meta"):
            lm, parts = LanDiffLM(lm_config), ControlParts(whole.config)
        lm.model, parts.control, parts.semantic = models.lm, whole.control, whole.semantic
        schedule = models.schedule.config
        return cls(
            lm,
            LanDiffTokenizer(models.tokenizer),
            LanDiffControl(parts),
            LanDiffTransformer(whole.transformer),
            models.codec.network,
            models.lm_text.network,
            models.lm_text.tokenizer,
            models.diffusion_text.network,
            models.diffusion_text.tokenizer,
            LanDiffScheduler(**schedule.model_dump(), clean_frames=clean_frames),
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_frames: int = 49,
        guidance_scale: float = 6.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback_on_step_end: Callback | None = None,
        output_type: str = "np",
        *,
        num_inference_steps: int = 50,
        num_videos_per_prompt: int = 1,
        token_sampling: TokenSamplingConfig | None = None,
        motion_score: float | None = None,
        latents: Tensor | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> LanDiffPipelineOutput | tuple[Any, Tensor]:
        """`num_videos_per_prompt` videos for every prompt, those of one prompt next to each other.

        Args:
            num_frames: 1 + 8 k; beyond 49 the video is streamed in chunks of 24 frames more: 73, 97, ...
            guidance_scale: of the diffusion model; the scale moves between 1 and 1 + guidance_scale. That of the language model
                is token_sampling.guidance.
            generator: only its initial seed is used, and it is left as it was: equal seeds give equal videos in any batch, and those
                of `landiff sample seed=...`. One generator for several prompts gives video i its seed + 1000 i; None is a random seed.
            motion_score: None is 0.1.
            latents: standard normal start [B, T, C, H, W] of the diffusion model, for a video of one chunk.
            callback_on_step_end: hears of every step and may give back other latents; `pipe._interrupt = True` in it ends the
                denoising with the latents as they are.
            output_type: "np" float32 [B, F, H, W, 3] in 0 ... 1, "pt" the same as [B, F, 3, H, W], "pil" a list of images for each
                video, "uint8" what the codec gives, "latent" scaled latents [B, T, C, H, W].

        Raises ValueError for what doesn't fit.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt = {num_videos_per_prompt} must be at least 1")
        prompts = [one for one in prompts for _ in range(num_videos_per_prompt)]
        unknown = sorted(
            set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        )
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may hold {', '.join(self._callback_tensor_inputs)}, not {unknown}"
            )
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type = {output_type!r} must be one of {', '.join(OUTPUTS)}")
        time = int(self.vae.config.temporal_compression_ratio)
        if num_frames < 1 or (num_frames - 1) % (2 * time):
            raise ValueError(
                f"num_frames = {num_frames} must be 1 + {2 * time} * k: the VAE gives back no other number"
            )
        models, count, clean = (
            self._models(),
            1 + (num_frames - 1) // time,
            self.scheduler.config.clean_frames,
        )
        models.check()
        check_prompts(prompts)
        warn_of_cut_prompts(models.lm_text, prompts)
        warn_of_cut_prompts(models.diffusion_text, prompts)
        window = models.diffusion.config.transformer.latent_frames
        shorter, longer = (
            1 + (length - 1) * time for length in stream_lengths(count, window, clean)
        )
        if shorter != num_frames:
            raise ValueError(
                f"num_frames = {num_frames} is no whole number of chunks of a stream; the nearest that are: {shorter} and {longer}"
            )
        seeds = seeds_of(generator, len(prompts))
        self._interrupt, self._num_timesteps = False, num_inference_steps

        sampler = self.scheduler.options(num_inference_steps, guidance_scale)
        with self._resident("lm_text_encoder"):
            text = models.lm_text(prompts)
        with (
            self._resident("lm"),
            self.progress_bar(total=models.lm.layout.body_length(count)) as bar,
        ):
            codes = draw_codes(
                models.lm,
                text,
                count,
                token_sampling or TokenSamplingConfig(),
                seeds,
                motion_score,
                lambda _what, done, _total: bar.update(done - bar.n),
            )
        with self._resident("semantic_tokenizer"):
            features = models.tokenizer.decode(codes, models.lm.layout.num_frames(codes.shape[1]))
        with self._resident("text_encoder"):
            states, _ = models.diffusion_text(prompts)
        with self._resident("control", "transformer"):
            features = features.to(self.transformer.device)
            self._check_start(latents, models, states, features)
            steps = num_chunks(features.shape[1], window, clean) * num_inference_steps
            with self.progress_bar(total=steps) as bar:
                on_step = self._on_step(
                    callback_on_step_end, callback_on_step_end_tensor_inputs, bar
                )
                made = draw_latents(
                    models.diffusion,
                    models.schedule,
                    states,
                    features,
                    sampler,
                    seeds,
                    clean,
                    on_step=on_step,
                    stop=lambda: self._interrupt,
                    start_BTCHW=latents,
                )
        frames: Any = made
        if output_type != "latent":
            with self._resident("vae"):
                frames = OUTPUTS[output_type](models.codec.decode(made).cpu())
        return LanDiffPipelineOutput(frames, codes) if return_dict else (frames, codes)

    def _models(self) -> Models:
        """The components as sampling takes them; nothing is copied."""
        lm_text = FlanT5Config(max_length=self.lm.model.config.max_text_tokens)
        diffusion_text = T5V11Config(max_length=self.transformer.sizes.text_length)
        return Models(
            lm=self.lm.model,
            tokenizer=self.semantic_tokenizer.model,
            schedule=self.scheduler.schedule,
            diffusion=self.control.model.with_main(self.transformer.model),
            lm_text=T5Text(self.lm_text_encoder, self.lm_tokenizer, lm_text, ""),
            diffusion_text=T5Text(self.text_encoder, self.tokenizer, diffusion_text, ""),
            codec=CogVideoXCodec(self.vae, ""),
        )

    @property
    def num_timesteps(self) -> int:
        """Steps of the latest call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def _check_start(
        self, latents: Tensor | None, models: Models, states: Tensor, features: Tensor
    ) -> None:
        if latents is None:
            return
        expected = latent_shape(models.diffusion, states, features)
        if (
            tuple(latents.shape) != expected
            or expected[1] > models.diffusion.config.transformer.latent_frames
        ):
            raise ValueError(
                f"latents of shape {list(latents.shape)} do not fit a video of one chunk, {list(expected)}"
            )

    def _on_step(
        self, callback: Callback | None, names: Sequence[str], bar: Any
    ) -> Callable[[SamplerStep], Tensor | None]:
        def on_step(done: SamplerStep) -> Tensor | None:
            bar.update()
            if callback is None:
                return None
            given = {"latents": done.state} if "latents" in names else {}
            return (callback(self, done.step, done.timestep, given) or {}).get("latents")

        return on_step

    @classmethod
    def load_config(cls, *args: Any, **options: Any) -> Any:
        """As in diffusers. Components saved under the earlier module name are found too."""
        found = super().load_config(*args, **options)
        config = found[0] if isinstance(found, tuple) else found
        for name, value in config.items():
            if isinstance(value, (list, tuple)) and value and value[0] == EARLIER_MODULE:
                config[name] = [__name__, *value[1:]]
        return found

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Also writes pipeline.py, by which diffusers finds this class: `DiffusionPipeline.from_pretrained(folder,
        custom_pipeline="pipeline", trust_remote_code=True)`."""
        super().save_pretrained(save_directory, **options)
        write_text(
            Path(save_directory, "pipeline.py"),
            "from landiff.model_zoo.diffusers.pipeline import LanDiffPipeline  # noqa: F401\n",
        )

    # ------------------------------------------------------------ memory

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str = "cuda"
    ) -> None:
        """Keep the components on the CPU, and each on `device` only while it works. Needs no accelerate.

        Our sampler calls modules inside the components, so hooks around their `forward` would not be heard.
        """
        target = torch.device(device, gpu_id) if gpu_id is not None else torch.device(device)
        if target.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(
                "enable_model_cpu_offload() moves components between the CPU and a CUDA device, and there is none; leave it out"
            )
        self.to("cpu")
        self._offload_device = target

    def enable_sequential_cpu_offload(self, *_args: Any, **_named: Any) -> None:
        raise NotImplementedError(
            "LanDiffPipeline offloads whole components: enable_model_cpu_offload()"
        )

    def enable_vae_tiling(self) -> None:
        """Decode in overlapping tiles: less memory, slightly different pixels at the seams."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    def _resident(self, *names: str) -> _Resident:
        return _Resident([getattr(self, name) for name in names], self._offload_device)


class _Resident:
    """Modules on a device for a while; without a device, wherever they are."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device | None) -> None:
        self.modules, self.device = modules, device

    def __enter__(self) -> None:
        self._move(self.device)

    def __exit__(self, *_error: object) -> None:
        self._move(None if self.device is None else torch.device("cpu"))

    def _move(self, device: torch.device | None) -> None:
        for module in self.modules if device is not None else ():
            module.to(device)


LARGEST_SEED = (
    1 << 63
)  # a generator's own may be up to twice that, and the streams behind it count on from it


def seeds_of(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int
) -> list[int]:
    """Raises ValueError for another number of generators than prompts."""
    if generator is None:
        return torch.randint(0, 1 << 31, (batch,)).tolist()
    if isinstance(generator, torch.Generator):
        return [(generator.initial_seed() + 1000 * i) % LARGEST_SEED for i in range(batch)]
    if len(generator) != batch:
        raise ValueError(
            f"{len(generator)} generators for {batch} prompts; give one, or one for each"
        )
    return [one.initial_seed() % LARGEST_SEED for one in generator]


def _unit(frames_BFHWC: Tensor) -> Tensor:
    return frames_BFHWC.float() / 255


def _images(frames_BFHWC: Tensor) -> list[list[Image.Image]]:
    return [[Image.fromarray(np.asarray(frame)) for frame in video] for video in frames_BFHWC]


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "np": lambda frames: _unit(frames).numpy(),
    "pt": lambda frames: _unit(frames).permute(0, 1, 4, 2, 3),
    "pil": _images,
    "uint8": lambda frames: frames,
    "latent": lambda latents: latents,
}
