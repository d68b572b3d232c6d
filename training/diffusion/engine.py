"""Engine of the diffusion trainer, on DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from landiff.configs.base import ConfigError
from landiff.data_pipeline.loading.samples import Batch, HeldOutBatch, Sample
from landiff.model_zoo.config import TransformerConfig
from landiff.model_zoo.convert.formats.deepspeed import (
    EMA,
    LAYOUT,
    SHARDS,
    ZeroLayout,
    read_deepspeed,
)
from landiff.model_zoo.convert.rules import check_against
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.model_zoo.layers import require_compiler
from landiff.model_zoo.lora.config import ADAPTER, require_same_adapter
from landiff.training.checkpoint.parts import StateFile, json_file
from landiff.training.diffusion import zero
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.gradients import FlatGradients
from landiff.training.diffusion.model import adapter_of, build_phase_model, load_tokenizer
from landiff.training.diffusion.prefix import PrefixLosses
from landiff.training.diffusion.preview import Previewer, prompt_samples
from landiff.training.diffusion.step import Objective
from landiff.training.diffusion.validation import CHARTS, clip_sums, prefix_frames, summarize_sums
from landiff.training.diffusion.zero_files import state_files
from landiff.training.diffusion.zero_settings import deepspeed_config
from landiff.training.distributed import World
from landiff.training.ema import Ema
from landiff.training.engine import StepResult
from landiff.training.float8 import layers as float8
from landiff.training.guard import Guard
from landiff.training.layout import check_batch
from landiff.training.observe.flops import control_flops, main_flops, num_tokens
from landiff.training.observe.previews import Preview, SourceFrames
from landiff.training.observe.step_times import StepClock
from landiff.training.optim import adamw, rate_of_step, set_rate_and_decay


class DeepSpeedEngine:
    """Trains `module` on `objective` with ZeRO stage 1, 2 or 3 and torch's AdamW."""

    charts = CHARTS

    def __init__(
        self,
        config: DiffusionTrainConfig,
        world: World,
        module: DiffusionTransformer | ControlledDiffusion,
        objective: Objective,
    ) -> None:
        """`module`: equal on all ranks. Parameters without gradient never change.

        With `precision: bf16` it may be in bfloat16 already, to which DeepSpeed casts it.
        """
        check_batch(config, world.size)  # raises before DeepSpeed does, with a better message
        self.config = config
        self.world = world
        self.guard = Guard(config.loop, world)
        self.objective = objective
        self.adapter = adapter_of(config)
        zero.prepare_deepspeed()
        optimizer = adamw(module.named_parameters(), config.optim, world.device)
        groups = zero.group_names(module, optimizer) if config.optim.groups else []
        settings = deepspeed_config(config, world)
        self.clock = StepClock(world.device, module)
        self.sequence_group = world.group_of_neighbors(config.sequence_parallel)
        self.zero = zero.initialize(module, optimizer, settings, world.device)
        if config.zero.stage != 3:
            overlap = config.zero.overlap_communication
            FlatGradients(self.zero, config.zero.reduce_bucket_size, overlap)
        zero.ask_before_update(self.zero, self._decide)
        self.module.sequence_group = self.sequence_group
        self._total = torch.zeros((), device=world.device)  # losses of this rank in this step
        self.ema = Ema(config.ema, zero.master_weights(self.zero))
        self.previewer: Previewer | None = None
        if config.preview_codec is not None:
            self.previewer = Previewer(config, objective, world.beat)
        self.prompts = prompt_samples(config, world)
        self.last_sample: Sample | None = None
        self.layout = ZeroLayout(
            zero_stage=config.zero.stage,
            world_size=world.size,
            precision=config.precision,
            phase=config.phase,
            model=config.model,
            shapes=zero.full_shapes(module),
            groups=groups,
        )

    @property
    def module(self) -> DiffusionTransformer | ControlledDiffusion:
        """The trained module. ZeRO-3 partitions its parameters: read them with `zero.read_full`."""
        return self.zero.module

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step. The loss is that of the global batch."""
        rate = rate_of_step(self.config, batch.step)
        self.clock.start()
        optim = self.config.at(batch.step).optim  # of the step's phase
        set_rate_and_decay(self.zero.optimizer, rate, optim.weight_decay)
        self.zero.optimizer.clip_grad = optim.clip_grad  # a checkpoint may have set another one
        objective = self.objective.at(batch)
        zero.set_batch(self.zero, batch, self.config.sequence_parallel)
        self.zero.train()
        self.last_sample = batch.micro_batches[0][0]
        self._total.zero_()
        after_prefix = PrefixLosses(objective.config, self.world)
        for samples in batch.micro_batches:
            inputs = objective.inputs(samples)
            result = objective.loss(self.zero, inputs)
            loss = result.loss  # squared error of the velocity
            self.zero.backward(loss)  # averages over micro-batches and ranks
            self._total += loss.detach()
            after_prefix.add(result, inputs.prefix_B)
            # After the last micro-batch: gradient norm, `_decide`, update.
            self.zero.step()
        if self._updated:
            self.ema.update(batch.step + 1)
        clips = batch.global_batch_size
        frames, _, height, width = inputs.latents_BTCHW.shape[1:]
        sizes = self.config.model.transformer.sized(frames, height, width)
        return StepResult(
            loss=self._loss,
            grad_norm=self._grad_norm,
            lr=rate,
            metrics=after_prefix.metrics(),
            tokens=clips * num_tokens(sizes),
            flops=clips * self._clip_flops(sizes),
            times=self.clock.stop(),
            skipped=not self._updated,
        )

    def _decide(self, grad_norm: Tensor) -> bool:
        """Ask the guard, with the loss of the global batch. DeepSpeed calls it in its `step`."""
        self._loss = self._total / (self.zero.gradient_accumulation_steps() * self.world.size)
        dist.all_reduce(self._loss)
        self._grad_norm = grad_norm
        self._updated = self.guard.decide(self._loss, grad_norm)
        self.clock.update()
        return self._updated

    def state_files(self) -> list[StateFile]:
        """DeepSpeed's shards, and layout.json with their division. Collective."""
        zero.complete_optimizer_state(self.zero)
        with zero.averages_in_optimizer(self.zero, self.ema.averages):
            files = state_files(self.zero)
        if self.world.rank == 0:
            files.append(json_file(LAYOUT, self.layout))
            if self.adapter is not None:
                files.append(json_file(ADAPTER, self.adapter))
        return files

    def load(self, folder: Path) -> None:
        """Restore a checkpoint. Collective.

        In the same layout it resumes bit-identically. In another layout, or with other parameter
        groups, it is resharded from the float32 weights and Adam's moments. Raises ConfigError for
        a checkpoint of another phase or model.
        """
        found = ZeroLayout.read(folder)
        if found.phase != self.layout.phase:
            raise ConfigError(
                f"{folder} is a checkpoint of phase = {found.phase}, this run is phase = "
                f"{self.layout.phase}; choose another run folder (run=...)"
            )
        require_same_adapter(folder, self.adapter)
        with torch.device("meta"):
            expected = {name: torch.empty(shape) for name, shape in self.layout.shapes.items()}
        check_against(expected, found.shapes, f"checkpoint {folder}")
        if found == self.layout:
            zero.load_same_layout(self.zero, folder)
            has_averages = zero.take_averages(self.zero, self.ema.averages)
        else:
            state = read_deepspeed(folder / SHARDS)
            zero.restore(self.zero, state, self.ema.averages)
            has_averages = EMA in state.moment_places
        self.ema.loaded(folder, found=has_averages)

    def local_weights(self) -> Iterable[tuple[str, Tensor]]:
        """This rank's part of parameters, buffers, float32 master weights and moving averages."""
        yield from zero.local_weights(self.zero)
        yield from self.ema.named()

    def weights(self, ema: bool) -> AbstractContextManager[None]:
        """Context in which forward passes read the moving averages, or the weights. Collective."""
        return self.ema.applied(ema, lambda: zero.publish_weights(self.zero))

    @torch.no_grad()
    def validate(self, batch: HeldOutBatch) -> dict[str, Tensor]:
        """Sums of losses (training/diffusion/validation.py). Collective with ZeRO-3."""
        self.zero.eval()
        sums = clip_sums(self.zero, self.objective, batch, prefix_frames(self.config))
        self.zero.train()
        return sums

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics by name, from the sums of `validate`."""
        return summarize_sums(sums, self.config)

    def preview(self, clips: Sequence[Sample]) -> list[Preview]:
        """Videos of held-out clips, or of the first clip of rank 0's last batch. Collective.

        After them videos of `preview_prompts`. Clips and prompts are divided over the ranks. Rank 0
        collects the videos and waits for the others.
        """
        if self.previewer is None:
            return []
        tag = "preview/held_out_{}"
        held_out = len(clips) > 0
        if not held_out and self.last_sample is not None:
            tag = "preview/clip"
            clips = [self.last_sample]
        with self.weights(self.ema.enabled), self._whole_sequences():
            previews = self._shared(clips, tag, self.previewer)
            if held_out:
                pairs = zip(previews, clips, strict=False)  # only rank 0 has previews
                previews = [
                    replace(each, source=SourceFrames(clip.position)) for each, clip in pairs
                ]
            previews += self._shared(self.prompts, "preview/prompt_{}", self.previewer.prompt)
        return previews

    def _shared(
        self, samples: Sequence[Sample], tag: str, show: Callable[[nn.Module, Sample, str], Preview]
    ) -> list[Preview]:
        """Previews of samples, which the ranks divide, on rank 0. Collective."""
        found = []
        for number in self._own_numbers(len(samples)):
            sample = samples[number % len(samples)]
            preview = show(self.module, sample, tag.format(number))
            if number < len(samples):
                found.append((number, preview.reduced()))
        found = self.world.send_to_first(found)
        return [preview for _, preview in sorted(found, key=itemgetter(0))]

    @contextmanager
    def _whole_sequences(self) -> Iterator[None]:
        """Context in which each rank processes different clips, as without `sequence_parallel`."""
        self.module.sequence_group = None
        try:
            yield
        finally:
            self.module.sequence_group = self.sequence_group

    def _own_numbers(self, count: int) -> range:
        """Which of `count` clips this rank shows.

        With ZeRO-3 every forward gathers parameters, so all ranks process equally many: numbers
        from `count` on are clips that another rank shows.
        """
        end = count
        if self.zero.zero_optimization_stage() == 3:
            end = -(-count // self.world.size) * self.world.size
        return range(self.world.rank, end, self.world.size)

    def _clip_flops(self, sizes: TransformerConfig) -> float:
        """Model FLOPs of one clip, for the main transformer with the sizes of its latents."""
        model = self.config.model.model_copy(update={"transformer": sizes})
        adapter = self.config.lora is not None
        if self.config.phase == "control":
            return control_flops(model, adapter=adapter).total
        return main_flops(model.transformer, adapter=adapter).total


def build_engine(config: DiffusionTrainConfig, world: World) -> DeepSpeedEngine:
    """The engine of a config. Collective, after `landiff.training.distributed.start`."""
    if config.fp8:
        float8.require_device(world.device)
    if config.compiles:
        require_compiler(world.device)
    objective = Objective(config, world.device, load_tokenizer(config, world.device))
    dtype = torch.float32
    if config.precision == "bf16":
        dtype = torch.bfloat16
    return DeepSpeedEngine(config, world, build_phase_model(config, dtype, world.device), objective)
