"""A toy engine whose run diverges."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.training.toy import ToyEngine


@dataclass
class Diverging(ToyEngine):
    """Samples of step 4 hold a bad value on one rank."""

    value: float = math.nan

    def train_step(self, batch):
        if batch.step == 4 and self.world.rank == self.world.size - 1:
            batch.micro_batches[0][0].tensors["x"][0] = self.value
        return super().train_step(batch)
