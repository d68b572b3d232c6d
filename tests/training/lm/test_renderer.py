"""Previews of the language model: sampled tokens as videos, rendered by several ranks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from landiff.configs.base import ConfigError
from landiff.data_pipeline.loading.samples import Sample
from landiff.model_zoo import registry
from landiff.model_zoo.config import DiffusionConfig
from landiff.model_zoo.frozen.config import MiniLMConfig
from landiff.training.checks import check_prompts
from landiff.training.lm.checks import check_renderer
from landiff.training.lm.config import LMTrainConfig
from landiff.training.lm.engine import MegatronEngine
from landiff.training.observe.previews import Preview
from landiff.training.observe.prompts import prompt_states
from tests.distributed import run_distributed
from tests.training.diffusion.tiny import MODEL, TOKENIZER, make_zoo
from tests.training.lm.samples import tiny_batch, tiny_config, tiny_sample
from tests.training.toy import validation_metrics

PROMPT_TAGS = ["preview/prompt_0", "preview/prompt_1"]
LAYOUT = TOKENIZER.model_dump(
    include={"codebook_size", "iframe_tokens", "pframe_tokens", "segment_frames"}
)


def render_config(folder: Path, **changes: Any) -> LMTrainConfig:
    renderer = {"diffusion": "diffusion", "codec": {"kind": "dct"}, "steps": 2, "clean_frames": 1}
    return tiny_config(
        folder,
        model={**LAYOUT, "text_dim": 384},
        tokenizer="tokenizer",
        renderer=renderer,
        preview_prompts=["A red ball.", "A blue cube turns."],
        preview_text={"kind": "minilm", "max_length": 16},
        **changes,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the zoo of the models that render."""
    folder = tmp_path_factory.mktemp("render")
    make_zoo(folder)
    model = DiffusionConfig.model_validate(MODEL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        module = registry.build_module("diffusion", model)
        state = {name: tensor + 0.1 for name, tensor in module.state_dict().items()}
    registry.export(folder / "zoo", "diffusion", "diffusion", model, state, {})
    return folder


def clips_of(config: LMTrainConfig) -> list[Sample]:
    """Clips of three frames, as the diffusion model."""
    clips = []
    for number in range(2):
        clips.append(replace(tiny_sample(config, 4 * number + 2, number), index=number))
    return clips


def previews(world: Any, folder: Path, parallel: dict[str, int]) -> list[Preview]:
    config = render_config(folder, parallel=parallel)
    engine = MegatronEngine(config)
    clips = clips_of(config)
    generator = torch.get_rng_state()
    found = engine.preview(clips)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [preview.tag for preview in engine.preview([])] == PROMPT_TAGS
    engine.close()
    return found


@pytest.fixture(scope="module")
def one(folder: Path) -> list[Preview]:
    """What one rank renders."""
    return run_distributed(previews, 1, folder, {})[0]


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}, {}])
def test_two_ranks_render_what_one_renders(folder, one, parallel):
    clip_tags = ["preview/held_out_0", "preview/held_out_1"]
    assert [preview.tag for preview in one] == [*clip_tags, *PROMPT_TAGS]
    assert list(one[0].panels) == ["tokens of the clip", "sampled"]
    assert (list(one[2].panels), one[2].text) == (["sampled"], "A red ball.")
    assert not torch.equal(one[2].panels["sampled"], one[3].panels["sampled"])
    for found in run_distributed(previews, 2, folder, parallel):
        for preview, expected in zip(found, one, strict=True):
            assert preview.text == expected.text
            for title, video in expected.panels.items():
                assert video.shape == (9, 32, 32, 3)
                assert torch.equal(preview.panels[title], video)
    assert not torch.equal(*one[0].panels.values())


def show_with_a_slow_rank(world: Any, folder: Path) -> tuple[dict[str, float], Any, float]:
    """Metrics, previews and the loss of a step. Rank 1, if there is one, sleeps in each forward."""
    config = render_config(folder, data={"global_batch_size": 3, "micro_batch_size": 1})
    engine = MegatronEngine(config)
    if world.rank == 1:
        engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    clips = clips_of(config)
    metrics = validation_metrics(engine, clips, engine.dp_rank, engine.dp_size)
    previews = engine.preview(clips)
    result = engine.train_step(tiny_batch(config, 0, engine.dp_rank, engine.dp_size))
    engine.close()
    return metrics, previews, float(result.loss)


def test_previews_and_validation_finish_when_one_of_three_ranks_is_slow(folder, one):
    ((expected, _, loss),) = run_distributed(show_with_a_slow_rank, 1, folder)
    assert {"loss", "sampled_bigram_distance"} <= expected.keys()
    for metrics, previews, found in run_distributed(show_with_a_slow_rank, 3, folder):
        # float32 sums in another order
        assert metrics == pytest.approx(expected, abs=1e-5) and found == pytest.approx(
            loss, abs=1e-5
        )
        for preview, alone in zip(previews, one, strict=True):
            for title, video in alone.panels.items():
                assert torch.equal(preview.panels[title], video), title


def test_text_states_of_prompts_are_kept_until_prompts_or_encoder_change(tmp_path):
    encoder = MiniLMConfig(kind="minilm", max_length=16)
    states = prompt_states(tmp_path, ["one", "and two"], encoder, None)
    assert [text.shape[1] for text in states] == [384, 384] and len(states[1]) > len(states[0])
    (path,) = tmp_path.iterdir()
    first = path.stat()
    again = prompt_states(tmp_path, ["one", "and two"], encoder, None)
    assert path.stat().st_ino == first.st_ino
    assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))
    (other,) = prompt_states(tmp_path, ["and two"], encoder, None)
    assert torch.equal(other, states[1])
    path.write_bytes(b"damaged")
    assert torch.equal(prompt_states(tmp_path, ["and two"], encoder, None)[0], other)


def test_a_renderer_that_does_not_fit_is_refused_by_name(folder):
    assert check_renderer(render_config(folder)) == []
    config = render_config(folder).model_copy(update={"tokenizer": None})
    assert "`tokenizer`" in check_renderer(config)[0].text
    for change, message in [
        ({"diffusion": "none"}, "renderer.diffusion = none"),
        ({"steps": 1}, "renderer.steps = 1"),
        ({"clean_frames": 3}, "renderer.clean_frames = 3"),
    ]:
        renderer = config.renderer.model_copy(update=change)
        problems = check_renderer(config.model_copy(update={"renderer": renderer}))
        assert any(message in problem.text for problem in problems)


def test_prompts_without_their_encoder_or_renderer_are_refused(folder):
    config = render_config(folder)
    assert check_prompts(config, 384, "model.text_dim") == []
    (problem,) = check_prompts(config, 20, "model.text_dim")
    assert "preview_text = minilm has states of width 384" in problem.text
    with pytest.raises(ConfigError, match="preview_prompts needs preview_text"):
        tiny_config(folder, preview_prompts=["a"])
    with pytest.raises(ConfigError, match="preview_prompts needs renderer"):
        tiny_config(folder, preview_prompts=["a"], preview_text={"kind": "minilm"})
