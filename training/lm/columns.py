"""Whether the columns of a data set fit the language model. Torch-free."""

from __future__ import annotations

from landiff.configs.problems import Problem, problems_of
from landiff.data_pipeline.format.column_checks import require_encoder
from landiff.data_pipeline.format.schema import Manifest
from landiff.model_zoo.registry import ZooEntry
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.lm.config import LMTrainConfig


def check_lm_tokenizer(config: LMTrainConfig, entry: ZooEntry) -> list[Problem]:
    """Whether the tokens of a tokenizer are those the model is for."""
    layout = TokenLayout.of(config.model)
    if TokenLayout.of(entry.config) == layout:
        return []
    return [
        Problem(
            f"tokenizer {entry.reference} makes tokens of {TokenLayout.of(entry.config)}, the "
            f"model is for {layout}; "
            "set model.codebook_size, iframe_tokens, pframe_tokens and segment_frames to the "
            "tokenizer's"
        )
    ]


def check_lm_columns(
    manifest: Manifest, config: LMTrainConfig, entry: ZooEntry | None
) -> list[Problem]:
    """Whether tokens and text states were made for this model.

    `entry`: the tokenizer named by the config, if any. Data with several numbers of frames has tokens of several
    sizes, given as 0 in the manifest; `batch.pack` checks the size of every sample.
    """
    model, layout = config.model, TokenLayout.of(config.model)
    tokens, text = (manifest.columns[name] for name in config.columns)
    problems = []
    if entry is not None:
        what = f"tokenizer = {entry.reference}"
        problems += problems_of(
            lambda: require_encoder(
                manifest, config.tokens_column, entry.fingerprint, what, adopt=config.data.adopt
            )
        )
    if text.shape[-1] and text.shape[-1] != model.text_dim:
        problems.append(
            Problem(
                f"column {config.text_column} was made by {text.encoder} with states of width "
                f"{text.shape[-1]}, "
                f"the model takes model.text_dim = {model.text_dim}"
            )
        )
    rows = text.shape[0] if len(text.shape) == 2 else 0
    if rows > model.max_text_tokens:
        problems.append(
            Problem(
                f"column {config.text_column} was made by {text.encoder} with {rows} rows for "
                "every clip, more than "
                f"model.max_text_tokens = {model.max_text_tokens}"
            )
        )
    if not tokens.shape[-1]:
        return problems
    try:
        length = layout.sequence_length(layout.num_frames(tokens.shape[-1]), max(rows, 1))
    except ValueError as error:
        problems.append(
            Problem(f"column {config.tokens_column} was made by {tokens.encoder}: {error}")
        )
        return problems
    if length > model.max_positions:
        problems.append(
            Problem(
                f"column {config.tokens_column} holds {tokens.shape[-1]} tokens for each clip, "
                f"which take {length} "
                f"positions with {max(rows, 1)} of text, more than model.max_positions = "
                f"{model.max_positions}"
            )
        )
    return problems
