"""What a diffusion config, its columns and its zoo entries may not be."""

from __future__ import annotations

import re

import pytest
import torch

from landiff.configs.base import ConfigError
from landiff.data_pipeline.format.schema import Column, Manifest
from landiff.data_pipeline.format.shards import read_manifest, write_manifest
from landiff.model_zoo import registry
from landiff.training.checks import Launch
from landiff.training.diffusion.checks import check
from landiff.training.diffusion.columns import check_diffusion_columns
from landiff.training.diffusion.engine import DeepSpeedEngine
from landiff.training.diffusion.model import build_phase_model
from landiff.training.diffusion.step import Objective
from tests.training.diffusion.tiny import TOKENIZER, config, make_zoo, write_data
from tests.training.toy import alone


def column(shape, encoder="test", **made):
    return Column(
        dtype="bfloat16", shape=shape, encoder=encoder, fingerprint="f", config=made, shards=[]
    )


def manifest(**columns):
    fitting = {"latents": column([3, 48, 4, 4]), "text-tiny": column([3, 6])}
    return Manifest(fingerprint="m", config={}, shards=[], columns=fitting | columns)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_stage_0_is_refused_with_the_reason(tmp_path, precision):
    with pytest.raises(ConfigError, match=r"zero.stage = 0 is refused: .* zero gradients"):
        config(tmp_path, zero__stage=0, precision=precision)


@pytest.mark.parametrize("missing", ["init_from", "tokenizer"])
def test_phase_control_names_what_it_needs(tmp_path, missing):
    with pytest.raises(ConfigError, match=f"phase = control needs {missing}"):
        config(tmp_path, "control", **{missing: "null"})


def test_a_prefix_leaves_something_to_learn(tmp_path):
    with pytest.raises(ConfigError, match=r"prefix\.frames = 3 leaves nothing"):
        config(tmp_path, prefix__frames=3)
    with pytest.raises(ConfigError, match=r"prefix\.frames = 4 leaves nothing"):
        config(tmp_path, prefix__frames=[1, 4, 2])
    with pytest.raises(ConfigError, match=r"prefix\.frames is empty"):
        config(tmp_path, prefix__frames=[])


def test_a_global_batch_that_ranks_do_not_divide_is_refused(tmp_path):
    settings = config(tmp_path, data__global_batch_size=5)
    with pytest.raises(
        ConfigError,
        match=r"global_batch_size = 5 is not a multiple of data-parallel ranks \* "
        r"data.micro_batch_size = 1 \* 2",
    ):
        DeepSpeedEngine(
            settings, alone(), torch.nn.Linear(1, 1), Objective(settings, torch.device("cpu"))
        )


def test_columns_of_another_shape_are_refused(tmp_path):
    settings = config(tmp_path)
    assert check_diffusion_columns(manifest(), settings, None) == []
    (problem,) = check_diffusion_columns(manifest(**{"text-tiny": column([5, 6])}), settings, None)
    assert "has shape [5, 6], but model.transformer needs [3, 6]" in str(problem)
    moments = manifest(latents=column([3, 96, 4, 4], moments=True))  # mean and log-variance
    assert check_diffusion_columns(moments, settings, None) == []
    (problem,) = check_diffusion_columns(manifest(latents=column([3, 96, 4, 4])), settings, None)
    assert "column latents" in str(problem) and "has shape [3, 96, 4, 4]" in str(problem)


def test_a_missing_column_is_refused(tmp_path):
    make_zoo(tmp_path)
    write_data(tmp_path)
    stored = read_manifest(tmp_path)
    write_manifest(
        tmp_path,
        stored.model_copy(
            update={
                "columns": {
                    name: column for name, column in stored.columns.items() if name != "tokens"
                }
            }
        ),
    )
    (problem,) = check(config(tmp_path, "control"), Launch(2))
    assert "no column 'tokens'; it has: latents, text-tiny" in str(problem)


def test_tokens_of_another_tokenizer_are_refused_unless_adopted(tmp_path):
    make_zoo(tmp_path)
    settings = config(tmp_path, "control")
    own = registry.resolve(tmp_path / "zoo", "tokenizer")
    assert check_diffusion_columns(manifest(tokens=column([5], own.reference)), settings, own) == []
    foreign = manifest(tokens=column([5], "tokenizer@0123456789abcdef"))
    (problem,) = check_diffusion_columns(foreign, settings, own)
    assert (
        f"was made by tokenizer@0123456789abcdef, but tokenizer = tokenizer is {own.reference}"
        in str(problem)
    )
    assert (
        check_diffusion_columns(foreign, config(tmp_path, "control", data__adopt="true"), own) == []
    )


def test_clips_may_be_longer_than_the_model(tmp_path):
    make_zoo(tmp_path)
    own = registry.resolve(tmp_path / "zoo", "tokenizer")
    settings = config(tmp_path, "control")
    for frames, tokens in ((5, 9), (0, 0)):  # 0: several lengths
        columns = {"latents": column([frames, 48, 4, 4]), "tokens": column([tokens], own.reference)}
        assert check_diffusion_columns(manifest(**columns), settings, own) == []
    short = manifest(latents=column([2, 48, 4, 4]), tokens=column([4], own.reference))
    (problem,) = check_diffusion_columns(short, settings, own)
    assert "has shape [2, 48, 4, 4], but model.transformer needs [3, 48, 4, 4]" in str(problem)


def test_tokens_of_another_length_are_refused_even_where_adopted(tmp_path):
    make_zoo(tmp_path)
    own = registry.resolve(tmp_path / "zoo", "tokenizer")
    settings = config(tmp_path, "control", data__adopt="true")
    (problem,) = check_diffusion_columns(manifest(tokens=column([4], own.reference)), settings, own)
    assert "4 tokens are 2 semantic frames, but column latents holds 3 latent frames" in str(
        problem
    )


def test_a_start_and_a_tokenizer_of_another_size_are_refused_with_the_differences(tmp_path):
    make_zoo(tmp_path)
    write_data(tmp_path)
    changes = {
        "model__transformer__num_layers": 5,
        "model__semantic__feature_channels": 7,
        "data__adopt": "true",
    }
    start, channels = map(str, check(config(tmp_path, "control", **changes), Launch(2)))
    assert re.search(
        r"main@[0-9a-f]{16} is another model: model\.transformer\.num_layers = 5 \(there 2\)", start
    )
    assert "model.semantic.feature_channels = 7, but the tokenizer tokenizer@" in channels


def test_phase_control_starts_as_the_main_transformer(tmp_path):
    make_zoo(tmp_path)
    model = build_phase_model(config(tmp_path, "control"))
    main = registry.load_model(registry.resolve(tmp_path / "zoo", "main"))
    assert torch.equal(model.control.blocks[0].qkv.weight, main.blocks[0].qkv.weight)
    draw = torch.Generator().manual_seed(0)
    latents, text = (
        torch.randn(2, 3, 48, 4, 4, generator=draw),
        torch.randn(2, 3, 6, generator=draw),
    )
    features = torch.randn(2, 3, TOKENIZER.feature_channels, 2, 2, generator=draw)
    timestep = torch.tensor([1, 900])
    assert torch.equal(model(latents, timestep, text, features), main(latents, timestep, text))
    trained = {
        name.split(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trained == {"control", "semantic"}
    assert not any(p.requires_grad for p in model.control.final_norm.parameters())


def test_weights_are_a_function_of_the_seed(tmp_path):
    first, same, other = (
        build_phase_model(config(tmp_path, loop__seed=seed)).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["input.text.weight"], other["input.text.weight"])


@pytest.mark.parametrize("stage", [1, 3])
def test_blocks_are_not_compiled_with_stage_3(tmp_path, stage):
    """Their weights are gathered by hooks in Python."""
    changed = config(tmp_path, zero__stage=stage, compile_blocks=True)
    module = build_phase_model(changed)
    compiled = [block._compiled_call_impl is not None for block in module.blocks]
    assert all(compiled) == any(compiled) == (stage == 1)
