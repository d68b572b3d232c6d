"""The semantic tokenizer in formulas (specification §3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.golden.formulas.weights import (
    Weights,
    gelu_exact,
    heads,
    rotated,
    softmax_attention,
    turns,
)

Sizes = dict[str, Any]


def frames_of(T: int, n: int, num_i: int, num_p: int) -> Tensor:
    visual = [f for f in range(T) for _ in range(n)]
    return torch.tensor(visual + [0] * num_i + [f for f in range(1, T) for _ in range(num_p)])


def encoder_mask(T: int, n: int, num_i: int, num_p: int) -> Tensor:
    frame = frames_of(T, n, num_i, num_p)
    place = torch.arange(len(frame))
    visual = place < T * n
    earlier_frame = frame[None, :] <= frame[:, None]
    causal = place[None, :] <= place[:, None]
    return (visual[None, :] & earlier_frame) | (~visual[:, None] & ~visual[None, :] & causal)


def decoder_mask(T: int, n: int, num_i: int, num_p: int) -> Tensor:
    frame = frames_of(T, n, num_i, num_p)
    return frame[None, :] <= frame[:, None]


def rotary(sizes: Sizes, T: int) -> Tensor:
    """complex [L, head width / 2]: 1/4 time, 3/8 row, 3/8 column; latent m at (m, m, m)."""
    rows, columns = sizes["grid"]
    width = sizes["width"] // sizes["num_heads"]
    places = [(t, y, x) for t in range(T) for y in range(rows) for x in range(columns)]
    places += [(m, m, m) for m in range(sizes["iframe_tokens"] + (T - 1) * sizes["pframe_tokens"])]
    time, row, column = torch.tensor(places).T
    parts = ((time, width // 4), (row, 3 * width // 8), (column, 3 * width // 8))
    return torch.cat([turns(p, part, 10000.0) for p, part in parts], dim=1)


def block(
    w: Weights, key: str, x: Tensor, num_heads: int, visible: Tensor, turned: Tensor
) -> Tensor:
    width = x.shape[-1]
    y = w.layer_norm(f"{key}.ln_1", x, 1e-5)
    q, k, v = (
        heads(w.linear(f"{key}.attn.{name}", y, width, bias=False), num_heads)
        for name in ("wq", "wk", "wv")
    )
    attended = softmax_attention(rotated(q, turned), rotated(k, turned), v, visible)
    x = x + w.linear(f"{key}.attn.wo", attended, width, bias=False)
    y = gelu_exact(w.linear(f"{key}.mlp.c_fc", w.layer_norm(f"{key}.ln_2", x, 1e-5), 4 * width))
    return x + w.linear(f"{key}.mlp.c_proj", y, width)


def stack(
    w: Weights, side: str, sizes: Sizes, x: Tensor, visible: Tensor, turned: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(after ln_pre, after block 0, after the last block)."""
    first = x = w.layer_norm(f"{side}.ln_pre", x, 1e-5)
    outputs = []
    for layer in range(sizes["num_layers"]):
        x = block(w, f"{side}.transformer.{layer}", x, sizes["num_heads"], visible, turned)
        outputs.append(x)
    return first, outputs[0], x


def encode(w: Weights, sizes: Sizes, features_BTChw: Tensor) -> dict[str, Tensor]:
    batch, T, _, rows, columns = features_BTChw.shape
    width = sizes["width"]
    patches = w.convolution("encoder.patch_embed", features_BTChw.flatten(0, 1), width, 1, 1)
    visual = (
        patches.unflatten(0, (batch, T))
        .permute(0, 1, 3, 4, 2)
        .reshape(batch, T * rows * columns, width)
    )
    i_table = w.take("encoder.IFrame_latent_tokens", sizes["iframe_tokens"], width)
    p_table = w.take("encoder.PFrame_latent_tokens", sizes["pframe_tokens"], width)
    queries = torch.cat([i_table, *[p_table] * (T - 1)])
    x = torch.cat([visual, queries.expand(batch, -1, -1)], dim=1)
    visible = encoder_mask(T, rows * columns, sizes["iframe_tokens"], sizes["pframe_tokens"])
    before, block0, x = stack(w, "encoder", sizes, x, visible, rotary(sizes, T))
    latents = w.layer_norm("encoder.ln_post", x[:, T * rows * columns :], 1e-5)
    latents = w.linear("encoder.proj_out", latents, sizes["token_size"])
    return {
        "enc_ln_pre": before,
        "enc_block0": block0,
        "encoder_latent": latents,
        "project_in": w.linear("quantizer.project_in", latents, sizes["codebook_dim"]),
    }


def book(w: Weights, sizes: Sizes) -> Tensor:
    shape = 1, sizes["codebook_size"], sizes["codebook_dim"]
    w.take("quantizer._codebook.initted", 1, around=1.0, scale=0.0)
    w.take("quantizer._codebook.cluster_size", 1, shape[1], around=20.0, scale=2.0)
    book = w.take("quantizer._codebook.embed", *shape)
    w.take("quantizer._codebook.embed_avg", *shape)
    return book[0]


def nearest(w: Weights, sizes: Sizes, codes_BNe: Tensor) -> tuple[Tensor, float]:
    """(indices, smallest gap between the nearest and the second-nearest code)."""
    distances = (codes_BNe.detach()[:, :, None] - book(w, sizes)).square().sum(-1).sqrt()
    best = distances.topk(2, largest=False).values
    return distances.argmin(-1), float((best[..., 1] - best[..., 0]).min())


def from_code_space(w: Weights, sizes: Sizes, codes_BNe: Tensor) -> Tensor:
    return w.linear("quantizer.project_out", codes_BNe, sizes["token_size"])


def decode(w: Weights, sizes: Sizes, quantized_BNz: Tensor, T: int) -> dict[str, Tensor]:
    (rows, columns), width, batch = sizes["grid"], sizes["width"], len(quantized_BNz)
    latents = w.linear("decoder.decoder_embed", quantized_BNz, width)
    mask_token = w.take("decoder.mask_token", 1, 1, width)
    x = torch.cat([mask_token.expand(batch, T * rows * columns, width), latents], dim=1)
    visible = decoder_mask(T, rows * columns, sizes["iframe_tokens"], sizes["pframe_tokens"])
    before, block0, x = stack(w, "decoder", sizes, x, visible, rotary(sizes, T))
    x = w.layer_norm("decoder.ln_post", x[:, : T * rows * columns], 1e-5)
    x = w.linear(
        "decoder.ffn.2", torch.tanh(w.linear("decoder.ffn.0", x, 2 * width)), sizes["channels"]
    )
    decoded = x.reshape(batch, T, rows, columns, -1).permute(0, 1, 4, 2, 3)
    return {"dec_ln_pre": before, "dec_block0": block0, "decoded": decoded}


def detokenize(w: Weights, sizes: Sizes, indices_BN: Tensor, T: int) -> Tensor:
    return decode(w, sizes, from_code_space(w, sizes, book(w, sizes)[indices_BN]), T)["decoded"]


def masks(sizes: Sizes) -> dict[str, Tensor]:
    outputs = {}
    for combo in sizes["combos"]:
        place = (
            combo["T"],
            combo["tokens_per_frame"],
            combo["iframe_tokens"],
            combo["pframe_tokens"],
        )
        name = "T{}_n{}_I{}_P{}".format(*place)
        outputs |= {f"enc_{name}": encoder_mask(*place), f"dec_{name}": decoder_mask(*place)}
    return {name: mask.to(torch.uint8) for name, mask in outputs.items()}


def forward(w: Weights, sizes: Sizes, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Outputs of a `tokenizer_forward` case and the smallest gap between codes."""
    outputs, gaps = {}, []
    mean = w.take("mean", sizes["channels"])[:, None, None]
    std = w.take("std", sizes["channels"], around=1.0, scale=0.2)[:, None, None] + 1e-8
    for number, T in enumerate(sizes["run_T"]):
        encoded = encode(w, sizes, inputs[f"features_T{T}"])
        indices, gap = nearest(w, sizes, encoded["project_in"])
        quantized = from_code_space(w, sizes, book(w, sizes)[indices])
        decoded = decode(w, sizes, quantized, T)
        found = encoded | decoded | {"indices": indices, "quantized": quantized}
        if number:
            found = {k: v for k, v in found.items() if not k.endswith(("ln_pre", "block0"))}
        else:
            outputs["normalised_features"] = (inputs[f"features_T{T}"] - mean) / std
            outputs["denormalised_decoded"] = found["decoded"] * std + mean
        if T == 1:
            found["decoded"] = found["decoded"][:, 0]
        layout = (
            T,
            sizes["grid"][0] * sizes["grid"][1],
            sizes["iframe_tokens"],
            sizes["pframe_tokens"],
        )
        found |= {
            "enc_mask": encoder_mask(*layout).to(torch.uint8),
            "dec_mask": decoder_mask(*layout).to(torch.uint8),
            "rope_cis": torch.view_as_real(rotary(sizes, T)),
        }
        outputs |= {f"{name}_T{T}": tensor for name, tensor in found.items()}
        gaps.append(gap)
    return outputs, min(gaps)


GRADIENTS = (
    "encoder.patch_embed.weight",
    "encoder.IFrame_latent_tokens",
    "encoder.transformer.0.attn.wq.weight",
    "quantizer.project_in.weight",
    "quantizer.project_out.weight",
    "decoder.mask_token",
    "decoder.ffn.2.weight",
)


def train_step(
    w: Weights, sizes: Sizes, features: Tensor, gradients_of: tuple[str, ...] = GRADIENTS
) -> tuple[dict[str, Tensor], float]:
    """Outputs of a `tokenizer_train_step` case and the smallest gap between codes."""
    w.take("mean", sizes["channels"]), w.take("std", sizes["channels"], around=1.0, scale=0.2)
    with torch.no_grad():  # the first pass draws what is missing
        detokenize(
            w,
            sizes,
            nearest(w, sizes, encode(w, sizes, features)["project_in"])[0],
            features.shape[1],
        )
    live = Weights(
        {
            k: t.clone().requires_grad_(t.is_floating_point() and "_codebook" not in k)
            for k, t in w.items()
        }
    )
    p = encode(live, sizes, features)["project_in"]
    indices, gap = nearest(live, sizes, p)
    q = book(live, sizes)[indices]
    commitment = (q - p).square().mean()

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)

    u, q_hat = unit(p).detach(), unit(q)
    r = unit(u + q_hat).detach()
    size = (q.norm(dim=-1, keepdim=True) / p.norm(dim=-1, keepdim=True).clamp(min=1e-6)).detach()
    turned = p - 2 * (p * r).sum(-1, keepdim=True) * r + 2 * (p * u).sum(-1, keepdim=True) * q_hat
    quantized = from_code_space(live, sizes, turned * size)
    decoded = decode(live, sizes, quantized, features.shape[1])["decoded"]
    reconstruction = (decoded - features).square().mean()
    total = commitment + reconstruction
    found = dict(
        zip(gradients_of, torch.autograd.grad(total, [live[k] for k in gradients_of]), strict=True)
    )

    one_hot = torch.nn.functional.one_hot(indices.flatten(), sizes["codebook_size"]).float()
    counts, sums = one_hot.sum(0), one_hot.T @ p.detach().flatten(0, 1)
    key = "quantizer._codebook."
    cluster = 0.8 * w[f"{key}cluster_size"] + 0.2 * counts
    average = 0.8 * w[f"{key}embed_avg"] + 0.2 * sums
    smoothed = (cluster + 1e-5) / (cluster.sum() + sizes["codebook_size"] * 1e-5) * cluster.sum()
    assert cluster.min() >= 2, "a code dies: what replaces it is chance"
    outputs = {
        "total_loss": total[None],
        "commit_loss": commitment[None],
        "recon_loss": reconstruction[None],
        "recon_features": decoded,
        "indices": indices,
        "quantized": quantized,
        f"after.{key}cluster_size": cluster,
        f"after.{key}embed_avg": average,
        f"after.{key}embed": average / smoothed[..., None],
    }
    outputs |= {f"grad.{name}": gradient for name, gradient in found.items()}
    return {name: tensor.detach() for name, tensor in outputs.items()}, gap
