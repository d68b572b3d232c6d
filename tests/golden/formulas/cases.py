"""Golden cases of other sizes: `python -m tests.golden.formulas.cases FOLDER`.

The format is that of tests/golden/data. Numbers come from the formulas of this folder, weights and
inputs from a seed. If rounding could change a choice (the nearest code, the best token), the next
seed is used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden.formulas import diffusion, frozen, lm, tokenizer
from tests.golden.formulas.weights import Weights

Sizes = dict[str, Any]
Tensors = dict[str, Tensor]
CODE_MARGIN, TOKEN_MARGIN = 1e-3, 2e-3  # that float32 errors of 1e-5 cannot bridge


def draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def write(folder: Path, sizes: Sizes, **files: Tensors) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"case": folder.name, "dtype": "float32"} | sizes, indent=1)
    )
    for name, tensors in files.items():
        save_file(
            {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()},
            folder / f"{name}.safetensors",
        )


# One writer per kind of case: (folder, sizes, seed).


def tokenizer_masks(folder: Path, sizes: Sizes, _seed: int) -> None:
    write(folder, sizes, outputs=tokenizer.masks(sizes))


@torch.no_grad()
def tokenizer_forward(folder: Path, sizes: Sizes, seed: int) -> None:
    for attempt in range(seed, seed + 400):
        w, normal = Weights(seed=attempt), draw(attempt)
        inputs = {
            f"features_T{T}": normal(sizes["batch"], T, sizes["channels"], *sizes["grid"])
            for T in sizes["run_T"]
        }
        outputs, margin = tokenizer.forward(w, sizes, inputs)
        if margin > CODE_MARGIN:
            return write(folder, sizes, weights=w, inputs=inputs, outputs=outputs)
    raise AssertionError(f"no seed gives codes {CODE_MARGIN} apart for {sizes}")


def tokenizer_train_step(folder: Path, sizes: Sizes, seed: int) -> None:
    for attempt in range(seed, seed + 400):
        w = Weights(seed=attempt)
        features = draw(attempt)(
            sizes["batch"], sizes["temporal_size"], sizes["channels"], *sizes["grid"]
        )
        outputs, margin = tokenizer.train_step(w, sizes, features)
        if margin > CODE_MARGIN:
            return write(folder, sizes, weights=w, inputs={"features": features}, outputs=outputs)
    raise AssertionError(f"no seed gives codes {CODE_MARGIN} apart for {sizes}")


def with_vocabulary(sizes: Sizes) -> Sizes:
    return sizes | {"vocab": lm.ids_of(sizes), "vocab_size": sizes["codebook_size"] + 7}


def lm_teacher_forced(folder: Path, sizes: Sizes, seed: int) -> None:
    w, normal, batch = Weights(seed=seed), draw(seed), sizes["batch"]
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(
        sizes["codebook_size"],
        (batch, lm.num_codes(sizes, sizes["num_frames"])),
        generator=generator,
    )
    inputs = {
        "codes": codes,
        "text_embeddings": normal(batch, sizes["text_len"], sizes["text_dim"]),
        "frames": torch.full((batch,), float(sizes["num_frames"])),
        "motion_score": normal(batch).abs(),
    }
    outputs = lm.teacher_forced(w, sizes, inputs)
    write(
        folder,
        with_vocabulary(sizes) | {"sequence_length": outputs["tokens"].shape[1]},
        weights=w,
        inputs=inputs,
        outputs=outputs,
    )


def lm_micro_condition(folder: Path, sizes: Sizes, seed: int) -> None:
    w = Weights(seed=seed)
    inputs = {
        "frames": torch.tensor([1.0, 4.0, 9.0]),
        "motion_score": torch.tensor([0.0, 0.5, 1.5]),
    }
    outputs = lm.micro_conditions(w, sizes, inputs)
    write(folder, sizes, weights=w, inputs=inputs, outputs=outputs)


@torch.no_grad()
def lm_sampling(folder: Path, sizes: Sizes, seed: int) -> None:
    for attempt in range(seed, seed + 100):
        w, text = Weights(seed=attempt), draw(attempt)(1, sizes["text_len"], sizes["text_dim"])
        inputs, outputs, runs = {"text_embeddings": text}, {}, []
        for options in sizes["runs"]:
            found, margin = lm.sample(w, sizes, text, options)
            if margin < TOKEN_MARGIN:
                break
            name = options["name"]
            inputs |= {
                f"{name}.frames": torch.tensor([float(options["num_frames"])]),
                f"{name}.motion_score": torch.tensor([options["motion_score"]]),
            }
            outputs |= {f"{name}.{key}": tensor for key, tensor in found.items()}
            runs.append(options | {"steps": len(found["drawn"])})
        else:
            return write(
                folder,
                with_vocabulary(sizes) | {"runs": runs},
                weights=w,
                inputs=inputs,
                outputs=outputs,
            )
    raise AssertionError(f"no seed gives greedy decisions {TOKEN_MARGIN} apart for {sizes}")


def _latent_shape(sizes: Sizes) -> tuple[int, ...]:
    return (
        sizes["batch"],
        sizes["latent_frames"],
        sizes["latent_channels"],
        sizes["latent_h"],
        sizes["latent_w"],
    )


def _tokens(sizes: Sizes, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        sizes["tok"]["codebook_size"], (1, 1, diffusion.tokens_of(sizes)), generator=generator
    )


@torch.no_grad()
def diffusion_control_forward(folder: Path, sizes: Sizes, seed: int) -> None:
    w, normal = Weights(seed=seed), draw(seed)
    inputs = {
        "semantic_tokens": _tokens(sizes, seed),
        "timesteps": torch.tensor(sizes["timesteps"]),
        "x": normal(*_latent_shape(sizes)),
        "text": normal(sizes["batch"], sizes["text_len"], sizes["text_dim"]),
    }
    outputs = diffusion.control_forward(w, sizes, inputs)
    write(folder, sizes, weights=w, inputs=inputs, outputs=outputs)


def diffusion_loss(folder: Path, sizes: Sizes, seed: int) -> None:
    w, normal, shape = Weights(seed=seed), draw(seed), _latent_shape(sizes)
    features = normal(*shape[:2], sizes["tok"]["channels"], *sizes["tok"]["grid"])
    inputs = {
        "timesteps": torch.tensor(sizes["timesteps"]),
        "latents": normal(*shape),
        "noise": normal(*shape),
        "semantic_features": features,
        "text": normal(sizes["batch"], sizes["text_len"], sizes["text_dim"]),
    }
    outputs = diffusion.loss(w, sizes, inputs)
    write(folder, sizes, weights=w, inputs=inputs, outputs=outputs)


@torch.no_grad()
def diffusion_sampling(folder: Path, sizes: Sizes, seed: int) -> None:
    w, normal, shape = Weights(seed=seed), draw(seed), _latent_shape(sizes)
    noise = normal(sizes["steps"], *shape)
    noise[-1] = 0
    inputs = {
        "semantic_tokens": _tokens(sizes, seed),
        "start_noise": normal(*shape),
        "step_noise": noise,
        "text": normal(sizes["batch"], sizes["text_len"], sizes["text_dim"]),
    }
    if sizes["fixed_frames"]:
        inputs["prefix_latents"] = normal(shape[0], sizes["fixed_frames"], *shape[2:])
    outputs = diffusion.sampling(w, sizes, inputs)
    write(folder, sizes, weights=w, inputs=inputs, outputs=outputs)


def noise_schedule(folder: Path, sizes: Sizes, _seed: int) -> None:
    write(folder, sizes, outputs=diffusion.noise_schedule(sizes))


def semantic_upsampler(folder: Path, sizes: Sizes, seed: int) -> None:
    w, inputs = Weights(seed=seed), {"features": draw(seed)(3, sizes["z_channels"], 2, 5)}
    outputs = diffusion.upsampler(w, sizes, inputs)
    write(folder, sizes, weights=w, inputs=inputs, outputs=outputs)


@torch.no_grad()
def vae(folder: Path, sizes: Sizes, seed: int) -> None:
    """h, w are the video's."""
    w, normal, levels = Weights(seed=seed), draw(seed), len(sizes["ch_mult"]) - 1
    latents = (
        1,
        sizes["z_channels"],
        sizes["latent_frames"],
        sizes["h"] >> levels,
        sizes["w"] >> levels,
    )
    frames = 1 + (sizes["latent_frames"] - 1) * 2 ** min(2, levels)
    inputs = {
        "video": normal(1, 3, frames, sizes["h"], sizes["w"]),
        "latent_scaled": normal(*latents),
        "posterior_noise": normal(*latents),
    }
    outputs = frozen.vae(w, sizes, inputs)
    write(folder, sizes, weights=w, inputs=inputs, outputs=outputs)


def feature_extractor(folder: Path, sizes: Sizes, seed: int) -> None:
    w, inputs = (
        Weights(seed=seed),
        {"video": draw(seed)(2, sizes["frames"], 3, sizes["h"], sizes["w"]) * 0.6},
    )
    outputs = frozen.feature_extractor(w, sizes, inputs)
    write(folder, sizes, weights=w, inputs=inputs, outputs=outputs)


# ---------------------------------------------------------------- the sizes

TOKENIZER = {
    "channels": 10,
    "width": 48,
    "num_heads": 3,
    "num_layers": 1,
    "token_size": 20,
    "codebook_size": 21,
    "codebook_dim": 5,
    "iframe_tokens": 6,
    "pframe_tokens": 2,
    "rope_max_time": 16,
    "rope_one_dim_max_time": 256,
}
WIDE = TOKENIZER | {
    "channels": 33,
    "width": 64,
    "num_heads": 1,
    "num_layers": 3,
    "token_size": 80,
    "codebook_size": 19,
    "codebook_dim": 12,
    "iframe_tokens": 3,
    "pframe_tokens": 5,
}
LM = {
    "codebook_size": 17,
    "hidden_dim": 40,
    "num_heads": 2,
    "mlp_dim": 56,
    "num_layers": 2,
    "text_dim": 12,
    "text_len": 4,
    "micro_hidden_dim": 10,
    "freq_dim": 6,
    "iframe_len": 5,
    "pframe_len": 2,
    "segment_length": 2,
    "rope_theta": 500,
    "max_len": 128,
}
FLAT = LM | {
    "codebook_size": 70,
    "hidden_dim": 60,
    "num_heads": 5,
    "mlp_dim": 33,
    "num_layers": 1,
    "text_len": 1,
    "iframe_len": 2,
    "pframe_len": 3,
    "segment_length": 5,
    "rope_theta": 10000,
}
DIFFUSION = {
    "layers": 3,
    "control_layers": 3,
    "hidden": 48,
    "heads": 3,
    "time_embed_dim": 20,
    "latent_channels": 3,
    "latent_h": 6,
    "latent_w": 10,
    "latent_frames": 2,
    "text_len": 3,
    "text_dim": 9,
    "interp": 1.25,
    "sem_out_dim": 5,
    "up_ch": 32,
    "up_mult": [2, 1],
    "up_res": 1,
    "tok": TOKENIZER | {"grid": [3, 5], "temporal_size": 2},
}
DEEP = DIFFUSION | {
    "layers": 2,
    "control_layers": 1,
    "hidden": 32,
    "heads": 4,
    "latent_h": 4,
    "latent_w": 8,
    "latent_frames": 4,
    "text_len": 1,
    "interp": 1.875,
    "up_mult": [1, 1, 2],
    "up_res": 0,
    "tok": WIDE | {"grid": [1, 2], "temporal_size": 3},
}
RUNS = [
    {"name": "greedy", "num_frames": 2, "motion_score": 0.0, "top_k": 1},
    {
        "name": "greedy_three_segments",
        "num_frames": 5,
        "motion_score": 0.3,
        "top_k": 1,
        "guidance_scale": 2.5,
        "temperature": 0.6,
    },
    {"name": "one_frame", "num_frames": 1, "motion_score": 0.4, "guidance_scale": 1.0, "rng": 1},
    {
        "name": "topk_cfg",
        "num_frames": 3,
        "motion_score": 0.9,
        "top_k": 3,
        "guidance_scale": 4.0,
        "temperature": 1.7,
        "rng": 2,
    },
    {"name": "topk_all", "num_frames": 1, "motion_score": 0.9, "top_k": 500, "rng": 8},
    {"name": "topp", "num_frames": 2, "motion_score": 0.1, "top_p": 0.35, "rng": 3},
    {"name": "may_end", "num_frames": 6, "motion_score": 0.2, "predict_eos": True, "rng": 3},
    {
        "name": "may_end_cfg",
        "num_frames": 7,
        "motion_score": 0.2,
        "predict_eos": True,
        "guidance_scale": 0.5,
        "rng": 0,
    },
    {"name": "goes_on", "num_frames": 5, "motion_score": 0.2, "rng": 0},
]

CASES: dict[str, tuple[Callable[[Path, Sizes, int], None], Sizes]] = {
    "tokenizer_masks_odd": (
        tokenizer_masks,
        {
            "combos": [
                {"T": 7, "tokens_per_frame": 10, "iframe_tokens": 2, "pframe_tokens": 5},
                {"T": 1, "tokens_per_frame": 1, "iframe_tokens": 1, "pframe_tokens": 3},
            ]
        },
    ),
    "tokenizer_forward_narrow": (
        tokenizer_forward,
        TOKENIZER | {"grid": [2, 3], "temporal_size": 3, "batch": 1, "run_T": [1, 3, 5]},
    ),
    "tokenizer_forward.wide": (
        tokenizer_forward,
        WIDE | {"grid": [1, 3], "temporal_size": 2, "batch": 3, "run_T": [2, 1]},
    ),
    "tokenizer_train_step_one_frame": (
        tokenizer_train_step,
        TOKENIZER | {"grid": [3, 1], "temporal_size": 1, "batch": 3},
    ),
    "tokenizer_train_step-wide": (
        tokenizer_train_step,
        WIDE | {"grid": [2, 2], "temporal_size": 2, "batch": 1},
    ),
    "lm_teacher_forced_three_segments": (lm_teacher_forced, LM | {"batch": 3, "num_frames": 5}),
    "lm_teacher_forced_one_text_token": (lm_teacher_forced, FLAT | {"batch": 2, "num_frames": 1}),
    "lm_micro_condition_narrow": (
        lm_micro_condition,
        {"freq_dim": 8, "hidden": 12, "out_dim": 20, "order": ["frames", "motion_score"]},
    ),
    "lm_sampling_short_segments": (lm_sampling, LM | {"runs": RUNS}),
    "lm_sampling_flat": (lm_sampling, FLAT | {"runs": RUNS}),
    "diffusion_control_forward_all_layers": (
        diffusion_control_forward,
        DIFFUSION | {"batch": 1, "timesteps": [3]},
    ),
    "diffusion_control_forward_deep": (
        diffusion_control_forward,
        DEEP | {"batch": 3, "timesteps": [0, 999, 512]},
    ),
    "diffusion_loss_pair": (
        diffusion_loss,
        DIFFUSION | {"batch": 2, "timesteps": [1, 700], "fixed_frames": [0, 1]},
    ),
    "diffusion_loss_long_prefix": (
        diffusion_loss,
        DEEP | {"batch": 1, "timesteps": [998], "fixed_frames": [3, 2]},
    ),
    "diffusion_sampling_pair": (
        diffusion_sampling,
        DIFFUSION | {"batch": 2, "steps": 4, "cfg_scale": 3.5, "cfg_exp": 2, "fixed_frames": 0},
    ),
    "diffusion_sampling_prefix_long": (
        diffusion_sampling,
        DEEP | {"batch": 1, "steps": 7, "cfg_scale": 2, "cfg_exp": 5, "fixed_frames": 3},
    ),
    "noise_schedule_short": (
        noise_schedule,
        {
            "shift_scale": 1.0,
            "linear_start": 0.001,
            "linear_end": 0.02,
            "num_timesteps": 400,
            "sampler_steps": [7, 400, 2],
            "dynamic_cfg": [{"scale": 3.5, "exp": 2}, {"scale": 7, "exp": 1}],
        },
    ),
    "semantic_upsampler_three_levels": (
        semantic_upsampler,
        {
            "z_channels": 5,
            "ch": 32,
            "ch_mult": [2, 1, 3],
            "num_res_blocks": 2,
            "out_ch": 3,
            "target_dim": 6,
            "upsample_type": "pixelshuffle",
            "use_mid_attention": False,
        },
    ),
    "vae_two_levels": (
        vae,
        {
            "scale_factor": 0.7,
            "ch": 32,
            "ch_mult": [1, 2],
            "res": 2,
            "z_channels": 6,
            "latent_frames": 3,
            "h": 8,
            "w": 4,
        },
    ),
    "vae_four_levels": (
        vae,
        {
            "scale_factor": 1.15258426,
            "ch": 32,
            "ch_mult": [1, 2, 1, 3],
            "res": 1,
            "z_channels": 3,
            "latent_frames": 3,
            "h": 16,
            "w": 24,
        },
    ),
    "vae_one_frame": (
        vae,
        {
            "scale_factor": 1.5,
            "ch": 32,
            "ch_mult": [1, 1, 2],
            "res": 1,
            "z_channels": 4,
            "latent_frames": 1,
            "h": 12,
            "w": 8,
        },
    ),
    "feature_extractor_portrait": (
        feature_extractor,
        {
            "pad_value": 127,
            "patch_size": 8,
            "layer_norm_eps": 1e-12,
            "qkv_bias": True,
            "hidden_act": "gelu",
            "hidden": 48,
            "layers": 3,
            "heads": 4,
            "h": 40,
            "w": 24,
            "frames": 1,
            "output_shape": [5, 3],
        },
    ),
    "feature_extractor_square": (
        feature_extractor,
        {
            "pad_value": 127,
            "patch_size": 16,
            "layer_norm_eps": 1e-12,
            "qkv_bias": True,
            "hidden_act": "gelu",
            "hidden": 24,
            "layers": 1,
            "heads": 1,
            "h": 48,
            "w": 48,
            "frames": 3,
            "output_shape": [3, 3],
        },
    ),
}


def write_cases(root: Path, seed: int = 0) -> None:
    for name, (writer, sizes) in CASES.items():
        writer(root / name, sizes, seed)


if __name__ == "__main__":
    write_cases(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
