"""The Megatron model in one process: equal to the plain torch model, packed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from landiff.configs import ConfigError
from landiff.data_pipeline.loading.loader import Batch
from landiff.launchers.budget.models import make_plan
from landiff.model_zoo.lm import LanguageModel
from landiff.training import optim
from landiff.training.lm.batch import pack
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.device import megatron_device
from landiff.training.lm.engine import MegatronEngine
from landiff.training.lm.model import InitialWeights
from tests.distributed import run_distributed
from tests.training import saving
from tests.training.lm.samples import (
    evaluate,
    longest_sample,
    plain_loss,
    tiny_batch,
    tiny_config,
)

STEPS = 5


def plain_model(config: LMTrainConfig) -> LanguageModel:
    model = LanguageModel(config.model)
    model.load_state_dict(InitialWeights(config.model, config.loop.seed))
    return model


def train_plain(config: LMTrainConfig) -> list[float]:
    model = plain_model(config)
    optimizer = optim.adamw(model.named_parameters(), config.optim)
    losses = []
    for step in range(STEPS):
        now = config.at(step)
        rate = optim.rate_of_step(config, step)
        optim.set_rate_and_decay(optimizer, rate, now.optim.weight_decay)
        optimizer.zero_grad()
        loss = plain_loss(model, tiny_batch(config, step), now)
        loss.backward()
        optim.clip_gradients(model.parameters(), now.optim.clip_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses


def kept_by_autograd(world, folder: Path) -> tuple[int, int]:
    """(bytes that Megatron's forward leaves for its backward, what `landiff plan` says)."""
    sizes = {
        "hidden_size": 192,
        "num_layers": 3,
        "ffn_size": 512,
        "segment_frames": 8,
        "max_text_tokens": 64,
    }
    config = tiny_config(folder, data={"global_batch_size": 2, "micro_batch_size": 2}, model=sizes)
    engine, kept = MegatronEngine(config), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in engine.model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage().data_ptr()
        kept[storage] = max(
            kept.get(storage, 0),
            0 if storage in weights else tensor.untyped_storage().nbytes(),
        )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.train_step(
            Batch(step=0, global_batch_size=2, micro_batches=((longest_sample(config),) * 2,))
        )
    engine.close()
    memory = make_plan(config, 1).memory
    return sum(kept.values()), memory["activations"] + memory["logits"]


def test_a_plan_knows_what_the_forward_leaves_for_the_backward(tmp_path):
    [(kept, planned)] = run_distributed(kept_by_autograd, 1, tmp_path)
    assert planned == pytest.approx(kept, rel=0.2)


def train(config: LMTrainConfig) -> list[float]:
    engine = MegatronEngine(config)
    losses = [float(engine.train_step(tiny_batch(config, step)).loss) for step in range(STEPS)]
    engine.close()
    return losses


def gradients(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in engine.model.named_parameters()
        if parameter.grad is not None
    }


def train_compiled(config: LMTrainConfig) -> list[float]:
    """As `train`, through the compiler's tracing and differentiation and the same kernels."""
    engine = MegatronEngine(config)
    engine.model.compile_blocks(backend="aot_eager")
    losses = [float(engine.train_step(tiny_batch(config, step)).loss) for step in range(STEPS)]
    engine.close()
    return losses


def all_checks(world: Any, folder: Path) -> dict[str, Any]:
    """Everything below, in one process; tests look at the parts."""
    config = tiny_config(folder)
    found: dict[str, Any] = {
        "plain": train_plain(config),
        "megatron": train(config),
        "micro 1": train(tiny_config(folder, data={"micro_batch_size": 1})),
        "micro 4": train(tiny_config(folder, data={"micro_batch_size": 4})),
        "recompute": train(tiny_config(folder, recompute=True)),
        "padded": train(tiny_config(folder, row_multiple=64, vocab_multiple=128, head_multiple=3)),
        "distributed optimizer": train(
            tiny_config(folder, {"distributed_optimizer": True, "overlap": True})
        ),
        "compiled": train_compiled(config),
        "bf16": train(tiny_config(folder, precision="bf16")),
        "fused": train(tiny_config(folder, optim={"fused": True})),
        "grid": train(tiny_config(folder, model={"grid_condition": True})),
        "plain grid": train_plain(tiny_config(folder, model={"grid_condition": True})),
        "phases": train(curriculum(folder)),
        "plain phases": train_plain(curriculum(folder)),
    }
    engine = MegatronEngine(tiny_config(folder, vocab_multiple=128))
    batch = tiny_batch(config, 0)
    found["evaluated"] = (
        evaluate(engine, batch),
        plain_loss(
            plain_model(config), batch, config.model_copy(update={"text_dropout": 0.0})
        ).item(),
    )
    found |= logits_checks(engine, batch, config)
    engine.close()
    found |= checkpoint_checks(folder)
    return found


def curriculum(folder: Path) -> LMTrainConfig:
    """A batch that grows, more decay, and a phase with another batch, another rate and no text."""
    phase = {
        "from_step": 3,
        "data": {"global_batch_size": 2, "micro_batch_size": 1},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "text_dropout": 1.0,
    }
    data = {
        "global_batch_size": 6,
        "micro_batch_size": 2,
        "ramp": {"start": 2, "increment": 4, "steps": 2},
    }
    decay = {"from_step": 1, "optim": {"weight_decay": 20.0, "clip_grad": 0.01}}
    return tiny_config(folder, data=data, phases=[decay, phase])


def logits_checks(engine: MegatronEngine, batch: Batch, config: LMTrainConfig) -> dict[str, Any]:
    samples = tuple(batch.samples)
    with megatron_device():
        row = pack(samples, config, engine.layout)
        logits = engine.model(row, logits=True)
        packed = engine.model(row)[0]
        (packed * row.weights_N).sum().backward()
        packed_gradients = gradients(engine)
        engine.model.zero_grad()
        alone = []
        for sample in samples:
            single = pack((sample,), config, engine.layout)
            losses = engine.model(single)[0]
            (losses * single.weights_N).sum().backward()
            alone.append(losses[: single.num_tokens])
        alone_gradients = gradients(engine)
        with torch.no_grad():
            engine.model.output_layer.weight[engine.layout.vocab_size :] = 10.0
            spoiled = engine.model(row)[0]
    plain = plain_model(config)
    unpadded = config.model_copy(update={"row_multiple": 1})
    rows = [pack((sample,), unpadded, engine.layout) for sample in samples]
    expected = [
        plain(
            single.ids_N[None],
            single.text_MD.float()[None],
            single.frames_B,
            single.motion_score_B,
            single.drop_text_M[:1],
        )[0]
        for single in rows
    ]
    length = row.num_tokens
    return {
        "logits": (logits[:length].detach(), torch.cat(expected).detach()),
        "packed": (packed[:length].detach(), torch.cat(alone).detach()),
        "packed gradients": (packed_gradients, alone_gradients),
        "spoiled": (packed.detach(), spoiled),
    }


def checkpoint_checks(folder: Path) -> dict[str, Any]:
    """Train 3 steps, save, 2 more, and resume. With both optimizers and both precisions."""
    found = {}
    for name, changes in {
        "fp32": {},
        "bf16": {"precision": "bf16"},
        "distributed": {"parallel": {"distributed_optimizer": True}, "optim": {"fused": True}},
        "padded": {"vocab_multiple": 128, "head_multiple": 3},
    }.items():
        config = tiny_config(folder, **changes)
        path = folder / name
        path.mkdir(parents=True)
        engine = MegatronEngine(config)
        for step in range(3):
            engine.train_step(tiny_batch(config, step))
        saving.save(engine, path)
        found[f"straight {name}"] = more_steps(engine, config)
        engine.close()
        engine = MegatronEngine(config)
        engine.load_weights(InitialWeights(config.model, 99))  # all must come from the file
        engine.load(path)
        found[f"resumed {name}"] = more_steps(engine, config)
        engine.close()
    engine = MegatronEngine(tiny_config(folder, {"distributed_optimizer": True}))
    with pytest.raises(ConfigError, match=r"parallel\.distributed_optimizer = False"):
        engine.load(folder / "fp32")
    engine.close()
    return found


def more_steps(engine: MegatronEngine, config: LMTrainConfig) -> list[tuple[float, float]]:
    results = [engine.train_step(tiny_batch(config, step)) for step in (3, 4)]
    return [(float(result.loss), float(result.grad_norm)) for result in results]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_distributed(all_checks, 1, tmp_path_factory.mktemp("one"))[0]


def test_training_follows_the_plain_torch_model_through_five_steps(found):
    # two implementations of the same sums in float32
    assert found["megatron"] == pytest.approx(found["plain"], abs=1e-5)
    assert found["plain"][0] - found["plain"][-1] > 0.05


def test_the_grid_of_a_clip_trains_as_in_the_plain_torch_model(found):
    assert found["grid"] == pytest.approx(found["plain grid"], abs=1e-5)
    assert found["grid"][0] == found["megatron"][0], "it has no effect before it is trained"
    assert found["grid"][-1] != found["megatron"][-1]


def test_compiled_layers_train_as_eager_ones(found):
    assert found["compiled"] == pytest.approx(found["megatron"], abs=1e-6)


def test_the_fused_update_computes_the_same(found):
    assert found["fused"] == pytest.approx(found["megatron"], abs=1e-6)  # its last bits differ


def test_phases_follow_the_plain_torch_model(found):
    # as above: two implementations of the same sums in float32
    assert found["phases"] == pytest.approx(found["plain phases"], abs=1e-5)


@pytest.mark.parametrize(
    "changed", ["micro 1", "micro 4", "recompute", "padded", "distributed optimizer"]
)
def test_losses_do_not_depend_on_how_the_batch_is_computed(found, changed):
    assert found[changed] == pytest.approx(found["megatron"], abs=2e-6)


def test_bfloat16_follows_float32_roughly(found):
    assert found["bf16"] == pytest.approx(found["megatron"], abs=2e-2)  # 8 bits of mantissa
    assert found["bf16"] != found["megatron"]


def test_evaluation_keeps_all_text(found):
    measured, expected = found["evaluated"]
    assert measured == pytest.approx(expected, abs=1e-5)


def test_logits_are_those_of_the_plain_model(found):
    torch.testing.assert_close(*found["logits"], atol=1e-5, rtol=0)


def test_a_packed_row_equals_each_sample_alone(found):
    torch.testing.assert_close(*found["packed"], atol=1e-5, rtol=0)
    packed, alone = found["packed gradients"]
    assert packed.keys() == alone.keys()
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-4, rtol=1e-4, msg=name)


def test_padded_vocabulary_rows_never_reach_the_loss(found):
    before, after = found["spoiled"]
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "distributed", "padded"])
def test_resume_on_the_same_layout_is_bit_equal(found, kind):
    assert found[f"resumed {kind}"] == found[f"straight {kind}"]
