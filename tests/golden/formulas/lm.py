"""The language model and its sampling loop in formulas (specification §4)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.golden.formulas.weights import (
    Weights,
    gelu_tanh,
    heads,
    rotated,
    softmax_attention,
    swish,
    turns,
    waves,
)

Sizes = dict[str, Any]


def ids_of(sizes: Sizes) -> dict[str, int]:
    names = (
        "EOS",
        "BOS",
        "START_OF_IFrame",
        "END_OF_IFrame",
        "START_OF_PFrame",
        "END_OF_PFrame",
        "PAD",
    )
    return {name: sizes["codebook_size"] + i for i, name in enumerate(names)}


def body(sizes: Sizes, num_frames: int, codes: list[int] | None = None) -> list[int]:
    """From the first SI to EOS; None's codes are -1."""
    v, left = ids_of(sizes), list(codes or [])
    result: list[int] = []
    for frame in range(num_frames):
        first = frame % sizes["segment_length"] == 0
        count = sizes["iframe_len" if first else "pframe_len"]
        kind = "I" if first else "P"
        inside = [left.pop(0) for _ in range(count)] if codes else [-1] * count
        result += [v[f"START_OF_{kind}Frame"], *inside, v[f"END_OF_{kind}Frame"]]
    assert not left
    return [*result, v["EOS"]]


def num_codes(sizes: Sizes, num_frames: int) -> int:
    return body(sizes, num_frames).count(-1)


def micro_condition(
    w: Weights, frequency_dim: int, hidden: int, width: int, frames: Tensor, motion_score: Tensor
) -> Tensor:
    vectors = []
    for name, values in (("frames", frames), ("motion_score", motion_score)):
        key = f"micro_condition.mlps.{name}"
        vectors.append(
            w.linear(
                f"{key}.2", swish(w.linear(f"{key}.0", waves(values, frequency_dim), hidden)), width
            )
        )
    return torch.stack(vectors, dim=1)


def rms(w: Weights, key: str, x: Tensor) -> Tensor:
    scale = w.take(f"{key}.weight", x.shape[-1], scale=0.2, around=1.0)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale


def block(w: Weights, layer: int, sizes: Sizes, x: Tensor) -> Tensor:
    key, width, count = f"transformer.blocks.{layer}", sizes["hidden_dim"], sizes["num_heads"]
    qkv = w.linear(f"{key}.wqkv", rms(w, f"{key}.norm0", x), 3 * width, bias=False)
    q, k, v = (heads(part, count) for part in qkv.split(width, dim=-1))
    turned = turns(torch.arange(x.shape[1]), width // count, sizes["rope_theta"])
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    x = x + w.linear(
        f"{key}.wo",
        softmax_attention(rotated(q, turned), rotated(k, turned), v, causal),
        width,
        bias=False,
    )
    y = rms(w, f"{key}.norm1", x)
    gate, value = (
        w.linear(f"{key}.mlp.{name}", y, sizes["mlp_dim"], bias=False) for name in ("w1", "w3")
    )
    return x + w.linear(f"{key}.mlp.w2", gelu_tanh(gate) * value, width, bias=False)


def run(
    w: Weights,
    sizes: Sizes,
    text_BLT: Tensor,
    frames: Tensor,
    motion: Tensor,
    ids_BN: Tensor,
    null: bool = False,
) -> dict[str, Tensor]:
    """`ids` from the first SI on."""
    batch, width = len(text_BLT), sizes["hidden_dim"]
    table = w.take("visual_embedding_model.tok_emb_code.weight", sizes["codebook_size"] + 7, width)
    micro = micro_condition(w, sizes["freq_dim"], sizes["micro_hidden_dim"], width, frames, motion)
    key = "cond_model.embeddings"
    text = w.linear(f"{key}.fc1", gelu_tanh(w.linear(f"{key}.fc0", text_BLT, width)), width)
    nothing = w.take("cond_model.null_text_embedding", width)
    text = nothing.expand_as(text) if null else text
    bos = table[ids_of(sizes)["BOS"]].expand(batch, 1, width)
    features = x = torch.cat([bos, micro, text, table[ids_BN]], dim=1)
    blocks = []
    for layer in range(sizes["num_layers"]):
        x = block(w, layer, sizes, x)
        blocks.append(x)
    logits = w.linear(
        "transformer.head",
        w.layer_norm("transformer.layer_norm", x, 1e-5),
        sizes["codebook_size"] + 7,
        bias=False,
    )
    return {
        "input_features": features,
        "block0_output": blocks[0],
        "logits": logits,
        "micro_condition": micro,
    }


def teacher_forced(w: Weights, sizes: Sizes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    text, codes, frames, motion = (
        inputs[k] for k in ("text_embeddings", "codes", "frames", "motion_score")
    )
    batch, length, _ = text.shape
    ids = torch.tensor([body(sizes, sizes["num_frames"], row) for row in codes.tolist()])
    outputs = run(w, sizes, text, frames, motion, ids)
    before = torch.full((batch, 3 + length), -100)
    before[:, 0] = ids_of(sizes)["BOS"]
    tokens = torch.cat([before, ids], dim=1)
    mask = torch.cat([torch.zeros_like(before), torch.ones_like(ids)], dim=1)
    start = 3 + length
    log_p = outputs["logits"].log_softmax(-1)[:, start - 1 : -1]
    losses = -log_p.gather(-1, ids[..., None])[..., 0]
    return outputs | {
        "tokens": tokens,
        "loss_mask": mask.to(torch.uint8),
        "loss_per_sample": losses.mean(1),
        "loss_packed": losses.mean()[None],
        "uncond_logits": run(w, sizes, text, frames, motion, ids, null=True)["logits"],
    }


def micro_conditions(w: Weights, sizes: Sizes, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    frames, motion = inputs["frames"], inputs["motion_score"]
    widths = sizes["freq_dim"], sizes["hidden"], sizes["out_dim"]
    return {
        "sinusoid_frames": waves(frames, widths[0]),
        "sinusoid_motion": waves(motion, widths[0]),
        "micro_condition": micro_condition(w, *widths, frames, motion),
        "micro_condition_defaults": micro_condition(
            w, *widths, torch.ones_like(frames), torch.zeros_like(motion)
        ),
    }


def filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    if top_k is not None:
        kth = logits.sort(descending=True).values[min(top_k, len(logits)) - 1]
        return logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        mass, kept = 0.0, torch.full_like(logits, -math.inf)
        for index in logits.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            kept[index] = logits[index]
            mass += float(logits.softmax(-1)[index])
        return kept
    return logits


def sample(
    w: Weights, sizes: Sizes, text: Tensor, options: dict[str, Any], draws: Tensor | None = None
) -> tuple[dict[str, Tensor], float]:
    """One run of §4.7, and the smallest difference of the two best logits in a greedy run.

    Rounding could change a choice with a small difference. draws: ids to continue with; None draws
    them with the seed `options["rng"]`.
    """
    v, num_frames = ids_of(sizes), options["num_frames"]
    guidance = options.get("guidance_scale") or 1.0
    template = body(sizes, num_frames)
    generator = torch.Generator().manual_seed(options.get("rng", 0))
    frames, motion = torch.tensor([float(num_frames)]), torch.tensor([options["motion_score"]])
    first_segment = len(body(sizes, min(num_frames, sizes["segment_length"]))) - 1
    fed, raw, probabilities, drawn, gaps = [template[0]], [], [], [], []
    for place in range(1, len(template)):
        ids = torch.tensor([fed])
        rows = [
            run(w, sizes, text, frames, motion, ids, null=null)["logits"][0, -1]
            for null in ((False, True) if guidance != 1 else (False,))
        ]
        raw.append(torch.stack(rows))
        logits = rows[0] if guidance == 1 else rows[1] + guidance * (rows[0] - rows[1])
        logits = logits / (options.get("temperature") or 1.0)
        wanted, may_end = template[place], False
        starts = wanted in (v["START_OF_IFrame"], v["START_OF_PFrame"])
        last_eos = wanted == v["EOS"] and num_frames > sizes["segment_length"]
        if starts or last_eos:
            may_end = starts and place > first_segment
            allowed = [wanted, v["EOS"]] if may_end else [wanted]
            only = torch.full_like(logits, -math.inf)
            only[allowed] = logits[allowed]
            logits = only
        else:
            logits = filtered(logits, options.get("top_k"), options.get("top_p"))
        probability = logits.softmax(-1)
        probabilities.append(probability)
        chosen = int(
            torch.multinomial(probability, 1, generator=generator)
            if draws is None
            else draws[place - 1]
        )
        drawn.append(chosen)
        if options.get("top_k") == 1 and not starts:
            best = (
                (rows[0] if guidance == 1 else rows[1] + guidance * (rows[0] - rows[1]))
                .topk(2)
                .values
            )
            gaps.append(float(best[0] - best[1]))
        if may_end and chosen == v["EOS"] and options.get("predict_eos"):
            break
        fed.append(chosen if wanted == -1 else wanted)
    fed = fed[1:] if len(fed) < len(template) else fed[1:-1]
    codes = [
        min(token, sizes["codebook_size"] - 1)
        for token, wanted in zip(fed, template[1:], strict=False)
        if wanted == -1
    ]
    return {
        "raw_logits": torch.stack(raw),
        "probs": torch.stack(probabilities),
        "drawn": torch.tensor(drawn),
        "fed_tokens": torch.tensor(fed),
        "codes": torch.tensor([codes]),
    }, min(gaps, default=math.inf)
