"""Latent codec of principal components of space-time blocks, fitted to clips in seconds.

Shapes as in the CogVideoX VAE: the first RGB frame is encoded alone, each further latent frame
covers four RGB frames, and a cell is 8 x 8 pixels. A cell's pixels are projected on the components
with the most variance in the clips that the codec was fitted to, and divided by a number for each
channel of a kind of frame. With `whiten` = 0 these numbers are the same: detail that hardly varies
stays small, where the unit variance of each DCT coefficient (`dct`) blows it up to noise that the
diffusion model has to predict as well. With `whiten` = 1 all channels have the same variance.
Values between them keep the order of the channels, while noise hides outlines less than with 0.

The components of first frames are rotated within their space so that a channel means as far as
possible the same in both kinds of frames.

Cells are decoded one by one, so errors of latents show as blocks. Weights may hold a refinement
(refinement.py), a convolutional network on the decoded frames. Latents do not depend on it, nor
does the fingerprint.

Weights are a file of safetensors. This package has `shapes`, `shapes-balanced` and
`shapes-refined`, made by

    landiff shapes make --out world --clips 1000
    landiff fit-codec --clips world/train --channels 16 --out shapes.safetensors
    landiff fit-codec --clips world/train --channels 16 --whiten 0.75 --out balanced.safetensors
    landiff shards --config quickstart/shards source=packaged data=film
    mkdir film-clips; cat film/raw/*.tar | tar xif - -C film-clips
    f=film-clips; landiff fit-codec --codec shapes-balanced --clips world/train $f $f $f $f $f $f
        --refine 3600 --bf16 --out refined.safetensors

from clips without the held-out combinations of the shapes world. The last also saw 69 spans of the
packaged film (CC BY 3.0, data_pipeline/assets/ATTRIBUTION.txt), six times as often as a clip of
shapes; it took 190 CPU seconds on a CPU with AMX.

Shape letters (docs/glossary.md): B batch, T RGB frames (1 + 4 k), t latent frames (1 + k),
C channels, H, W height and width in pixels, h, w height and width in latent cells, U pixel values
of a cell: 192 in the first latent frame, 768 in others, M cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from landiff.configs.base import ConfigError
from landiff.model_zoo.frozen.base import NO_VARIANCE, decode_first_and_later
from landiff.model_zoo.frozen.checks import pca_weights
from landiff.model_zoo.frozen.config import PcaConfig
from landiff.model_zoo.frozen.refinement import Refinement, RefinementOptions, train_refinement
from landiff.model_zoo.frozen.weights import encoder_fingerprint
from landiff.model_zoo.health import UnhealthyError, require_finite

SPACE = 8
TIME = 4
KINDS = ("first", "later")
REFINEMENT = "refinement."  # prefix of the tensors of the refinement


class PcaCodec(nn.Module):
    """`LatentCodec` whose latents are principal components."""

    name = "pca"
    space = SPACE
    time = TIME

    first_basis: Tensor
    later_basis: Tensor
    first_mean: Tensor
    later_mean: Tensor
    first_scale: Tensor
    later_scale: Tensor

    def __init__(self, weights: dict[str, Tensor]) -> None:
        """weights: of each kind of latent frame, basis [C, U], mean [U] and scale,
        [] or [C]; optionally those of a `Refinement`, whose names begin with `REFINEMENT`.

        Raises KeyError for a missing tensor, ValueError for a refinement of other shapes,
        UnhealthyError for NaN or infinity.
        """
        super().__init__()
        components = {}
        for kind in KINDS:
            for part in ("basis", "mean", "scale"):
                components[f"{kind}_{part}"] = weights[f"{kind}_{part}"]
        for name, tensor in components.items():
            self.register_buffer(name, tensor)
        self.channels = len(self.first_basis)
        constants = {"space": SPACE, "time": TIME}
        self.fingerprint = encoder_fingerprint(self.name, constants, components)
        self.refinement: Refinement | None = None
        refinement = {}
        for name, tensor in weights.items():
            if name.startswith(REFINEMENT):
                refinement[name.removeprefix(REFINEMENT)] = tensor
        if refinement:
            require_finite(refinement.items(), "the refinement of the codec pca")
            self.refinement = Refinement.load(refinement)

    @torch.no_grad()
    def encode(self, video_BTHWC: Tensor, noise_BtChw: Tensor | None = None) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, t, C, h, w]. The noise is ignored.

        Raises ValueError for numbers of frames or pixels that cells do not divide.
        """
        first_BthwU, later_BthwU = cells(video_BTHWC.to(self.first_basis.device))
        first_BthwC = (first_BthwU - self.first_mean) @ self.first_basis.T / self.first_scale
        later_BthwC = (later_BthwU - self.later_mean) @ self.later_basis.T / self.later_scale
        latents_BthwC = torch.cat([first_BthwC, later_BthwC], dim=1)
        return latents_BthwC.permute(0, 1, 4, 2, 3).contiguous()

    def encode_moments(self, video_BTHWC: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> float32 [B, t, 2 C, h, w]: latents and `NO_VARIANCE`."""
        latents_BtChw = self.encode(video_BTHWC)
        return torch.cat([latents_BtChw, torch.full_like(latents_BtChw, NO_VARIANCE)], dim=2)

    @torch.no_grad()
    def decode(self, latents_BtChw: Tensor) -> Tensor:
        """[B, t, C, h, w] -> uint8 [B, T, H, W, 3]."""
        x_BTHWC = self.decode_components(latents_BtChw)
        if self.refinement is not None:
            # One frame at a time: convolutions of several may round in another way, and the frames
            # of a stream must be those of the whole video.
            frames = x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2).split(1)
            refined = torch.cat([self.refinement(x_13HW) for x_13HW in frames])
            x_BTHWC = refined.permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2])
        return ((x_BTHWC + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def decode_components(self, latents_BtChw: Tensor) -> Tensor:
        """[B, t, C, h, w] -> frames of about [-1, 1] without refinement, [B, T, H, W, 3]."""
        z_BthwC = latents_BtChw.to(self.first_basis.device).float().permute(0, 1, 3, 4, 2)
        first_BthwU = z_BthwC[:, :1] * self.first_scale @ self.first_basis + self.first_mean
        later_BthwU = z_BthwC[:, 1:] * self.later_scale @ self.later_basis + self.later_mean
        return torch.cat([_frames(first_BthwU, 1), _frames(later_BthwU, TIME)], dim=1)

    def decode_stream(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        """Consecutive parts [B, t, C, h, w] -> their frames, uint8 [B, T, H, W, 3]."""
        return decode_first_and_later(self, parts)


def cells(video_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in [-1, 1] of the cells of first and of later latent frames, [B, t, h, w, U] each.

    Raises ValueError for numbers of frames or pixels that cells do not divide.
    """
    frames, height, width = video_BTHWC.shape[1:4]
    if (frames - 1) % TIME or height % SPACE or width % SPACE:
        raise ValueError(
            f"video of {frames} frames, {height} x {width}: frames must be 1 + {TIME} * k, "
            f"sides multiples of {SPACE}"
        )
    x_BTHWC = video_BTHWC.float() / 127.5 - 1
    return _cells(x_BTHWC[:, :1], 1), _cells(x_BTHWC[:, 1:], TIME)


def _cells(x_BTHWC: Tensor, num_frames: int) -> Tensor:
    """[B, t · num_frames, H, W, 3] -> [B, t, h, w, U] with U ordered (frame, y, x, colour)."""
    x = x_BTHWC.unflatten(3, (-1, SPACE)).unflatten(2, (-1, SPACE))
    x = x.unflatten(1, (x.shape[1] // num_frames, num_frames))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def _frames(cells_BthwU: Tensor, num_frames: int) -> Tensor:
    """[B, t, h, w, U] -> [B, t · num_frames, H, W, 3]."""
    x = cells_BthwU.unflatten(4, (num_frames, SPACE, SPACE, 3)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)


class Moments:
    """Count, sum and sum of products of vectors, from which principal components follow."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.sum_U = torch.zeros(size, dtype=torch.float64)
        self.product_UU = torch.zeros(size, size, dtype=torch.float64)

    def add(self, vectors_MU: Tensor) -> None:
        """Counts more vectors."""
        self.count += len(vectors_MU)
        self.sum_U += vectors_MU.double().sum(dim=0)
        self.product_UU += (vectors_MU.T @ vectors_MU).double()

    def components(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [U], the components with the most variance [number, U], and their variances."""
        mean_U = self.sum_U / self.count
        covariance_UU = self.product_UU / self.count - mean_U.outer(mean_U)
        variances, vectors_UC = torch.linalg.eigh(covariance_UU)
        basis_CU = vectors_UC.T.flip(0)[:number]
        # The sign of an eigenvector is arbitrary: make its largest element positive.
        largest = basis_CU.gather(1, basis_CU.abs().argmax(dim=1, keepdim=True))
        return mean_U, basis_CU * largest.sign(), variances.flip(0)[:number]


def fit(videos: Iterable[Tensor], channels: int, whiten: float = 0.0) -> dict[str, Tensor]:
    """Weights of a `PcaCodec` for videos, uint8 [B, T, H, W, 3] each.

    whiten: from 0 to 1. Channels are divided by their standard deviation to this power, and by one
        number that makes their mean variance 1.
    """
    pixels = SPACE * SPACE * 3
    first = Moments(pixels)
    later = Moments(TIME * pixels)
    for video_BTHWC in videos:
        first_BthwU, later_BthwU = cells(video_BTHWC)
        first.add(first_BthwU.flatten(0, 3))
        later.add(later_BthwU.flatten(0, 3))
    first_mean, first_basis, first_variances = first.components(channels)
    later_mean, later_basis, later_variances = later.components(channels)
    still_CU = later_basis.unflatten(1, (TIME, pixels)).mean(dim=1)
    left, _, right = torch.linalg.svd(still_CU @ first_basis.T)
    turn_CC = left @ right
    # Variances of the rotated channels, the diagonal of their covariance.
    turned_variances = (turn_CC.square() * first_variances).sum(dim=1)
    weights = {
        "first_basis": turn_CC @ first_basis,
        "first_mean": first_mean,
        "first_scale": _scale(turned_variances, whiten),
        "later_basis": later_basis,
        "later_mean": later_mean,
        "later_scale": _scale(later_variances, whiten),
    }
    return {name: tensor.float().contiguous() for name, tensor in weights.items()}


def _scale(variances_C: Tensor, whiten: float) -> Tensor:
    """Divisor of the channels: [C], or [] if it is the same for all."""
    if whiten == 0.0:
        return variances_C.mean().sqrt()
    # Rounding can make the smallest variance negative, of a channel without any detail.
    variances_C = variances_C.clamp(min=1e-6 * float(variances_C.max()))
    divisor_C = variances_C.sqrt() ** whiten
    return divisor_C * (variances_C / divisor_C.square()).mean().sqrt()


def refine(
    weights: dict[str, Tensor],
    clips: Sequence[Tensor],
    options: RefinementOptions,
    progress: Callable[[int, int, str], None],
) -> dict[str, Tensor]:
    """Weights with a refinement that is trained on clips, in place of one that they have.

    clips: uint8 [T, H, W, 3] of the same height and width. progress: see `train_refinement`.
    """
    components = {}
    for name, tensor in weights.items():
        if not name.startswith(REFINEMENT):
            components[name] = tensor
    codec = PcaCodec(components)
    trained = train_refinement(codec.encode, codec.decode_components, clips, options, progress)
    return components | {REFINEMENT + name: tensor for name, tensor in trained.items()}


def write(weights: dict[str, Tensor], path: Path) -> None:
    """Writes weights as safetensors."""
    save_file(weights, path)


def build(config: PcaConfig, device: str | torch.device) -> PcaCodec:
    """Loads the codec. Raises ConfigError if the file is missing or damaged."""
    path = pca_weights(config)
    try:
        return PcaCodec(load_file(path)).to(device)
    except UnhealthyError:
        raise
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"pca: path = {config.path!r} cannot be loaded ({error}); write it with "
            "`landiff fit-codec`"
        ) from error
