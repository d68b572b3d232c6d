"""DeepSpeed resumes from checkpoints that were resharded to any stage and world size.

The model is none of ours: two groups of the optimizer, frozen parameters, buffers, and sizes that
no number of ranks divides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Slow to import (3 s), so imported once before ranks are forked.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import pytest
import torch
from torch import Tensor, nn

from landiff.model_zoo.convert.formats import deepspeed_write
from landiff.model_zoo.convert.formats.deepspeed import DeepSpeedState, read_deepspeed
from landiff.model_zoo.convert.formats.deepspeed_write import ZeroPartition, write_deepspeed
from landiff.training.diffusion import zero
from tests.distributed import run_distributed

BEFORE, AFTER = 2, 2  # steps, around the save
STAGES, PRECISIONS = (1, 2, 3), ("fp32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (saved with stage, precision, read with stage); the number of ranks changes too
MOVES = [(1, "fp32", 3), (3, "fp32", 2), (2, "fp32", 1), (2, "bf16", 3), (3, "bf16", 1)]


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.frozen, self.last = nn.Linear(5, 7), nn.Linear(7, 9), nn.Linear(9, 3)
            self.scale = nn.Parameter(torch.rand(1))
            self.register_buffer("shift", torch.rand(3))
            self.register_buffer("count", torch.tensor(seed))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(
            torch.tanh(self.frozen(torch.relu(self.first(x))))
        ) * self.scale + self.shift.to(x.dtype)


def build(world: Any, stage: int, precision: str, seed: int) -> Any:
    zero.prepare_deepspeed()
    net = Net(seed)
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.0)
    return zero.initialize(
        net,
        optimizer,
        {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 4 // world.size,
            "gradient_clipping": 0.3,
            "bf16": {"enabled": precision == "bf16"},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        },
        world.device,
    )


def go(engine: Any, world: Any, first: int, steps: int) -> list[float]:
    """Losses of the global batch."""
    found = []
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 5, generator=draw), torch.randn(4, 3, generator=draw)
        share = slice(world.rank, None, world.size)
        dtype = next(engine.module.parameters()).dtype
        loss = (engine(x[share].to(dtype)).float() - y[share]).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        found.append(float(total) / world.size)
    return found


def name(stage: int, size: int, precision: str) -> str:
    return f"{precision}-{stage}-{size}"


def train(world: Any, folder: Path) -> dict[str, list[float]]:
    """Every stage and precision: steps, a checkpoint, and the losses of the steps after it."""
    found = {}
    for precision in PRECISIONS:
        for stage in STAGES:
            engine = build(world, stage, precision, seed=1)
            engine.checkpoint_engine = engine.checkpoint_engine.inner  # DeepSpeed writes the files
            go(engine, world, 0, BEFORE)
            place = name(stage, world.size, precision)
            engine.save_checkpoint(
                str(folder / place),
                tag="zero",
                save_latest=False,
                client_state={"note": [1, "two", torch.arange(3)]},
            )
            found[place] = go(engine, world, BEFORE, AFTER)
    return found


def resume(world: Any, folder: Path, jobs: list[tuple[str, str, str, int]]) -> dict[str, Any]:
    """Load converted folders with DeepSpeed and their sources with our restore, then train."""
    found = {}
    for source, converted, precision, stage in jobs:
        theirs = build(world, stage, precision, seed=2)
        path, client = theirs.load_checkpoint(str(folder / converted), tag="zero")
        assert path is not None
        ours = build(world, stage, precision, seed=2)
        zero.restore(ours, read_deepspeed(folder / source / "zero"))
        buffers = {key: buffer.clone() for key, buffer in theirs.module.named_buffers()}
        found[converted] = {
            "note": client["note"],
            "steps": theirs.global_steps,
            "buffers": buffers,
            "theirs": go(theirs, world, BEFORE, AFTER),
            "ours": go(ours, world, BEFORE, AFTER),
            "weights": {key: zero.read_full(p) for key, p in theirs.module.named_parameters()},
            "other weights": {key: zero.read_full(p) for key, p in ours.module.named_parameters()},
        }
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("zero")
    losses: dict[str, list[float]] = {}
    for size in (1, 2):
        losses |= run_distributed(train, size, folder)[0]
    return folder, losses


def convert(source: Path, target: Path, partition: ZeroPartition) -> None:
    (target / "zero").mkdir(parents=True)
    write_deepspeed(target / "zero", read_deepspeed(source / "zero"), partition)


@pytest.mark.parametrize("size", [1, 2])
def test_deepspeed_alone_goes_on_from_another_layout(trained, size):
    folder, losses = trained
    jobs = []
    for saved, precision, stage in MOVES:
        source, target = (
            name(saved, 3 - size, precision),
            f"{name(saved, 3 - size, precision)}-to-{stage}-{size}",
        )
        convert(folder / source, folder / target, ZeroPartition(stage, size))
        jobs.append((source, target, precision, stage))
    for result in run_distributed(resume, size, folder, jobs):
        for source, target, precision, _ in jobs:
            found = result[target]
            assert found["theirs"] == found["ours"], (
                target
            )  # bit for bit what a restore by name makes of the source
            assert all(
                torch.equal(found["other weights"][key], tensor)
                for key, tensor in found["weights"].items()
            )
            # float32 sums in another order; bfloat16 has 8 bits
            assert found["theirs"] == pytest.approx(
                losses[source], rel=1e-5 if precision == "fp32" else 2e-2
            )
            assert (
                found["steps"] == BEFORE
                and found["note"][:2] == [1, "two"]
                and torch.equal(found["note"][2], torch.arange(3))
            )
            assert (
                torch.equal(found["buffers"]["shift"], Net(1).shift)
                and int(found["buffers"]["count"]) == 1
            )


def equal(first: DeepSpeedState, second: DeepSpeedState) -> None:
    assert (
        first.groups == second.groups
        and first.working == second.working
        and first.buffers == second.buffers
    )
    assert first.optimizer_steps == second.optimizer_steps == BEFORE
    pairs = [
        (first.weights, second.weights),
        *((first.moments[key], second.moments[key]) for key in ("exp_avg", "exp_avg_sq")),
    ]
    for ones, others in pairs:
        assert ones.keys() == others.keys()
        for key, tensor in ones.items():
            assert tensor.dtype == others[key].dtype and torch.equal(tensor, others[key]), key


@pytest.mark.parametrize(
    ("stage", "size", "precision"),
    [
        (1, 1, "bf16"),
        (1, 2, "fp32"),
        (2, 1, "fp32"),
        (2, 2, "bf16"),
        (3, 1, "fp32"),
        (3, 2, "bf16"),
        (3, 2, "fp32"),
    ],
)
def test_there_and_back_is_bit_equal(tmp_path, trained, stage, size, precision, monkeypatch):
    source = trained[0] / name(stage, size, precision)
    for number, partition in enumerate(
        (ZeroPartition(1, 3), ZeroPartition(2, 7), ZeroPartition(3, 5))
    ):
        if partition.stage == 3:
            monkeypatch.setattr(
                deepspeed_write, "SUB_GROUP", 4
            )  # several vectors in a group, as of a large model
        convert(source, tmp_path / f"there-{number}", partition)
        monkeypatch.undo()
        there = read_deepspeed(tmp_path / f"there-{number}" / "zero")
        assert (there.zero_stage, there.world_size) == (partition.stage, partition.world_size)
        equal(there, read_deepspeed(source / "zero"))
        convert(
            tmp_path / f"there-{number}", tmp_path / f"back-{number}", ZeroPartition(stage, size)
        )
        equal(read_deepspeed(tmp_path / f"back-{number}" / "zero"), read_deepspeed(source / "zero"))
        for file in (source / "zero").iterdir():
            alike(
                torch.load(tmp_path / f"back-{number}" / "zero" / file.name, weights_only=False),
                torch.load(file, weights_only=False),
                file.name,
            )


def alike(found: Any, expected: Any, place: str) -> None:
    """Check for the same objects in the same containers.

    In ZeRO 3, DeepSpeed pads slices with uninitialized memory (`equal` compares the parameters in
    them), and a converted checkpoint may have the additional entry `clip_grad`.
    """
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, place
        assert ("zero_pp" in place and found.ndim == 1) or torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert set(found) - {"clip_grad"} == set(expected) - {"clip_grad"}, place
        for key, value in expected.items():
            alike(found[key], value, f"{place} {key}")
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected), place
        for one, other in zip(found, expected, strict=True):
            alike(one, other, place)
    else:
        assert type(found) is type(expected) and getattr(found, "__dict__", found) == getattr(
            expected, "__dict__", expected
        ), place


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_the_precision_changes_and_the_masters_stay(tmp_path, trained, before, after):
    source = trained[0] / name(2, 2, before)
    convert(source, tmp_path / "out", ZeroPartition(3, 2, DTYPES[after]))
    old, new = read_deepspeed(source / "zero"), read_deepspeed(tmp_path / "out" / "zero")
    assert {new.working[key] for key in new.trainable} == {DTYPES[after]}
    assert all(torch.equal(new.weights[key], old.weights[key]) for key in old.trainable)
    assert (
        new.weights["frozen.weight"].dtype == DTYPES[after]
        and new.weights["shift"].dtype == torch.float32
    )
