"""Diffusion model, schedule, loss and sampler against numbers of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from landiff.configs import load
from landiff.model_zoo.config import (
    DiffusionConfig,
    ModelConfig,
    ScheduleConfig,
    SemanticConditionConfig,
    TransformerConfig,
)
from landiff.model_zoo.convert.formats.release_diffusion import (
    diffusion_rules,
    from_release,
    release_position_table,
    semantic_rules,
    split,
)
from landiff.model_zoo.convert.formats.release_set import SHARD
from landiff.model_zoo.convert.known_formats import Options, export_to_zoo, open_source
from landiff.model_zoo.convert.rules import apply_rules
from landiff.model_zoo.dit import ControlledDiffusion
from landiff.model_zoo.layers import sinusoid
from landiff.model_zoo.sample.latents import (
    SamplerOptions,
    SamplerStep,
    guidance_scale,
    sample_latents,
)
from landiff.model_zoo.schedule import NoiseSchedule, noise_level
from landiff.model_zoo.semantic_condition import SemanticCondition
from landiff.model_zoo.tokenizer import SemanticTokenizer
from landiff.training.diffusion.config import DiffusionTrainConfig
from landiff.training.diffusion.model import build_phase_model, freeze_main
from landiff.training.diffusion.step import Inputs, Objective
from tests.golden.conftest import Case
from tests.golden.released_models import close, load_tokenizer, tokenizer_config


def diffusion_config(sizes: dict[str, Any]) -> DiffusionConfig:
    return DiffusionConfig(
        transformer=TransformerConfig(
            latent_channels=sizes["latent_channels"],
            latent_frames=sizes["latent_frames"],
            latent_height=sizes["latent_h"],
            latent_width=sizes["latent_w"],
            hidden_size=sizes["hidden"],
            num_layers=sizes["layers"],
            num_heads=sizes["heads"],
            time_embed_dim=sizes["time_embed_dim"],
            text_length=sizes["text_len"],
            text_dim=sizes["text_dim"],
            spatial_interpolation=sizes["interp"],
        ),
        control_layers=sizes["control_layers"],
        semantic=SemanticConditionConfig(
            feature_channels=sizes["tok"]["channels"],
            base_channels=sizes["up_ch"],
            channel_multipliers=sizes["up_mult"],
            num_res_blocks=sizes["up_res"],
            out_channels=sizes["sem_out_dim"],
        ),
    )


def load_diffusion(case: Case) -> ControlledDiffusion:
    model = ControlledDiffusion(diffusion_config(case.config))
    model.load_state_dict(from_release(case.weights), strict=True)
    return model.eval().requires_grad_(False)


def tokenizer_of(case: Case) -> SemanticTokenizer:
    """The case's copy of the tokenizer."""
    sizes = case.config
    return load_tokenizer(
        sizes["tok"], split(case.weights).tokenizer, sizes["latent_frames"]
    ).eval()


def semantic_features(case: Case) -> Tensor:
    """[1, T, C, h, w] of the case's tokens; one condition for the whole batch."""
    return tokenizer_of(case).decode(
        case.inputs["semantic_tokens"][:, 0], case.config["latent_frames"]
    )


def check_latents(case: Case, latents: Tensor) -> None:
    """Latents have the sizes of the config."""
    names = ("latent_frames", "latent_channels", "latent_h", "latent_w")
    assert latents.shape[1:] == tuple(case.config[name] for name in names)


@pytest.mark.golden("diffusion_control_forward")
def test_control_forward(case: Case):
    inputs, outputs = case.inputs, case.outputs
    check_latents(case, inputs["x"])
    model = load_diffusion(case)
    features = semantic_features(case)
    close(features, outputs["semantic_features"])
    hidden: list[Tensor] = []
    for projection in model.control.projections:
        projection.register_forward_hook(lambda _m, _i, out: hidden.append(out))
    batch = len(inputs["x"])
    semantic = model.semantic(features)
    close(semantic, outputs["semantic_latent"])
    close(
        model.semantic.upsample(features[0]),
        outputs["upsampled"].reshape(-1, *outputs["upsampled"].shape[-3:]),
    )
    x, text, timesteps = inputs["x"], inputs["text"], inputs["timesteps"]
    close(model(x, timesteps, text, semantic_BTCHW=semantic.expand_as(x)), outputs["output"])
    close(model(x, timesteps, text, features.expand(batch, *features.shape[1:])), outputs["output"])
    close(model(x, timesteps, text), outputs["output_without_control"])
    close(model.transformer(x, timesteps, text), outputs["output_without_control"])
    for layer in range(case.config["control_layers"]):
        close(hidden[layer], outputs[f"control_hidden_{layer}"])


@pytest.mark.golden("diffusion_control_forward")
def test_embeddings(case: Case):
    inputs, outputs = case.inputs, case.outputs
    model = load_diffusion(case)
    close(sinusoid(inputs["timesteps"], case.config["hidden"]), outputs["timestep_sinusoid"])
    close(
        model.control.input(inputs["x"], inputs["timesteps"], inputs["text"])[1],
        outputs["control_time_embed"],
    )
    close(release_position_table(model.config.transformer), outputs["pos_embedding"], 5e-7)


@pytest.mark.golden("semantic_upsampler")
def test_semantic_upsampler(case: Case):
    sizes = case.config
    # what else the reference's class can do and the released model does not
    assert sizes.get("upsample_type", "pixelshuffle") == "pixelshuffle"
    assert (
        not sizes.get("use_mid_attention")
        and not sizes.get("attn_resolutions")
        and not sizes.get("dropout")
    )
    config = SemanticConditionConfig(
        feature_channels=sizes["z_channels"],
        base_channels=sizes["ch"],
        channel_multipliers=sizes["ch_mult"],
        num_res_blocks=sizes["num_res_blocks"],
        out_channels=sizes["out_ch"],
    )
    model = SemanticCondition(config, sizes["target_dim"]).eval()
    model.load_state_dict(apply_rules(case.weights, semantic_rules("", ""), "to_ours"), strict=True)
    features = case.inputs["features"]
    close(model.upsample(features), case.outputs["upsampled"])
    close(model(features[:, None])[:, 0], case.outputs["latent"])


@pytest.mark.golden("noise_schedule")
def test_noise_schedule(case: Case):
    sizes, outputs = case.config, case.outputs
    schedule = NoiseSchedule(ScheduleConfig(**{k: sizes[k] for k in ScheduleConfig.model_fields}))
    torch.testing.assert_close(
        schedule.shifted_alphas,
        outputs["alphas_cumprod_shifted_before_rescale"],
        atol=1e-12,
        rtol=0,
    )
    close(schedule.alphas_sqrt, outputs["train_alphas_cumprod_sqrt"], 5e-7)
    close(-noise_level(schedule.alphas_sqrt), outputs["train_c_out"], 1e-6)
    # Where the weight reaches 400, 1e-6 is less than one float32 step. The last bit of a changes
    # the weight by 1.2e-7 / (1 - a^2).
    weight = schedule.loss_weight(torch.arange(sizes["num_timesteps"]))
    off_by = (weight - outputs["train_loss_weight"]).abs() / outputs["train_loss_weight"]
    assert bool((off_by <= 1e-6 + 1.3e-7 * outputs["train_loss_weight"]).all()), off_by.max()
    for steps in sizes["sampler_steps"]:
        table = schedule.sampler_table(steps)
        assert table.timesteps == outputs[f"sampler_{steps}.timesteps"].tolist()
        close(
            torch.tensor(table.alphas_sqrt), outputs[f"sampler_{steps}.alphas_cumprod_sqrt"], 5e-7
        )
        snapped = torch.tensor(table.denoiser_alphas_sqrt)
        close(snapped, outputs[f"sampler_{steps}.denoiser_alphas_cumprod_sqrt"], 5e-7)
        assert torch.equal(
            snapped, schedule.alphas_sqrt[outputs[f"sampler_{steps}.denoiser_table_index"]]
        )


def train_config(case: Case, zoo: str = "zoo", phase: str = "control") -> DiffusionTrainConfig:
    return load(
        DiffusionTrainConfig,
        {
            "run": "run",
            "zoo": zoo,
            "phase": phase,
            "init_from": "diffusion",
            "tokenizer": "tokenizer",
            "text_column": "text",
            "data": {"manifest": "data", "global_batch_size": 1},
            "loop": {"steps": 1},
            "optim": {"lr": 1e-3},
            "precision": "fp32",
            "model": diffusion_config(case.config).model_dump(),
        },
    )


def objective(case: Case) -> Objective:
    """The trainer's, in phase control."""
    return Objective(train_config(case), torch.device("cpu"), tokenizer_of(case))


@pytest.mark.golden("diffusion_loss")
def test_training_starts_at_the_loss_of_the_released_model(case: Case, tmp_path: Path):
    """From a file of the release to the zoo, and from there to step 0 of phase control."""
    shard = tmp_path / "LanDiff" / "diffusion" / "1" / SHARD
    shard.parent.mkdir(parents=True)
    torch.save({"module": case.weights}, shard)
    models = ModelConfig(
        tokenizer=tokenizer_config(case.config["tok"], case.config["latent_frames"]),
        diffusion=diffusion_config(case.config),
    )
    released = open_source(tmp_path / "LanDiff", Options(models))
    zoo_names = {part.kind: part.kind for part in released.parts} | {"diffusion": "diffusion"}
    export_to_zoo(tmp_path / "zoo", zoo_names, released.parts, {})
    inputs = case.inputs
    model = build_phase_model(train_config(case, str(tmp_path / "zoo")))
    for fixed_frames in case.config["fixed_frames"]:
        start = Inputs(
            latents_BTCHW=inputs["latents"],
            noise_BTCHW=inputs["noise"],
            timestep_B=inputs["timesteps"],
            prefix_B=torch.full_like(inputs["timesteps"], fixed_frames),
            prefix_BTCHW=inputs["latents"],
            text_BLD=inputs["text"],
            features_BTchw=inputs["semantic_features"],
        )
        loss = objective(case).loss(model, start).loss
        close(loss, case.outputs[f"fixed{fixed_frames}.loss"][0], 1e-5)
    main = build_phase_model(train_config(case, str(tmp_path / "zoo"), "main")).state_dict()
    assert isinstance(model, ControlledDiffusion)
    for name, tensor in model.transformer.state_dict().items():
        assert torch.equal(main[name], tensor), name


@pytest.mark.golden("diffusion_loss")
def test_loss(case: Case):
    """The trainer's objective on the module and the parameters that it trains."""
    inputs, outputs = case.inputs, case.outputs
    check_latents(case, inputs["latents"])
    training = objective(case)
    schedule, timesteps = training.schedule, inputs["timesteps"]
    for fixed_frames in case.config["fixed_frames"]:
        model = load_diffusion(case).train().requires_grad_(True)
        freeze_main(model)
        result = training.loss(
            model,
            Inputs(
                latents_BTCHW=inputs["latents"],
                noise_BTCHW=inputs["noise"],
                timestep_B=timesteps,
                prefix_B=torch.full_like(timesteps, fixed_frames),
                prefix_BTCHW=inputs["latents"],
                text_BLD=inputs["text"],
                features_BTchw=inputs["semantic_features"],
            ),
        )
        result.loss.backward()
        prefix = f"fixed{fixed_frames}."
        close(result.noised, outputs.pop(f"{prefix}noised_input"), 2e-6)
        denoised = schedule.denoised(result.noised, result.velocity, timesteps)
        close(denoised, outputs.pop(f"{prefix}predicted_x0"))
        close(result.loss, outputs.pop(f"{prefix}loss")[0], 1e-5)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        torch.testing.assert_close(norm, outputs.pop(f"{prefix}grad_norm")[0], atol=1e-5, rtol=1e-4)
        theirs = apply_rules(gradients, diffusion_rules(), "to_theirs")
        for name in [name for name in outputs if name.startswith(f"{prefix}grad.")]:
            torch.testing.assert_close(
                theirs[name.removeprefix(f"{prefix}grad.")], outputs.pop(name), atol=1e-5, rtol=1e-3
            )
    close(schedule.signal(timesteps).flatten(), outputs.pop("alphas_cumprod_sqrt"), 5e-7)
    assert not outputs, f"not compared: {sorted(outputs)}"


@pytest.mark.golden("noise_schedule")
def test_dynamic_guidance(case: Case):
    outputs = case.outputs
    for steps in case.config["sampler_steps"]:
        timesteps = outputs[f"sampler_{steps}.timesteps"].tolist()
        for guidance in case.config["dynamic_cfg"]:
            name = "cfg_scale{scale}_exp{exp}".format(**guidance)
            for kind, recorded in (("timestep", "dynamic"), ("step", "intended")):
                options = SamplerOptions(steps, guidance["scale"], guidance["exp"], dynamic=kind)
                scales = [
                    guidance_scale(options, step, timestep)
                    for step, timestep in enumerate(timesteps)
                ]
                close(
                    torch.tensor(scales, dtype=torch.float64),
                    outputs[f"sampler_{steps}.{recorded}_{name}"],
                    1e-9,
                )


@pytest.mark.golden("diffusion_sampling")
def test_sampling(case: Case):
    sizes, inputs, outputs = case.config, case.inputs, case.outputs
    drawn = [inputs["start_noise"], *inputs["step_noise"]]
    seen: list[SamplerStep] = []
    prefix = inputs.get("prefix_latents")
    assert sizes["fixed_frames"] == (0 if prefix is None else prefix.shape[1])
    check_latents(case, inputs["start_noise"])
    features = semantic_features(case).expand(len(inputs["text"]), -1, -1, -1, -1)
    final = sample_latents(
        load_diffusion(case),
        NoiseSchedule(ScheduleConfig()),
        inputs["text"],
        features,
        lambda step, _shape: drawn[step],
        options=SamplerOptions(sizes["steps"], sizes["cfg_scale"], sizes["cfg_exp"]),
        prefix_BTCHW=prefix,
        on_step=seen.append,
    )
    # the reference allows 1e-3: guidance multiplies rounding by up to 7
    assert [done.timestep for done in seen] == outputs["network_timesteps"].tolist()
    close(torch.stack([done.denoised for done in seen]), outputs["denoised"], 2e-4)
    close(torch.stack([done.state for done in seen]), outputs["states"], 2e-4)
    close(final, outputs["final"], 2e-4)
