"""The moving average of the diffusion model in every ZeRO stage and precision, on two ranks."""

from __future__ import annotations

import logging
from pathlib import Path

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - slow to import: once for all ranks
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

from landiff.launchers.cli import main
from landiff.model_zoo import registry
from landiff.model_zoo.convert.formats.deepspeed import read_deepspeed
from landiff.training.diffusion import zero
from landiff.training.diffusion.engine import build_engine
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.diffusion.tiny import batch, config, make_zoo

LAYOUTS = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
PERSISTENT = 40  # elements; in ZeRO-3 some parameters stay on every rank, as in shipped configs
EMA = "{decay: 0.9, every: 2, from_step: 7}"
KEPT = 0.9**2
STEPS = 20


def settings_of(folder: Path, stage: int, precision: str, phase: str = "main", **changes):
    return config(
        folder,
        phase,
        data__global_batch_size=2,
        data__micro_batch_size=1,
        zero__stage=stage,
        zero__parameter_persistence_threshold=PERSISTENT,
        precision=precision,
        **{"ema": EMA, **changes},
    )


def engine_of(world, *args, **changes):
    return build_engine(settings_of(*args, **changes), world)


def train(engine, world, steps) -> list[torch.Tensor]:
    """Trains, and averages this rank's master weights as docs/training.md says."""
    average: list[torch.Tensor] = []
    for step in steps:
        engine.train_step(batch(engine.config, step, world))
        masters = [master.detach().clone() for master in zero.master_weights(engine.zero)]
        if step + 1 <= 7:
            average = masters
        elif (step + 1) % 2 == 0:
            pairs = zip(average, masters, strict=True)
            average = [KEPT * old + (1 - KEPT) * new for old, new in pairs]
    return average


def working_copies(engine) -> dict[str, torch.Tensor]:
    """What forward passes read. Collective."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return found


def save(engine, world, folder: Path) -> Path:
    if world.rank == 0:
        folder.mkdir(parents=True)
    world.barrier()
    saving.save(engine, folder)
    world.barrier()
    return folder


def averages_in(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_deepspeed(folder / "zero").moments["ema"].items())


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def check_context(engine, folder: Path) -> dict[str, bool]:
    """What `engine.weights` does to the weights that forward passes read. Collective."""
    before = working_copies(engine)
    held = {name: tensor.detach().clone() for name, tensor in engine.local_weights()}
    averages = averages_in(folder)
    with engine.weights(True):
        inside = working_copies(engine)
    with engine.weights(False):
        raw = working_copies(engine)
    after = {name: tensor.detach() for name, tensor in engine.local_weights()}
    cast = {}
    for name, tensor in before.items():
        cast[name] = averages.get(name, tensor).to(tensor.dtype)
    return {
        "averages inside": equal(inside, cast) and not equal(inside, before),
        "weights after": equal(raw, before),
        "state after": equal(after, held),
    }


def train_and_check(world, folder: Path) -> dict:
    """Every layout: differences from the reference, and what the context does."""
    found = {}
    for stage, precision in LAYOUTS:
        engine = engine_of(world, folder, stage, precision)
        expected = train(engine, world, range(STEPS))
        pairs = zip(engine.ema.averages, expected, strict=True)
        difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
        saved = save(engine, world, folder / f"{stage}-{precision}")
        context = check_context(engine, saved)
        engine.train_step(batch(engine.config, STEPS, world))
        save(engine, world, folder / f"{stage}-{precision}-next")
        found[stage, precision] = {"difference": difference, **context}
    return found


def resume_and_save(world, folder: Path, moves) -> None:
    """Load checkpoints in engines of another seed and layout, save, and go on."""
    for precision, stage, own in moves:
        engine = engine_of(world, folder, own, precision, loop__seed=4)
        engine.load(folder / f"{stage}-{precision}")
        name = f"{stage}-{precision}-to-{own}-{world.size}"
        save(engine, world, folder / name)
        engine.objective.config = engine.config = settings_of(folder, own, precision)
        engine.train_step(batch(engine.config, STEPS, world))
        save(engine, world, folder / f"{name}-next")


# precision, ZeRO stage of the checkpoint, ZeRO stage of the run that loads it
MOVES_OF_TWO = [("fp32", 1, 1), ("bf16", 2, 2), ("bf16", 3, 3), ("fp32", 3, 3), ("bf16", 3, 1)]
MOVES_OF_ONE = [("fp32", 2, 2), ("bf16", 1, 3), ("fp32", 3, 3)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ema")
    make_zoo(folder)
    found = run_distributed(train_and_check, 2, folder, timeout_s=600)
    run_distributed(resume_and_save, 2, folder, MOVES_OF_TWO, timeout_s=600)
    run_distributed(resume_and_save, 1, folder, MOVES_OF_ONE, timeout_s=600)
    return folder, found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_equals_a_plain_reference_over_20_steps(trained, layout):
    for rank in trained[1]:
        # float32 rounding of weights below 2
        assert rank[layout]["difference"] < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_passes_read_it_inside_the_context_only(trained, layout):
    for rank in trained[1]:
        assert rank[layout]["averages inside"]
        assert rank[layout]["weights after"]
        assert rank[layout]["state after"]


@pytest.mark.parametrize(
    ("move", "size"), [(m, 2) for m in MOVES_OF_TWO] + [(m, 1) for m in MOVES_OF_ONE]
)
def test_checkpoints_keep_it_exactly_in_every_layout(trained, move, size):
    precision, stage, own = move
    folder, _ = trained
    before = averages_in(folder / f"{stage}-{precision}")
    assert equal(averages_in(folder / f"{stage}-{precision}-to-{own}-{size}"), before)


@pytest.mark.parametrize("move", [move for move in MOVES_OF_TWO if move[1] == move[2]])
def test_resume_in_the_same_layout_is_bit_equal(trained, move):
    precision, stage, own = move
    folder, _ = trained
    straight = averages_in(folder / f"{stage}-{precision}-next")
    assert equal(averages_in(folder / f"{stage}-{precision}-to-{own}-2-next"), straight)


@pytest.mark.parametrize("layout", [(1, "bf16"), (3, "fp32")])
def test_a_conversion_takes_it_unless_told_otherwise(trained, tmp_path, capsys, layout):
    folder, _ = trained
    saved = folder / f"{layout[0]}-{layout[1]}"
    raw = dict(read_deepspeed(saved / "zero").weights.items())
    averaged = {**raw, **averages_in(saved)}
    for words, kind, expected in (([], "ema", averaged), (["--weights", "raw"], "raw", raw)):
        zoo = tmp_path / kind
        assert main(["convert", str(saved), "--zoo", str(zoo), "--name", "it", *words]) == 0
        assert ("moving average" in capsys.readouterr().out) == (kind == "ema")
        entry = registry.resolve(zoo, "it")
        assert entry.provenance["weights"] == kind
        assert equal(
            dict(entry.load()), {name: tensor.float() for name, tensor in expected.items()}
        )


def test_a_checkpoint_is_converted_with_it_and_the_optimizer(trained, tmp_path, capsys):
    folder, _ = trained
    words = ["convert", str(folder / "3-bf16"), "--to", "deepspeed", "--out", str(tmp_path / "out")]
    assert main([*words, "--weights", "ema"]) == 2
    assert "with --weights-only" in capsys.readouterr().err
    assert main([*words, "--world-size", "3", "zero.stage=2"]) == 0
    assert equal(averages_in(tmp_path / "out"), averages_in(folder / "3-bf16"))


def switch(world, folder: Path) -> list[str]:
    """Log lines of a run that switches the average on, and of one that switches it off."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("landiff.training.ema").addHandler(handler)
    logging.getLogger("landiff.training.ema").setLevel(logging.INFO)
    for stage in (1, 3):
        # Phase control has frozen parameters, which have no average.
        off = engine_of(world, folder, stage, "bf16", "control", ema="null")
        off.train_step(batch(off.config, 0, world))
        save(off, world, folder / f"off-{stage}")
        on = engine_of(world, folder, stage, "bf16", "control")
        on.load(folder / f"off-{stage}")
        for ours, master in zip(on.ema.averages, zero.master_weights(on.zero), strict=True):
            assert torch.equal(ours, master)
        train(on, world, range(1, 9))
        saved = save(on, world, folder / f"on-{stage}")
        assert all(check_context(on, saved).values())
        off.load(saved)
        off.train_step(batch(off.config, 9, world))
    return records


def test_it_can_be_switched_on_and_off(tmp_path):
    make_zoo(tmp_path)
    [records] = run_distributed(switch, 1, tmp_path)
    assert ["holds no moving average" in text for text in records] == [True, False, True, False]
    assert ["is dropped" in text for text in records] == [False, True, False, True]
