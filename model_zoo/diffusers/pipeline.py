"""LanDiff as a diffusers pipeline: all models in one folder.

    pipe = LanDiffPipeline.from_pretrained("LanDiff", torch_dtype=torch.bfloat16).to("cuda")
    generator = torch.Generator().manual_seed(42)
    video = pipe("a rabbit runs over a meadow", generator=generator).frames[0]

Where diffusers or transformers has a class for a component, its folder is in that format:
`transformer/` can be read by `CogVideoXTransformer3DModel`, and `vae/` and the text encoders are
stock classes. `landiff convert ... --to diffusers` writes the other folders. Sampling is that of
model_zoo/sample/generate.py, so a seed gives the same numbers as in `landiff sample`.

Shape letters (docs/glossary.md): B batch, K codes of a clip, T frames (RGB frames of videos, latent
frames of latents and features), C channels, H, W height and width of RGB frames or latents,
h, w height and width in feature cells, L text rows, D width of text states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    ModelMixin,
    SchedulerMixin,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from landiff.configs.files import write_text
from landiff.model_zoo.config import TokenSamplingConfig
from landiff.model_zoo.diffusers.adapters import PipelineAdapters
from landiff.model_zoo.diffusers.arguments import repeated, seeds_of
from landiff.model_zoo.diffusers.components import (
    EARLIER_MODULES,
    PUBLIC_MODULE,
    ControlParts,
    LanDiffControl,
    LanDiffLM,
    LanDiffLMConfig,
    LanDiffScheduler,
    LanDiffTokenizer,
    LanDiffTransformer,
)
from landiff.model_zoo.diffusers.outputs import OUTPUTS, LanDiffPipelineOutput
from landiff.model_zoo.frozen.cogvideox_vae import CogVideoXCodec
from landiff.model_zoo.frozen.config import FlanT5Config, T5V11Config
from landiff.model_zoo.frozen.t5 import T5Text
from landiff.model_zoo.sample.generate import (
    Models,
    check_prompts,
    draw_codes,
    draw_latents,
    warn_of_cut_prompts,
)
from landiff.model_zoo.sample.latents import OnStep, SamplerOptions, SamplerStep, latent_shape
from landiff.model_zoo.sample.sizes import num_chunks, stream_lengths

# diffusers looks up the components of folders that name this module, and their base classes, here.
EARLIER_NAMES = (
    LanDiffControl,
    LanDiffLM,
    LanDiffScheduler,
    LanDiffTokenizer,
    LanDiffTransformer,
    ModelMixin,
    PreTrainedModel,
    SchedulerMixin,
)


# callback(pipe, step, timestep, {"latents": ...}) returns {} or {"latents": replacement}.
Callback = Callable[["LanDiffPipeline", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class _Request:
    """The videos of a call: one prompt and seed per video."""

    prompts: list[str]
    seeds: list[int]
    num_latent_frames: int


class LanDiffPipeline(DiffusionPipeline):
    """Text to video, see `__call__`."""

    __module__ = PUBLIC_MODULE
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
        """Components are used as they are, except for a stock CogVideoXTransformer3DModel.

        The pipeline converts it to a LanDiffTransformer, which copies weights.
        """
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
        self._adapters = PipelineAdapters(self)

    @classmethod
    def from_models(cls, models: Models, clean_frames: int = 7) -> LanDiffPipeline:
        """Builds a pipeline that shares the weights of models loaded for `landiff sample`.

        Raises ValueError unless the text encoders are T5 and the codec is the CogVideoX VAE.
        """
        if not (
            isinstance(models.lm_text, T5Text)
            and isinstance(models.diffusion_text, T5Text)
            and isinstance(models.codec, CogVideoXCodec)
        ):
            raise ValueError(
                "a LanDiffPipeline holds two T5 encoders and the CogVideoX VAE; use "
                "`landiff sample` for other encoders"
            )
        whole = models.diffusion
        with torch.device("meta"):
            lm = LanDiffLM(LanDiffLMConfig(models.lm.config.model_dump(mode="json")))
            parts = ControlParts(whole.config)
        lm.model = models.lm
        parts.control = whole.control
        parts.semantic = whole.semantic
        schedule = models.schedule.config.model_dump()
        return cls(
            lm=lm,
            semantic_tokenizer=LanDiffTokenizer(models.tokenizer),
            control=LanDiffControl(parts),
            transformer=LanDiffTransformer(whole.transformer),
            vae=models.codec.network,
            lm_text_encoder=models.lm_text.network,
            lm_tokenizer=models.lm_text.tokenizer,
            text_encoder=models.diffusion_text.network,
            tokenizer=models.diffusion_text.tokenizer,
            scheduler=LanDiffScheduler(**schedule, clean_frames=clean_frames),
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
        """Generates `num_videos_per_prompt` videos per prompt, those of one prompt in a row.

        Args:
            prompt: what the video shows, or a list of prompts.
            num_frames: 1 + 8 k. Videos of more than 49 frames are generated in chunks of 24 more
                frames each: 73, 97, ...
            guidance_scale: guidance of the diffusion model, whose scale varies between 1 and
                1 + guidance_scale. That of the language model is `token_sampling.guidance`.
            generator: its initial seed is used and its state is not changed. Equal seeds give equal
                videos in any batch, the same as `landiff sample seed=...`. With one generator for
                several videos, video i has its seed + 1000 i. None draws random seeds.
            callback_on_step_end: called after each sampling step; it may return other latents.
                Setting `pipe._interrupt = True` in it ends the sampling with the latents so far.
            output_type: "np" (float32 [B, T, H, W, 3] in 0 ... 1), "pt" (the same as
                [B, T, 3, H, W]), "pil" (a list of images per video), "uint8" (frames of the VAE) or
                "latent" (scaled latents [B, T, C, H, W]).
            num_inference_steps: sampling steps of the diffusion model.
            token_sampling: sampling options of the language model.
            motion_score: in frame heights per second; None means 0.1.
            latents: standard normal noise [B, T, C, H, W] that the sampling of the diffusion model
                starts from, for a video of one chunk.
            callback_on_step_end_tensor_inputs: what the callback receives: ["latents"] or [].
            return_dict: False returns a tuple (frames, codes).

        Raises ValueError for arguments that do not fit each other or the models.
        """
        self._check_arguments(
            num_videos_per_prompt, callback_on_step_end_tensor_inputs, output_type
        )
        prompts = repeated(prompt, num_videos_per_prompt)
        num_latent_frames = self._num_latent_frames(num_frames)
        models = self._models()
        models.check()
        check_prompts(prompts)
        request = _Request(prompts, seeds_of(generator, len(prompts)), num_latent_frames)
        warn_of_cut_prompts(models.lm_text, prompts)
        warn_of_cut_prompts(models.diffusion_text, prompts)
        self._interrupt = False
        self._num_timesteps = num_inference_steps

        codes_BK = self._codes(
            models, request, token_sampling or TokenSamplingConfig(), motion_score
        )
        with self._resident("semantic_tokenizer"):
            count = models.lm.layout.num_frames(codes_BK.shape[1])
            features_BTChw = models.tokenizer.decode(codes_BK, count)
        latents_BTCHW = self._latents(
            models,
            request,
            features_BTChw,
            options=self.scheduler.options(num_inference_steps, guidance_scale),
            on_step=self._on_step(callback_on_step_end, callback_on_step_end_tensor_inputs),
            start_BTCHW=latents,
        )
        frames: Any = latents_BTCHW
        if output_type != "latent":
            with self._resident("vae"):
                frames = OUTPUTS[output_type](models.codec.decode(latents_BTCHW).cpu())
        if not return_dict:
            return frames, codes_BK
        return LanDiffPipelineOutput(frames, codes_BK)

    def _check_arguments(
        self, num_videos_per_prompt: int, tensor_inputs: Sequence[str], output_type: str
    ) -> None:
        """Raises ValueError for arguments of a call that are wrong whatever the models are."""
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt = {num_videos_per_prompt} must be at least 1")
        unknown = sorted(set(tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(
                "callback_on_step_end_tensor_inputs may hold "
                f"{', '.join(self._callback_tensor_inputs)}, not {unknown}"
            )
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type = {output_type!r} must be one of {', '.join(OUTPUTS)}")

    def _num_latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video.

        Raises ValueError for a number of frames that the VAE or whole chunks do not give.
        """
        factor = int(self.vae.config.temporal_compression_ratio)
        if num_frames < 1 or (num_frames - 1) % (2 * factor):
            raise ValueError(
                f"num_frames = {num_frames} must be 1 + {2 * factor} * k: the VAE decodes to no "
                "other number of frames"
            )
        num_latent_frames = 1 + (num_frames - 1) // factor
        window = self.transformer.sizes.latent_frames
        clean_frames = self.scheduler.config.clean_frames
        shorter, longer = stream_lengths(num_latent_frames, window, clean_frames)
        if shorter != num_latent_frames:
            raise ValueError(
                f"num_frames = {num_frames} is no whole number of chunks; the nearest that are: "
                f"{1 + (shorter - 1) * factor} and {1 + (longer - 1) * factor}"
            )
        return num_latent_frames

    def _models(self) -> Models:
        """The components as the sampling functions take them, without copies."""
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

    def _codes(
        self,
        models: Models,
        request: _Request,
        sampling: TokenSamplingConfig,
        motion_score: float | None,
    ) -> Tensor:
        """Samples the codes, int64 [B, K], with a progress bar."""
        with self._resident("lm_text_encoder"):
            text = models.lm_text(request.prompts)
        num_positions = models.lm.layout.body_length(request.num_latent_frames)
        with self._resident("lm"), self.progress_bar(total=num_positions) as bar:

            def progress(_what: str, done: int, _total: int) -> None:
                bar.update(done - bar.n)

            return draw_codes(
                models.lm,
                text,
                request.num_latent_frames,
                sampling,
                seeds=request.seeds,
                motion_score=motion_score,
                progress=progress,
            )

    def _latents(
        self,
        models: Models,
        request: _Request,
        features_BTChw: Tensor,
        *,
        options: SamplerOptions,
        on_step: OnStep,
        start_BTCHW: Tensor | None,
    ) -> Tensor:
        """Samples the latents [B, T, C, H, W] of all chunks, with a progress bar."""
        with self._resident("text_encoder"):
            text_BLD, _ = models.diffusion_text(request.prompts)
        with self._resident("control", "transformer"):
            features_BTChw = features_BTChw.to(self.transformer.device)
            if start_BTCHW is not None:
                _check_start(start_BTCHW, models, text_BLD, features_BTChw)
            clean_frames = self.scheduler.config.clean_frames
            window = models.diffusion.config.transformer.latent_frames
            chunks = num_chunks(features_BTChw.shape[1], window, clean_frames)
            with self.progress_bar(total=chunks * options.num_steps) as bar:

                def step_done(step: SamplerStep) -> Tensor | None:
                    bar.update()
                    return on_step(step)

                return draw_latents(
                    models.diffusion,
                    models.schedule,
                    text_BLD,
                    features_BTChw,
                    options,
                    seeds=request.seeds,
                    clean_frames=clean_frames,
                    on_step=step_done,
                    stop=lambda: self._interrupt,
                    start_BTCHW=start_BTCHW,
                )

    def _on_step(self, callback: Callback | None, names: Sequence[str]) -> OnStep:
        """Wraps the callback of a call as the sampler calls it."""

        def on_step(step: SamplerStep) -> Tensor | None:
            if callback is None:
                return None
            inputs = {}
            if "latents" in names:
                inputs["latents"] = step.state
            changed = callback(self, step.step, step.timestep, inputs) or {}
            return changed.get("latents")

        return on_step

    @property
    def num_timesteps(self) -> int:
        """Sampling steps of the latest call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has interrupted the latest call."""
        return self._interrupt

    @classmethod
    def load_config(cls, *args: Any, **options: Any) -> Any:
        """Reads model_index.json as diffusers does, with the present module of our components."""
        loaded = super().load_config(*args, **options)
        config = loaded
        if isinstance(loaded, tuple):
            config = loaded[0]
        for name, value in config.items():
            if isinstance(value, (list, tuple)) and value and value[0] in EARLIER_MODULES:
                config[name] = [PUBLIC_MODULE, *value[1:]]
        return loaded

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Writes the folder, and pipeline.py by which diffusers finds this class.

        `DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline",
        trust_remote_code=True)` loads it.
        """
        super().save_pretrained(save_directory, **options)
        write_text(
            Path(save_directory, "pipeline.py"),
            "from landiff import LanDiffPipeline  # noqa: F401\n",
        )

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str = "cuda"
    ) -> None:
        """Keeps all components on the CPU and moves each to `device` while it runs.

        Needs no accelerate. Its hooks around `forward` would not work here, because the sampler
        calls modules inside the components.
        """
        target = torch.device(device)
        if gpu_id is not None:
            target = torch.device(target.type, gpu_id)
        if target.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(
                "enable_model_cpu_offload() moves components between the CPU and a CUDA device, "
                "but there is none; remove the call"
            )
        self.to("cpu")
        self._offload_device = target

    def enable_sequential_cpu_offload(self, *_args: Any, **_named: Any) -> None:
        """Not supported. Raises NotImplementedError."""
        raise NotImplementedError(
            "LanDiffPipeline offloads whole components only; call enable_model_cpu_offload()"
        )

    def load_adapter(self, folder: str | Path, scale: float = 1.0, *, merge: bool = True) -> None:
        """Adds a LoRA adapter, the folder of a zoo entry, to the model that it was trained on.

        merge: add it to the weights. Otherwise it stays in layers of its own. Raises ConfigError
        for an adapter of another base, whose weights are compared as the pipeline loaded them.
        """
        self._adapters.add(Path(folder), scale, merged=merge)

    def enable_vae_tiling(self) -> None:
        """Decodes in overlapping tiles: less memory, slightly different pixels at the seams."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decodes whole frames again."""
        self.vae.disable_tiling()

    @contextmanager
    def _resident(self, *names: str) -> Iterator[None]:
        """Moves components to the device of `enable_model_cpu_offload`, and back at the end.

        Without offloading the components stay where they are.
        """
        device = self._offload_device
        if device is None:
            yield
            return
        components = [getattr(self, name) for name in names]
        for component in components:
            component.to(device)
        try:
            yield
        finally:
            for component in components:
                component.to("cpu")


def _check_start(
    start_BTCHW: Tensor, models: Models, text_BLD: Tensor, features_BTChw: Tensor
) -> None:
    """Raises ValueError for start noise that does not fit the video, or a video of many chunks."""
    expected = latent_shape(models.diffusion, text_BLD, features_BTChw)
    window = models.diffusion.config.transformer.latent_frames
    if tuple(start_BTCHW.shape) != expected or expected[1] > window:
        raise ValueError(
            f"latents of shape {list(start_BTCHW.shape)} do not fit a video of one chunk, "
            f"{list(expected)}"
        )
