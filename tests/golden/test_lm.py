"""The language model against numbers of the reference implementation."""

import pytest
import torch
from torch.nn import functional

from landiff.model_zoo.config import TokenSamplingConfig
from landiff.model_zoo.convert.formats.release_lm import RULES
from landiff.model_zoo.convert.rules import apply_rules
from landiff.model_zoo.layers import sinusoid
from landiff.model_zoo.lm import MicroConditions
from landiff.model_zoo.sample.tokens import Prompts, sample_tokens
from landiff.model_zoo.token_layout import CODE, IGNORE
from tests.golden.released_models import close, load_lm


@pytest.mark.golden("lm_teacher_forced")
def test_teacher_forced(case):
    model, given, wanted = load_lm(case), case.inputs, case.outputs
    length = given["text_embeddings"].shape[1]
    rows = [model.layout.training_row(codes, length) for codes in given["codes"].numpy()]
    ids = torch.stack([torch.from_numpy(row.input_ids) for row in rows])
    assert torch.equal(ids, wanted["tokens"])
    assert ids.shape[1] == case.config["sequence_length"]
    frames = [model.layout.num_frames(len(codes)) for codes in given["codes"]]
    assert frames == given["frames"].tolist()
    masks = torch.stack(
        [torch.from_numpy(model.layout.loss_mask(count, length)) for count in frames]
    )
    assert torch.equal(masks, wanted["loss_mask"].bool())

    scalars = given["frames"], given["motion_score"]
    close(model.micro(*scalars), wanted["micro_condition"])
    features = model.embed(ids, given["text_embeddings"], *scalars)
    close(features, wanted["input_features"])
    outputs = []
    model.blocks[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    logits = model(ids, given["text_embeddings"], *scalars)
    close(outputs[0], wanted["block0_output"])
    close(logits, wanted["logits"])
    everyone = torch.ones(len(ids), dtype=torch.bool)
    close(
        model(ids, given["text_embeddings"], *scalars, drop_text_B=everyone),
        wanted["uncond_logits"],
    )

    targets = torch.stack([torch.from_numpy(row.targets) for row in rows])
    weights = torch.stack([torch.from_numpy(row.loss_weights) for row in rows])
    losses = functional.cross_entropy(logits.mT, targets, reduction="none") * weights
    close(losses.sum(1) / weights.sum(1), wanted["loss_per_sample"], 1e-5)
    close((losses.sum() / weights.sum())[None], wanted["loss_packed"], 1e-5)


@pytest.mark.golden("lm_micro_condition")
def test_micro_conditions(case):
    sizes, given, wanted = case.config, case.inputs, case.outputs
    assert sizes["order"] == ["frames", "motion_score"]
    conditions = MicroConditions(sizes["out_dim"], sizes["hidden"], sizes["freq_dim"])
    rules = [rule for rule in RULES if "micro" in rule.ours]
    ours = apply_rules(case.weights, rules, "to_ours")
    conditions.load_state_dict(
        {name.removeprefix("micro."): tensor for name, tensor in ours.items()}
    )
    close(sinusoid(given["frames"], sizes["freq_dim"]), wanted["sinusoid_frames"], 1e-5)
    close(sinusoid(given["motion_score"], sizes["freq_dim"]), wanted["sinusoid_motion"], 1e-5)
    close(conditions(given["frames"], given["motion_score"]), wanted["micro_condition"], 1e-5)
    count = len(given["frames"])
    close(
        conditions(torch.ones(count), torch.zeros(count)), wanted["micro_condition_defaults"], 1e-5
    )


class Replay:
    """Checks the probabilities of each step and continues with the recorded id."""

    def __init__(self, probabilities, drawn):
        self.probabilities = probabilities
        self.drawn = drawn
        self.steps = 0

    def __call__(self, probabilities_BV, step):
        assert step == self.steps
        self.steps += 1
        close(probabilities_BV[0], self.probabilities[step])
        return self.drawn[step : step + 1]


@pytest.mark.golden("lm_sampling")
def test_sampling(case):
    model, given, wanted = load_lm(case), case.inputs, case.outputs
    text = given["text_embeddings"]
    for run in case.config["runs"]:
        name, frames = run["name"], run["num_frames"]
        config = TokenSamplingConfig(
            guidance=run.get("guidance_scale") or 1.0,
            temperature=run.get("temperature") or 1.0,
            top_k=run.get("top_k"),
            top_p=run.get("top_p"),
            predict_end=run.get("predict_eos") or False,
            reference_behaviour=True,
        )
        prompts = Prompts(text, given[f"{name}.motion_score"])
        replay = Replay(wanted[f"{name}.probs"], wanted[f"{name}.drawn"])
        sampled = sample_tokens(model, prompts, frames, config, draw=replay)
        assert replay.steps == run["steps"]
        found = int(sampled.num_frames_B)
        assert found == frames or (
            config.predict_end and wanted[f"{name}.drawn"][-1] == model.layout.eos
        )
        assert torch.equal(
            sampled.codes_BK[:, : model.layout.num_codes(found)], wanted[f"{name}.codes"]
        )
        if run.get("top_k") == 1 and not config.predict_end:
            # Greedy sampling uses no random numbers: any seed gives these codes.
            greedy = sample_tokens(model, prompts, frames, config, seeds=[0])
            assert torch.equal(greedy.codes_BK, wanted[f"{name}.codes"])

        fed, raw = wanted[f"{name}.fed_tokens"], wanted[f"{name}.raw_logits"]
        template = torch.from_numpy(model.layout.template(frames))[1 : 1 + len(fed)]
        assert torch.equal(fed[template != CODE], template[template != CODE])
        start = model.layout.first_start(text.shape[1])
        prompt_ids = torch.full((start + 1,), IGNORE)
        prompt_ids[0] = model.layout.bos
        prompt_ids[-1] = model.layout.start_iframe
        ids = torch.cat([prompt_ids, fed])[None]
        for row in range(raw.shape[1]):  # with text, then without
            logits = model(
                ids,
                text,
                given[f"{name}.frames"],
                given[f"{name}.motion_score"],
                torch.tensor([row == 1]),
            )
            close(logits[0, start:], raw[:, row])
