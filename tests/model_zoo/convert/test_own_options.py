"""Options that the release does not have are refused in its formats, and kept in the zoo."""

from __future__ import annotations

import pytest

from landiff.configs import ConfigError
from landiff.model_zoo.convert.known_formats import write_target
from landiff.model_zoo.convert.parts import Part
from tests.model_zoo.convert.tiny import MODELS, part


@pytest.mark.parametrize("format", ["release", "diffusers"])
def test_a_model_with_own_options_is_refused(tmp_path, format):
    transformer = MODELS.diffusion.transformer.model_copy(
        update={"rotary_theta": 100.0, "prediction": "clean"}
    )
    tokenizer = MODELS.tokenizer.model_copy(update={"latent_positions": "grid"})
    for kind, config in (
        ("transformer", transformer),
        ("diffusion", MODELS.diffusion.model_copy(update={"transformer": transformer})),
        ("diffusion", MODELS.diffusion.model_copy(update={"control_input": "condition"})),
        ("diffusion", MODELS.diffusion.model_copy(update={"control_projections": "beside"})),
        ("tokenizer", tokenizer),
        ("lm", MODELS.lm.model_copy(update={"grid_condition": True})),
    ):
        tensors = part(kind).tensors
        with pytest.raises(ConfigError, match="use --to zoo") as error:
            write_target(tmp_path / kind, format, [Part(kind, config, tensors)], {})
        assert ("latent_positions = grid" in str(error.value)) == (kind == "tokenizer")
        assert not (tmp_path / kind).exists()
