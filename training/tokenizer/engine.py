"""Engine of the semantic tokenizer, on plain torch DDP.

Shape letters (docs/glossary.md): B clips of a micro-batch, T semantic frames, C feature channels,
h w rows and columns of the grid, M all vectors of a micro-batch.

A checkpoint holds `model.safetensors` (parameters, codebook and its moving averages),
`optimizer.safetensors` (exp_avg.<parameter>, exp_avg_sq.<parameter>, step.<parameter>), and with
`ema` in the config `ema.safetensors` (moving averages of the parameters). It does not depend on the
number of ranks: all hold the same state, and random numbers are keyed by the position in the global
batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from landiff.data_pipeline.loading.samples import Batch, HeldOutBatch, Sample
from landiff.model_zoo import keyed_random, registry
from landiff.model_zoo.device import to_device
from landiff.model_zoo.evaluate.codebook import codebook_use, count_codes
from landiff.model_zoo.layers import require_compiler
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training import rng
from landiff.training.checkpoint.parts import StateFile, safetensors_file
from landiff.training.distributed import World
from landiff.training.ema import Ema
from landiff.training.engine import StepResult
from landiff.training.guard import Guard
from landiff.training.observe.alarms import AlarmRule
from landiff.training.observe.flops import tokenizer_flops
from landiff.training.observe.previews import Preview, SourceFrames
from landiff.training.observe.step_times import StepClock
from landiff.training.optim import (
    adamw,
    clip_gradients,
    rate_of_step,
    set_rate_and_decay,
    step_count,
)
from landiff.training.tokenizer import alarms
from landiff.training.tokenizer.config import COLUMN, TokenizerTrainConfig
from landiff.training.tokenizer.preview import paint
from landiff.training.tokenizer.sampling import KeyedSampling
from landiff.training.tokenizer.validation import CHARTS, clip_sums, summarize_sums, zero_sums

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
EMA = "ema.safetensors"


class TokenizerEngine:
    """Trains one `SemanticTokenizer`, data-parallel. The process group exists already."""

    charts = CHARTS

    def __init__(self, config: TokenizerTrainConfig, world: World) -> None:
        """Build the tokenizer with initial weights from `loop.seed` or `init_from`."""
        self.config = config
        self.world = world
        self.guard = Guard(config.loop, world)
        with rng.seeded(config.loop.seed, "weights"):
            self.tokenizer = SemanticTokenizer(config.model)
        if config.init_from is not None:
            entry = registry.resolve(config.zoo, config.init_from, kind="tokenizer")
            self.tokenizer.load_state_dict(entry.load(), strict=True)
        self.tokenizer.set_recompute(config.recompute)
        if config.compile_blocks:
            require_compiler(world.device)
            self.tokenizer.compile_blocks()
        self.tokenizer.to(world.device).train()
        self.sampling = KeyedSampling(config.loop.seed, world)
        self.sampling.install(self.tokenizer)
        self.clock = StepClock(world.device, self.tokenizer)
        self.model = self._wrap()
        self.optimizer = adamw(self.tokenizer.named_parameters(), config.optim, world.device)
        self.ema = Ema(config.ema, list(self.tokenizer.parameters()))
        self._preview_TChw: Tensor | None = None  # features of a clip of the last batch

    def _wrap(self) -> torch.nn.Module:
        if self.world.size == 1:
            return self.tokenizer
        ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(self.tokenizer, device_ids=ids, gradient_as_bucket_view=True)

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step. Loss and codebook use are those of the global batch."""
        config = self.config
        self.clock.start()
        number_of_parts = len(batch.micro_batches)
        features = [self._features(samples) for samples in batch.micro_batches]
        buffers = self._copy_buffers()
        # A start from the zoo keeps its statistics: its decoder predicts features in their units.
        measured = config.model.normalize_features and config.init_from is None
        if measured and not self.optimizer.state:  # no update yet
            self.tokenizer.set_feature_statistics(*self._statistics(features))
        rate = rate_of_step(config, batch.step)
        optim = config.at(batch.step).optim  # of the step's phase
        set_rate_and_decay(self.optimizer, rate, optim.weight_decay)
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(3, device=self.world.device)
        counts = torch.zeros(config.model.codebook_size, device=self.world.device)
        positions = [[sample.position for sample in part] for part in batch.micro_batches]
        self.sampling.begin_step(batch.step, positions)
        for number in range(number_of_parts):
            self.sampling.place(number)
            self._reduce_gradients(number + 1 == number_of_parts)
            with self._autocast():
                output = self.model(features[number], batch.step >= config.quantize_from_step)
            # The loss: reconstruction + commitment_weight * commitment, see SemanticTokenizer.
            (output.loss / number_of_parts).backward()
            parts = torch.stack([output.loss, output.reconstruction, output.commitment])
            losses += parts.detach() / number_of_parts
            counts += count_codes(output.indices, config.model.codebook_size)
        self._preview_TChw = features[-1][0]
        grad_norm = clip_gradients(self.tokenizer.parameters(), optim.clip_grad)
        summed = self._sum(torch.cat([losses, counts]))
        loss, reconstruction, commitment = summed[:3] / self.world.size
        updating = self.guard.decide(loss, grad_norm)
        self.clock.update()
        if updating:
            self.optimizer.step()
            self.ema.update(batch.step + 1)
        else:
            self._restore_buffers(buffers)
        perplexity, used = codebook_use(summed[3:])
        metrics: dict[str, Tensor | float] = {
            "train/reconstruction": reconstruction,
            "train/commitment": commitment,
            alarms.PERPLEXITY: perplexity,
            alarms.USED: used,
            alarms.DEAD: self._dead_fraction(),
            alarms.COMMITMENT: commitment / reconstruction.clamp(min=1e-12),
        }
        clips = batch.global_batch_size
        num_codes = clips * output.indices.shape[1]
        return StepResult(
            loss,
            grad_norm,
            rate,
            metrics,
            tokens=num_codes,
            flops=clips * self._clip_flops(features[0]),
            times=self.clock.stop(),
            skipped=not updating,
            alarms=self._alarms(batch.step, num_codes),
        )

    def _clip_flops(self, features_BTChw: Tensor) -> float:
        """Model FLOPs of one clip of a micro-batch."""
        frames, _, rows, columns = features_BTChw.shape[1:]
        return tokenizer_flops(self.config.model.sized(rows, columns), frames).total

    def _dead_fraction(self) -> Tensor:
        """Part of the codebook that is dead codes, or was replaced in this step."""
        codebook = self.tokenizer.quantizer._codebook
        dead = codebook.cluster_size <= codebook.threshold_ema_dead_code
        return dead.float().mean()

    def _alarms(self, step: int, num_codes: int) -> Sequence[AlarmRule]:
        """Alarms of step `step`, none before the codebook has settled."""
        config = self.config
        if config.alarms is None:
            return ()
        if step < config.quantize_from_step + config.alarms.from_step:
            return ()
        return alarms.alarm_rules(config.alarms, config.model.codebook_size, num_codes)

    def _copy_buffers(self) -> list[Tensor]:
        """Copies of codebook, its moving averages and feature statistics, which forward changes."""
        return [buffer.clone() for buffer in self.tokenizer.buffers()]

    def _restore_buffers(self, copies: Sequence[Tensor]) -> None:
        """Undo the changes of a forward pass whose step is skipped."""
        self.sampling.started = False
        for buffer, copy in zip(self.tokenizer.buffers(), copies, strict=True):
            buffer.copy_(copy)

    def _reduce_gradients(self, enabled: bool) -> None:
        """Whether the next backward reduces gradients over the ranks."""
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = enabled

    def _autocast(self) -> torch.autocast:
        """Autocast to bfloat16 if the config asks for it."""
        enabled = self.config.precision == "bf16"
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _features(self, samples: tuple[Sample, ...]) -> Tensor:
        """Features of a micro-batch, float32 [B, T, C, h, w] on the device."""
        stacked = torch.stack([self._segment(sample) for sample in samples])
        return to_device(stacked, self.world.device).float()

    def _segment(self, sample: Sample) -> Tensor:
        """Features of a sample [T, C, h, w]: for a longer clip, those of a random segment."""
        start = self._segment_start(sample)
        return sample.tensors[COLUMN][start : start + self.config.model.segment_frames]

    def _segment_start(self, sample: Sample) -> int:
        """First semantic frame of the segment, keyed by the sample's index."""
        frames = len(sample.tensors[COLUMN])
        last_start = frames - self.config.model.segment_frames
        if last_start <= 0:
            return 0
        generator = keyed_random.generator(self.config.loop.seed, "segment", sample.index)
        return int(torch.randint(last_start + 1, (), generator=generator))

    def _statistics(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the global batch, [C] each."""
        flat = [features_BTChw.transpose(0, 2).flatten(1) for features_BTChw in features]
        values_CM = torch.cat(flat, dim=1).double()
        count = values_CM.new_tensor([values_CM.shape[1]])
        sums = self._sum(torch.cat([count, values_CM.sum(1), values_CM.square().sum(1)]))
        mean_C, square_C = (sums[1:] / sums[0]).chunk(2)
        deviation_C = (square_C - mean_C.square()).clamp(min=0).sqrt()
        return mean_C.float(), deviation_C.float()

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world.size > 1:
            dist.all_reduce(values)
        return values

    # ------------------------------------------------------------ checkpoint

    def state_files(self) -> list[StateFile]:
        """The state, from rank 0: all ranks hold the same."""
        if self.world.rank != 0:
            return []
        moments = {}
        for name, parameter in self.tokenizer.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{key}.{name}"] = value
        files = [
            safetensors_file(MODEL, self.tokenizer.state_dict()),
            safetensors_file(OPTIMIZER, moments),
        ]
        if self.ema.enabled:
            names = [name for name, _ in self.tokenizer.named_parameters()]
            averages = dict(zip(names, self.ema.averages, strict=True))
            files.append(safetensors_file(EMA, averages))
        return files

    def load(self, folder: Path) -> None:
        """Restore a checkpoint, on any number of ranks."""
        device = str(self.world.device)
        self.sampling.started = False
        self.tokenizer.load_state_dict(load_file(folder / MODEL, device=device))
        moments = load_file(folder / OPTIMIZER, device=device)
        fused = self.optimizer.defaults["fused"]
        self.optimizer.state.clear()  # a checkpoint from before the first update has no moments
        names = {parameter: name for name, parameter in self.tokenizer.named_parameters()}
        # In the order in which the optimizer's first step creates the states.
        for parameter in chain(*(group["params"] for group in self.optimizer.param_groups)):
            name = names[parameter]
            if f"step.{name}" not in moments:
                continue
            self.optimizer.state[parameter] = {
                "step": step_count(moments[f"step.{name}"], parameter, fused),
                "exp_avg": moments[f"exp_avg.{name}"],
                "exp_avg_sq": moments[f"exp_avg_sq.{name}"],
            }
        self._load_averages(folder, device)

    def _load_averages(self, folder: Path, device: str) -> None:
        """Restore the moving averages if checkpoint and config have them."""
        found = (folder / EMA).is_file()
        if found and self.ema.enabled:
            stored = load_file(folder / EMA, device=device)
            names = [name for name, _ in self.tokenizer.named_parameters()]
            for name, average in zip(names, self.ema.averages, strict=True):
                average.copy_(stored[name])
        self.ema.loaded(folder, found=found)

    def local_weights(self) -> Iterable[tuple[str, Tensor]]:
        """All weights, buffers and moving averages."""
        yield from self.tokenizer.state_dict().items()
        yield from self.ema.named()

    def weights(self, ema: bool) -> AbstractContextManager[None]:
        """Context in which the tokenizer holds the moving averages of its parameters, or not.

        The quantizer's buffers do not change.
        """
        return self.ema.applied(ema, lambda: None)

    # ------------------------------------------------------------ validation

    @torch.no_grad()
    def validate(self, batch: HeldOutBatch) -> dict[str, Tensor]:
        """Sums of errors and code counts (training/tokenizer/validation.py).

        There is no collective in the forward pass, so clips that do not count are skipped.
        """
        pairs = zip(batch.samples, batch.counted, strict=True)
        samples = tuple(sample for sample, counted in pairs if counted)
        if not samples:
            return zero_sums(self.config.model, self.world.device)
        features_BTChw = self._features(samples)
        self.tokenizer.eval()
        with self._autocast():
            output = self.tokenizer(features_BTChw)
        self.tokenizer.train()
        return clip_sums(self.tokenizer, features_BTChw, output)

    def summarize(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics by name, from the sums of `validate`."""
        return summarize_sums(sums, self.config.model)

    # ------------------------------------------------------------ preview

    @torch.no_grad()
    def preview(self, clips: Sequence[Sample]) -> list[Preview]:
        """Features of held-out clips, or of a clip of the last batch, and their reconstruction.

        Empty before the first step, and on all ranks but rank 0.
        """
        if self._preview_TChw is None or self.world.rank != 0:
            return []
        if not clips:
            return [self._reconstruction("preview/clip", self._preview_TChw)]
        previews = []
        for number, clip in enumerate(clips):
            preview = self._reconstruction(f"preview/held_out_{number}", self._features((clip,))[0])
            source = self._source_frames(clip)
            previews.append(replace(preview, text=clip.meta.caption, source=source))
        return previews

    def _source_frames(self, clip: Sample) -> SourceFrames:
        """Frames of a held-out clip that its features are computed from."""
        frames = len(clip.tensors[COLUMN])
        step = (clip.meta.num_frames - 1) // max(1, frames - 1)
        return SourceFrames(clip.position, self._segment_start(clip) * step, step)

    def _reconstruction(self, tag: str, features_TChw: Tensor) -> Preview:
        """Features and their reconstruction from codes, painted in the same colours."""
        self.tokenizer.eval()
        with self.weights(self.ema.enabled), self._autocast():
            decoded_TChw = self.tokenizer(features_TChw[None]).decoded[0].float()
        self.tokenizer.train()
        features, reconstruction = paint(features_TChw, decoded_TChw)
        return Preview(tag, {"features": features, "reconstruction": reconstruction})
