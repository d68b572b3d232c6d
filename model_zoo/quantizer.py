"""Vector quantization of the semantic tokenizer, with vector-quantize-pytorch.

Shape letters (docs/glossary.md): B batch, N latent tokens of a segment, Z width of a latent token,
E width of a code vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import cdist

from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.device import keeping_dtype


class Quantizer(VectorQuantize):
    """vector-quantize-pytorch with the settings of the released tokenizer (§3.6).

    The codebook is a moving average, gradients pass through the rotation trick. Everything is
    computed and kept in float32, whatever the model is cast to and under autocast, except for the
    projection in `nearest`, which follows autocast (§3.10). Code vectors are all-reduced over ranks
    if the process group exists at construction. The k-means initialization and the replacement of
    dead codes use torch's global generator, in training only.
    """

    zero: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        synced = False
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            synced = torch.distributed.get_world_size() > 1
        super().__init__(
            dim=config.token_size,
            codebook_size=config.codebook_size,
            codebook_dim=config.codebook_dim,
            decay=config.codebook_decay,
            eps=1e-5,
            kmeans_init=True,
            kmeans_iters=config.kmeans_iterations,
            threshold_ema_dead_code=config.dead_code_threshold,
            commitment_weight=1.0,
            rotation_trick=True,
            # The library would decide once per process and remember the answer.
            sync_codebook=synced,
        )
        # As a buffer outside the state dict it would stay without data in a model that is built on
        # meta and then loaded.
        del self.zero
        self.zero = torch.zeros((), device="cpu")
        self.dead_code_share = config.dead_code_share
        self._has_codebook = False  # known on the host, so that no call waits for the device
        self.world_size = torch.distributed.get_world_size() if synced else 1
        self.register_load_state_dict_pre_hook(_load_as_float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Moves tensors between devices but does not cast them to another dtype."""
        return super()._apply(keeping_dtype(fn), recurse)

    def quantize(self, latents_BNZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes in training and updates the codebook. latents_BNZ: [B, N, Z].

        Returns the values of the codes (float32 [B, N, Z], with gradients), the codes (int64
        [B, N]) and the commitment loss.
        """
        if self.dead_code_share is not None:
            expected = latents_BNZ.shape[:2].numel() * self.world_size / self.codebook_size
            self._codebook.threshold_ema_dead_code = self.dead_code_share * expected
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            outputs = self(latents_BNZ.float(), return_loss_breakdown=True)
        values_BNZ, indices_BN, _, losses = outputs
        return values_BNZ, indices_BN, losses.commitment

    def bypass(self, latents_BNZ: Tensor) -> Tensor:
        """Latents through the projections to code vectors and back, [B, N, Z], not quantized."""
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            return self.project_out(self.project_in(latents_BNZ.float()))

    @torch.no_grad()
    def nearest(self, latents_BNZ: Tensor) -> Tensor:
        """Nearest codes, [B, N, Z] -> int64 [B, N]; the lowest index wins a tie.

        Under autocast the projected vectors are rounded to its dtype; distances are float32. Leaves
        the codebook unchanged. Raises ValueError if it is untrained.
        """
        self.require_codebook()
        codes_BNE = self.project_in(latents_BNZ.float()).float()
        with torch.autocast(latents_BNZ.device.type, enabled=False):
            distances = cdist(codes_BNE.flatten(0, 1)[None], self._codebook.embed)[0]
        return distances.argmin(-1).view(codes_BNE.shape[:2])

    def lookup(self, indices_BN: Tensor) -> Tensor:
        """Values of codes, [B, N] -> float32 [B, N, Z]. Raises ValueError if untrained."""
        self.require_codebook()
        with torch.autocast(indices_BN.device.type, enabled=False):
            return self.get_output_from_indices(indices_BN)

    def require_codebook(self) -> None:
        """Raises ValueError if the codebook was neither trained nor loaded."""
        if self._has_codebook:
            return
        self._has_codebook = bool(self._codebook.initted)
        if not self._has_codebook:
            raise ValueError(
                "the tokenizer's codebook is untrained (initted = 0): it is filled by k-means in "
                "the first training step; train the tokenizer or load trained weights before it "
                "encodes or decodes"
            )


def _load_as_float32(module: Quantizer, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Loads weights stored in half precision as float32, also where tensors are assigned."""
    module._has_codebook = False  # it may be an untrained one
    for name in list(state):
        if name.startswith(prefix) and state[name].is_floating_point():
            state[name] = state[name].float()
