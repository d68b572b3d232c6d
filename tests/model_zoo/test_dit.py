"""Diffusion transformer beyond the golden cases: sizes, control, recompute, conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from pydantic import ValidationError
from torch import Tensor, nn

from landiff.model_zoo import layers
from landiff.model_zoo.config import DiffusionConfig, TransformerConfig
from landiff.model_zoo.convert.formats import diffusers_transformer, release_diffusion
from landiff.model_zoo.convert.rules import ConversionError, apply_rules, check_against
from landiff.model_zoo.dit import ControlledDiffusion, DiffusionTransformer
from landiff.model_zoo.positions.tables import position_table_numel
from landiff.model_zoo.registry import export, load_model
from landiff.model_zoo.semantic_condition import SemanticCondition
from tests.model_zoo.tiny_diffusion import TINY, randomize

KEYS = Path(__file__).parents[1] / "golden" / "keys"


def diffusion(seed: int = 0) -> ControlledDiffusion:
    model = ControlledDiffusion(TINY)
    randomize(model, seed)
    return model


def inputs(batch: int = 2, num_frames: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        "latents_BTCHW": torch.randn(batch, num_frames, 4, 4, 6, generator=generator),
        "timestep_B": torch.tensor([17, 803][:batch]),
        "text_BLD": torch.randn(batch, 5, 12, generator=generator),
        "features_BTChw": torch.randn(batch, num_frames, 8, 2, 3, generator=generator),
    }


def plain(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != "features_BTChw"}


def released(file: str, **wanted: str) -> dict[str, list[int]]:
    """Shapes of the released keys whose entries hold all of `wanted`."""
    entries: dict[str, dict[str, Any]] = json.loads((KEYS / file).read_text())
    return {k: v["shape"] for k, v in entries.items() if wanted.items() <= v.items()}


@pytest.fixture(scope="module")
def full_size() -> ControlledDiffusion:
    with torch.device("meta"):
        return ControlledDiffusion(DiffusionConfig())


def count(*modules: nn.Module) -> int:
    """Elements of all parameters."""
    total = 0
    for module in modules:
        total += sum(parameter.numel() for parameter in module.parameters())
    return total


def test_release_size_has_the_released_counts(full_size):
    table = position_table_numel(full_size.config.transformer)
    assert table == 34_129_920
    assert count(full_size.transformer) + table == 1_727_913_792
    assert count(full_size.control, full_size.semantic) + table == 979_141_968
    assert count(full_size.semantic) == 39_242_688 + 9_232
    assert count(full_size.semantic.projection) == 9_232
    assert not list(full_size.buffers())


def test_release_keys_are_exactly_the_released_ones(full_size):
    state = apply_rules(full_size.state_dict(), release_diffusion.diffusion_rules(), "to_theirs")
    keys = {
        k: v
        for k, v in released("diffusion.json").items()
        if not k.endswith(release_diffusion.POSITION_TABLE)
    }
    main = {k: v for k, v in keys.items() if k.startswith(release_diffusion.MAIN)}
    control = {
        k: v
        for k, v in keys.items()
        if k.startswith(release_diffusion.CONTROL) and not k.startswith(release_diffusion.TOKENIZER)
    }
    assert len(main) == 556
    assert len(control) == 403
    check_against(state, main | control, "the converted model")


def test_cogvideox_keys_are_exactly_the_released_ones(full_size):
    expected = released("cogvideox2b.json", container="module")
    expected = {k: v for k, v in expected.items() if k.startswith(release_diffusion.COGVIDEOX)}
    rules = release_diffusion.main_rules("", release_diffusion.COGVIDEOX)
    state = apply_rules(full_size.transformer.state_dict(), rules, "to_theirs")
    del expected[release_diffusion.COGVIDEOX + release_diffusion.POSITION_TABLE]
    check_against(state, expected, "the converted transformer")


def test_release_conversion_there_and_back_is_bit_equal():
    state = diffusion().state_dict()
    file = release_diffusion.diffusion_to_release(state, TINY)
    assert file[release_diffusion.MAIN + release_diffusion.POSITION_TABLE].shape == (
        1,
        5 + 3 * 2 * 3,
        32,
    )
    back = release_diffusion.from_release(file)
    assert set(back) == set(state)
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_cogvideox_conversion_there_and_back_is_bit_equal():
    model = diffusion().transformer
    file = release_diffusion.cogvideox_to_release(model.state_dict(), TINY.transformer)
    back = release_diffusion.cogvideox_from_release(
        {**file, "first_stage_model.decoder.x": torch.zeros(1)}
    )
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


def test_release_file_is_read_tolerantly_but_unknown_names_are_reported():
    state = diffusion().state_dict()
    file = release_diffusion.diffusion_to_release(state, TINY)
    file |= dict.fromkeys((k for k in file if k.startswith(release_diffusion.MAIN)), None)
    file |= {
        "conditioner.t5.weight": torch.zeros(1),
        release_diffusion.TOKENIZER + "mean": torch.ones(3),
    }
    assert set(release_diffusion.from_release(file)) == {
        k for k in state if not k.startswith("transformer.")
    }
    assert list(release_diffusion.split(file).tokenizer) == ["mean"]
    with pytest.raises(ConversionError, match="strange"):
        release_diffusion.from_release({**file, "model.strange": torch.zeros(1)})


def test_untrained_control_changes_nothing():
    model = ControlledDiffusion(TINY)
    randomize(model.transformer)
    model.copy_main_to_control()
    batch = inputs()
    assert torch.equal(model(**batch), model(**plain(batch)))
    assert torch.equal(model(**plain(batch)), model.transformer(**plain(batch)))
    assert model(**batch).abs().max() > 0.1


def test_first_step_of_control_training_moves_the_zero_projections_only():
    model = ControlledDiffusion(TINY)
    randomize(model.transformer)
    model.copy_main_to_control()
    model.transformer.requires_grad_(False)
    model(**inputs()).square().mean().backward()
    moved = {
        n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert moved == {"control.projections.0.weight", "control.projections.1.weight"}


def test_copy_takes_input_layers_and_first_blocks():
    model = ControlledDiffusion(TINY)
    randomize(model)
    model.copy_main_to_control()
    main = model.transformer.state_dict()
    control = model.control.state_dict()
    copied = [k for k in control if not k.startswith("projections.")]
    assert all(torch.equal(control[k], main[k]) for k in copied)
    assert all(control[f"projections.{i}.weight"].abs().max() > 0 for i in range(2))


def test_trained_control_follows_the_features_of_its_own_frame_and_sample():
    model = diffusion()
    batch = inputs()
    semantic = model.semantic(batch["features_BTChw"])
    changed = batch["features_BTChw"].clone()
    changed[1, 2] += 1
    different = (model.semantic(changed) != semantic).flatten(2).any(-1)
    assert different.tolist() == [[False, False, False], [False, False, True]]
    output = model(**batch)
    other = model(**{**batch, "features_BTChw": changed})
    assert torch.equal(output[0], other[0])
    assert not torch.allclose(output[1], other[1], atol=1e-3)
    assert torch.equal(model(**plain(batch), semantic_BTCHW=semantic), output)


@pytest.mark.parametrize("num_frames", [1, 2, 7])
def test_frames_may_differ_from_the_config(num_frames):
    batch = inputs(num_frames=num_frames)
    output = diffusion()(**batch)
    assert output.shape == batch["latents_BTCHW"].shape
    assert output.isfinite().all()


@pytest.mark.parametrize("trainable_main", [True, False])
def test_recomputed_activations_give_the_same_gradients(trainable_main):
    gradients = []
    for recompute in (False, True):
        model = diffusion()
        model.transformer.requires_grad_(trainable_main)
        model.recompute = recompute
        model(**inputs()).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
    assert any(n.startswith("transformer.") for n in gradients[0]) == trainable_main


@pytest.mark.parametrize("trainable_main", [True, False])
def test_inputs_of_recomputed_blocks_wait_on_the_host(trainable_main, monkeypatch):
    """All of them, and the gradients are the same. On the CPU a copy is a copy too."""
    monkeypatch.setattr(layers, "LARGE", 0)
    copies = []

    def to_host(tensor: torch.Tensor) -> layers.HostCopy:
        kept = original(tensor)
        copies.append(kept[1])
        return kept

    original = layers._to_host
    monkeypatch.setattr(layers, "_to_host", to_host)
    gradients = []
    for on_host in (False, True):
        model = diffusion()
        model.transformer.requires_grad_(trainable_main)
        model.recompute = True
        model.keep_inputs_on_host = on_host
        model(**inputs()).square().mean().backward()
        assert bool(copies) == on_host
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    blocks = len(model.transformer.blocks) + len(model.control.blocks)
    assert len(copies) == 2 * blocks  # hidden states and the embedding of the timestep
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


def test_recompute_reaches_the_plain_transformer():
    def saved_elements(recompute: bool) -> int:
        model = diffusion()
        sizes = []
        model.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(**plain(inputs()))
        return sum(sizes)

    assert saved_elements(recompute=True) < saved_elements(recompute=False) / 2


def test_only_the_unused_norm_of_the_branch_gets_no_gradient():
    model = diffusion()
    model(**inputs()).square().mean().backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert unused == {"control.final_norm.weight", "control.final_norm.bias"}


def test_half_precision_weights_take_float32_inputs():
    model = diffusion()
    batch = inputs()
    exact = model(**batch)
    half = model.bfloat16()(**batch)
    assert half.dtype == torch.bfloat16
    # 8 bits of mantissa, a dozen layers
    assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_autocast_keeps_float32_weights():
    model = diffusion()
    batch = inputs()
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    assert (output.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("kind", ["diffusion", "transformer"])
def test_zoo_round_trip_needs_no_table(tmp_path, kind):
    model = diffusion() if kind == "diffusion" else diffusion().transformer
    loaded = load_model(export(tmp_path, "entry", kind, model.config, model.state_dict(), {}))
    assert torch.equal(loaded(**plain(inputs())), model(**plain(inputs())))


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("latents_BTCHW", (2, 3, 5, 4, 6), r"\[B, T, 4, H, W\].*not \[2, 3, 5, 4, 6\]"),
        ("latents_BTCHW", (2, 3, 4, 5, 6), "multiples of 2"),
        ("features_BTChw", (2, 2, 8, 2, 3), "one frame per latent frame"),
        ("features_BTChw", (2, 3, 8, 3, 3), "2 times coarser"),
        ("features_BTChw", (2, 3, 7, 2, 3), r"\[B, T, 8, h, w\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        diffusion()(**{**inputs(), name: torch.zeros(shape)})


# ---------------------------------------------------------------- diffusers


@pytest.fixture(scope="module")
def theirs() -> CogVideoXTransformer3DModel:
    model = CogVideoXTransformer3DModel(
        **diffusers_transformer.diffusers_config(TINY.transformer)
    ).eval()
    randomize(model, seed=4)
    model.norm_out.norm.eps = diffusers_transformer.OUTPUT_NORM_EPS
    return model


def test_diffusers_model_agrees_on_converted_weights(theirs):
    ours = DiffusionTransformer(TINY.transformer).eval()
    ours.load_state_dict(apply_rules(theirs.state_dict(), diffusers_transformer.RULES, "to_ours"))
    batch = plain(inputs())
    with torch.no_grad():
        expected = theirs(
            batch["latents_BTCHW"], batch["text_BLD"], batch["timestep_B"], return_dict=False
        )[0]
        # float32 rounding in another order of operations
        torch.testing.assert_close(ours(**batch), expected, atol=2e-5, rtol=0)
    assert expected.std() > 0.1


def test_diffusers_conversion_there_and_back_is_bit_equal(theirs):
    state = theirs.state_dict()
    ours = apply_rules(state, diffusers_transformer.RULES, "to_ours")
    back = apply_rules(ours, diffusers_transformer.RULES, "to_theirs")
    assert set(back) == set(state)
    assert all(torch.equal(back[k], state[k]) for k in state)
    again = apply_rules(back, diffusers_transformer.RULES, "to_ours")
    assert all(torch.equal(again[k], v) for k, v in ours.items())


def test_diffusers_defaults_are_our_defaults():
    with torch.device("meta"):
        theirs = CogVideoXTransformer3DModel()
        ours = DiffusionTransformer(TransformerConfig())
    assert diffusers_transformer.config_from_diffusers(dict(theirs.config)) == TransformerConfig()
    arguments = diffusers_transformer.diffusers_config(TransformerConfig())
    assert {k: theirs.config[k] for k in arguments} == arguments
    converted = apply_rules(ours.state_dict(), diffusers_transformer.RULES, "to_theirs")
    check_against(
        converted, {k: v.shape for k, v in theirs.state_dict().items()}, "the converted transformer"
    )


def test_rotary_variant_of_diffusers_is_refused(theirs):
    with pytest.raises(ValueError, match="CogVideoX-5B"):
        diffusers_transformer.config_from_diffusers(
            {**theirs.config, "use_rotary_positional_embeddings": True}
        )


def with_rotation(**changes: Any) -> DiffusionConfig:
    transformer = TINY.transformer.model_copy(update={"rotary_theta": 100.0, **changes})
    return TINY.model_copy(update={"transformer": transformer})


def test_rotary_positions_add_no_weights_and_change_attention_between_patches_only():
    plain_model = diffusion()
    rotated = ControlledDiffusion(with_rotation())
    rotated.load_state_dict(plain_model.state_dict())
    batch = inputs()
    assert not torch.equal(rotated(**batch), plain_model(**batch))
    one_patch = {**plain(batch), "latents_BTCHW": batch["latents_BTCHW"][:, :1, :, :2, :2]}
    # A single patch is at position 0, where the rotation is the identity.
    assert torch.equal(rotated(**one_patch), plain_model(**one_patch))
    main = rotated.transformer
    main.recompute = True
    recomputed = main(**plain(batch))
    main.recompute = False
    assert torch.equal(main(**plain(batch)), recomputed)


def test_rotary_positions_need_heads_that_split():
    with pytest.raises(ValidationError, match="multiple of 16 with rotary_theta"):
        TransformerConfig(hidden_size=48, num_heads=2, rotary_theta=100.0)


def test_linear_condition_gives_each_feature_cell_its_latent_cells():
    small = TINY.semantic.model_copy(update={"upsampler": "linear"})
    condition = SemanticCondition(small, latent_channels=4)
    assert [name for name, _ in condition.named_parameters()] == ["linear.weight", "linear.bias"]
    features = inputs()["features_BTChw"]
    before = condition(features)
    assert before.shape == (2, 3, 4, 4, 6)
    features[:, 1, :, 1, 2] += 1  # frame 1, row 1, column 2
    changed = (condition(features) != before).any(dim=(0, 2))
    expected = torch.zeros(3, 4, 6, dtype=torch.bool)
    expected[1, 2:4, 4:6] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("given", ["sum", "condition"])
def test_control_branch_receives_the_condition_with_or_without_latents(given):
    model = ControlledDiffusion(TINY.model_copy(update={"control_input": given}))
    randomize(model, 0)
    received = []
    model.control.input.register_forward_pre_hook(lambda _, given: received.append(given[0]))
    batch = inputs()
    model(**batch)
    expected = model.semantic(batch["features_BTChw"])
    if given == "sum":
        expected = expected + batch["latents_BTCHW"]
    assert torch.equal(received[0], expected)


@pytest.mark.parametrize("projections", ["series", "beside"])
def test_projections_start_later_control_blocks_at_once_only_beside_them(projections):
    """The first step changes all projections beside the blocks, and in series the first alone."""
    model = ControlledDiffusion(TINY.model_copy(update={"control_projections": projections}))
    model.copy_main_to_control()
    randomize(model.transformer, 0)
    torch.nn.init.normal_(model.semantic.projection.weight)
    received = []
    model.control.blocks[1].register_forward_pre_hook(lambda _, given: received.append(given[0]))
    made = []
    model.control.blocks[0].register_forward_hook(lambda _, given, result: made.append(result))
    model(**inputs()).square().mean().backward()
    assert torch.equal(received[0], made[0]) == (projections == "beside")
    gradients = [float(each.weight.grad.abs().max()) for each in model.control.projections]
    assert gradients[0] > 0
    assert all((size > 0) == (projections == "beside") for size in gradients[1:])


def test_compiled_blocks_equal_eager_ones():
    """Traced and differentiated by the compiler, and run by the same kernels."""
    model = ControlledDiffusion(TINY)
    randomize(model)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 3, 4, 4, 6, generator=generator)
    text = torch.randn(2, 5, 12, generator=generator)
    semantic = torch.randn(2, 3, 4, 4, 6, generator=generator)
    found = []
    for compiled in (False, True):
        if compiled:
            model.compile_blocks(backend="aot_eager")
        model.zero_grad()
        out = model(latents, torch.tensor([3, 700]), text, semantic_BTCHW=semantic)
        out.square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((out.detach(), gradients))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)
