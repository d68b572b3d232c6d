"""Convolutional refinement of decoded frames, and its training.

A codec that decodes each cell by itself shows small errors of latents as blocks and coloured
edges. A residual network of 3 x 3 convolutions on groups of 4 x 4 pixels removes them. It sees one
frame at a time, so that a stream of frames is refined as the whole video is.

It is trained on clips whose latents were made worse: blurred before they are encoded, as sampled
latents lack detail, and with noise added. The target is the original clip.

Shape letters (docs/glossary.md): B batch, T RGB frames, t latent frames, C channels, H, W height
and width in pixels, h, w height and width in latent cells, N frames of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 4  # pixels along one side of a group
PIXELS = 3 * GROUP * GROUP
WIDTH = 64
DEPTH = 6


class Refinement(nn.Module):
    """Residual network on single frames. Sides of a frame are multiples of `GROUP`."""

    def __init__(self, width: int = WIDTH, depth: int = DEPTH) -> None:
        super().__init__()
        self.input = nn.Conv2d(PIXELS, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.output = nn.Conv2d(width, PIXELS, 3, padding=1)
        nn.init.zeros_(self.output.weight)
        assert self.output.bias is not None
        nn.init.zeros_(self.output.bias)

    def forward(self, x_N3HW: Tensor) -> Tensor:
        """Frames of about [-1, 1], [N, 3, H, W] -> refined frames."""
        hidden = self.input(F.pixel_unshuffle(x_N3HW, GROUP))
        for block in self.blocks:
            hidden = hidden + 0.5 * block(F.silu(hidden))
        return x_N3HW + F.pixel_shuffle(self.output(F.silu(hidden)), GROUP)

    @classmethod
    def load(cls, weights: dict[str, Tensor]) -> Refinement:
        """The network of `state_dict` weights of any float dtype, in float32.

        Raises ValueError if tensors are missing or have other shapes.
        """
        try:
            width = weights["input.weight"].shape[0]
            depth = len([name for name in weights if name.endswith("weight")]) - 2
            network = cls(width, depth)
            network.load_state_dict(weights)
        except (KeyError, IndexError, RuntimeError) as error:
            raise ValueError(f"weights of the refinement do not fit: {error}") from error
        return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class RefinementOptions:
    """How a refinement is trained.

    steps, seed: number of steps, and seed of weights, clips and noise.
    clips_per_step, frames_per_clip: size of a batch.
    learning_rate: of AdamW, after a warm-up of 30 steps, with linear decay.
    crop: longest side in pixels of the part of a clip that is used, a multiple of 8.
    blur: largest deviation of the Gaussian blur, in pixels. noise: that of the noise of latents.
    unchanged: share of clips that are not blurred, and of clips without noise.
    bfloat16: whether convolutions run in bfloat16, which CPUs with AMX compute 3 times as fast.
    """

    steps: int
    seed: int = 0
    clips_per_step: int = 4
    frames_per_clip: int = 4
    learning_rate: float = 2e-3
    crop: int = 64
    blur: float = 3.0
    noise: float = 0.5
    unchanged: float = 0.4
    bfloat16: bool = False


def train_refinement(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    clips: Sequence[Tensor],
    options: RefinementOptions,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> dict[str, Tensor]:
    """Trains a `Refinement` and returns its weights in float16.

    encode: uint8 [B, T, H, W, 3] -> latents [B, t, C, h, w]. decode: latents -> frames of about
    [-1, 1], [B, T, H, W, 3]. clips: uint8 [T, H, W, 3] of the same height and width. progress:
    called with steps done, all steps, and the mean loss of about 100 steps.
    """
    generator = torch.Generator().manual_seed(options.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = Refinement()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        network.parameters(), options.learning_rate, weight_decay=0.01, foreach=False
    )
    error = 0.0  # running mean
    for step in range(options.steps):
        warmup = min(1.0, (step + 1) / 30)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * warmup * (1 - step / options.steps)
        inputs = []
        targets = []
        for index in torch.randint(len(clips), (options.clips_per_step,), generator=generator):
            video_THWC = _crop(clips[int(index)], options.crop, generator)
            degraded_THWC = decode(perturbed_latents(encode, video_THWC[None], options, generator))
            chosen = torch.randperm(len(video_THWC), generator=generator)[: options.frames_per_clip]
            inputs.append(degraded_THWC[0, chosen])
            targets.append(video_THWC[chosen].float() / 127.5 - 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            refined_N3HW = network(torch.cat(inputs).permute(0, 3, 1, 2))
        loss = F.l1_loss(refined_N3HW.float(), torch.cat(targets).permute(0, 3, 1, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        share = max(0.01, 1 / (step + 1))
        error += share * (float(loss.detach()) - error)
        progress(step + 1, options.steps, f"L1 error {error:.4f}")
    weights = {}
    for name, tensor in network.state_dict().items():
        weights[name] = tensor.half().contiguous()
    return weights


def perturbed_latents(
    encode: Callable[[Tensor], Tensor],
    video_BTHWC: Tensor,
    options: RefinementOptions,
    generator: torch.Generator,
) -> Tensor:
    """Latents of clips after a random blur, with random noise, [B, t, C, h, w]."""
    blur, noise, blurred, noisy = torch.rand(4, generator=generator).tolist()
    if blurred >= options.unchanged:
        video_BTHWC = _blur(video_BTHWC, 0.2 + blur * (options.blur - 0.2))
    latents = encode(video_BTHWC)
    if noisy < options.unchanged:
        return latents
    return latents + noise * options.noise * torch.randn(latents.shape, generator=generator)


def _blur(video_BTHWC: Tensor, deviation: float) -> Tensor:
    """The video after a Gaussian filter of `deviation` pixels, float of the same range."""
    x_BTHWC = video_BTHWC.float()
    x_BTHWC = torch.einsum("yh,bthwc->btywc", _gaussian(x_BTHWC.shape[2], deviation), x_BTHWC)
    return torch.einsum("xw,bthwc->bthxc", _gaussian(x_BTHWC.shape[3], deviation), x_BTHWC)


def _gaussian(size: int, deviation: float) -> Tensor:
    """Matrix [size, size] of a Gaussian filter along one side; rows have the sum 1."""
    position = torch.arange(size).float()
    matrix = (-((position[:, None] - position) / deviation).square() / 2).exp()
    return matrix / matrix.sum(dim=1, keepdim=True)


def _crop(video_THWC: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A random part of at most `side` x `side` pixels that begins at the border of a cell."""
    for dim in (1, 2):
        spare = max(0, video_THWC.shape[dim] - side) // 8
        start = 8 * int(torch.randint(spare + 1, (), generator=generator))
        video_THWC = video_THWC.narrow(dim, start, min(side, video_THWC.shape[dim]))
    return video_THWC
