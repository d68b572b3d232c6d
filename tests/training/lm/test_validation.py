"""Metrics of the language model on held-out clips, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from landiff.data_pipeline.loading.samples import HeldOutBatch
from landiff.model_zoo import keyed_random
from landiff.model_zoo.config import TokenSamplingConfig
from landiff.model_zoo.lm import LanguageModel
from landiff.model_zoo.sample.tokens import Prompts, sample_tokens, seeded_draw
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.engine import MegatronEngine
from landiff.training.lm.model import InitialWeights
from landiff.training.lm.sampling import SEED, draw_codes, sampling_row
from tests.distributed import run_distributed
from tests.training.lm.samples import tiny_batch, tiny_config, tiny_sample
from tests.training.toy import validation_metrics

SEGMENT_FRAMES = 2  # clips have 1 to 4 frames
SHIPPED = {  # options of landiff/lm that change how weights are kept
    "parallel": {"distributed_optimizer": True, "overlap": True},
    "precision": "bf16",
}


def small(folder: Path, **changes: Any) -> LMTrainConfig:
    return tiny_config(folder, model={"segment_frames": SEGMENT_FRAMES}, **changes)


def clips(config: LMTrainConfig) -> list[Any]:
    return [tiny_sample(config, 1000 + number, number) for number in range(7)]


def plain_metrics(config: LMTrainConfig) -> dict[str, float]:
    """The losses of the definition, computed clip by clip with the plain torch model."""
    model = LanguageModel(config.model)
    model.load_state_dict(InitialWeights(config.model, config.loop.seed))
    layout = model.layout
    samples = clips(config)
    losses: dict[str, list[float]] = {}
    for number, sample in enumerate(samples):
        codes = sample.tensors[config.tokens_column]
        frames = layout.num_frames(codes.numel())
        kinds = []
        for frame, size in enumerate(layout.frame_sizes(frames)):
            kind = "iframe" if frame % SEGMENT_FRAMES == 0 else "pframe"
            place = f"frame_{frame:02d}", f"segment_{frame // SEGMENT_FRAMES:02d}"
            kinds += [("structural",), *[("codes", kind, *place)] * size, ("structural",)]
        kinds.append(("structural",))
        for suffix, other in (("", sample), ("other", samples[number - 1])):
            text_LD = other.tensors[config.text_column].float()
            row = layout.training_row(codes.numpy(), len(text_LD))
            with torch.no_grad():
                logits = model(
                    torch.from_numpy(row.input_ids)[None],
                    text_LD[None],
                    torch.tensor([float(frames)]),
                    torch.tensor([sample.meta.motion_score]),
                )[0]
            found = functional.cross_entropy(
                logits, torch.from_numpy(row.targets), reduction="none"
            ).numpy()
            found = found[row.loss_weights > 0].tolist()
            if not suffix:
                correct = (logits.argmax(-1).numpy() == row.targets)[row.loss_weights > 0]
                losses.setdefault("accuracy", []).extend(correct.tolist())
            assert len(found) == len(kinds)
            for loss, names in zip(found, kinds, strict=True):
                if not suffix:
                    for name in ("loss", *[f"loss_{name}" for name in names]):
                        losses.setdefault(name, []).append(loss)
                elif "codes" in names:
                    losses.setdefault("loss_other_caption", []).append(loss)
    return {name: float(np.mean(values)) for name, values in losses.items()}


def plain_samples(config: LMTrainConfig) -> dict[str, float]:
    """Distances of tokens that `sample_tokens` draws with the plain model and the same numbers."""
    model = LanguageModel(config.model)
    model.load_state_dict(InitialWeights(config.model, config.loop.seed))
    size = config.model.codebook_size
    counts = torch.zeros(2, size, dtype=torch.float64)
    pairs = torch.zeros(2, size, size, dtype=torch.float64)
    for sample in clips(config)[: config.validation_samples]:
        codes_K = sample.tensors[config.tokens_column].long()
        text_LD = sample.tensors[config.text_column].float()
        sampled = sample_tokens(
            model,
            Prompts(text_LD[None], torch.tensor([sample.meta.motion_score])),
            model.layout.num_frames(len(codes_K)),
            TokenSamplingConfig(guidance=1.0, temperature=1.0, top_k=None, top_p=None),
            seeds=[keyed_random.key(SEED, "validation sample", sample.index)],
        )
        for number, codes in enumerate((codes_K, sampled.codes_BK[0])):
            counts[number] += torch.bincount(codes, minlength=size)
            pairs[number].index_put_(
                (codes[:-1], codes[1:]), torch.ones(()).double(), accumulate=True
            )
    share = counts / counts.sum(1, keepdim=True)
    pair_share = pairs / pairs.sum((1, 2), keepdim=True)
    return {
        "sampled_unigram_distance": float((share[0] - share[1]).abs().sum() / 2),
        "sampled_bigram_distance": float((pair_share[0] - pair_share[1]).abs().sum() / 2),
        "sampled_used_fraction": float((counts[1] > 0).double().mean()),
        "data_used_fraction": float((counts[0] > 0).double().mean()),
    }


@torch.no_grad()
def drawn(engine: MegatronEngine, *, cached: bool) -> list[list[int]]:
    """Codes that are sampled for all clips in one row; without cache over the whole row each."""
    samples = tuple(clips(engine.config))
    batch = HeldOutBatch(samples, (None,) * len(samples), (True,) * len(samples))
    part = sampling_row(batch, engine.config, engine.layout, engine.device)
    size = engine.layout.codebook_size
    if cached:
        draw_codes(part, engine._logits, size)
    else:
        draw = seeded_draw(part.seeds, part.most_codes, engine.device)
        for number in range(part.most_codes):
            last = [max(0, new.end - 1) for new in part.before(number)]
            logits_BV = engine._logits(part.row, None, last)[:, :size]
            part.record(number, draw(logits_BV.softmax(-1), number))
    return [codes_K.tolist() for codes_K in part.sampled()]


def all_checks(world: Any, folder: Path) -> dict[str, Any]:
    """What the tests look at."""
    found: dict[str, Any] = {"weights": []}
    config = small(folder)
    engine = MegatronEngine(config)
    for micro in (1, 3, 7, 7):
        found.setdefault(micro, []).append(validation_metrics(engine, clips(config), 0, 1, micro))
    found["drawn"] = [drawn(engine, cached=True), drawn(engine, cached=False)]
    engine.close()
    found["plain"] = plain_metrics(config)
    found["sampled"] = plain_samples(config)
    for validates in (True, False):
        engine = MegatronEngine(small(folder, **SHIPPED))
        for step in range(4):
            engine.train_step(tiny_batch(engine.config, step))
            if validates:
                metrics = validation_metrics(engine, clips(config), 0, 1, 2)
        weights = {name: tensor.clone() for name, tensor in engine.local_weights()}
        found["weights"].append(weights)
        engine.close()
    found["bf16"] = metrics
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_distributed(all_checks, 1, tmp_path_factory.mktemp("one"))[0]


def test_losses_are_those_of_the_plain_model_by_kind_of_token(found):
    (metrics,) = found[3]
    for name, expected in found["plain"].items():
        assert metrics[name] == pytest.approx(expected, abs=1e-5), name
    assert "loss_segment_01" in found["plain"] and "loss_frame_03" in found["plain"]
    gain = metrics["loss_other_caption"] - metrics["loss_codes"]
    assert metrics["caption_gain"] == pytest.approx(gain, abs=1e-12)


def test_sampled_tokens_are_those_of_the_plain_sampler(found):
    (metrics,) = found[3]
    for name, expected in found["sampled"].items():
        assert metrics[name] == pytest.approx(expected), name
    assert 0 < metrics["sampled_unigram_distance"] < metrics["sampled_bigram_distance"] < 1


def test_a_cache_changes_no_token(found):
    cached, plain = found["drawn"]
    assert cached == plain
    assert [len(codes) for codes in cached] == [
        len(clip.tensors["tokens"]) for clip in clips(small(Path()))
    ]


def test_metrics_are_bit_equal_when_repeated_and_equal_for_other_micro_batches(found):
    first, second = found[7]
    assert first == second
    for micro in (1, 3):
        assert found[micro][0] == pytest.approx(first, abs=1e-5)  # float32 sums in another order


def test_training_in_the_shipped_precision_is_bit_equal_with_and_without_validation(found):
    validated, plain = found["weights"]
    assert validated.keys() == plain.keys()
    for name, weight in plain.items():
        assert torch.equal(validated[name], weight), name
    assert found["bf16"]["loss"] < found["plain"]["loss"]


def four_ranks(world: Any, folder: Path) -> list[tuple[dict[str, float], list[list[int]]]]:
    found = []
    for parallel in (
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "sequence": True},
        {},
    ):
        engine = MegatronEngine(small(folder, parallel=parallel))
        samples = clips(engine.config)
        metrics = validation_metrics(engine, samples, engine.dp_rank, engine.dp_size, 1)
        found.append((metrics, drawn(engine, cached=True)))
        engine.close()
    return found


def test_four_ranks_measure_and_draw_what_one_does(found, tmp_path):
    (expected,) = found[1]
    for rank in run_distributed(four_ranks, 4, tmp_path):
        for metrics, codes in rank:
            assert metrics == pytest.approx(expected, abs=1e-5)  # float32 sums in another order
            assert codes == found["drawn"][0]
