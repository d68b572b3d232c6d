"""The tokenizer engine: learns, resumes exactly, and doesn't depend on the number of ranks."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from landiff.configs import load
from landiff.data_pipeline.format.schema import Column, Manifest
from landiff.model_zoo import registry
from landiff.training.observe.scalars import read_scalars
from landiff.training.tokenizer.checks import check_parameter_groups
from landiff.training.tokenizer.columns import check_features
from landiff.training.tokenizer.config import TokenizerTrainConfig
from landiff.training.tokenizer.engine import TokenizerEngine
from landiff.training.tokenizer.preview import paint
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.tokenizer.tiny import MODEL, batch, config, features
from tests.training.toy import alone, assert_measured


def train(engine, steps, world=None, micro_batches=1):
    """Scalars of each step."""
    world = world or engine.world
    found = []
    for step in steps:
        result = engine.train_step(batch(step, world.rank, world.size, micro_batches))
        assert_measured(result)
        found.append(
            read_scalars({"loss": result.loss, "grad_norm": result.grad_norm, **result.metrics})
        )
    return found


def test_loss_falls_and_the_codebook_is_used(tmp_path):
    scalars = train(
        TokenizerEngine(config(tmp_path, optim={"lr": 1e-2, "warmup_steps": 5}), alone()),
        range(130),
    )
    assert scalars[-1]["loss"] < 0.5 * scalars[0]["loss"]
    assert scalars[-1]["codebook/used_fraction"] > 0.5
    assert 1 < scalars[-1]["codebook/perplexity"] <= MODEL.codebook_size


def test_resume_is_bit_equal_and_needs_no_generator_state(tmp_path):
    straight = TokenizerEngine(config(tmp_path), alone())
    expected = train(straight, range(12))
    stopped = TokenizerEngine(config(tmp_path), alone())
    train(stopped, range(6))
    saving.save(stopped, tmp_path)
    torch.randn(7)  # somebody else draws in between
    resumed = TokenizerEngine(config(tmp_path), alone())
    for parameter in resumed.tokenizer.parameters():
        torch.nn.init.zeros_(parameter)
    resumed.load(tmp_path)
    assert train(resumed, range(6, 12)) == expected[6:]
    for name, tensor in straight.tokenizer.state_dict().items():
        assert torch.equal(resumed.tokenizer.state_dict()[name], tensor), name


def test_groups_are_those_of_a_plain_adamw_and_may_change(tmp_path):
    groups = [{"match": "quantizer.*", "lr_scale": 0.5}, {"match": "dec*", "weight_decay_scale": 0}]
    optim = {"lr": 3e-3, "warmup_steps": 5, "weight_decay": 0.5}
    settings = config(tmp_path, optim=optim | {"groups": groups})
    assert check_parameter_groups(settings) == []
    straight = TokenizerEngine(settings, alone())
    plain = TokenizerEngine(config(tmp_path, optim=optim), alone())
    each = []
    for name, parameter in plain.tokenizer.named_parameters():
        decays = parameter.ndim >= 2 and not name.startswith("decoder.")
        scale = 0.5 if name.startswith("quantizer.") else 1.0
        each.append({"params": [parameter], "lr_scale": scale, "decay_scale": float(decays)})
    betas = settings.optim.betas
    plain.optimizer = torch.optim.AdamW(each, betas=betas, eps=settings.optim.eps)
    expected = train(plain, range(6))
    assert train(straight, range(4)) == expected[:4]
    saving.save(straight, tmp_path)
    without = TokenizerEngine(config(tmp_path, optim=optim), alone())
    without.load(tmp_path)
    saving.save(without, tmp_path)
    resumed = TokenizerEngine(settings, alone())
    resumed.load(tmp_path)
    assert train(resumed, range(4, 6)) == expected[4:]
    for name, tensor in plain.tokenizer.state_dict().items():
        assert torch.equal(resumed.tokenizer.state_dict()[name], tensor), name
    wrong = config(tmp_path, optim=optim | {"groups": [{"match": "quantiser.*"}]})
    assert "did you mean 'quantizer." in str(check_parameter_groups(wrong)[0])


def test_quantization_begins_at_its_step_and_resumes_there_bit_equal(tmp_path):
    settings = config(tmp_path, quantize_from_step=4)
    straight = TokenizerEngine(settings, alone())
    expected = train(straight, range(8))
    assert [step["train/commitment"] == 0 for step in expected] == [True] * 4 + [False] * 4
    assert expected[4]["codebook/used_fraction"] > 0.5
    stopped = TokenizerEngine(settings, alone())
    train(stopped, range(3))
    saving.save(stopped, tmp_path)
    resumed = TokenizerEngine(settings, alone())
    resumed.load(tmp_path)
    assert train(resumed, range(3, 8)) == expected[3:]


def test_training_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    train(TokenizerEngine(config(tmp_path), alone()), range(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_start_from_the_zoo_keeps_weights_codebook_and_statistics(tmp_path):
    model = MODEL.model_copy(update={"normalize_features": True})
    first = TokenizerEngine(config(tmp_path, model), alone())
    train(first, range(5))
    state = first.tokenizer.state_dict()
    registry.export(tmp_path / "zoo", "tokenizer", "tokenizer", model, state, {})
    settings = config(tmp_path, model, zoo=tmp_path / "zoo", init_from="tokenizer")
    start = TokenizerEngine(settings, alone())
    statistics = start.tokenizer.mean.clone()
    assert float(statistics.abs().max()) > 0
    expected = train(TokenizerEngine(settings, alone()), [5])[0]["loss"]
    assert expected == train(first, [5])[0]["loss"]
    train(start, [0])  # step 0 of a run would otherwise measure the statistics of its batch
    assert torch.equal(start.tokenizer.mean, statistics)


def train_on(world, folder, normalize):
    model = MODEL.model_copy(update={"normalize_features": normalize})
    engine = TokenizerEngine(config(folder, model), world)
    scalars = train(engine, range(10), world)
    return scalars, {name: tensor.clone() for name, tensor in engine.tokenizer.state_dict().items()}


@pytest.mark.parametrize("normalize", [False, True])
def test_two_ranks_follow_one_and_share_one_codebook(tmp_path, normalize):
    scalars, state = train_on(alone(), tmp_path, normalize)
    (scalars0, state0), (scalars1, state1) = run_distributed(train_on, 2, tmp_path, normalize)
    assert scalars0 == scalars1
    for name, tensor in state.items():
        assert torch.equal(state0[name], state1[name]), name
        # float32 sums in another order, through ten AdamW steps
        torch.testing.assert_close(
            state0[name],
            tensor,
            rtol=1e-3,
            atol=2e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    for ours, theirs in zip(scalars, scalars0, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)


def test_the_gradient_of_micro_batches_is_their_mean(tmp_path):
    whole, cut = (TokenizerEngine(config(tmp_path), alone()) for _ in range(2))
    for engine in (whole, cut):
        engine.tokenizer.load_state_dict(trained_state(tmp_path))
        engine.tokenizer.quantizer._codebook.ema_update = False
        engine.tokenizer.quantizer._codebook.threshold_ema_dead_code = 0
    first = whole.train_step(batch(10))
    second = cut.train_step(batch(10, micro_batches=4))
    assert float(second.loss) == pytest.approx(float(first.loss), rel=1e-5)
    assert float(second.grad_norm) == pytest.approx(float(first.grad_norm), rel=1e-4)


def trained_state(folder):
    engine = TokenizerEngine(config(folder), alone())
    train(engine, range(10))
    return engine.tokenizer.state_dict()


def test_bf16_autocast_trains_and_keeps_float32_parameters(tmp_path):
    engine = TokenizerEngine(
        config(tmp_path, optim={"lr": 1e-2}, precision="bf16", recompute=True), alone()
    )
    scalars = train(engine, range(60))
    assert scalars[-1]["loss"] < 0.9 * scalars[0]["loss"]
    assert {tensor.dtype for tensor in engine.tokenizer.parameters()} == {torch.float32}


def test_longer_clips_give_one_segment_that_starts_anywhere(tmp_path):
    engine = TokenizerEngine(config(tmp_path), alone())
    longer = torch.randn(5, 8, 2, 2).half()
    starts = set()
    for sample in batch(0).samples:
        sample = replace(sample, tensors={"features": longer})
        (segment,) = engine._features((sample,))
        windows = longer.float().unfold(0, MODEL.segment_frames, 1).movedim(-1, 1)
        starts.add([torch.equal(window, segment) for window in windows].index(True))
    assert starts == {0, 1, 2}


def test_preview_shows_a_clip_beside_its_reconstruction(tmp_path):
    engine = TokenizerEngine(config(tmp_path), alone())
    assert engine.preview([]) == []
    train(engine, range(1))
    (preview,) = engine.preview([])
    assert list(preview.panels) == ["features", "reconstruction"]
    for video in preview.panels.values():
        assert video.dtype == torch.uint8 and video.shape == (3, 2 * 16, 2 * 16, 3)
    assert engine.tokenizer.training


def test_equal_features_are_painted_equally():
    clip = features(0).float()
    video, other = paint(clip, clip, pixels=1)
    assert torch.equal(video, other)
    assert len(video.reshape(-1, 3).unique(dim=0)) > 3


def test_features_of_another_size_are_refused_naming_both(tmp_path):
    column = Column(
        dtype="float16", shape=[3, 16, 2, 2], encoder="theia", fingerprint="f", config={}, shards=[]
    )
    manifest = Manifest(fingerprint="m", config={}, shards=[], columns={"features": column})
    (problem,) = check_features(config(tmp_path), manifest)
    assert re.search(r"\[8, 2, 2\].*theia.*\[16, 2, 2\]", str(problem))


def shipped_config(folder, name):
    """The options of a packaged config with the tiny model and data."""
    shipped = load(TokenizerTrainConfig, name)
    return config(folder).model_copy(
        update={key: getattr(shipped, key) for key in ("optim", "precision", "recompute")}
    )


def save_and_resume(world, folder, name):
    """(scalars of the steps after a checkpoint, state after them), trained on and resumed."""
    engine = TokenizerEngine(shipped_config(folder, name), world)
    train(engine, range(3), world)
    if world.rank == 0:
        (folder / name).mkdir(parents=True)
    world.barrier()
    saving.save(engine, folder / name)
    world.barrier()
    resumed = TokenizerEngine(engine.config, world)
    for parameter in resumed.tokenizer.parameters():
        torch.nn.init.zeros_(parameter)
    resumed.load(folder / name)
    return [
        (train(each, range(3, 5), world), each.tokenizer.state_dict()) for each in (engine, resumed)
    ]


@pytest.mark.parametrize("name", ["landiff/tokenizer", "nano/tokenizer"])
def test_shipped_options_resume_bit_for_bit_on_two_ranks(tmp_path, name):
    for (scalars, state), (resumed_scalars, resumed_state) in run_distributed(
        save_and_resume, 2, tmp_path, name
    ):
        assert resumed_scalars == scalars
        for key, tensor in state.items():
            assert torch.equal(resumed_state[key], tensor), key
    weights = load_file(tmp_path / name / "model.safetensors")
    assert {tensor.dtype for key, tensor in weights.items() if tensor.is_floating_point()} == {
        torch.float32
    }
