"""Diffusion transformer with control branch, schedule, loss and sampler in formulas (§5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.golden.formulas import tokenizer
from tests.golden.formulas.weights import Weights, gelu_tanh, heads, softmax_attention, swish, waves

Sizes = dict[str, Any]
MAIN, CONTROL = "model.main_model.diffusion_model.", "model.control_model.diffusion_model."
TOKENIZER = "semantic_conditioner.semantic_model.model."
RELEASED_SCHEDULE = {
    "linear_start": 0.00085,
    "linear_end": 0.0120,
    "num_timesteps": 1000,
    "shift_scale": 3.0,
}


def position_table(sizes: Sizes, frames: int) -> Tensor:
    """[1, text + video, width]: zeros for the text; then time, column, row."""
    rows, columns, width = sizes["latent_h"] // 2, sizes["latent_w"] // 2, sizes["hidden"]

    def part(position: float, size: int) -> list[float]:
        angles = [position * 10000.0 ** (-k / (size // 2)) for k in range(size // 2)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    quarter, rest = width // 4, 3 * width // 8
    table = [
        part(t, quarter) + part(x / sizes["interp"], rest) + part(y / sizes["interp"], rest)
        for t in range(frames)
        for y in range(rows)
        for x in range(columns)
    ]
    return torch.cat([torch.zeros(sizes["text_len"], width), torch.tensor(table)])[None]


def enter(
    w: Weights, prefix: str, sizes: Sizes, x_BTCHW: Tensor, timesteps: Tensor, text: Tensor
) -> tuple[Tensor, Tensor]:
    """(sequence, time embedding)."""
    batch, frames, width = len(x_BTCHW), x_BTCHW.shape[1], sizes["hidden"]
    patches = w.convolution(
        f"{prefix}mixins.patch_embed.proj", x_BTCHW.flatten(0, 1), width, 2, 2, stride=2
    )
    video = patches.flatten(2).mT.reshape(batch, -1, width)
    states = w.linear(f"{prefix}mixins.patch_embed.text_proj", text, width)
    time = w.linear(f"{prefix}time_embed.0", waves(timesteps, width), sizes["time_embed_dim"])
    time = w.linear(f"{prefix}time_embed.2", swish(time), sizes["time_embed_dim"])
    return torch.cat([states, video], dim=1) + position_table(sizes, frames), time


def block(w: Weights, prefix: str, layer: int, sizes: Sizes, x: Tensor, time: Tensor) -> Tensor:
    width, text = sizes["hidden"], sizes["text_len"]
    key, adaln = f"{prefix}transformer.layers.{layer}", f"{prefix}mixins.adaln_layer"
    chunks = w.linear(f"{adaln}.adaLN_modulations.{layer}.1", swish(time), 12 * width).chunk(
        12, dim=1
    )
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        torch.cat(
            [t[:, None].expand(-1, text, -1), v[:, None].expand(-1, x.shape[1] - text, -1)], dim=1
        )
        for v, t in zip(chunks[:6], chunks[6:], strict=True)
    )
    y = w.layer_norm(f"{key}.input_layernorm", x, 1e-5) * (1 + scale1) + shift1
    qkv = w.linear(f"{key}.attention.query_key_value", y, 3 * width)
    q, k, v = (heads(part, sizes["heads"]) for part in qkv.split(width, dim=-1))
    q = w.layer_norm(f"{adaln}.query_layernorm_list.{layer}", q, 1e-6)
    k = w.layer_norm(f"{adaln}.key_layernorm_list.{layer}", k, 1e-6)
    x = x + gate1 * w.linear(f"{key}.attention.dense", softmax_attention(q, k, v), width)
    y = w.layer_norm(f"{key}.post_attention_layernorm", x, 1e-5) * (1 + scale2) + shift2
    y = w.linear(
        f"{key}.mlp.dense_4h_to_h",
        gelu_tanh(w.linear(f"{key}.mlp.dense_h_to_4h", y, 4 * width)),
        width,
    )
    return x + gate2 * y


def network(
    w: Weights, sizes: Sizes, x: Tensor, timesteps: Tensor, text: Tensor, semantic: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor]:
    """(velocity, what each control layer adds, the control branch's time embedding)."""
    width, (batch, frames, channels, height, columns) = sizes["hidden"], x.shape
    main, time = enter(w, MAIN, sizes, x, timesteps, text)
    side, side_time = enter(
        w, CONTROL, sizes, x if semantic is None else x + semantic, timesteps, text
    )
    added: list[Tensor] = []
    for layer in range(sizes["layers"]):
        main = block(w, MAIN, layer, sizes, main, time)
        if layer < sizes["control_layers"] and semantic is not None:
            side = block(w, CONTROL, layer, sizes, side, side_time)
            side = w.linear(
                f"{CONTROL}mixins.adaln_layer.zero_linears.{layer}", side, width, bias=False
            )
            added.append(side)
            main = main + side
    w.affine(f"{CONTROL}transformer.final_layernorm", width)  # there, and of no influence
    main = w.layer_norm(f"{MAIN}transformer.final_layernorm", main, 1e-5)[:, sizes["text_len"] :]
    shift, scale = w.linear(
        f"{MAIN}mixins.final_layer.adaLN_modulation.1", swish(time), 2 * width
    ).chunk(2, dim=1)
    main = (
        w.layer_norm(f"{MAIN}mixins.final_layer.norm_final", main, 1e-6) * (1 + scale[:, None])
        + shift[:, None]
    )
    patches = w.linear(f"{MAIN}mixins.final_layer.linear", main, channels * 4)
    patches = patches.reshape(batch, frames, height // 2, columns // 2, channels, 2, 2)
    return patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(x.shape), added, side_time


def res_block(w: Weights, key: str, x: Tensor, width: int) -> Tensor:
    y = w.convolution(
        f"{key}.conv1", swish(w.group_norm(f"{key}.norm1", x)), width, 3, 3, padding=1
    )
    y = w.convolution(
        f"{key}.conv2", swish(w.group_norm(f"{key}.norm2", y)), width, 3, 3, padding=1
    )
    return (w.convolution(f"{key}.nin_shortcut", x, width, 1, 1) if x.shape[1] != width else x) + y


def upsample(
    w: Weights, prefix: str, x: Tensor, ch: int, multipliers: list[int], res: int, out: int
) -> Tensor:
    key, top = f"{prefix}upsample_model", ch * multipliers[-1]
    x = w.convolution(f"{key}.conv_in", x, top, 3, 3, padding=1)
    for name in ("block_1", "block_2"):
        x = res_block(w, f"{key}.mid.{name}", x, top)
    for level in reversed(range(len(multipliers))):
        width = ch * multipliers[level]
        for number in range(res + 1):
            x = res_block(w, f"{key}.up.{level}.block.{number}", x, width)
        if level:
            batch, _, rows, columns = x.shape
            x = (
                x.reshape(batch, width // 4, 2, 2, rows, columns)
                .permute(0, 1, 4, 2, 5, 3)
                .reshape(batch, width // 4, 2 * rows, 2 * columns)
            )
            x = w.convolution(f"{key}.up.{level}.upsample.conv", x, width, 3, 3, padding=1)
    return w.convolution(
        f"{key}.conv_out", swish(w.group_norm(f"{key}.norm_out", x)), out, 3, 3, padding=1
    )


def upsampler(w: Weights, sizes: Sizes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    upsampled = upsample(
        w,
        "",
        inputs["features"],
        sizes["ch"],
        sizes["ch_mult"],
        sizes["num_res_blocks"],
        sizes["out_ch"],
    )
    return {
        "upsampled": upsampled,
        "latent": w.convolution("conv_out", upsampled, sizes["target_dim"], 3, 3, padding=1),
    }


def condition(w: Weights, sizes: Sizes, features_BTChw: Tensor) -> tuple[Tensor, Tensor]:
    """(upsampled, frame by frame; semantic latent)."""
    prefix = f"{CONTROL}semantic_conditioner."
    flat = features_BTChw.flatten(0, 1)
    upsampled = upsample(
        w, prefix, flat, sizes["up_ch"], sizes["up_mult"], sizes["up_res"], sizes["sem_out_dim"]
    )
    latent = w.convolution(
        f"{prefix}conv_out", upsampled, sizes["latent_channels"], 3, 3, padding=1
    )
    return upsampled, latent.unflatten(0, features_BTChw.shape[:2])


def features_of(w: Weights, sizes: Sizes, tokens_11n: Tensor) -> Tensor:
    """Decoded features of the case's tokens. Encoder weights are drawn too, for a complete copy."""
    prefix, tok = f"{CONTROL}{TOKENIZER}", sizes["tok"]
    inner = Weights({k.removeprefix(prefix): t for k, t in w.items() if k.startswith(prefix)})
    inner.generator = w.generator
    inner.take("mean", tok["channels"]), inner.take("std", tok["channels"], around=1.0, scale=0.2)
    tokenizer.encode(inner, tok, torch.zeros(1, 1, tok["channels"], *tok["grid"]))
    features = tokenizer.detokenize(inner, tok, tokens_11n[:, 0], sizes["latent_frames"])
    w.update({prefix + k: t for k, t in inner.items()})
    return features


def control_forward(w: Weights, sizes: Sizes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    x, text, timesteps = inputs["x"], inputs["text"], inputs["timesteps"]
    features = features_of(w, sizes, inputs["semantic_tokens"])
    upsampled, semantic = condition(w, sizes, features)
    output, added, time = network(w, sizes, x, timesteps, text, semantic)
    return {
        "semantic_features": features,
        "upsampled": upsampled,
        "semantic_latent": semantic,
        "output": output,
        "output_without_control": network(w, sizes, x, timesteps, text, None)[0],
        "control_time_embed": time,
        "timestep_sinusoid": waves(timesteps, sizes["hidden"]),
        "pos_embedding": position_table(sizes, sizes["latent_frames"]),
        **{f"control_hidden_{layer}": hidden for layer, hidden in enumerate(added)},
    }


# ---------------------------------------------------------------- schedule


def rescaled(alphas: np.ndarray) -> np.ndarray:
    """Roots in float32, the last of them moved to zero."""
    a = np.sqrt(alphas.astype(np.float32))
    return (a - a[-1]) * (a[0] / (a[0] - a[-1]))


def shifted(schedule: Sizes) -> np.ndarray:
    low, high, count, s = (
        schedule[k] for k in ("linear_start", "linear_end", "num_timesteps", "shift_scale")
    )
    alphas = np.cumprod(1 - np.linspace(math.sqrt(low), math.sqrt(high), count) ** 2)
    return alphas / (s + (1 - s) * alphas)


def training_table(schedule: Sizes) -> np.ndarray:
    return rescaled(shifted(schedule))


def sampler_table(schedule: Sizes, steps: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """(timesteps, levels with 1 at the end, index of the nearest entry of the training table)."""
    last = schedule["num_timesteps"] - 1
    timesteps = [math.floor(last - i * last / steps) for i in range(steps)]
    levels = rescaled(shifted(schedule)[timesteps[::-1]])[::-1]
    index = np.abs(levels[:, None] - training_table(schedule)[None]).argmin(1)
    return timesteps, np.append(levels, np.float32(1)), index


def guidance(scale: float, exponent: float, steps: int, counter: float) -> float:
    base = (steps - counter) / steps
    return 1 + scale * (1 - math.cos(math.pi * base**exponent)) / 2


def noise_schedule(sizes: Sizes) -> dict[str, Tensor]:
    a = training_table(sizes)
    outputs = {
        "alphas_cumprod_shifted_before_rescale": shifted(sizes),
        "train_alphas_cumprod_sqrt": a,
        "train_loss_weight": 1 / (1 - a**2),
        "train_c_out": -np.sqrt(1 - a**2),
    }
    for steps in sizes["sampler_steps"]:
        timesteps, levels, index = sampler_table(sizes, steps)
        found = {
            "timesteps": np.array(timesteps),
            "alphas_cumprod_sqrt": levels,
            "denoiser_alphas_cumprod_sqrt": a[index],
            "denoiser_table_index": index,
        }
        for dynamic in sizes["dynamic_cfg"]:
            name = f"cfg_scale{dynamic['scale']}_exp{dynamic['exp']}"
            pair = dynamic["scale"], dynamic["exp"], steps
            found[f"dynamic_{name}"] = np.array([guidance(*pair, t) for t in timesteps])
            found[f"intended_{name}"] = np.array([guidance(*pair, steps - i) for i in range(steps)])
        outputs |= {f"sampler_{steps}.{key}": value for key, value in found.items()}
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in outputs.items()}


# ---------------------------------------------------------------- loss and sampler

GRADIENTS = (
    f"{CONTROL}mixins.adaln_layer.zero_linears.0.weight",
    f"{CONTROL}semantic_conditioner.conv_out.weight",
    f"{CONTROL}transformer.layers.0.attention.query_key_value.weight",
    f"{CONTROL}mixins.adaln_layer.adaLN_modulations.0.1.weight",
    f"{CONTROL}mixins.patch_embed.proj.weight",
    f"{CONTROL}semantic_conditioner.upsample_model.conv_in.weight",
)


def trainable(key: str) -> bool:
    return (
        key.startswith(CONTROL)
        and TOKENIZER not in key
        and "transformer.final_layernorm" not in key
    )


def loss(
    w: Weights, sizes: Sizes, inputs: dict[str, Tensor], gradients_of: tuple[str, ...] = GRADIENTS
) -> dict[str, Tensor]:
    x0, noise, timesteps, text, features = (
        inputs[k] for k in ("latents", "noise", "timesteps", "text", "semantic_features")
    )
    a = torch.from_numpy(training_table(RELEASED_SCHEDULE))[timesteps]
    outputs = {"alphas_cumprod_sqrt": a}
    a = a.reshape(-1, 1, 1, 1, 1)
    features_of(
        w, sizes, torch.zeros(1, 1, tokens_of(sizes), dtype=torch.long)
    )  # the copy of the tokenizer lies in the file
    with torch.no_grad():
        network(
            w, sizes, x0, timesteps, text, condition(w, sizes, features)[1]
        )  # draws what is missing
    for fixed in sizes["fixed_frames"]:
        live = Weights({k: t.clone().requires_grad_(trainable(k)) for k, t in w.items()})
        noised = a * x0 + (1 - a**2).sqrt() * noise
        noised[:, :fixed] = x0[:, :fixed]
        v = network(live, sizes, noised, timesteps, text, condition(live, sizes, features)[1])[0]
        denoised = a * noised - (1 - a**2).sqrt() * v
        value = (1 / (1 - a**2) * (denoised - x0).square())[:, fixed:].mean(dim=(1, 2, 3, 4)).mean()
        keys = [k for k in live if trainable(k)]
        gradients = dict(
            zip(keys, torch.autograd.grad(value, [live[k] for k in keys]), strict=True)
        )
        norm = torch.stack([g.double().norm() for g in gradients.values()]).norm().float()
        found = {
            "noised_input": noised,
            "predicted_x0": denoised,
            "loss": value[None],
            "grad_norm": norm[None],
            **{f"grad.{k}": gradients[k] for k in gradients_of},
        }
        outputs |= {f"fixed{fixed}.{k}": t.detach() for k, t in found.items()}
    return outputs


def tokens_of(sizes: Sizes) -> int:
    return (
        sizes["tok"]["iframe_tokens"] + (sizes["latent_frames"] - 1) * sizes["tok"]["pframe_tokens"]
    )


def sampling(w: Weights, sizes: Sizes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    steps, text, fixed = sizes["steps"], inputs["text"], sizes["fixed_frames"]
    semantic = condition(w, sizes, features_of(w, sizes, inputs["semantic_tokens"]))[1]
    timesteps, levels, index = sampler_table(RELEASED_SCHEDULE, steps)
    snapped = training_table(RELEASED_SCHEDULE)[index].astype(float)
    a = levels.astype(float)

    def put_back(x: Tensor) -> Tensor:
        return torch.cat([inputs["prefix_latents"], x[:, fixed:]], dim=1) if fixed else x

    def estimate(x: Tensor, j: int) -> Tensor:
        t = torch.full((len(x),), float(timesteps[j]))
        u, c = (
            snapped[j] * x
            - math.sqrt(1 - snapped[j] ** 2) * network(w, sizes, x, t, states, semantic)[0]
            for states in (torch.zeros_like(text), text)
        )
        return u + guidance(sizes["cfg_scale"], sizes["cfg_exp"], steps, timesteps[j]) * (c - u)

    denoised, states = solve(inputs, a, put_back, estimate)
    return {
        "denoised": torch.stack(denoised),
        "states": torch.stack(states),
        "final": put_back(states[-1]),
        "network_timesteps": torch.tensor(timesteps).float(),
    }


def solve(
    inputs: dict[str, Tensor], a: np.ndarray, put_back: Callable, estimate: Callable
) -> tuple[list[Tensor], list[Tensor]]:
    """x0 as estimated at each step, and the state after it."""
    lam = [-math.inf, *[math.log(v / math.sqrt(1 - v**2)) for v in a[1:-1]], math.inf]
    x, before, denoised, states = inputs["start_noise"], None, [], []
    for j in range(len(a) - 1):
        x = put_back(x)
        d = estimate(x, j)
        direction = d
        if j and j < len(a) - 2:
            r = (lam[j] - lam[j - 1]) / (lam[j + 1] - lam[j])
            direction = (1 + 1 / (2 * r)) * d - before / (2 * r)
        if j == len(a) - 2:
            x = d
        elif j == 0:
            x = a[1] * d + math.sqrt(1 - a[1] ** 2) * inputs["step_noise"][0]
        else:
            h = lam[j + 1] - lam[j]
            x = (
                math.sqrt((1 - a[j + 1] ** 2) / (1 - a[j] ** 2)) * math.exp(-h) * x
                - math.expm1(-2 * h) * a[j + 1] * direction
                + math.sqrt(1 - a[j + 1] ** 2)
                * math.sqrt(1 - math.exp(-2 * h))
                * inputs["step_noise"][j]
            )
        before = d
        denoised.append(d)
        states.append(x)
    return denoised, states
