"""LanDiffPipeline at tiny size, like diffusers' own pipeline tests and as `landiff sample`."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import math
import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    GGUFQuantizationConfig,
    PipelineQuantizationConfig,
)
from safetensors.torch import load_file, save_file
from torch.nn import Module
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import landiff
from landiff.configs import ConfigError
from landiff.data_pipeline.video.codec import Mp4Writer
from landiff.launchers.cli import main
from landiff.launchers.config import SampleConfig
from landiff.launchers.results import sample
from landiff.launchers.results.prompts import SampleUnit
from landiff.launchers.results.sampling.loading import load_models
from landiff.model_zoo import registry
from landiff.model_zoo.config import ModelConfig, ScheduleConfig, TokenSamplingConfig
from landiff.model_zoo.convert.known_formats import open_source, write_target
from landiff.model_zoo.diffusers import pipeline
from landiff.model_zoo.diffusers.components import EARLIER_MODULES, LanDiffScheduler
from landiff.model_zoo.diffusers.pipeline import LanDiffPipeline
from landiff.model_zoo.health import UnhealthyError
from landiff.model_zoo.sample.generate import Models, draw_codes
from landiff.model_zoo.sample.given import Given
from landiff.model_zoo.sample.latents import SamplerOptions, guidance_scale
from landiff.model_zoo.sample.stream import Request, VideoStream, generate
from landiff.model_zoo.schedule import NoiseSchedule
from tests.model_zoo.adapters import TARGETS, export_adapter
from tests.model_zoo.convert.tiny import MODELS, VAE_CONFIG, weights
from tests.model_zoo.zoo_entries import write_entry

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a rabbit hops over the grass", "snow"]
WORDS = PROMPTS[0].split() + PROMPTS[1:]
TOKENS = TokenSamplingConfig(guidance=2.0)
CALL = {"num_frames": 9, "num_inference_steps": 3, "token_sampling": TOKENS, "motion_score": 0.2}
SEED = 42
SIZES = MODELS.model_dump()
SIZES["lm"]["text_dim"] = SIZES["diffusion"]["transformer"]["text_dim"] = 16
TINY = ModelConfig.model_validate(SIZES)


OFFLOADS = {
    "part": LanDiffPipeline.enable_model_cpu_offload,
    "block": LanDiffPipeline.enable_group_offload,
    "layer": LanDiffPipeline.enable_sequential_cpu_offload,
}
MOVED = {"lm", "semantic_tokenizer", "control", "transformer", "vae"}
MOVED |= {"lm_text_encoder", "text_encoder"}


def seeded(*seeds: int) -> torch.Generator | list[torch.Generator]:
    found = [torch.Generator().manual_seed(seed) for seed in seeds]
    return found[0] if len(found) == 1 else found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Zoo, two T5 encoders and a VAE: what `landiff sample` starts from."""
    path = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pieces = [
            ("<pad>", 0.0),
            ("</s>", 0.0),
            ("<unk>", 0.0),
            *(("▁" + word, -1.0) for word in WORDS),
        ]
        tokenizer = T5Tokenizer(vocab=[*pieces, ("▁", -5.0)], extra_ids=0)
        for name in ("flan-t5", "t5"):
            sizes = T5Config(
                vocab_size=32,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            )
            T5EncoderModel(sizes).save_pretrained(path / name)
            tokenizer.save_pretrained(path / name)
        AutoencoderKLCogVideoX(**VAE_CONFIG).save_pretrained(path / "vae")
        for kind, config in (
            ("lm", TINY.lm),
            ("tokenizer", TINY.tokenizer),
            ("diffusion", TINY.diffusion),
        ):
            state = (
                registry.build_module(kind, config).state_dict()
                if kind != "tokenizer"
                else weights(kind)
            )
            state = {
                n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t
                for n, t in state.items()
            }
            registry.export(path / "zoo", kind, kind, config, state, {})
    return path


@pytest.fixture(scope="module")
def models(folder) -> Models:
    return load_models(sample_config(folder), torch.device("cpu"))


def sample_config(folder, dtype: str = "float32", **options) -> SampleConfig:
    return SampleConfig(
        zoo=folder / "zoo",
        out=folder / "out",
        lm_text={
            "kind": "flan-t5",
            "path": str(folder / "flan-t5"),
            "dtype": dtype,
            "max_length": 16,
        },
        diffusion_text={
            "kind": "t5-v1.1",
            "path": str(folder / "t5"),
            "dtype": dtype,
            "max_length": 5,
        },
        codec={"kind": "cogvideox-vae", "path": str(folder / "vae"), "dtype": dtype},
        **options,
    )


@pytest.fixture(scope="module")
def pipe(models) -> LanDiffPipeline:
    return LanDiffPipeline.from_models(models, clean_frames=1)


@pytest.fixture(scope="module")
def expected(models):
    """`landiff sample`'s own call."""
    return generate(
        models,
        PROMPTS,
        3,
        TOKENS,
        SamplerOptions(num_steps=3),
        seeds=[SEED, SEED + 1000],
        motion_score=0.2,
        clean_frames=1,
    )


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(path)
    return path


def test_the_pipeline_gives_what_landiff_sample_gives_bit_for_bit(pipe, expected):
    found = pipe(PROMPTS, generator=seeded(SEED), output_type="uint8", **CALL)
    assert torch.equal(found.codes, expected.codes_BK) and torch.equal(
        found.frames, expected.frames_BTHWC
    )
    latents = pipe(PROMPTS, generator=seeded(SEED), output_type="latent", **CALL).frames
    assert torch.equal(latents, expected.latents_BTCHW)
    assert (
        expected.frames_BTHWC.shape == (2, 9, 32, 48, 3) and expected.frames_BTHWC.float().std() > 1
    )


class Grey:
    """Vision features that are grey levels of cells."""

    name = fingerprint = "grey"
    channels = TINY.tokenizer.feature_channels
    cell = 16

    def __call__(self, frames_BTHWC: torch.Tensor) -> torch.Tensor:
        cells = frames_BTHWC.float().mean(-1)[:, :, None, :: self.cell, :: self.cell] / 255
        return cells.repeat(1, 1, self.channels, 1, 1)


def test_a_call_begins_with_images_and_renders_given_codes(models, pipe, expected):
    images = torch.randint(256, (2, 1, 32, 48, 3), dtype=torch.uint8, generator=seeded(0))
    given = pipe.first_frames(images, Grey())
    wanted = generate(
        models,
        PROMPTS,
        3,
        TOKENS,
        SamplerOptions(num_steps=3),
        seeds=[SEED, SEED + 1000],
        motion_score=0.2,
        clean_frames=1,
        given=given,
    )
    found = pipe(PROMPTS, generator=seeded(SEED), output_type="latent", given=given, **CALL)
    assert torch.equal(found.codes, wanted.codes_BK)
    assert torch.equal(found.frames, wanted.latents_BTCHW)
    assert torch.equal(found.frames[:, :1], given.latents_BTCHW)
    call = {"generator": seeded(SEED), "output_type": "uint8", "given": Given(expected.codes_BK)}
    again = pipe(PROMPTS, **call, **CALL)
    assert torch.equal(again.frames, expected.frames_BTHWC)
    assert not torch.equal(pipe(PROMPTS[::-1], **call, **CALL).frames, again.frames)


def test_a_long_video_comes_in_chunks(models, pipe):
    request = Request(
        PROMPTS[:1], 5, TOKENS, SamplerOptions(num_steps=3), [SEED], 0.2, clean_frames=1
    )
    chunks = [chunk.frames_BTHWC for chunk in pipe.stream(request)]
    whole = pipe(
        PROMPTS[:1], generator=seeded(SEED), output_type="uint8", **CALL | {"num_frames": 17}
    )
    assert len(chunks) == 2 and torch.equal(torch.cat(chunks, dim=1), whole.frames)


@pytest.mark.parametrize("level", OFFLOADS)
def test_a_long_video_does_not_depend_on_offloading(models, saved, level):
    """Bit for bit, also with a call between two chunks. One component at a time has weights."""
    request = Request(
        [{0: PROMPTS[0], 9: PROMPTS[1]}],
        7,
        TOKENS,
        SamplerOptions(num_steps=2, control_guidance=0.5),
        [SEED],
        0.2,
        ["rain"],
        clean_frames=1,
    )
    wanted = list(VideoStream(models, request))
    pipe = LanDiffPipeline.from_pretrained(saved)
    offload_to_cpu(pipe, level)
    held: list[set[str]] = []

    def look(*_):
        held.append(with_weights(pipe))

    for component in pipe.components.values():
        if isinstance(component, Module):
            layers = [module for module in component.modules() if not list(module.children())]
            for layer in (layers[0], layers[-1]):
                layer.register_forward_pre_hook(look)
    found = []
    for chunk in pipe.stream(request):
        found.append(chunk)
        if len(found) == 1:
            pipe(PROMPTS[1], generator=seeded(SEED), output_type="latent", **CALL)
    assert len(found) == len(wanted) == 3
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.frames_BTHWC, theirs.frames_BTHWC)
        assert torch.equal(ours.latents_BTCHW, theirs.latents_BTCHW)
    alone = [{name} for name in MOVED - {"control", "transformer"}]
    assert all(held_then in [*alone, {"control", "transformer"}] for held_then in held)
    assert set().union(*held) == MOVED and not with_weights(pipe)
    stream = iter(pipe.stream(request))
    next(stream)
    assert with_weights(pipe) == {"vae"}
    stream.close()
    assert not with_weights(pipe)
    stream = iter(pipe.stream(request))
    next(stream)
    pipe.to("cpu")
    stream.close()
    assert with_weights(pipe) == MOVED


def offload_to_cpu(pipe: LanDiffPipeline, level: str) -> None:
    name = "onload_device" if level == "block" else "device"
    OFFLOADS[level](pipe, **{name: "cpu"})


def with_weights(pipe: LanDiffPipeline) -> set[str]:
    """Names of the components that hold any of their weights."""
    found = set()
    for name, component in pipe.components.items():
        if isinstance(component, Module) and any(x.numel() for x in component.parameters()):
            found.add(name)
    return found


@pytest.fixture(scope="module")
def adapters(folder) -> dict[str, registry.ZooEntry]:
    """Adapters with random weights, by kind of their base."""
    return {kind: export_adapter(folder / "zoo", kind) for kind in TARGETS}


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_in_a_pipeline_give_what_landiff_sample_gives(folder, saved, adapters, merge):
    uses = [{"adapter": f"lora-{kind}", "scale": 0.5} for kind in adapters]
    models = load_models(
        sample_config(folder, adapters=uses, merge_adapters=merge), torch.device("cpu")
    )
    expected = LanDiffPipeline.from_models(models, clean_frames=1)
    loaded = LanDiffPipeline.from_pretrained(saved)
    before = loaded(PROMPTS[0], generator=seeded(SEED), output_type="latent", **CALL)
    for entry in adapters.values():
        loaded.load_adapter(entry.path, 0.5, merge=merge)
    found, wanted = (
        each(PROMPTS[0], generator=seeded(SEED), output_type="latent", **CALL)
        for each in (loaded, expected)
    )
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.frames, wanted.frames)
    assert not torch.equal(found.frames, before.frames)


def test_a_pipeline_knows_the_base_that_it_was_loaded_from(saved, adapters, tmp_path):
    half = LanDiffPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    for entry in adapters.values():
        half.load_adapter(entry.path)
    shutil.copytree(saved, tmp_path / "other")
    path = tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"] += 1
    save_file(tensors, path)
    other = LanDiffPipeline.from_pretrained(tmp_path / "other")
    other.load_adapter(adapters["lm"].path)
    for kind in ("transformer", "diffusion"):
        with pytest.raises(ConfigError, match=f"is an adapter of the {kind} with"):
            other.load_adapter(adapters[kind].path)


def test_the_command_writes_the_frames_of_the_pipeline(folder, pipe, monkeypatch, capsys):
    """All of `landiff sample` but the mp4 file itself, which loses a little."""
    written = {}
    add = Mp4Writer.add

    def keep(writer, frames_THWC):
        written.setdefault(writer.path.name, []).append(torch.from_numpy(frames_THWC))
        add(writer, frames_THWC)

    monkeypatch.setattr(Mp4Writer, "add", keep)
    sample.sample_videos(
        sample_config(
            folder,
            prompts=PROMPTS,
            num_latent_frames=5,
            steps=3,
            guidance=4.5,
            tokens=TOKENS,
            motion_score=0.2,
            clean_frames=1,
            seed=SEED,
            batch_size=2,
        )
    )
    found = pipe(
        PROMPTS,
        guidance_scale=4.5,
        generator=seeded(SEED),
        output_type="uint8",
        **{**CALL, "num_frames": 17},
    )
    videos = [torch.cat(written[name]) for name in sorted(written)]
    assert torch.equal(torch.stack(videos), found.frames)
    shown = capsys.readouterr().out  # two chunks of three sampler steps
    for words in (
        "sample loads: 0/5 models",
        "sample loads: 5/5 models",
        "sample latents: 0/6",
        "sample latents: 6/6",
    ):
        assert words in shown, shown


@pytest.fixture(scope="module")
def small_zoo(tmp_path_factory):
    """Zoo with models for the nano encoders, whose transformer has options of our own."""
    path = tmp_path_factory.mktemp("small")
    sizes = TINY.model_dump()
    sizes["lm"]["text_dim"] = sizes["diffusion"]["transformer"]["text_dim"] = 384
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        registry.export(path, "tokenizer", "tokenizer", TINY.tokenizer, weights("tokenizer"), {})
        for name, channels in (("dct", 48), ("pca", 16)):
            transformer = sizes["diffusion"]["transformer"]
            transformer["latent_channels"] = channels
            if name == "pca":
                transformer |= {"prediction": "clean", "rotary_theta": 100.0}
            config = ModelConfig.model_validate(sizes)
            for kind, part in (("lm", config.lm), ("diffusion", config.diffusion)):
                state = registry.build_module(kind, part).state_dict()
                state = {
                    key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in state.items()
                }
                registry.export(path, f"{kind}-{name}", kind, part, state, {})
    return path


SMALL = {
    "dct": {"solver": "unipc", "guidance_schedule": "step", "precision": "bf16"},
    "pca": {"guidance_interval": (0.0, 0.7), "guidance_rescale": 0.5, "control_guidance": 0.75},
}


@pytest.mark.parametrize("codec", ["dct", "pca"])
def test_a_config_with_nano_encoders_becomes_a_folder_that_gives_the_same_videos(
    small_zoo, tmp_path, codec, capsys
):
    """Prompts of different lengths, a negative prompt, schedules of tokens and other samplers."""
    config = SampleConfig(
        zoo=small_zoo,
        out=tmp_path / "videos",
        lm=f"lm-{codec}",
        diffusion=f"diffusion-{codec}",
        lm_text={"kind": "minilm", "max_length": 12},
        diffusion_text={"kind": "minilm", "max_length": 5, "padded": True},
        codec={"kind": "pca", "path": "shapes"} if codec == "pca" else {"kind": "dct"},
        tokens={"guidance": 2.0, "temperature": 1.2, "temperature_end": 0.8},
        clean_frames=1,
        steps=4,
        guidance=4.5,
        motion_score=0.2,
        batch_size=2,
        **SMALL[codec],
    )
    (tmp_path / "sample.yaml").write_text(config.model_dump_json())
    folder = tmp_path / "LanDiff"
    command = ["convert", str(tmp_path / "sample.yaml"), "--to", "diffusers", "--out", str(folder)]
    assert main([*command, "--dry-run"]) == 0 and not folder.exists()
    assert main(command) == 0, capsys.readouterr()
    assert main(command) == 2 and "exists already" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "x"), "--dtype", "bfloat16"]) == 2
    assert "--dtype does not go with a config" in capsys.readouterr().err
    assert main([*command[:2], "--to", "release", "--out", str(tmp_path / "x")]) == 2
    assert "for --to diffusers" in capsys.readouterr().err
    units = [SampleUnit(0, PROMPTS[0], 3, 5, 0.2), SampleUnit(1, PROMPTS[1], 4, 5, 0.2, "rain")]
    models = load_models(config, torch.device("cpu"))
    wanted = sample.stream_batch(models, config, units, sample.UnitProgress(2, 0))
    wanted_BTHWC = torch.cat([chunk.frames_BTHWC for chunk in wanted], dim=1)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    for again in range(2 if codec == "pca" else 1):
        pipe = LanDiffPipeline.from_pretrained(folder, torch_dtype=dtype)
        found = pipe(
            PROMPTS,
            num_frames=17,
            guidance_scale=4.5,
            generator=seeded(3, 4),
            output_type="uint8",
            negative_prompt=["", "rain"],
            num_inference_steps=4,
            token_sampling=config.tokens,
            motion_score=0.2,
        )
        assert torch.equal(found.codes, wanted.codes_BK)
        assert torch.equal(found.frames, wanted_BTHWC) and found.frames.float().std() > 1
        folder = tmp_path / f"again-{again}"
        pipe.save_pretrained(folder)


def test_options_of_a_call_are_those_of_landiff_sample(models, pipe):
    changed = {"solver": "euler", "guidance_interval": (0.2, 1.0), "guidance_rescale": 0.7}
    changed["control_guidance"] = 1.5
    sampler = SamplerOptions(num_steps=3, dynamic="constant", **changed)
    wanted = generate(
        models,
        PROMPTS,
        3,
        TOKENS,
        sampler,
        seeds=[SEED, SEED + 1000],
        motion_score=0.2,
        negatives=["snow", "snow"],
        clean_frames=1,
    )
    found = pipe(
        PROMPTS,
        generator=seeded(SEED),
        output_type="latent",
        guidance_schedule="constant",
        negative_prompt="snow",
        **changed,
        **CALL,
    )
    assert torch.equal(found.codes, wanted.codes_BK)
    assert torch.equal(found.frames, wanted.latents_BTCHW)


def test_save_and_load_give_the_same_video(saved, expected):
    loaded = LanDiffPipeline.from_pretrained(saved)
    found = loaded(PROMPTS, generator=seeded(SEED), output_type="uint8", **CALL)
    assert torch.equal(found.frames, expected.frames_BTHWC)
    index = json.loads((saved / "model_index.json").read_text())
    components = {name: value for name, value in index.items() if isinstance(value, list)}
    assert index["lm_text_options"] == {"kind": "flan-t5", "max_length": 16}
    assert index["text_options"] == {"kind": "t5-v1.1", "max_length": 5}
    assert components == {
        "control": ["landiff", "LanDiffControl"],
        "lm": ["landiff", "LanDiffLM"],
        "lm_text_encoder": ["transformers", "T5EncoderModel"],
        "lm_tokenizer": ["transformers", "T5Tokenizer"],
        "scheduler": ["landiff", "LanDiffScheduler"],
        "semantic_tokenizer": ["landiff", "LanDiffTokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["landiff", "LanDiffTransformer"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def test_component_classes_are_found_where_they_say_they_are(pipe):
    for component in (pipe, *pipe.components.values()):
        kind = type(component)
        if kind.__name__.startswith("LanDiff"):
            assert kind.__module__ == "landiff"
            assert getattr(landiff, kind.__name__) is kind
    assert landiff.LanDiffLMConfig is type(pipe.lm.config)


def name_module(folder: Path, module: str) -> None:
    """Makes model_index.json name `module` for our components, as earlier versions did."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    ours = [name for name, value in index.items() if "landiff" in value]
    assert len(ours) == 5
    for name in ours:
        index[name][0] = module
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("module", EARLIER_MODULES)
def test_a_folder_that_names_an_earlier_module_loads(saved, pipe, tmp_path, module):
    shutil.copytree(saved, tmp_path / "old")
    name_module(tmp_path / "old", module)
    loaded = LanDiffPipeline.from_pretrained(tmp_path / "old")
    ours = pipe.lm.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.lm.state_dict().items())


def test_diffusers_loads_a_folder_that_names_the_earlier_module(saved, expected, tmp_path):
    """As a folder saved before the module was `landiff`, with its own pipeline.py."""
    shutil.copytree(saved, tmp_path / "old")
    name_module(tmp_path / "old", pipeline.__name__)
    (tmp_path / "old" / "pipeline.py").write_text(
        f"from {pipeline.__name__} import LanDiffPipeline  # noqa: F401\n"
    )
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path / "old", custom_pipeline="pipeline", trust_remote_code=True
    )
    found = loaded(PROMPTS, generator=seeded(SEED), output_type="uint8", **CALL)
    assert torch.equal(found.frames, expected.frames_BTHWC)


def test_stock_classes_and_the_converter_read_the_folder(saved, pipe, tmp_path):
    _, report = CogVideoXTransformer3DModel.from_pretrained(
        saved / "transformer", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    parts = {part.kind: part for part in open_source(saved).parts}
    assert sorted(parts) == ["diffusion", "lm", "tokenizer", "vae"]
    assert all(
        torch.equal(t, pipe.lm.model.state_dict()[n]) for n, t in parts["lm"].tensors.items()
    )
    write_target(tmp_path / "converted", "diffusers", list(parts.values()), {})
    for name in ("transformer", "control", "semantic_tokenizer", "lm", "vae"):
        kind = type(getattr(pipe, name))
        again = kind.from_pretrained(tmp_path / "converted" / name)
        ours = getattr(pipe, name).state_dict()
        assert again.state_dict().keys() == ours.keys()
        assert all(torch.equal(t, ours[n]) for n, t in again.state_dict().items())


def test_a_stock_transformer_is_taken_as_a_component(saved, pipe, expected):
    components = {
        **pipe.components,
        "transformer": CogVideoXTransformer3DModel.from_pretrained(saved / "transformer"),
    }
    found = LanDiffPipeline(**components)(
        PROMPTS, generator=seeded(SEED), output_type="uint8", **CALL
    )
    assert torch.equal(found.frames, expected.frames_BTHWC)


def test_a_batch_gives_what_single_prompts_give(pipe):
    both = pipe(PROMPTS, generator=seeded(5, 6), output_type="latent", **CALL)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, (5, 6), strict=True)):
        single = pipe(prompt, generator=seeded(seed), output_type="latent", **CALL)
        assert torch.equal(single.codes[0], both.codes[row])
        # matrix products of another shape round otherwise; guidance multiplies that by up to 7
        torch.testing.assert_close(single.frames[0], both.frames[row], atol=2e-4, rtol=1e-4)


def test_nothing_is_left_over_between_calls(pipe):
    state, generator = torch.get_rng_state(), seeded(1)
    before = generator.get_state()
    first = pipe(PROMPTS[0], generator=generator, **CALL).frames
    pipe(PROMPTS[1], generator=seeded(2), **{**CALL, "num_frames": 1})
    again = pipe(PROMPTS[0], generator=generator, **CALL).frames
    assert np.array_equal(first, again)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(generator.get_state(), before)
    other = pipe(PROMPTS[0], generator=seeded(2), **CALL).frames
    assert not np.array_equal(first, other)
    assert (
        pipe(PROMPTS[0], generator=seeded(-1), **CALL).frames.shape == first.shape
    )  # torch's largest seed


def test_without_a_generator_every_call_is_another_and_follows_the_global_seed(pipe):
    def video() -> np.ndarray:
        return pipe(PROMPTS[0], output_type="latent", **CALL).frames

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first, second = video(), video()
        torch.manual_seed(3)
        assert torch.equal(video(), first) and not torch.equal(first, second)


def test_output_types_hold_the_same_frames(pipe, expected):
    def frames(kind: str):
        return pipe(PROMPTS, generator=seeded(SEED), output_type=kind, **CALL).frames

    pixels = expected.frames_BTHWC
    array = frames("np")
    assert array.dtype == np.float32 and array.shape == (2, 9, 32, 48, 3)
    assert torch.equal(torch.from_numpy((array * 255).round().astype(np.uint8)), pixels)
    assert torch.equal(frames("pt"), torch.from_numpy(array).permute(0, 1, 4, 2, 3))
    images = frames("pil")
    assert (
        len(images) == 2
        and len(images[0]) == 9
        and np.array_equal(np.asarray(images[1][3]), pixels[1, 3].numpy())
    )
    as_tuple = pipe(PROMPTS, generator=seeded(SEED), output_type="uint8", return_dict=False, **CALL)
    assert torch.equal(as_tuple[0], pixels)


def test_callbacks_hear_every_step_and_may_change_the_latents(pipe):
    heard = []

    def listen(owner, step, timestep, given):
        assert owner is pipe and set(given) == {"latents"}
        heard.append((step, timestep, given["latents"].clone()))
        return given

    plain = pipe(PROMPTS[0], generator=seeded(SEED), output_type="latent", **CALL).frames
    listened = pipe(
        PROMPTS[0],
        generator=seeded(SEED),
        output_type="latent",
        callback_on_step_end=listen,
        **CALL,
    ).frames
    assert torch.equal(listened, plain)
    assert [(step, timestep) for step, timestep, _ in heard] == [(0, 999), (1, 666), (2, 333)]
    assert torch.equal(heard[-1][2], plain)

    def wipe(_owner, step, _timestep, given):
        return {"latents": torch.zeros_like(given["latents"])} if step == 2 else {}

    wiped = pipe(
        PROMPTS[0], generator=seeded(SEED), output_type="latent", callback_on_step_end=wipe, **CALL
    ).frames
    assert not wiped.any()
    with pytest.raises(ValueError, match="may hold latents"):
        pipe(
            PROMPTS[0],
            callback_on_step_end=listen,
            callback_on_step_end_tensor_inputs=["noise"],
            **CALL,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_and_runs_with_the_quantiser_in_float32(saved, dtype):
    half = LanDiffPipeline.from_pretrained(saved, torch_dtype=dtype)
    floats = {
        name: {p.dtype for p in getattr(half, name).parameters()}
        for name in ("control", "transformer", "vae")
    }
    assert all(found == {dtype} for found in floats.values()), floats
    kept = {name for name, p in half.lm.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        name for name, _ in half.lm.named_parameters() if "norm" in name or "head" in name
    }
    assert {p.dtype for name, p in half.lm.named_parameters() if name not in kept} == {dtype}
    assert {
        b.dtype for b in half.semantic_tokenizer.model.quantizer.buffers() if b.is_floating_point()
    } == {torch.float32}
    found = half(PROMPTS, generator=seeded(SEED), output_type="latent", **CALL)
    assert found.frames.dtype == torch.float32 and torch.isfinite(found.frames).all()


def test_bfloat16_gives_what_landiff_sample_gives_in_bf16_bit_for_bit(folder, saved, tmp_path):
    loaded = load_models(sample_config(folder, "bfloat16", precision="bf16"), torch.device("cpu"))
    wanted = generate(
        loaded,
        PROMPTS,
        3,
        TOKENS,
        SamplerOptions(num_steps=3),
        seeds=[SEED, SEED + 1000],
        motion_score=0.2,
        clean_frames=1,
    )
    half = LanDiffPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    for pipe in (half, LanDiffPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)):
        found = pipe(PROMPTS, generator=seeded(SEED), output_type="uint8", **CALL)
        assert torch.equal(found.codes, wanted.codes_BK) and torch.equal(
            found.frames, wanted.frames_BTHWC
        )


def test_encoders_in_bfloat16_beside_models_in_float32_give_what_landiff_sample_gives(
    folder, tmp_path
):
    """The default of `landiff sample`. diffusers loads a VAE in float32 unless it is told."""
    loaded = load_models(sample_config(folder, "bfloat16"), torch.device("cpu"))
    wanted = generate(
        loaded,
        PROMPTS[:1],
        3,
        TOKENS,
        SamplerOptions(num_steps=3),
        seeds=[SEED],
        motion_score=0.2,
        clean_frames=1,
    )
    LanDiffPipeline.from_models(loaded, clean_frames=1).save_pretrained(tmp_path)
    pipe = LanDiffPipeline.from_pretrained(tmp_path)
    pipe.vae.to(torch.bfloat16)
    found = pipe(PROMPTS[0], generator=seeded(SEED), output_type="uint8", **CALL)
    assert torch.equal(found.codes, wanted.codes_BK)
    assert torch.equal(found.frames, wanted.frames_BTHWC)


def test_all_components_follow_a_cast_and_come_back(saved):
    pipe = LanDiffPipeline.from_pretrained(saved)
    arguments = set(inspect.signature(LanDiffPipeline.__init__).parameters)
    assert pipe.components.keys() == arguments - {"self", "lm_text_options", "text_options"}
    for dtype in (torch.float16, torch.float32):
        pipe.to(dtype=dtype)
        assert {c.dtype for c in pipe.components.values() if hasattr(c, "dtype")} == {dtype}


def test_diffusers_finds_the_class_by_the_file_in_the_folder(saved, expected):
    pipe = DiffusionPipeline.from_pretrained(
        saved, custom_pipeline="pipeline", trust_remote_code=True
    )
    assert type(pipe) is LanDiffPipeline
    found = pipe(PROMPTS, generator=seeded(SEED), output_type="uint8", **CALL)
    assert torch.equal(found.frames, expected.frames_BTHWC)


def test_the_code_in_the_documentation_runs(folder, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "pipeline.md").read_text()
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sample.yaml").write_text(sample_config(folder, clean_frames=1).model_dump_json())
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("num_inference_steps=50", "num_inference_steps=2"), names)
    assert (
        names["video"].shape == (49, 32, 48, 3) and names["pipe"].scheduler.config.clean_frames == 1
    )


def test_several_videos_of_one_prompt_are_those_of_their_seeds(pipe):
    both = pipe(
        PROMPTS[1], generator=seeded(3, 4), num_videos_per_prompt=2, output_type="latent", **CALL
    )
    listed = pipe([PROMPTS[1]] * 2, generator=seeded(3, 4), output_type="latent", **CALL)
    assert torch.equal(both.frames, listed.frames) and not torch.equal(
        both.frames[0], both.frames[1]
    )


def test_given_start_noise_takes_the_place_of_the_seed(pipe):
    shape = (1, 3, 4, 4, 6)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED + 1))
    plain = pipe(
        PROMPTS[0],
        generator=seeded(SEED),
        output_type="latent",
        **{**CALL, "num_inference_steps": 2},
    )
    assert plain.frames.shape == shape
    given = pipe(
        PROMPTS[0],
        generator=seeded(SEED),
        latents=noise,
        output_type="latent",
        **{**CALL, "num_inference_steps": 2},
    )
    other = pipe(
        PROMPTS[0],
        generator=seeded(SEED),
        latents=-noise,
        output_type="latent",
        **{**CALL, "num_inference_steps": 2},
    )
    assert torch.equal(given.codes, plain.codes) and not torch.equal(given.frames, other.frames)
    with pytest.raises(ValueError, match=r"latents of shape \[1, 2, 4, 4, 6\]"):
        pipe(PROMPTS[0], latents=noise[:, :2], **CALL)


def test_a_callback_may_interrupt_and_the_next_call_runs_whole(pipe):
    heard = []

    def stop_after_two(owner, step, _timestep, given):
        heard.append(given["latents"].clone())
        owner._interrupt = step == 1
        return {}

    stopped = pipe(
        PROMPTS[0],
        generator=seeded(SEED),
        output_type="latent",
        callback_on_step_end=stop_after_two,
        **CALL,
    )
    assert pipe.interrupt and len(heard) == 2 and torch.equal(stopped.frames, heard[1])
    whole = pipe(PROMPTS[0], generator=seeded(SEED), output_type="latent", **CALL)
    assert (
        not pipe.interrupt
        and pipe.num_timesteps == 3
        and not torch.equal(whole.frames, stopped.frames)
    )


def test_a_video_of_several_chunks_and_one_that_ends_early(pipe, monkeypatch):
    window = pipe.transformer.sizes.latent_frames
    assert window == 3 and pipe.lm.model.config.segment_frames < 7
    call = {**CALL, "num_frames": 1 + 6 * 4}
    frames = pipe(PROMPTS[0], generator=seeded(SEED), output_type="uint8", **call).frames
    assert frames.shape[1] == 25
    early = {**call, "token_sampling": TokenSamplingConfig(predict_end=True)}
    model, wants_to_end = pipe.lm.model, torch.zeros(pipe.lm.model.layout.vocab_size)
    wants_to_end[model.layout.eos] = 1e4
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x_BSD: logits(x_BSD) + wants_to_end)
    ended = pipe(PROMPTS[0], generator=seeded(SEED), output_type="uint8", **early)
    # The earliest end is after the first frame of the second segment. A fourth latent frame is no
    # whole chunk.
    assert model.layout.num_frames(ended.codes.shape[1]) == 4 and ended.frames.shape[1] == 9


@pytest.mark.parametrize("level", OFFLOADS)
def test_offloading_changes_where_not_what(saved, expected, level, tmp_path):
    """No weight is left on the device between calls, and the pipeline can still be saved."""
    pipe = LanDiffPipeline.from_pretrained(saved)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="there is none"):
            OFFLOADS[level](pipe)
    offload_to_cpu(pipe, level)
    if level == "block":
        with pytest.raises(ValueError, match="block_level, leaf_level"):
            pipe.enable_group_offload("cpu", offload_type="stream")
    found = pipe(PROMPTS, generator=seeded(SEED), output_type="uint8", **CALL).frames
    assert torch.equal(found, expected.frames_BTHWC)
    weights = [component for component in pipe.components.values() if isinstance(component, Module)]
    for component in weights:
        assert not any(tensor.numel() for tensor in component.parameters())
    if level != "part":
        with pytest.raises(RuntimeError, match="cannot be offloaded"):
            pipe.compile_blocks()
    pipe.save_pretrained(tmp_path)
    original = (saved / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    copy = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    assert copy.read_bytes() == original
    pipe.to("cpu")
    assert all(tensor.numel() for tensor in pipe.transformer.parameters())


def test_quantized_blocks_change_videos_by_rounding(saved, expected, tmp_path):
    pytest.importorskip("torchao")
    pipe = LanDiffPipeline.from_pretrained(saved)
    call = {"generator": seeded(SEED), "output_type": "uint8", "given": Given(expected.codes_BK)}
    pipe.quantize_blocks()
    found = pipe(PROMPTS, **call, **CALL).frames
    error = (found.float() - expected.frames_BTHWC.float()).square().mean()
    assert 0 < error < 4
    offload_to_cpu(pipe, "block")
    assert torch.equal(pipe(PROMPTS, **call, **CALL).frames, found)
    for component in (pipe, pipe.lm, pipe.transformer):
        with pytest.raises(ConfigError, match="cannot be saved or exported"):
            component.save_pretrained(tmp_path)


def test_tiles_of_the_vae_have_the_size_of_whole_frames(saved, expected):
    pipe = LanDiffPipeline.from_pretrained(saved)
    pipe.enable_vae_tiling()
    assert pipe.vae.use_tiling
    tiled = pipe(PROMPTS, generator=seeded(SEED), output_type="uint8", **CALL).frames
    assert tiled.shape == expected.frames_BTHWC.shape
    pipe.disable_vae_tiling()
    whole = pipe(PROMPTS, generator=seeded(SEED), output_type="uint8", **CALL).frames
    assert torch.equal(whole, expected.frames_BTHWC)


def test_compiled_blocks_give_the_same_video_and_keep_their_names(saved, expected):
    pipe = LanDiffPipeline.from_pretrained(saved)
    names = [list(pipe.components[part].state_dict()) for part in ("transformer", "control")]
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    pipe.compile_blocks(backend=backend)
    found = pipe(PROMPTS, generator=seeded(SEED), output_type="uint8", **CALL).frames
    assert compiled and torch.equal(found, expected.frames_BTHWC)
    parts = [list(pipe.components[part].state_dict()) for part in ("transformer", "control")]
    assert parts == names


def test_a_quantization_that_would_be_ignored_is_refused(saved):
    chosen = PipelineQuantizationConfig(quant_mapping={"transformer": GGUFQuantizationConfig()})
    with pytest.raises(ValueError, match="LanDiffTransformer cannot be quantized"):
        LanDiffPipeline.from_pretrained(saved, quantization_config=chosen)


def test_wrong_arguments_are_told_apart(pipe):
    for arguments, message in [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "snow", "num_frames": 5}, r"1 \+ 8 \* k"),
        ({"prompt": "snow", "output_type": "gif"}, "must be one of np, pt, pil"),
        ({"prompt": PROMPTS, "generator": seeded(1, 2, 3)}, "3 generators for 2 prompts"),
        ({"prompt": "snow", "num_videos_per_prompt": 0}, "must be at least 1"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": "snow", "negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"prompt": "snow", "solver": "heun"}, "must be one of sde-dpm"),
        ({"prompt": "snow", "guidance_schedule": "never"}, "must be one of timestep"),
        ({"prompt": "snow", "guidance_interval": (0.0, 2.0)}, "two numbers in 0 ... 1"),
        ({"prompt": "snow", "guidance_rescale": 2.0}, "must lie in 0 ... 1"),
        ({"prompt": "snow", "control_guidance": -1.0}, "must be at least 0"),
        (
            {"prompt": PROMPTS, "token_sampling": TokenSamplingConfig(predict_end=True)},
            "one at a time",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(**{**CALL, **arguments})


def test_models_not_made_for_each_other_are_refused(pipe):
    whole = pipe.components
    sizes = T5Config(vocab_size=32, d_model=8, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(
        ValueError, match="text width of the language model = 16, of its text encoder = 8"
    ):
        LanDiffPipeline(**{**whole, "lm_text_encoder": T5EncoderModel(sizes)})("snow", **CALL)


def test_lengths_that_chunks_do_not_fill_are_refused_before_anything_runs(pipe, models):
    pipe.scheduler.register_to_config(clean_frames=0)  # chunks of 3 latents
    with pytest.raises(ValueError, match="num_frames = 17 .* nearest that are: 9 and 21"):
        pipe("snow", **{**CALL, "num_frames": 17})
    pipe.scheduler.register_to_config(clean_frames=1)
    with pytest.raises(ValueError, match="4 latent frames .* nearest that are: 3 and 5"):
        generate(
            models, ["snow"], 4, TOKENS, SamplerOptions(num_steps=2), seeds=[0], clean_frames=1
        )


def test_no_motion_score_is_the_default_one(pipe):
    heard = []
    hook = pipe.lm.model.micro.register_forward_hook(
        lambda _module, given, _output: heard.append(given[1].tolist())
    )
    pipe("snow", output_type="latent", **{**CALL, "motion_score": None})
    hook.remove()
    assert heard == [[pytest.approx(0.1)] * 2]  # with the text and without


def test_dynamic_guidance_is_the_expression_of_diffusers_pipeline():
    """The line of `CogVideoXPipeline.__call__`, taken from its source and run beside ours."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(CogVideoXPipeline.__call__)))
    lines = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and "cos" in ast.dump(node.value)
        and ast.unparse(node.targets[0]) == "self._guidance_scale"
    ]
    assert len(lines) == 1
    for steps, scale in ((50, 6.0), (7, 3.5)):
        for step, timestep in enumerate(
            NoiseSchedule(ScheduleConfig()).sampler_table(steps).timesteps
        ):
            names = {
                "math": math,
                "guidance_scale": scale,
                "num_inference_steps": steps,
                "t": torch.tensor(timestep),
            }
            theirs = eval(ast.unparse(lines[0]), names)
            assert guidance_scale(SamplerOptions(steps, scale), step, timestep) == pytest.approx(
                theirs, abs=1e-12
            )


def test_the_scheduler_keeps_its_options(saved):
    scheduler = LanDiffScheduler.from_pretrained(saved / "scheduler")
    assert (
        scheduler.options(50, 6.0) == SamplerOptions(50, 6.0)
        and scheduler.schedule.config.shift_scale == 3.0
    )


def test_a_prompt_longer_than_an_encoder_takes_is_warned_about_with_the_cut_text(
    models, pipe, caplog
):
    short, long = PROMPTS[0].split()[0], " ".join([PROMPTS[0].split()[0]] * 4 + ["snow", "hops"])
    sampler = SamplerOptions(num_steps=2)
    generate(models, [short, long], 3, TOKENS, sampler, seeds=[1, 2], clean_frames=1)
    [warning] = [
        record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()
    ]
    assert warning == (
        "prompt 1 is longer than the 5 tokens that text encoder t5-v1.1 takes; "
        "this part has no effect: 'snow hops'"
    )
    caplog.clear()
    pipe(
        [short, long],
        generator=seeded(SEED),
        output_type="latent",
        **CALL | {"num_inference_steps": 2},
    )
    assert [
        record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()
    ] == [warning]


def test_weights_that_are_not_finite_are_refused_before_sampling(folder, tmp_path):
    for kind, name in (
        ("lm", "blocks.0.wo.weight"),
        ("tokenizer", "decoder.head_out.weight"),
        ("diffusion", "control.blocks.0.qkv.weight"),
    ):
        zoo = tmp_path / kind
        shutil.copytree(folder / "zoo", zoo)
        entry = registry.resolve(zoo, kind)
        state = entry.load()
        state[name].view(-1)[0] = float("nan")
        write_entry(zoo, kind, kind, entry.config, state)
        settings = sample_config(folder).model_copy(update={"zoo": zoo})
        with pytest.raises(UnhealthyError, match=f"NaN or infinity in {name}"):
            load_models(settings, torch.device("cpu"))


def test_samples_of_one_code_alone_are_refused(models):
    lm = copy.deepcopy(models.lm)
    with torch.no_grad():
        lm.head.weight.zero_()
        lm.final_norm.bias.fill_(1.0)
        lm.head.weight[3] = 100.0
    text = models.lm_text(PROMPTS)
    with pytest.raises(UnhealthyError, match=r"all of \d+ tokens are code 3"):
        draw_codes(lm, text, 3, TOKENS, seeds=[1, 2])
