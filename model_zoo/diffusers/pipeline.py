"""LanDiff as a diffusers pipeline: all models in one folder.

    pipe = LanDiffPipeline.from_pretrained("LanDiff", torch_dtype=torch.bfloat16).to("cuda")
    generator = torch.Generator().manual_seed(42)
    video = pipe("a rabbit runs over a meadow", generator=generator).frames[0]

Where diffusers or transformers has a class for a component, its folder is in that format:
`transformer/` can be read by `CogVideoXTransformer3DModel`, and T5 and the CogVideoX VAE are stock
classes. Sampling is that of model_zoo/sample/generate.py, so a seed gives the same numbers as in
`landiff sample`.

Shape letters (docs/glossary.md): B batch, K codes of a clip, T frames (RGB frames of videos, latent
frames of latents and features), C channels, H, W height and width of RGB frames or latents,
h, w height and width in feature cells, L text rows, D width of text states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXTransformer3DModel,
    ModelMixin,
    SchedulerMixin,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from landiff.configs.files import write_text
from landiff.model_zoo.config import TokenSamplingConfig
from landiff.model_zoo.diffusers.adapters import PipelineAdapters
from landiff.model_zoo.diffusers.arguments import (
    TENSOR_INPUTS,
    Callback,
    check_arguments,
    check_start,
    latent_frames_of,
    negatives_of,
    on_step_of,
    repeated,
    seeds_of,
)
from landiff.model_zoo.diffusers.components import (
    EARLIER_MODULES,
    PUBLIC_MODULE,
    ControlParts,
    GuidanceSchedule,
    LanDiffControl,
    LanDiffLM,
    LanDiffLMConfig,
    LanDiffScheduler,
    LanDiffTokenizer,
    LanDiffTransformer,
)
from landiff.model_zoo.diffusers.encoders import (
    LanDiffCodec,
    TextComponent,
    codec_component,
    codec_of,
    text_encoder_of,
    text_parts,
)
from landiff.model_zoo.diffusers.outputs import OUTPUTS, LanDiffPipelineOutput
from landiff.model_zoo.diffusers.placement import ComponentPlacement
from landiff.model_zoo.frozen.base import LatentCodec, VisionFeatures
from landiff.model_zoo.layers import compile_blocks
from landiff.model_zoo.sample.generate import (
    Models,
    draw_codes,
    draw_latents,
    encode_negatives,
    encode_separately,
    warn_of_cut_prompts,
)
from landiff.model_zoo.sample.given import Given, first_frames
from landiff.model_zoo.sample.latents import OnStep, SamplerOptions, SamplerStep
from landiff.model_zoo.sample.placement.quantized import quantize_blocks
from landiff.model_zoo.sample.sizes import num_chunks
from landiff.model_zoo.sample.solvers import Solver
from landiff.model_zoo.sample.stream import Request, VideoStream

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


class LanDiffPipeline(ComponentPlacement):
    """Text to video, see `__call__`."""

    __module__ = PUBLIC_MODULE
    _num_timesteps = 0
    _interrupt = False
    model_cpu_offload_seq = (
        "lm_text_encoder->lm->semantic_tokenizer->text_encoder->control->transformer->vae"
    )
    _callback_tensor_inputs = TENSOR_INPUTS
    _optional_components: ClassVar[list[str]] = ["lm_tokenizer", "tokenizer"]

    def __init__(
        self,
        lm: LanDiffLM,
        semantic_tokenizer: LanDiffTokenizer,
        control: LanDiffControl,
        transformer: LanDiffTransformer,
        vae: AutoencoderKLCogVideoX | LanDiffCodec,
        lm_text_encoder: TextComponent,
        lm_tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: TextComponent,
        tokenizer: PreTrainedTokenizerBase | None,
        scheduler: LanDiffScheduler,
        lm_text_options: dict[str, Any] | None = None,
        text_options: dict[str, Any] | None = None,
    ) -> None:
        """Components are used as they are, except for a stock CogVideoXTransformer3DModel.

        The pipeline converts it to a LanDiffTransformer, which copies weights.

        lm_text_options, text_options: `kind` (flan-t5 or t5-v1.1) and `max_length` of the T5
            encoders; None means those of the release, with the lengths of the models.
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
        self.register_to_config(lm_text_options=lm_text_options, text_options=text_options)
        self._adapters = PipelineAdapters(self)

    @classmethod
    def from_models(
        cls, models: Models, clean_frames: int = 7, sampler: SamplerOptions | None = None
    ) -> LanDiffPipeline:
        """Builds a pipeline that shares the weights of models loaded for `landiff sample`.

        sampler: the defaults of calls. Number of steps and guidance are arguments of each call.
        """
        whole = models.diffusion
        with torch.device("meta"):
            lm = LanDiffLM(LanDiffLMConfig(models.lm.config.model_dump(mode="json")))
            parts = ControlParts(whole.config)
        lm.model = models.lm
        parts.control = whole.control
        parts.semantic = whole.semantic
        lm_text, lm_tokenizer, lm_text_options = text_parts(models.lm_text)
        text, tokenizer, text_options = text_parts(models.diffusion_text)
        return cls(
            lm=lm,
            semantic_tokenizer=LanDiffTokenizer(models.tokenizer),
            control=LanDiffControl(parts),
            transformer=LanDiffTransformer(whole.transformer),
            vae=codec_component(models.codec),
            lm_text_encoder=lm_text,
            lm_tokenizer=lm_tokenizer,
            text_encoder=text,
            tokenizer=tokenizer,
            scheduler=LanDiffScheduler.of(
                models.schedule, sampler or SamplerOptions(), clean_frames
            ),
            lm_text_options=lm_text_options,
            text_options=text_options,
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
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 50,
        num_videos_per_prompt: int = 1,
        token_sampling: TokenSamplingConfig | None = None,
        motion_score: float | None = None,
        solver: Solver | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        control_guidance: float | None = None,
        latents: Tensor | None = None,
        given: Given | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> LanDiffPipelineOutput | tuple[Any, Tensor]:
        """Generates `num_videos_per_prompt` videos per prompt, those of one prompt in a row.

        Args:
            prompt: what the video shows, or a list of prompts.
            num_frames: 1 + 8 k, with codecs other than the CogVideoX VAE 1 + 4 k. Longer videos
                than the model's clips come in chunks, in the release of 49, 73, 97, ... frames.
            guidance_scale: guidance of the diffusion model, whose scale varies between 1 and
                1 + guidance_scale. That of the language model is `token_sampling.guidance`.
            generator: gives the seed; its state is not changed. Equal seeds give equal videos in
                any batch, those of `landiff sample seed=...`. With one generator for several
                videos, video i has its seed + 1000 i. None uses random seeds.
            callback_on_step_end: called after each sampling step; it may return other latents.
                Setting `pipe._interrupt = True` in it ends the sampling with the latents so far.
            output_type: "np" (float32 [B, T, H, W, 3] in 0 ... 1), "pt" (the same as
                [B, T, 3, H, W]), "pil" (a list of images per video), "uint8" (frames of the VAE) or
                "latent" (scaled latents [B, T, C, H, W]).
            negative_prompt: text of the unconditional branch of the diffusion model, one for all
                prompts or a list of one per prompt; "" and None are no text.
            num_inference_steps: sampling steps of the diffusion model.
            token_sampling: sampling options of the language model, schedules included.
            motion_score: in frame heights per second; None means 0.1.
            solver, guidance_schedule, guidance_interval, guidance_rescale, control_guidance: as in
                the config of `landiff sample`; None means that of the scheduler.
            latents: standard normal noise [B, T, C, H, W] to start from, for a video of one chunk.
            given: first frames of the videos (`pipe.first_frames`), or codes that are rendered
                without the language model, `Given(codes)` with those of another call.
            callback_on_step_end_tensor_inputs: what the callback receives: ["latents"] or [].
            return_dict: False returns a tuple (frames, codes).

        Raises ValueError for arguments that do not fit each other or the models.
        """
        check_arguments(num_videos_per_prompt, output_type)
        on_step = on_step_of(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        models = self._models()
        prompts = repeated(prompt, num_videos_per_prompt)
        request = Request(
            prompts,
            latent_frames_of(num_frames, models, self.scheduler.config.clean_frames),
            token_sampling or TokenSamplingConfig(),
            self.scheduler.options(
                num_inference_steps,
                guidance_scale,
                solver=solver,
                dynamic=guidance_schedule,
                guidance_interval=guidance_interval,
                guidance_rescale=guidance_rescale,
                control_guidance=control_guidance,
            ),
            seeds_of(generator, len(prompts)),
            motion_score,
            negatives_of(negative_prompt, prompt, num_videos_per_prompt),
            self.scheduler.config.clean_frames,
            given or Given(),
        )
        codes_BK, latents_BTCHW = self._generate(models, request, on_step, latents)
        frames = self._decode(models.codec, latents_BTCHW, output_type)
        return LanDiffPipelineOutput(frames, codes_BK) if return_dict else (frames, codes_BK)

    def _decode(self, codec: LatentCodec, latents_BTCHW: Tensor, output_type: str) -> Any:
        """Latents as a call returns them: decoded, unless it asks for latents."""
        if output_type == "latent":
            return latents_BTCHW
        with self._resident("vae"):
            # One after the other, as in `generate`: decoding takes the most memory.
            videos = [codec.decode(each).cpu() for each in latents_BTCHW.split(1)]
            return OUTPUTS[output_type](torch.cat(videos))

    def _generate(
        self, models: Models, request: Request, on_step: OnStep, start_BTCHW: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Samples codes [B, K] and latents [B, T, C, H, W]. Errors are those of `Request.check`."""
        request.check(models)
        warn_of_cut_prompts(models.lm_text, request.texts)
        warn_of_cut_prompts(models.diffusion_text, request.texts)
        self._interrupt = False
        self._num_timesteps = request.sampler.num_steps
        codes_BK = self._codes(models, request)
        with self._resident("semantic_tokenizer"):
            count = models.lm.layout.num_frames(codes_BK.shape[1])
            features_BTChw = models.tokenizer.decode(codes_BK, count)
        return codes_BK, self._latents(models, request, features_BTChw, on_step, start_BTCHW)

    def stream(self, request: Request) -> VideoStream:
        """Iterator of the chunks of long videos, in memory that does not depend on their length.

        Its prompts may change over the frames, and `VideoStream` says how to resume it. With
        offloading, each component moves to the device several times per chunk, and the pipeline
        must not be moved, saved or given an adapter before the last chunk. Raises ConfigError as
        `Request.check` does.
        """
        return VideoStream(self._on_demand(self._models()), request)

    def first_frames(self, frames_BTHWC: Tensor, vision: VisionFeatures) -> Given:
        """First frames of videos: an image (T = 1), or a video to continue.

        frames_BTHWC: uint8 [B, T, H, W, 3], one per video, at the size of the videos. T is
            1 + time · k of the codec.
        vision: the encoder that the tokenizer was trained with (`landiff.model_zoo.frozen.build`).
        """
        models = self._models()
        with self._resident("semantic_tokenizer", "vae"):
            return first_frames(models.tokenizer, vision, models.codec, frames_BTHWC)

    def _models(self) -> Models:
        """The components as the sampling functions take them, without copies."""
        lm_text = self.config.lm_text_options or {
            "kind": "flan-t5",
            "max_length": self.lm.model.config.max_text_tokens,
        }
        diffusion_text = self.config.text_options or {
            "kind": "t5-v1.1",
            "max_length": self.transformer.sizes.text_length,
        }
        return Models(
            lm=self.lm.model,
            tokenizer=self.semantic_tokenizer.model,
            schedule=self.scheduler.schedule,
            diffusion=self.control.model.with_main(self.transformer.model),
            lm_text=text_encoder_of(self.lm_text_encoder, self.lm_tokenizer, lm_text),
            diffusion_text=text_encoder_of(self.text_encoder, self.tokenizer, diffusion_text),
            codec=codec_of(self.vae),
        )

    def _codes(self, models: Models, request: Request) -> Tensor:
        """Samples the codes, int64 [B, K], with a progress bar. Given ones are returned."""
        layout = models.lm.layout
        given_BK = request.given.codes_BK
        if given_BK is not None and request.given.num_codes() == layout.num_codes(
            request.num_latent_frames
        ):
            return given_BK.to(self.semantic_tokenizer.device)
        with self._resident("lm_text_encoder"):
            text = encode_separately(models.lm_text, request.texts)
        num_positions = layout.body_length(request.num_latent_frames)
        with self._resident("lm"), self.progress_bar(total=num_positions) as bar:

            def progress(_what: str, done: int, _total: int) -> None:
                bar.update(done - bar.n)

            return draw_codes(
                models.lm,
                text,
                request.num_latent_frames,
                request.tokens,
                seeds=request.seeds,
                motion_score=request.motion_score,
                grid=request.grid_of(models.tokenizer),
                prefix_codes_BK=given_BK,
                progress=progress,
            )

    def _latents(
        self,
        models: Models,
        request: Request,
        features_BTChw: Tensor,
        on_step: OnStep,
        start_BTCHW: Tensor | None,
    ) -> Tensor:
        """Samples the latents [B, T, C, H, W] of all chunks, with a progress bar."""
        with self._resident("text_encoder"):
            text_BLD, _ = encode_separately(models.diffusion_text, request.texts)
            negative_BLD = encode_negatives(models.diffusion_text, request.negatives, text_BLD)
        prefix_BTCHW = request.given.latents_BTCHW
        with self._resident("control", "transformer"):
            features_BTChw = features_BTChw.to(self.transformer.device)
            if start_BTCHW is not None:
                check_start(start_BTCHW, models, text_BLD, features_BTChw)
            window = models.diffusion.config.transformer.latent_frames
            chunks = num_chunks(features_BTChw.shape[1], window, request.clean_frames)
            with self.progress_bar(total=chunks * request.sampler.num_steps) as bar:

                def step_done(step: SamplerStep) -> Tensor | None:
                    bar.update()
                    return on_step(step)

                return draw_latents(
                    models.diffusion,
                    models.schedule,
                    text_BLD,
                    features_BTChw,
                    request.sampler,
                    seeds=request.seeds,
                    negative_BLD=negative_BLD,
                    clean_frames=request.clean_frames,
                    on_step=step_done,
                    stop=lambda: self._interrupt,
                    start_BTCHW=start_BTCHW,
                    prefix_BTCHW=prefix_BTCHW,
                )

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
        with self._all_on_host():
            super().save_pretrained(save_directory, **options)
        write_text(
            Path(save_directory, "pipeline.py"),
            "from landiff import LanDiffPipeline  # noqa: F401\n",
        )

    def compile_blocks(self, **options: Any) -> None:
        """Compiles the blocks of main transformer and control branch, each at its first call.

        Names of weights stay the same, so that the pipeline can be saved afterwards. The language
        model is not compiled: its caches grow with every token.

        options: those of torch.compile. Raises RuntimeError with group or sequential offloading,
        which exchange the weights of compiled code.
        """
        if self._offloading is not None and self._offloading[1] != "part":
            raise RuntimeError(
                "compiled blocks cannot be offloaded one by one; use enable_model_cpu_offload()"
            )
        for blocks in (self.transformer.model.blocks, self.control.model.control.blocks):
            compile_blocks(blocks, **options)

    def quantize_blocks(self) -> None:
        """Stores the weights of the blocks of LM, main transformer and control branch as int8.

        The pipeline cannot be saved or given an adapter afterwards. Raises ConfigError if torchao
        is not installed.
        """
        with self._all_on_host():
            for component in (self.lm, self.transformer, self.control):
                quantize_blocks(component.model)

    def load_adapter(self, folder: str | Path, scale: float = 1.0, *, merge: bool = True) -> None:
        """Adds a LoRA adapter, the folder of a zoo entry, to the model that it was trained on.

        merge: add it to the weights. Otherwise it stays in layers of its own. Raises ConfigError
        for an adapter of another base, whose weights are compared as the pipeline loaded them.
        """
        with self._all_on_host():
            self._adapters.add(Path(folder), scale, merged=merge)
