"""The tokenizer trainer on images and videos of several sizes: layouts, grids, checks, metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from landiff.data_pipeline.loading.phased_loader import PhasedLoader
from landiff.launchers.weights.convert import convert_weights
from landiff.launchers.weights.request import ConvertRequest
from landiff.model_zoo import registry
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.checks import Launch
from landiff.training.config import LoopConfig
from landiff.training.loop import fit
from landiff.training.observe.metrics import read_metrics
from landiff.training.run import Run
from landiff.training.tokenizer.checks import check
from landiff.training.tokenizer.config import TokenizerTrainConfig
from landiff.training.tokenizer.engine import TokenizerEngine
from tests.data_pipeline.http_server import served
from tests.distributed import run_distributed
from tests.training import mixed
from tests.training.mixed import IMAGE, TALL, VIDEO, write_mixed
from tests.training.tokenizer.tiny import MODEL, config
from tests.training.toy import alone

BATCH = 30  # divided by 1, 2, 3 and 5 ranks
STEPS = 4
LOSSES = ("train/reconstruction", "train/commitment", "codebook/perplexity")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    return write_mixed(folder, {"features": mixed.features(MODEL.feature_channels)})


def settings(folder: Path, run: Path, micro: int = 1, model=MODEL, remote="", **changes):
    section = {
        "manifest": folder,
        "remote": remote,
        "buckets": [IMAGE, VIDEO, TALL],
        "balance_tokens": True,
        "global_batch_size": BATCH,
        "micro_batch_size": micro,
    }
    sections = {"data": section, "loop": LoopConfig(steps=STEPS, log_every=1)} | changes
    return config(run, model, **sections)


def train(world, data, run, remote=""):
    """(bucket, batch size), and numbers of each step."""
    config = settings(data, run, BATCH // world.size, remote=remote)
    assert check(config, Launch(world.size)) == []
    engine = TokenizerEngine(config, world)
    places = []
    numbers = []
    loader = PhasedLoader(
        config.data_phases, config.columns, dp_rank=world.rank, dp_size=world.size
    )
    with loader:
        for _ in range(STEPS):
            batch = loader.next_batch()
            result = engine.train_step(batch)
            places.append((batch.bucket, batch.global_batch_size))
            metrics = [float(result.metrics[name]) for name in LOSSES]
            numbers.append([float(result.loss), float(result.grad_norm), *metrics])
    return places, numbers


@pytest.mark.parametrize("sizes", [(1, 3), pytest.param((1, 2, 3, 5), marks=pytest.mark.long)])
def test_ranks_train_the_same_model_on_mixed_buckets(data, tmp_path, sizes):
    by_size = [run_distributed(train, size, data, tmp_path) for size in sizes]
    expected_places, expected = by_size[0][0]
    assert (IMAGE, 3 * BATCH) in expected_places and (VIDEO, BATCH) in expected_places
    for ranks in by_size:
        for places, numbers in ranks:
            assert places == expected_places
            for ours, theirs in zip(numbers, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-3)  # float32 sums in another order


def test_a_data_set_on_a_web_server_trains_the_same_model(data, tmp_path):
    pytest.importorskip("aiohttp", reason="pip install '.[test]'")
    expected = train(alone(), data, tmp_path / "run")
    with served(data) as server:
        assert train(alone(), tmp_path / "cache", tmp_path / "run", server.url) == expected


def test_losses_are_logged_and_validated_by_bucket(data, tmp_path):
    validation = {"fraction": 0.3}
    base = settings(data, tmp_path)
    section = base.data.model_dump(exclude={"validation"}) | {"validation": validation}
    loop = LoopConfig(steps=STEPS, log_every=STEPS, val_every=STEPS)
    run = settings(data, tmp_path, data=section, loop=loop)
    world = alone()
    with PhasedLoader(run.data_phases, run.columns, dp_rank=0, dp_size=1) as loader:
        fit(TokenizerEngine(run, world), loader, Run(tmp_path, run, world), run.loop)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert {f"val/loss_{bucket}" for bucket in (IMAGE, VIDEO, TALL)} <= set(line)
    losses = [line[f"val/loss_{bucket}"] for bucket in (IMAGE, VIDEO, TALL)]
    assert min(losses) < line["val/loss"] < max(losses)
    assert f"train/loss_{IMAGE}" in line
    request = ConvertRequest((str(tmp_path),), zoo=tmp_path / "zoo", name="tokenizer")
    convert_weights(request)
    entry = registry.resolve(tmp_path / "zoo", "tokenizer")
    assert [shape.name for shape in entry.buckets] == [IMAGE, VIDEO, TALL]


def test_the_tokenizer_takes_any_grid_and_each_clip_alone_gives_the_same_codes():
    for model in (
        MODEL,
        MODEL.model_copy(update={"latent_positions": "grid", "local_paths": True}),
    ):
        torch.manual_seed(0)
        tokenizer = SemanticTokenizer(model).eval()
        tokenizer.quantizer._codebook.initted.fill_(True)
        features_BTChw = torch.randn(2, 3, MODEL.feature_channels, 3, 2)
        codes_BK = tokenizer.encode(features_BTChw)
        assert torch.equal(tokenizer.encode(features_BTChw[:1]), codes_BK[:1])
        assert tokenizer.decode(codes_BK, 3, (3, 2)).shape == features_BTChw.shape
        assert tokenizer.decode(codes_BK, 3).shape[3:] == (2, 2)


def test_what_a_bucket_needs_is_checked_before_the_start(data, tmp_path):
    def problems(config: TokenizerTrainConfig):
        return [str(problem) for problem in check(config, Launch())]

    assert problems(settings(data, tmp_path)) == []
    masks = MODEL.model_copy(update={"cell_mask_tokens": True})
    (text,) = problems(settings(data, tmp_path, model=masks))
    assert f"the features of {TALL} are 3 x 2, but with model.cell_mask_tokens" in text
    plain = {"manifest": data, "global_batch_size": 4}
    (text,) = problems(settings(data, tmp_path, data=plain))
    assert f"data.buckets=[{IMAGE},{VIDEO},{TALL}]" in text
