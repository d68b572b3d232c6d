"""`landiff plan`: estimates compared with what torch counts."""

from __future__ import annotations

import json
import re

import pytest
import torch

from landiff.configs import ConfigError, load
from landiff.configs.loader import dump
from landiff.data_pipeline.format.shards import write_manifest
from landiff.launchers.budget.budget_plan import GIB
from landiff.launchers.budget.models import make_plan
from landiff.launchers.budget.search import changed, search, way_out
from landiff.launchers.budget.step_time import (
    GPUS,
    Speed,
    model_flops_utilization,
    traffic_seconds,
)
from landiff.launchers.budget.total import checkpoint_size, format_disk
from landiff.launchers.cli import main
from landiff.launchers.stages import TRAINERS
from landiff.model_zoo.lora.config import AdapterConfig
from landiff.model_zoo.lora.modules import add_layers
from landiff.model_zoo.registry import build_module
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.checkpoint.files import CheckpointState
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.lm.config import LMTrainConfig
from landiff.training.observe.flops import lm_flops, main_flops
from tests.data_pipeline.data_sets import write_column, write_raw


@pytest.fixture(scope="module")
def lm() -> LMTrainConfig:
    layout = ["parallel.tensor=2", "parallel.sequence=true", "recompute=true"]
    return load(LMTrainConfig, "landiff/lm", layout)


def test_parameters_are_those_of_the_specification(lm):
    assert make_plan(lm, 32).parameters["all"] == 2_049_321_984
    control = make_plan(load(DiffusionTrainConfig, "landiff/diffusion-control"), 64)
    assert control.parameters["trained"] == 945_012_048


@pytest.mark.parametrize(
    ("stage", "name", "kind"),
    [
        ("lm", "nano/lm", "lm"),
        ("diffusion", "nano/diffusion-main", "transformer"),
        ("diffusion", "nano/diffusion-control", "diffusion"),
    ],
)
def test_an_adapter_has_the_parameters_that_peft_adds(stage, name, kind):
    overrides = ["init_from=a", "lora.rank=4", "parallel.tensor=1"]
    config = load(TRAINERS[stage].config_class, name, overrides[: 3 if stage == "lm" else 2])
    plan = make_plan(config, 1)
    assert config.lora is not None
    sizes = config.model.transformer if kind == "transformer" else config.model
    with torch.device("meta"):
        model = build_module(kind, sizes)
    adapter = AdapterConfig(base_kind=kind, base="", rank=4, alpha=4, targets=config.lora.targets)
    add_layers(model, adapter)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.parameters["trained"] == trained > 0
    whole = make_plan(config.model_copy(update={"lora": None}), 1)
    assert plan.memory["optimizer"] < whole.memory["optimizer"] / 10
    assert plan.memory["weights"] >= whole.memory["weights"]


def test_flops_are_those_of_the_clips_of_a_batch(lm):
    """`tests/training/test_flops.py` compares the FLOPs of a clip with what torch counts."""
    diffusion = load(DiffusionTrainConfig, "landiff/diffusion-main")
    clip = main_flops(diffusion.model.transformer)
    plan = make_plan(diffusion, 8)
    assert plan.model_flops == pytest.approx(256 * clip.total)
    assert plan.hardware_flops == pytest.approx(256 * clip.total)
    again = make_plan(changed(diffusion, {"recompute": True}), 8)
    assert again.model_flops == plan.model_flops
    assert again.hardware_flops == pytest.approx(256 * (clip.total + clip.forward))
    length = TokenLayout.of(lm.model).sequence_length(13, 64)
    assert make_plan(lm, 8).model_flops == pytest.approx(512 * lm_flops(lm.model, length, 64).total)


def test_all_segments_of_the_datas_clips_are_counted(lm, tmp_path):
    data = lm.data.model_copy(update={"manifest": tmp_path})
    config = lm.model_copy(update={"data": data})
    layout = TokenLayout.of(lm.model)
    assert "13 frames (one segment, without data)" in make_plan(config, 8).notes[0]
    write_raw(tmp_path, [1])
    for frames in (13, 39):
        codes = torch.zeros(layout.num_codes(frames), dtype=torch.uint16)
        manifest = write_column(tmp_path, "tokens", value=lambda key, codes=codes: codes)
        column = manifest.columns["tokens"].model_copy(update={"shape": [len(codes)]})
        write_manifest(tmp_path, manifest.model_copy(update={"columns": {"tokens": column}}))
        plan = make_plan(config, 8)
        length = layout.sequence_length(frames, 64)
        assert plan.tokens_per_step == 512 * length
        assert plan.model_flops == pytest.approx(512 * lm_flops(lm.model, length, 64).total)
        assert f"of {frames} frames (clips of {tmp_path})" in plan.notes[0]


@pytest.mark.parametrize(
    ("stage", "name", "overrides", "own", "shared"),
    [  # sums as in docs/fine-tuning.md
        ("lm", "landiff/lm", [], 28.7, 0),
        ("lm", "landiff/lm", ["init_from=lm", "lora.rank=32"], 4.2, 0),
        ("diffusion", "landiff/diffusion-main", ["ema=null"], 23.7, 0),
        ("diffusion", "landiff/diffusion-control", ["ema=null"], 13.2, 3.4),
        ("diffusion", "landiff/diffusion-control", ["ema=null", "zero.stage=3"], 11.3, 3.4),
        ("diffusion", "landiff/diffusion-main", ["init_from=m", "lora.rank=32"], 0.2, 3.4),
    ],
)
def test_a_plan_knows_the_size_of_a_checkpoint(stage, name, overrides, own, shared):
    config = load(TRAINERS[stage].config_class, name, overrides)
    size = checkpoint_size(config, make_plan(config, 8))
    assert size.own / 1e9 == pytest.approx(own, rel=0.02, abs=0.05)
    assert size.shared / 1e9 == pytest.approx(shared, rel=0.02)
    # The two newest, and every 10,000th of 100,000 before them.
    total = 11 * own + shared
    text = format_disk(size, config.loop, config.loop.steps)
    found = re.search(r"11 kept at the end: (\d+) GB", text)
    assert found is not None and int(found[1]) == pytest.approx(total, rel=0.02, abs=1)
    assert ("share" in text) == (shared > 0)


def test_activations_are_what_autograd_keeps():
    """The main transformer's blocks, with an attention that keeps no matrix of scores."""
    config = load(
        DiffusionTrainConfig,
        "nano/diffusion-main",
        [
            "data.global_batch_size=1",
            "data.micro_batch_size=1",
            "precision=fp32",
            "recompute=false",
        ],
    )
    sizes = config.model.transformer
    seen = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr(), tensor.shape] = tensor.numel() * 4
        return tensor

    module = build_module("transformer", sizes)
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(
            torch.zeros(
                1,
                sizes.latent_frames,
                sizes.latent_channels,
                sizes.latent_height,
                sizes.latent_width,
            ),
            torch.zeros(1),
            torch.zeros(1, sizes.text_length, sizes.text_dim),
        )
    kept = sum(size for (pointer, _), size in seen.items() if pointer not in parameters)
    # Which views share memory depends on the kernels.
    assert make_plan(config, 1).memory["activations"] == pytest.approx(kept, rel=0.25)


def test_more_gpus_share_what_can_be_shared(lm):
    alone = make_plan(changed(lm, {"parallel.tensor": 1, "parallel.sequence": False}), 8)
    shared = make_plan(changed(lm, {"parallel.tensor": 4}), 8)
    assert shared.memory["weights"] < alone.memory["weights"] / 3
    assert shared.model_flops == alone.model_flops
    zero = load(DiffusionTrainConfig, "landiff/diffusion-main")
    memory = {
        stage: make_plan(changed(zero, {"zero.stage": stage}), 64).memory for stage in (1, 2, 3)
    }
    assert memory[1]["gradients"] > memory[2]["gradients"]
    assert memory[2]["weights"] > memory[3]["weights"]


def test_diffusion_gradients_are_summed_and_sent_in_float32():
    """By hand, from the number of trained parameters; 256 clips on 64 GPUs are 4 micro-batches."""
    control = load(DiffusionTrainConfig, "landiff/diffusion-control")
    plans = {stage: make_plan(changed(control, {"zero.stage": stage}), 64) for stage in (1, 2)}
    trained = plans[1].parameters["trained"]
    assert plans[1].memory["gradients"] == 4 * trained
    assert plans[2].memory["gradients"] == 4 * trained // 64
    assert plans[1].gradient_bytes == (8 + 2) * trained  # all-reduced, and the bfloat16 weights
    assert plans[2].gradient_bytes == (4 * 8 + 2) * trained


def test_hierarchical_zero_trades_memory_for_traffic_between_nodes():
    """By hand; 256 clips on 64 GPUs are 4 micro-batches."""
    control = load(DiffusionTrainConfig, "landiff/diffusion-control", ["zero.stage=3"])
    nodes = changed(control, {"zero.hpz_partition_size": 8})
    before = make_plan(control, 64)
    after = make_plan(nodes, 64)
    weights = 2 * before.parameters["all"]
    trained = before.parameters["trained"]
    assert after.memory["node copy"] == weights // 8
    assert after.total_memory - before.total_memory == weights // 8
    assert before.gradient_bytes == 4 * (4 * trained + 2 * weights)
    assert after.gradient_bytes == 4 * 4 * trained + 2 * trained
    assert after.gradient_bytes + after.node_bytes == before.gradient_bytes
    gpu = GPUS["h100"]
    assert traffic_seconds(after, gpu) < traffic_seconds(before, gpu)
    (note,) = set(after.notes) - set(before.notes)
    assert f"{after.gradient_bytes / 1e9:.1f} GB a step between nodes" in note
    assert make_plan(nodes, 8) == make_plan(control, 8)  # one node
    with pytest.raises(ConfigError, match="does not divide the 12 launched ranks.* 8 or 16"):
        make_plan(nodes, 12)


def test_a_moving_average_takes_four_bytes_for_each_weight_divided_like_the_optimizer(lm):
    control = load(DiffusionTrainConfig, "landiff/diffusion-control")
    trained = make_plan(control, 64).parameters["trained"]
    for stage in (1, 2, 3):
        plan = make_plan(changed(control, {"zero.stage": stage}), 64)
        assert plan.memory["moving average"] == 4 * (trained // 64)
    assert "moving average" not in make_plan(changed(control, {"ema": None}), 64).memory
    average = {"ema": {"decay": 0.99}, "parallel.distributed_optimizer": True}
    plan = make_plan(changed(lm, average), 8)
    assert plan.memory["moving average"] == pytest.approx(plan.memory["optimizer"] / 3, abs=4)


def test_recompute_trades_memory_for_flops(lm):
    kept = make_plan(changed(lm, {"recompute": False}), 8)
    again = make_plan(changed(lm, {"recompute": True}), 8)
    assert again.memory["activations"] < kept.memory["activations"] / 5
    # The forward pass once more: all of it is half of the backward pass, but for the first layers.
    assert again.hardware_flops == pytest.approx(kept.hardware_flops * 4 / 3, rel=1e-3)
    assert again.model_flops == kept.model_flops


@pytest.mark.parametrize(
    ("gpus", "change", "near"),
    [
        (30, {"data.global_batch_size": 512}, "480 or 540"),
        (7, {}, "6 or 8"),
        (8, {"data.global_batch_size": 100}, "96 or 112"),
    ],
)
def test_a_layout_that_does_not_divide_names_the_nearest(lm, gpus, change, near):
    with pytest.raises(ConfigError, match=near):
        make_plan(changed(lm, change), gpus)


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [("parallel.tensor", 3, "2 and 4"), ("parallel.pipeline", 5, "4 and 6")],
)
def test_a_config_that_does_not_divide_names_the_nearest(lm, key, value, near):
    with pytest.raises(ConfigError, match=f"{key} = {value}; the nearest that divide it: {near}"):
        changed(lm, {key: value})


def test_chunks_of_layers_shorten_the_pipeline_bubble(lm):
    """Idle time relative to the time of work: (pipeline - 1) / micro-batches / chunks."""
    relative = []
    kept = []
    for chunks in (1, 2, 3):
        sizes = {"parallel.pipeline": 4, "parallel.virtual_pipeline": chunks}
        plan = make_plan(changed(lm, {**sizes, "data.global_batch_size": 512}), 32)
        relative.append(plan.bubble / (1 - plan.bubble))
        kept.append(plan.memory["activations"])
    assert relative[1:] == pytest.approx([relative[0] / 2, relative[0] / 3])
    assert kept[0] < kept[1]  # more layers are ahead of the backward pass


def test_a_plan_refuses_rows_that_the_interleaved_schedule_does_not_run(lm):
    sizes = {"parallel.pipeline": 4, "parallel.virtual_pipeline": 2}
    config = changed(lm, {**sizes, "data.global_batch_size": 24, "data.micro_batch_size": 1})
    with pytest.raises(ConfigError, match="needs a multiple of parallel.pipeline = 4"):
        make_plan(config, 32)


def test_search_ranks_what_fits(lm):
    found = search(lm, 64, GPUS["h100"], Speed(0.4))
    seconds = [round(candidate.seconds, 3) for candidate in found]
    assert len(found) > 20 and seconds == sorted(seconds)
    assert all(candidate.plan.total_memory <= 0.9 * 80 * GIB for candidate in found)
    small = search(
        load(DiffusionTrainConfig, "landiff/diffusion-main"), 8, GPUS["l40s"], Speed(0.4)
    )
    assert small[0].change["recompute"]  # 48 GiB do not hold all activations


def test_the_command_prints_a_plan(capsys):
    assert main(["plan", "tokenizer", "--config", "nano/tokenizer", "--gpus", "2"]) == 0
    text = capsys.readouterr().out
    memory = ("weights", "gradients", "optimizer", "activations")
    for word in ("parameters", *memory, "FLOPs", "clips", "days"):
        assert word in text


def test_a_plan_takes_gpu_utilization_and_steps(capsys):
    words = ["plan", "tokenizer", "--config", "nano/tokenizer", "--gpus", "2"]
    printed: set[str] = set()
    options = ["--gpu", "a100", "--mfu", "0.1", "--steps", "7"]
    for end in range(0, 7, 2):  # each option changes what the ones before gave
        assert main([*words, *options[:end]]) == 0
        text = capsys.readouterr().out
        assert text not in printed
        printed.add(text)
    assert "A100" in text.upper()


def test_a_plan_adds_up_the_batch_sizes_of_ramp_and_phases(capsys):
    phases = '[{"from_step": 60, "data": {"global_batch_size": 32}}]'
    ramp = '{"start": 8, "increment": 8, "steps": 20}'
    overrides = ["loop.steps=100", f"data.ramp={ramp}", f"phases={phases}"]
    sizes = ["data.global_batch_size=16", "data.micro_batch_size=8", "parallel.tensor=1"]
    assert main(["plan", "lm", "--config", "nano/lm", "--gpus", "1", *sizes, *overrides]) == 0
    printed = capsys.readouterr().out
    for text in ("from step 0: 8 clips", "from step 20: 16 clips", "from step 60: 32 clips"):
        assert text in printed
    assert f"{20 * 8 + 40 * 16 + 40 * 32:,} clips, a checkpoint every" in printed


def test_the_command_prints_a_ranking(capsys):
    command = ["plan", "tokenizer", "--config", "nano/tokenizer", "--gpus", "2", "--search"]
    assert main([*command, "--top", "1"]) == 0
    title, line = capsys.readouterr().out.splitlines()
    assert title.split() == ["s/step", "GiB", "change"]
    assert "data.micro_batch_size=" in line


@pytest.mark.parametrize("recompute", [False, True])
def test_an_mfu_is_that_of_model_flops_over_whole_steps(lm, recompute):
    config = changed(lm, {"recompute": recompute})
    plan = make_plan(config, 32)
    gpu = GPUS["h100"]
    seconds = Speed(0.3).step_seconds(plan, gpu)
    assert seconds == pytest.approx(plan.model_flops / (32 * 989e12 * 0.3))
    assert model_flops_utilization(plan, gpu, seconds) == pytest.approx(0.3)
    assert seconds > traffic_seconds(plan, gpu) > 0


def test_other_layouts_are_compared_at_the_speed_of_the_given_one(lm):
    gpu = GPUS["h100"]
    again = make_plan(changed(lm, {"recompute": True}), 32)
    once = make_plan(changed(lm, {"recompute": False}), 32)
    speed = Speed(0.3).fixed_by(again, gpu)
    assert speed.step_seconds(again, gpu) == pytest.approx(Speed(0.3).step_seconds(again, gpu))
    assert speed.step_seconds(once, gpu) < 0.85 * speed.step_seconds(again, gpu)


def test_an_mfu_that_the_network_does_not_allow_is_not_promised(lm):
    change = {"parallel.tensor": 1, "parallel.sequence": False, "data.micro_batch_size": 1}
    plan = make_plan(changed(lm, change), 512)
    gpu = GPUS["h100"]
    assert model_flops_utilization(plan, gpu, Speed(0.9).step_seconds(plan, gpu)) < 0.6


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("tokenizer", "landiff/tokenizer"),
        ("lm", "landiff/lm"),
        ("diffusion", "landiff/diffusion-main"),
        ("diffusion", "landiff/diffusion-control"),
    ],
)
@pytest.mark.parametrize("gpus", [1, 3, 8, 64, 100, 512, 1000, 1024])
def test_a_packaged_config_runs_on_1_to_1024_gpus_or_the_way_out_does(stage, name, gpus):
    config = load(TRAINERS[stage].config_class, name)
    gpu = GPUS["h100"]
    try:
        plan = make_plan(config, gpus)
        if plan.total_memory <= 0.9 * gpu.memory_gib * GIB:
            return
    except ConfigError:
        pass
    text = way_out(config, gpus, gpu, Speed(0.4))
    marker = "the smallest change that does: "
    assert marker in text
    overrides = text.removeprefix(marker).split()
    nearest = [key for key in overrides if key.startswith("data.global_batch_size=")]
    assert all(int(key.partition("=")[2]) % gpus == 0 for key in nearest)
    plan = make_plan(load(TRAINERS[stage].config_class, name, overrides), gpus)
    assert plan.total_memory <= 0.9 * gpu.memory_gib * GIB


def test_a_plan_names_the_way_out(capsys):
    assert main(["plan", "lm", "--config", "landiff/lm", "--gpus", "1024"]) == 2
    # A pipeline of 8 stages is a change of one key, and would idle for 7 of 8 parts of a step.
    assert "change that does: parallel.tensor=8 parallel.sequence=true" in capsys.readouterr().err
    command = ["plan", "diffusion", "--config", "landiff/diffusion-main", "--gpus", "8"]
    assert main([*command, "--gpu", "l40s", "recompute=false"]) == 0
    out = capsys.readouterr().out
    assert (
        "does NOT fit" in out and "suggestion  the smallest change that does: recompute=true" in out
    )


def test_a_plan_adds_up_buckets(capsys):
    buckets = "data.buckets=[1x480x720, 49x480x720]"
    command = ["plan", "diffusion", "--config", "landiff/diffusion-main", "--gpus", "64", buckets]
    assert main([*command, "data.balance_tokens=true"]) == 0
    out = capsys.readouterr().out
    # 1350 / 2 / 2 + 226 tokens fit 11 times into 17776 ones.
    assert "bucket 1x480x720: 50% of the steps, 2,816 clips" in out.replace("\n", " ")
    assert "bucket 49x480x720: 50% of the steps, 256 clips" in out


def test_all_stages_are_added_up_at_a_price(capsys):
    command = ["plan", "all", "--preset", "landiff", "--gpus", "64", "--price", "2", "--clips"]
    assert main([*command, "1000000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[2:8]}
    stages = ("precompute", "tokenizer", "lm", "diffusion-main", "diffusion-control")
    hours = {}
    for name in (*stages, "all"):
        cells = [cell.replace(",", "") for cell in rows[name]]
        hours[name] = float(cells[1 if name == "all" else 3])
        assert float(cells[-1]) == pytest.approx(2 * hours[name], abs=1)
    assert hours["all"] == pytest.approx(sum(hours[name] for name in stages), abs=1)
    assert main(["plan", "all", "--config", "landiff/lm"]) == 2


def test_a_run_calibrates_a_plan(tmp_path, capsys):
    config = load(LMTrainConfig, "landiff/lm", ["run=" + str(tmp_path)])
    (tmp_path / "resolved.yaml").write_text(dump(config))
    lines = []
    for step in range(10):
        lines.append({"step": step, "time": 0.0, "throughput/mfu": 0.1 if step < 5 else 0.45})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["plan", "lm", "--config", "landiff/lm", "--gpus", "32", "--calibrate", str(tmp_path)]
    assert main(command) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    folder = tmp_path / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    state = CheckpointState(
        step=10,
        kind="LMTrainConfig",
        loader={},
        manifest="0",
        columns={},
        world_size=32,
        versions={},
    )
    (folder / "state.json").write_text(state.model_dump_json())
    assert main(command) == 0
    assert "at an MFU of 45.0%" in capsys.readouterr().out
