"""Tokens that the language model samples for held-out clips, and their distribution.

The codes of a clip are sampled for its caption, its number of frames and its motion score, from the
model's distribution: temperature 1, no guidance, no truncation. The trained model itself computes
the logits, in its parallel layout, so no second copy of the weights is needed. It runs once per
code, on the positions since the previous code, with a cache of keys and values.

Shape letters (docs/glossary.md): N tokens of a packed row, B samples in it, K codes of a clip,
V codes of the codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from landiff.data_pipeline.loading.samples import HeldOutBatch, Sample
from landiff.model_zoo import frozen, keyed_random, registry
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.evaluate.codebook import codebook_use, count_codes
from landiff.model_zoo.sample.render import Renderer
from landiff.model_zoo.sample.tokens import seeded_draw
from landiff.model_zoo.schedule import NoiseSchedule
from landiff.model_zoo.token_layout import CODE, TokenLayout
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.distributed import World
from landiff.training.lm.batch import LMRow, NewPositions, RowCache, pack
from landiff.training.lm.config import LMTrainConfig
from landiff.training.observe.prompts import prompt_sample, prompt_states

BIGRAM_GROUPS = 64  # of codes; a codebook of thousands has too many bigrams to compare few clips
SEED = 0  # instead of loop.seed: the samples of different runs can be compared


@dataclass(frozen=True)
class SamplingRow:
    """A packed row whose codes are still to be sampled.

    starts: for each sample, its first position in the row.
    codes_at: for each sample, positions of its codes in the row.
    data: for each sample, its own codes, int64 [K].
    seeds: of the random numbers of each sample.
    multiple: of the number of positions of a forward pass.
    """

    row: LMRow
    starts: list[int]
    codes_at: list[list[int]]
    data: list[Tensor]
    seeds: list[int]
    multiple: int

    @property
    def most_codes(self) -> int:
        """Codes of the longest clip."""
        return max(len(positions) for positions in self.codes_at)

    def before(self, number: int) -> list[NewPositions]:
        """For each sample, the positions from code `number` - 1 on that precede code `number`.

        None for a sample that has no code `number`.
        """
        parts = []
        for start, positions in zip(self.starts, self.codes_at, strict=True):
            if number >= len(positions):
                parts.append(NewPositions(start, positions[-1], positions[-1]))
                continue
            first = positions[number - 1] if number else start
            parts.append(NewPositions(start, first, positions[number]))
        return parts

    def record(self, number: int, codes_B: Tensor) -> None:
        """Enter code `number` of each sample that has so many."""
        for positions, code in zip(self.codes_at, codes_B, strict=True):
            if number < len(positions):
                self.row.ids_N[positions[number]] = code

    def sampled(self) -> list[Tensor]:
        """The codes of each sample that are in the row now."""
        found = []
        for positions in self.codes_at:
            found.append(self.row.ids_N[torch.tensor(positions, device=self.row.ids_N.device)])
        return found


def sampling_row(
    batch: HeldOutBatch, config: LMTrainConfig, layout: TokenLayout, device: torch.device
) -> SamplingRow:
    """The clips of a batch with code 0 in place of all codes, on `device`."""
    row = pack(batch.samples, config, layout, train=False)
    bounds = row.cu_seqlens.tolist()
    codes_at = []
    data = []
    for sample, end in zip(batch.samples, bounds[1:], strict=False):
        codes_K = sample.tensors[config.tokens_column].to(torch.int64)
        template = layout.template(layout.num_frames(len(codes_K)))
        start = end - len(template)
        codes_at.append((start + (template == CODE).nonzero()[0]).tolist())
        data.append(codes_K.to(device))
    seeds = [keyed_random.key(SEED, "validation sample", clip.index) for clip in batch.samples]
    row = row.to(device)
    ids_N = row.ids_N.clone()
    for positions in codes_at:
        ids_N[torch.tensor(positions, device=device)] = 0
    row.ids_N.copy_(ids_N)
    return SamplingRow(
        row=row,
        starts=bounds[: len(codes_at)],
        codes_at=codes_at,
        data=data,
        seeds=seeds,
        multiple=config.parallel.tensor if config.parallel.sequence else 1,
    )


@torch.no_grad()
def draw_codes(
    part: SamplingRow, logits_of: Callable[[LMRow, RowCache, list[int]], Tensor], size: int
) -> None:
    """Draw all codes of a row, one of each sample at a time.

    logits_of: logits after the given places of the positions that are appended to a cache,
        [B, vocabulary], equal on all ranks that share the model. Called once for each code.
    size: of the codebook.
    """
    draw = seeded_draw(part.seeds, part.most_codes, part.row.ids_N.device)
    cache = RowCache(len(part.row.ids_N))
    for number in range(part.most_codes):
        cache.parts = part.before(number)
        places: list[int] = []
        last = []
        for new in cache.parts:
            places.extend(range(new.first, new.end))
            last.append(max(0, len(places) - 1))  # after its last code, any
        row = part.row.part(places, conditions=number == 0, multiple=part.multiple)
        logits_BV = logits_of(row, cache, last)[:, :size]
        part.record(number, draw(logits_BV.float().softmax(-1), number))


def prompt_clips(config: LMTrainConfig, layout: TokenLayout, world: World | None) -> list[Sample]:
    """`preview_prompts` as clips of one segment whose codes are still to be sampled. Collective."""
    if not config.preview_prompts:
        return []
    assert config.preview_text is not None
    states = prompt_states(config.run, config.preview_prompts, config.preview_text, world)
    codes_K = torch.zeros(layout.num_codes(layout.segment_frames), dtype=torch.uint16)
    clips = []
    for number, (prompt, text_LD) in enumerate(zip(config.preview_prompts, states, strict=True)):
        tensors = {config.tokens_column: codes_K, config.text_column: text_LD}
        clips.append(prompt_sample(number, prompt, tensors))
    return clips


def forward_step(
    rows: Iterator[LMRow], model: nn.Module, cache: RowCache, last: Sequence[int]
) -> tuple[Tensor, Callable]:
    """Forward of the next row, which is appended to `cache`.

    The report is the logits after the places `last` of it, for Megatron-core's schedule.
    """
    row = next(rows)
    last_B = torch.tensor(last, device=row.ids_N.device)

    def chosen(logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unused = logits_NV.new_zeros(())
        return unused, unused.to(torch.int), logits_NV[last_B]

    return model(row, logits=True, cache=cache), chosen


def load_renderer(config: LMTrainConfig, device: torch.device) -> Renderer:
    """The models of `config.renderer` on `device`. Raises ZooError."""
    settings = config.renderer
    assert settings is not None and config.tokenizer is not None
    entries = {"tokenizer": config.tokenizer, "diffusion": settings.diffusion}
    models = {}
    for kind, reference in entries.items():
        entry = registry.resolve(config.zoo, reference, kind=kind)
        models[kind] = registry.load_model(entry, device)
    tokenizer, diffusion = models.values()
    assert isinstance(tokenizer, SemanticTokenizer) and isinstance(diffusion, ControlledDiffusion)
    return Renderer(
        tokenizer=tokenizer,
        diffusion=diffusion,
        codec=frozen.build(settings.codec, device),
        schedule=NoiseSchedule(settings.schedule),
        steps=settings.steps,
        clean_frames=settings.clean_frames,
    )


def render_shared(
    clips: Sequence[Tensor],
    seeds: Sequence[int],
    config: LMTrainConfig,
    device: torch.device,
    beat: Callable[[], None],
) -> list[Tensor]:
    """Videos uint8 [T, H, W, 3] of the codes of clips, on all ranks. Collective.

    Rank i renders video i, so that no rank waits for more than one of a few videos.

    beat: called after each sampling step.
    """
    rank = dist.get_rank()
    size = dist.get_world_size()
    renderer = load_renderer(config, device) if rank < len(clips) else None
    own: dict[int, Tensor] = {}
    for number in range(rank, len(clips), size):
        assert renderer is not None
        videos_BTHWC = renderer(clips[number][None], [seeds[number]], lambda *_: beat())
        own[number] = videos_BTHWC[0].to(device)
    videos = []
    for number in range(len(clips)):
        shape = torch.zeros(4, dtype=torch.int64, device=device)
        if number in own:
            shape.copy_(torch.tensor(own[number].shape))
        dist.broadcast(shape, number % size)
        video_THWC = own.get(number)
        if video_THWC is None:
            video_THWC = torch.empty(shape.tolist(), dtype=torch.uint8, device=device)
        dist.broadcast(video_THWC, number % size)
        videos.append(video_THWC.cpu())
    return videos


def zero_sums(layout: TokenLayout, device: torch.device) -> dict[str, Tensor]:
    """The sums of no clip: occurrences of codes, and of pairs of groups of successive codes."""
    groups = min(BIGRAM_GROUPS, layout.codebook_size)
    sums = {}
    for origin in ("data", "sampled"):
        for name, size in (("unigram", layout.codebook_size), ("bigram", groups * groups)):
            sums[f"{origin}_{name}"] = torch.zeros(size, dtype=torch.float64, device=device)
    return sums


def token_sums(
    part: SamplingRow, counted: Sequence[bool], layout: TokenLayout
) -> dict[str, Tensor]:
    """Sums over the counted clips of a row whose codes are sampled."""
    sums = zero_sums(layout, part.row.ids_N.device)
    groups = min(BIGRAM_GROUPS, layout.codebook_size)
    for origin, clips in (("data", part.data), ("sampled", part.sampled())):
        for codes_K, counts in zip(clips, counted, strict=True):
            if not counts:
                continue
            sums[f"{origin}_unigram"] += count_codes(codes_K, layout.codebook_size)
            group_K = codes_K % groups
            pairs = group_K[:-1] * groups + group_K[1:]
            sums[f"{origin}_bigram"] += count_codes(pairs, groups * groups)
    return sums


def summarize_tokens(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics by name: distances of the samples from the data, and how many codes both use.

    Distances are total variations, between 0 and 1. Few clips are far from any others, so only
    distances of equally many clips compare.
    """
    metrics = {}
    for name in ("unigram", "bigram"):
        data = sums[f"data_{name}"]
        sampled = sums[f"sampled_{name}"]
        difference = data / data.sum() - sampled / sampled.sum()
        metrics[f"sampled_{name}_distance"] = float(difference.abs().sum() / 2)
    for origin in ("data", "sampled"):
        perplexity, used = codebook_use(sums[f"{origin}_unigram"])
        metrics[f"{origin}_perplexity"] = float(perplexity)
        metrics[f"{origin}_used_fraction"] = float(used)
    return metrics
