"""The table between our names and Megatron's, and checkpoints read without Megatron."""

from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from landiff.configs.files import write_text
from landiff.model_zoo.config import LMConfig
from landiff.model_zoo.convert.formats.dist_checkpoint import DistReader
from landiff.model_zoo.convert.formats.megatron import (
    Padded,
    export_lm,
    megatron_rules,
    module_name,
    read_lm,
    read_megatron,
    shard,
    to_megatron,
)
from landiff.model_zoo.convert.formats.megatron_optimizer import (
    MOMENTS,
    MegatronCut,
    MegatronState,
    has_optimizer,
    read_state,
    write_state,
)
from landiff.model_zoo.convert.lazy import LazyTensors
from landiff.model_zoo.convert.rules import ConversionError, apply_rules
from landiff.model_zoo.health import UnhealthyError
from landiff.model_zoo.lm import LanguageModel
from tests.model_zoo.convert.tiny import same

CONFIG = LMConfig(
    codebook_size=20,
    iframe_tokens=4,
    pframe_tokens=2,
    segment_frames=3,
    hidden_size=12,
    num_layers=2,
    num_heads=3,
    ffn_size=10,
    text_dim=6,
    micro_hidden_size=4,
    micro_frequency_dim=4,
)
PADDED = Padded(vocab=32, heads=4)


def weights(seed=0, config=CONFIG):
    model = LanguageModel(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def theirs(config=CONFIG, padded=PADDED, **names):
    return apply_rules(weights(config=config), megatron_rules(config, padded), "to_theirs")


def write(folder, state):
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


@pytest.mark.parametrize("padded", [Padded(27, 3), PADDED])
def test_there_and_back_is_the_same(padded):
    ours = weights()
    back = apply_rules(theirs(padded=padded), megatron_rules(CONFIG, padded), "to_ours")
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_query_key_and_value_stand_together_for_each_head():
    wqkv = weights()["blocks.1.wqkv.weight"].unflatten(0, (3, 3, 4))  # q k v, head, row of the head
    stacked = theirs()["decoder.layers.1.self_attention.linear_qkv.weight"].unflatten(0, (4, 3, 4))
    assert torch.equal(stacked[2, 1], wqkv[1, 2])  # third head, key
    assert not stacked[3].any()  # the head that only pads


def test_gate_and_up_are_cut_one_by_one_for_each_rank():
    ours, fc1 = weights(), theirs()["decoder.layers.0.mlp.linear_fc1.weight"]
    gate, up = shard(fc1, 0, 2, rank=1, size=2).chunk(2)
    assert torch.equal(gate, ours["blocks.0.w1.weight"][5:])
    assert torch.equal(up, ours["blocks.0.w3.weight"][5:])


def test_shards_of_all_ranks_make_the_whole():
    whole = torch.arange(24.0).reshape(6, 4)
    assert torch.equal(torch.cat([shard(whole, 1, 1, rank, 2) for rank in range(2)], 1), whole)


def test_padded_vocabulary_rows_are_zero():
    assert not theirs()["output_layer.weight"][27:].any()
    assert not theirs()["embedding.word_embeddings.weight"][27:].any()


def test_norms_stand_beside_megatrons_own_linear_layers():
    assert (
        module_name("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight")
        == "decoder.layers.3.input_layernorm.weight"
    )
    assert (
        module_name("decoder.layers.3.mlp.linear_fc1.layer_norm_weight")
        == "decoder.layers.3.pre_mlp_layernorm.weight"
    )
    assert (
        module_name("decoder.layers.3.mlp.linear_fc1.weight")
        == "decoder.layers.3.mlp.linear_fc1.weight"
    )


def test_a_stage_gets_its_layers_only():
    names = [
        name
        for name, _ in to_megatron(weights(), CONFIG, PADDED, range(1, 2), first=False, last=True)
    ]
    assert "output_layer.weight" in names and "decoder.layers.1.mlp.linear_fc2.weight" in names
    assert not [
        name for name in names if "layers.0." in name or "embedding" in name or "text" in name
    ]


def test_weights_without_a_layer_are_refused():
    state = {name: tensor for name, tensor in weights().items() if not name.startswith("blocks.1.")}
    with pytest.raises(ConversionError, match=r"no blocks\.1\."):
        dict(to_megatron(state, CONFIG, PADDED, range(2), first=True, last=True))


def test_reads_layers_stacked_or_apart(tmp_path):
    state = theirs()
    stacked = {name: tensor for name, tensor in state.items() if "layers." not in name}
    for name in [name.removeprefix("decoder.layers.0.") for name in state if "layers.0." in name]:
        stacked[f"decoder.layers.{name}"] = torch.stack(
            [state[f"decoder.layers.{i}.{name}"] for i in range(2)]
        )
    write(tmp_path / "stacked", stacked)
    write(tmp_path / "apart", state)
    for folder in ("stacked", "apart"):
        ours = read_lm(tmp_path / folder, CONFIG)
        assert all(torch.equal(ours[name], tensor) for name, tensor in weights().items())


@pytest.mark.parametrize("prefix", ["optimizer.state.fp32_param.", "optimizer.state.param."])
def test_prefers_the_optimizers_float32_weights(tmp_path, prefix):
    exact = theirs()
    state = {name: tensor.bfloat16() for name, tensor in exact.items()}
    state |= {prefix + name: tensor for name, tensor in exact.items()}
    state |= {f"optimizer.state.exp_avg.{name}": tensor for name, tensor in exact.items()}
    write(tmp_path, state)
    read = read_megatron(tmp_path)
    assert read.keys() == exact.keys()
    assert all(torch.equal(read[name], exact[name]) for name in exact)


def test_export_takes_the_config_that_lies_in_the_checkpoint(tmp_path):
    write(tmp_path, theirs())
    with pytest.raises(ConversionError, match=r"no config\.yaml"):
        export_lm(tmp_path)
    write_text(tmp_path / "config.yaml", f"model: {CONFIG.model_dump(mode='json')}\n")
    config, state = export_lm(tmp_path)
    assert config == CONFIG
    assert state.keys() == weights().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 40}, "a vocabulary of 32 and 4 heads; the config has 47"),
        ({"num_layers": 3}, r"missing: decoder\.layers\.\*\.self_attention"),
        ({"ffn_size": 12}, r"wrong shape: decoder\.layers\.\*\.mlp"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tmp_path, changes, message):
    write(tmp_path, theirs())
    with pytest.raises(ConversionError, match=message):
        read_lm(tmp_path, CONFIG.model_copy(update=changes))


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="not a Megatron checkpoint"):
        read_lm(tmp_path, CONFIG)


# ---------------------------------------------------------------- with the optimizer

CUTS = [
    MegatronCut(padded, distributed, dtype)
    for padded in (Padded(27, 3), PADDED)
    for distributed in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
]


def state() -> MegatronState:
    """Masters that bfloat16 cannot hold, moments of their own, two groups."""
    lazy = [LazyTensors.of(weights(seed)) for seed in range(3)]
    return MegatronState(
        CUTS[0],
        lazy[0],
        lazy[0],
        dict(zip(MOMENTS, lazy[1:], strict=True)),
        7.0,
        ({"lr": 0.1, "wd_mult": 1.0}, {"lr": 0.1, "wd_mult": 0.0}),
    )


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_padding_precision_and_kind_of_optimizer_change_and_come_back(tmp_path, cut):
    original = state()
    for folder, source, target in (
        ("first", original, CUTS[0]),
        ("other", None, cut),
        ("back", None, CUTS[0]),
    ):
        (tmp_path / folder).mkdir()
        source = source or read_state(
            tmp_path / {"other": "first", "back": "other"}[folder], CONFIG
        )
        write_state(tmp_path / folder, CONFIG, source, target)
    found = read_state(tmp_path / "other", CONFIG)
    assert found.cut == cut and found.steps == 7 and found.groups == original.groups
    assert same(dict(found.masters), weights()) and same(
        dict(found.weights), {name: tensor.to(cut.dtype) for name, tensor in weights().items()}
    )
    assert all(
        same(dict(found.moments[moment]), weights(seed)) for seed, moment in enumerate(MOMENTS, 1)
    )
    first, back = (DistReader(tmp_path / folder) for folder in ("first", "back"))
    assert same(
        {key: back.read(key) for key in back.entries},
        {key: first.read(key) for key in first.entries},
    )
    assert torch.load(tmp_path / "back" / "common.pt") == torch.load(
        tmp_path / "first" / "common.pt"
    )
    assert same(dict(read_lm(tmp_path / "other", CONFIG)), weights())


def test_an_optimizer_state_by_rank_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "out").mkdir()
    write_state(tmp_path / "out", CONFIG, state(), CUTS[0])
    assert has_optimizer(tmp_path / "out")
    write(
        tmp_path / "ranks",
        {**theirs(), "optimizer.distributed.dp_group_idx_0.gbuf_idx_0": torch.ones(3)},
    )
    with pytest.raises(
        ConversionError,
        match=r"by rank \(optimizer\.distributed.*fully_reshardable(.|\n)*--weights-only",
    ):
        has_optimizer(tmp_path / "ranks")
    write(tmp_path / "weights", theirs())
    assert not has_optimizer(tmp_path / "weights")
    (tmp_path / "out" / "common.pt").unlink()
    with pytest.raises(ConversionError, match=r"common\.pt does not exist"):
        read_state(tmp_path / "out", CONFIG)


@pytest.mark.parametrize("what", ["masters", "exp_avg"])
def test_a_checkpoint_with_infinity_is_not_converted(tmp_path, what):
    good = state()
    tensors = dict(good.masters if what == "masters" else good.moments[what])
    tensors["head.weight"] = torch.full_like(tensors["head.weight"], float("inf"))
    bad = LazyTensors.of(tensors)
    if what == "masters":
        source = replace(good, masters=bad)
    else:
        source = replace(good, moments={**good.moments, what: bad})
    with pytest.raises(UnhealthyError, match=r"NaN or infinity in .*output_layer\.weight"):
        write_state(tmp_path, CONFIG, source, CUTS[0])
