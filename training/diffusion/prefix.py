"""Loss by distance from the prefix: how errors grow within a chunk that continues a video.

Shape letters (docs/glossary.md): B batch, T latent frames.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from landiff.model_zoo.schedule import DenoisingLoss
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.distributed import World


def losses_after_prefix(result: DenoisingLoss, prefix_B: Tensor, distances: int) -> Tensor:
    """Loss by distance from the prefix: sums over the samples with a prefix, and their number.

    Returns float32 [2, `distances`]. Entry d is for latent frame d after the prefix, from 0 on.
    """
    per_frame_BT = result.per_frame.detach()
    num_frames = per_frame_BT.shape[1]
    frame_BT = prefix_B[:, None] + torch.arange(distances, device=prefix_B.device)
    counted_BT = (prefix_B[:, None] > 0) & (frame_BT < num_frames)
    error_BT = per_frame_BT.gather(1, frame_BT.clamp(max=num_frames - 1)) * counted_BT
    return torch.stack([error_BT.sum(dim=0), counted_BT.sum(dim=0).float()])


class PrefixLosses:
    """Loss of a step by distance from the prefix: `train/loss_after_prefix_N`, N from 1.

    The loss of later frames against that of the first shows how errors grow within a chunk.
    """

    def __init__(self, config: DiffusionTrainConfig, world: World) -> None:
        """Without prefixes in the config there are no metrics and no collectives."""
        self.active = config.prefix.probability > 0
        distances = config.model.transformer.latent_frames - min(config.prefix.lengths)
        self.sums = torch.zeros((2, max(distances, 0)), device=world.device)

    def add(self, result: DenoisingLoss, prefix_B: Tensor) -> None:
        """Add a micro-batch."""
        if self.active:
            self.sums += losses_after_prefix(result, prefix_B, self.sums.shape[1])

    def metrics(self) -> dict[str, Tensor | float]:
        """Means over the global batch, NaN where no sample had such a frame. Collective."""
        if not self.active:
            return {}
        dist.all_reduce(self.sums)
        sums, counts = self.sums
        means = sums / counts
        return {f"train/loss_after_prefix_{i}": mean for i, mean in enumerate(means, start=1)}
