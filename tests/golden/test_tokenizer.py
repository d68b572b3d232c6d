"""The semantic tokenizer against numbers of the reference implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from landiff.data_pipeline.loading.loader import Batch, Sample
from landiff.model_zoo.convert.formats.release_tokenizer import RULES
from landiff.model_zoo.convert.rules import apply_rules
from landiff.model_zoo.positions.frame_spans import decoder_mask, encoder_mask
from landiff.model_zoo.tokenizer import TokenizerOutput, sequence_angles
from landiff.training.tokenizer.engine import COLUMN, TokenizerEngine
from tests.golden.conftest import Case
from tests.golden.released_models import close, load_tokenizer, tokenizer_config
from tests.training.tokenizer import tiny
from tests.training.toy import META, alone


@pytest.mark.golden("tokenizer_masks")
def test_masks(case: Case):
    outputs = case.outputs
    for combo in case.config["combos"]:
        sizes = (
            combo["T"],
            combo["tokens_per_frame"],
            combo["iframe_tokens"],
            combo["pframe_tokens"],
        )
        name = "T{}_n{}_I{}_P{}".format(*sizes)
        assert torch.equal(encoder_mask(*sizes), outputs.pop(f"enc_{name}").bool()), name
        assert torch.equal(decoder_mask(*sizes), outputs.pop(f"dec_{name}").bool()), name
    assert not outputs, f"not compared: {sorted(outputs)}"


@pytest.mark.golden("tokenizer_forward")
def test_forward(case: Case):
    sizes, inputs, outputs = case.config, case.inputs, case.outputs
    model = load_tokenizer(sizes, case.weights, max(sizes["run_T"])).eval()
    for num_frames in sizes["run_T"]:
        tag = f"_T{num_frames}"
        features = inputs[f"features{tag}"]
        latents = model.encode_latents(features)
        close(latents, outputs[f"encoder_latent{tag}"])
        close(model.quantizer.project_in(latents), outputs[f"project_in{tag}"])
        indices = model.encode(features)
        assert torch.equal(indices, outputs[f"indices{tag}"])
        close(model.quantizer.lookup(indices), outputs[f"quantized{tag}"])
        close(model.decode(indices, num_frames), outputs[f"decoded{tag}"].reshape(features.shape))
        layout = (
            num_frames,
            sizes["grid"][0] * sizes["grid"][1],
            sizes["iframe_tokens"],
            sizes["pframe_tokens"],
        )
        assert torch.equal(encoder_mask(*layout), outputs[f"enc_mask{tag}"].bool())
        assert torch.equal(decoder_mask(*layout), outputs[f"dec_mask{tag}"].bool())
        angles = sequence_angles(
            model.sequence(num_frames),
            sizes["grid"][1],
            sizes["width"] // sizes["num_heads"],
            model.config.rope_theta,
            features.device,
        )
        close(torch.stack([angles.cos(), angles.sin()], dim=-1), outputs[f"rope_cis{tag}"], 2e-5)


@pytest.mark.golden("tokenizer_forward")
def test_activations_inside(case: Case):
    sizes, inputs, outputs = case.config, case.inputs, case.outputs
    num_frames = sizes["run_T"][0]
    model = load_tokenizer(sizes, case.weights, num_frames).eval()
    seen: dict[str, Tensor] = {}
    for name, stack in (("enc", model.encoder), ("dec", model.decoder)):
        stack.norm_in.register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({f"{name}_ln_pre": out})
        )
        stack.blocks[0].register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({f"{name}_block0": out})
        )
    model.decode(model.encode(inputs[f"features_T{num_frames}"]), num_frames)
    for name, value in seen.items():
        close(value, outputs[f"{name}_T{num_frames}"])
    assert len(seen) == 4


@pytest.mark.golden("tokenizer_forward")
def test_feature_normalisation(case: Case):
    """With the statistics of the case's weights, around the same encoder and decoder."""
    sizes, inputs, outputs = case.config, case.inputs, case.outputs
    num_frames = sizes["run_T"][0]
    features = inputs[f"features_T{num_frames}"]
    model = load_tokenizer(sizes, case.weights, num_frames).eval()
    close(model.normalize(features), outputs["normalised_features"])
    denormalised = outputs["denormalised_decoded"].reshape(features.shape)
    close(
        model.denormalize(outputs[f"decoded_T{num_frames}"].reshape(features.shape)), denormalised
    )
    model.config = model.config.model_copy(update={"normalize_features": True})
    indices = outputs[f"indices_T{num_frames}"]
    close(model.decode(indices, num_frames), denormalised)
    assert torch.equal(model.encode(model.denormalize(features)), indices)


@pytest.mark.golden("tokenizer_train_step")
def test_train_step(case: Case, tmp_path: Path):
    """One step of the trainer's engine. The learning rate is tiny: gradients are compared."""
    inputs, outputs = case.inputs, case.outputs
    batch, num_frames = inputs["features"].shape[:2]
    data = {"manifest": "unused", "global_batch_size": batch, "micro_batch_size": batch}
    optim = {"lr": 1e-30, "weight_decay": 0.0, "clip_grad": 0.0}
    engine = TokenizerEngine(
        tiny.config(tmp_path, tokenizer_config(case.config, num_frames), data=data, optim=optim),
        alone(),
    )
    model = engine.tokenizer
    model.load_state_dict(apply_rules(case.weights, RULES, "to_ours"), strict=True)
    seen: list[TokenizerOutput] = []
    values: list[Tensor] = []
    model.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model.quantizer.register_forward_hook(lambda _m, _i, out: values.append(out[0]))
    samples = tuple(
        Sample(str(i), 0, i, i, META, {COLUMN: clip}) for i, clip in enumerate(inputs["features"])
    )
    step = engine.train_step(Batch(0, batch, (samples,)))
    (result,) = seen
    close(step.loss, outputs["total_loss"][0], 5e-6)
    close(result.loss, outputs["total_loss"][0], 5e-6)
    close(result.commitment, outputs["commit_loss"][0], 5e-6)
    close(result.reconstruction, outputs["recon_loss"][0], 5e-6)
    close(result.decoded, outputs["recon_features"])
    close(values[0], outputs["quantized"])
    assert torch.equal(result.indices, outputs["indices"])
    gradients = apply_rules(
        {name: p.grad for name, p in model.named_parameters()}, RULES, "to_theirs"
    )
    after = apply_rules(model.state_dict(), RULES, "to_theirs")
    compared = {"total_loss", "commit_loss", "recon_loss", "recon_features", "quantized", "indices"}
    for name, expected in outputs.items():
        if name.startswith("grad."):
            torch.testing.assert_close(
                gradients[name.removeprefix("grad.")], expected, atol=1e-5, rtol=1e-3
            )
        elif name.startswith("after."):
            close(after[name.removeprefix("after.")], expected)
        else:
            assert name in compared, f"{name} is not compared"
