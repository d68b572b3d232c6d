"""Two processes: every layout trains the same model, and checkpoints move between layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from landiff.configs import ConfigError
from landiff.model_zoo.convert.fingerprint import weights_fingerprint
from landiff.model_zoo.convert.formats.megatron import read_lm
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.engine import MegatronEngine
from landiff.training.lm.model import InitialWeights
from landiff.training.observe.flops import lm_flops
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.lm.samples import tiny_batch, tiny_config, tiny_sample
from tests.training.toy import assert_measured, validation_metrics

STEPS = 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2": {"tensor": 2},
    "tensor 2, sequence": {"tensor": 2, "sequence": True},
    "pipeline 2": {"pipeline": 2},
    "context 2": {"context": 2},
    "context 2, distributed optimizer": {"context": 2, "distributed_optimizer": True},
    "data 2": {},
    "data 2, overlap": {"overlap": True},
    "data 2, distributed optimizer": {"distributed_optimizer": True},
    "tensor 2, sequence, distributed optimizer": {
        "tensor": 2,
        "sequence": True,
        "distributed_optimizer": True,
    },
}
MOVES = [  # saved as, loaded as
    ("one", "tensor 2"),
    ("one", "tensor 2, sequence"),
    ("one", "pipeline 2"),
    ("one", "data 2"),
    ("one", "context 2"),
    ("context 2, distributed optimizer", "data 2, distributed optimizer"),
    ("context 2, distributed optimizer", "context 2, distributed optimizer"),
    ("tensor 2", "tensor 2"),
    ("tensor 2", "pipeline 2"),
    ("tensor 2", "data 2"),
    ("pipeline 2", "tensor 2, sequence"),
    ("pipeline 2", "pipeline 2"),
    ("data 2, distributed optimizer", "tensor 2, sequence, distributed optimizer"),
    ("data 2, distributed optimizer", "data 2, distributed optimizer"),
    ("tensor 2, sequence, distributed optimizer", "data 2, distributed optimizer"),
]


def clip_flops(config: LMTrainConfig, step: int) -> float:
    """FLOPs of the clips of a global batch, which no layout changes."""
    layout = TokenLayout.of(config.model)
    total = 0.0
    for sample in tiny_batch(config, step).samples:
        text = len(sample.tensors[config.text_column])
        frames = layout.num_frames(sample.tensors[config.tokens_column].numel())
        length = layout.sequence_length(frames, text)
        total += lm_flops(config.model, length, text).total
    return total


class Trained:
    """An engine of one layout, and what it says."""

    def __init__(self, folder: Path, layout: str) -> None:
        self.config = tiny_config(folder, LAYOUTS.get(layout))
        self.engine = MegatronEngine(self.config)

    def steps(self, first: int, end: int) -> list[tuple[float, float]]:
        results = [
            self.engine.train_step(
                tiny_batch(self.config, step, self.engine.dp_rank, self.engine.dp_size)
            )
            for step in range(first, end)
        ]
        assert all(result.tokens > 0 for result in results)
        for step, result in zip(range(first, end), results, strict=True):
            assert_measured(result)
            assert result.flops == pytest.approx(clip_flops(self.config, step), rel=1e-12)
        return [(float(result.loss), float(result.grad_norm)) for result in results]

    def save(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        saving.save(self.engine, folder)
        dist.barrier()

    def condition_gradients(self) -> dict[str, torch.Tensor]:
        """Summed over all copies. With the distributed optimizer a rank has only its part."""
        return {
            name: parameter.grad.clone()
            for name, parameter in self.engine.model.named_parameters()
            if name.startswith(("text.", "micro.")) and parameter.grad is not None
        }


def held_out_metrics(engine: MegatronEngine) -> dict[str, float]:
    """Metrics of seven clips that no step trains on."""
    samples = [tiny_sample(engine.config, 1000 + number, number) for number in range(7)]
    return validation_metrics(engine, samples, engine.dp_rank, engine.dp_size, 2)


def one_process(world: Any, folder: Path) -> dict[str, Any]:
    run = Trained(folder, "one")
    evaluated = held_out_metrics(run.engine)
    run.save(folder / "first" / "one")
    losses = run.steps(0, 1)
    gradients = run.condition_gradients()
    losses += run.steps(1, 3)
    run.save(folder / "one")
    losses += run.steps(3, STEPS)
    run.engine.close()
    return {"losses": losses, "gradients": gradients, "evaluated": evaluated}


def two_processes(world: Any, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": {}, "gradients": {}, "evaluated": {}, "moved": {}}
    for layout in LAYOUTS:
        run = Trained(folder, layout)
        found["evaluated"][layout] = held_out_metrics(run.engine)
        run.save(folder / "first" / layout)
        losses = run.steps(0, 1)
        found["gradients"][layout] = run.condition_gradients()
        losses += run.steps(1, 3)
        run.save(folder / layout)
        found["losses"][layout] = losses + run.steps(3, STEPS)
        run.engine.close()
    for saved, loaded in MOVES:
        run = Trained(folder, loaded)
        run.engine.load_weights(InitialWeights(run.config.model, 99))  # all must come from the file
        run.engine.load(folder / saved)
        found["moved"][saved, loaded] = run.steps(3, STEPS)
        run.engine.close()
    with pytest.raises(ConfigError, match="tensor = 3 does not divide the 2 launched ranks"):
        MegatronEngine(
            tiny_config(
                folder, {"tensor": 3}, head_multiple=3, model={"ffn_size": 81}, vocab_multiple=9
            )
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return run_distributed(one_process, 1, folder)[0]


@pytest.fixture(scope="module")
def ranks(folder: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    return run_distributed(two_processes, 2, folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_follows_one_process_through_five_steps(one, ranks, layout):
    losses, norms = zip(*ranks[0]["losses"][layout], strict=True)
    expected_losses, expected_norms = zip(*one["losses"], strict=True)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert norms == pytest.approx(expected_norms, abs=1e-5)
    assert ranks[1]["losses"][layout] == ranks[0]["losses"][layout]  # whatever the stage or copy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_is_the_same_in_every_layout(one, ranks, layout):
    for rank in ranks:
        assert rank["evaluated"][layout] == pytest.approx(one["evaluated"], abs=1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "distributed" not in name])
def test_gradients_of_the_condition_modules_are_right_and_equal_on_all_ranks(one, ranks, layout):
    first, second = (rank["gradients"][layout] for rank in ranks)
    assert first.keys() == one["gradients"].keys() and len(first) == 13
    assert second.keys() == (
        set() if layout == "pipeline 2" else first.keys()
    )  # only the first stage has them
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, one["gradients"][name], atol=1e-6, rtol=1e-4, msg=name)
        assert name not in second or torch.equal(gradient, second[name]), name


@pytest.mark.parametrize(("saved", "loaded"), MOVES)
def test_checkpoints_go_on_in_another_layout(one, ranks, saved, loaded):
    straight = one["losses"][3:] if saved == "one" else ranks[0]["losses"][saved][3:]
    moved = ranks[0]["moved"][saved, loaded]
    if saved == loaded:
        assert moved == straight
    else:
        assert [loss for loss, _ in moved] == pytest.approx(
            [loss for loss, _ in straight], abs=1e-5
        )


def test_checkpoints_of_the_same_weights_export_to_the_same_bytes(folder, one, ranks):
    config = tiny_config(folder).model
    marks = {
        weights_fingerprint("lm", config, read_lm(folder / "first" / name, config))
        for name in ["one", *LAYOUTS]
    }
    assert marks == {weights_fingerprint("lm", config, InitialWeights(config, 7))}


def compiled_and_eager(world: Any, folder: Path) -> list[list[float]]:
    """Losses with more layers than a function may be compiled for, and core's hooks on weights."""
    import torch._dynamo.config as dynamo

    parallel = {"distributed_optimizer": True, "overlap": True}
    config = tiny_config(folder, parallel, model={"num_layers": 4})
    found = []
    with dynamo.patch(fail_on_recompile_limit_hit=True, recompile_limit=3):
        for compiled in (False, True):
            engine = MegatronEngine(config)
            if compiled:
                engine.model.compile_blocks(backend="eager")
            losses = []
            for step in range(3):
                batch = tiny_batch(config, step, engine.dp_rank, engine.dp_size)
                losses.append(float(engine.train_step(batch).loss))
            engine.close()
            found.append(losses)
    return found


def test_code_is_compiled_once_for_all_layers(tmp_path):
    for eager, compiled in run_distributed(compiled_and_eager, 2, tmp_path):
        assert compiled == pytest.approx(eager, abs=1e-5)
