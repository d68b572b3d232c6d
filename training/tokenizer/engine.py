"""Semantic tokenizer on plain torch DDP.

Letters: B clips of a micro-batch, T semantic frames, C feature channels, h w feature rows and columns,
N codes of a clip, E width of a code.

A checkpoint holds `model.safetensors` (parameters, codebook and its moving averages) and
`optimizer.safetensors` (exp_avg.<parameter>, exp_avg_sq.<parameter>, step). Nothing depends on the layout:
ranks hold the same state, and every draw is keyed by its place in the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from landiff.data_pipeline.loading.loader import Batch, Sample
from landiff.model_zoo.evaluate.codebook import codebook_use, count_codes
from landiff.model_zoo.tokenizer import SemanticTokenizer, TokenizerOutput
from landiff.training import rng
from landiff.training.distributed import World
from landiff.training.engine import StepResult
from landiff.training.guard import Guard
from landiff.training.optim import adamw, clip_gradients, learning_rate, set_learning_rate
from landiff.training.tokenizer.config import COLUMN, TokenizerTrainConfig
from landiff.training.tokenizer.sampling import KeyedSampling

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
PREVIEW_PIXELS = 16  # side of a feature cell


class TokenizerEngine:
    """Trains one `SemanticTokenizer`, data-parallel. Built after the process group exists."""

    def __init__(self, config: TokenizerTrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.guard = Guard(world)
        with rng.seeded(config.loop.seed, "weights"):
            self.tokenizer = SemanticTokenizer(config.model)
        self.tokenizer.set_recompute(config.recompute)
        self.tokenizer.to(world.device).train()
        self.sampling = KeyedSampling(config.loop.seed, world)
        self.sampling.install(self.tokenizer)
        self.model = self._wrap()
        self.optimizer = adamw(self.tokenizer.parameters(), config.optim)
        self._preview: Tensor | None = None  # features_TChw of the last batch's first clip

    def _wrap(self) -> torch.nn.Module:
        if self.world.size == 1:
            return self.tokenizer
        ids = [self.world.device.index] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(self.tokenizer, device_ids=ids, gradient_as_bucket_view=True)

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step. Loss and codebook use are those of the whole global batch."""
        config, size = self.config, self.config.model.codebook_size
        micro_batches = [(micro, self._features(micro)) for micro in batch.micro_batches]
        if batch.step == 0 and config.model.normalize_features:
            self.tokenizer.set_feature_statistics(
                *self._statistics([features for _, features in micro_batches])
            )
        rate = learning_rate(config.optim, batch.step, config.loop.steps)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(3, device=self.world.device)
        counts = torch.zeros(size, device=self.world.device)
        for number, (micro, features_BTChw) in enumerate(micro_batches):
            self.sampling.place(batch.step, number, [sample.position for sample in micro])
            output = self._forward_backward(
                features_BTChw, number + 1 == len(micro_batches), len(micro_batches)
            )
            losses += torch.stack(
                [output.loss, output.reconstruction, output.commitment]
            ).detach() / len(micro_batches)
            counts += count_codes(output.indices, size)
        self._preview = features_BTChw[0]
        grad_norm = clip_gradients(self.tokenizer.parameters(), config.optim.clip_grad)
        summed = self._sum(torch.cat([losses, counts]))
        loss, reconstruction, commitment = summed[:3] / self.world.size
        self.guard.decide(loss, grad_norm)
        self.optimizer.step()
        perplexity, used = codebook_use(summed[3:])
        metrics = {
            "train/reconstruction": reconstruction,
            "train/commitment": commitment,
            "codebook/perplexity": perplexity,
            "codebook/used_fraction": used,
        }
        codes = output.indices.shape[1] * batch.global_batch_size
        return StepResult(loss, grad_norm, rate, metrics, tokens=codes)

    def _forward_backward(self, features_BTChw: Tensor, final: bool, parts: int) -> TokenizerOutput:
        """One micro-batch of `parts`; gradients travel with the `final` one."""
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = final
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=bf16):
            output = self.model(features_BTChw)
        (output.loss / parts).backward()
        return output

    def _features(self, samples: tuple[Sample, ...]) -> Tensor:
        """features_BTChw float32 on the device."""
        stacked = torch.stack([sample.tensors[COLUMN] for sample in samples])
        return stacked.to(self.world.device, non_blocking=True).float()

    def _statistics(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel over global batch 0, [C] each."""
        values_CM = torch.cat(
            [part.transpose(0, 2).flatten(1) for part in features], dim=1
        ).double()
        count = values_CM.new_tensor([values_CM.shape[1]])
        sums = self._sum(torch.cat([count, values_CM.sum(1), values_CM.square().sum(1)]))
        mean, square = (sums[1:] / sums[0]).chunk(2)
        return mean.float(), (square - mean.square()).clamp(min=0).sqrt().float()

    def _sum(self, values: Tensor) -> Tensor:
        if self.world.size > 1:
            dist.all_reduce(values)
        return values

    # ------------------------------------------------------------ checkpoint

    def save(self, folder: Path) -> None:
        """Rank 0 writes: all ranks hold the same."""
        if self.world.rank != 0:
            return
        save_file(
            {name: tensor.contiguous() for name, tensor in self.tokenizer.state_dict().items()},
            folder / MODEL,
        )
        moments = {}
        for name, parameter in self.tokenizer.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{key}.{name}"] = value
        save_file(moments, folder / OPTIMIZER)

    def load(self, folder: Path) -> None:
        device = str(self.world.device)
        self.tokenizer.load_state_dict(load_file(folder / MODEL, device=device))
        moments = load_file(folder / OPTIMIZER, device=device)
        for name, parameter in self.tokenizer.named_parameters():
            self.optimizer.state[parameter] = {
                "step": moments[f"step.{name}"].cpu(),  # AdamW counts on the CPU
                "exp_avg": moments[f"exp_avg.{name}"],
                "exp_avg_sq": moments[f"exp_avg_sq.{name}"],
            }

    def local_weights(self) -> Iterable[tuple[str, Tensor]]:
        return self.tokenizer.state_dict().items()

    # ------------------------------------------------------------ preview

    @torch.no_grad()
    def preview(self) -> dict[str, Tensor]:
        """Features of one clip (left) and what the codes give back (right), coloured by their principal axes."""
        if self._preview is None or self.world.rank != 0:
            return {}
        self.tokenizer.eval()
        decoded_TChw = self.tokenizer(self._preview[None]).decoded[0].float()
        self.tokenizer.train()
        return {"preview/features_and_reconstruction": paint(self._preview, decoded_TChw)}


def paint(features_TChw: Tensor, decoded_TChw: Tensor, pixels: int = PREVIEW_PIXELS) -> Tensor:
    """uint8 [T, H, W, 3]: both side by side, the three first principal axes of `features_TChw` as colours."""
    channels = features_TChw.shape[1]
    flat_MC = features_TChw.transpose(0, 1).reshape(channels, -1).T
    mean_C = flat_MC.mean(0)
    centred_MC = flat_MC - mean_C
    _, axes_CK = torch.linalg.eigh(centred_MC.T @ centred_MC)  # eigenvalues rise
    axes_C3 = axes_CK[:, -3:].flip(-1)
    scale_3 = 3 * (centred_MC @ axes_C3).std(0).clamp(min=1e-6)
    images = []
    for part_TChw in (features_TChw, decoded_TChw):
        colour_Thw3 = (part_TChw.permute(0, 2, 3, 1) - mean_C) @ axes_C3 / scale_3
        image = ((colour_Thw3 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        images.append(image.repeat_interleave(pixels, 1).repeat_interleave(pixels, 2))
    gap = torch.full_like(images[0][:, :, : max(1, pixels // 4)], 255)
    return torch.cat([images[0], gap, images[1]], dim=2).cpu()
