"""Check whether the columns of a data set fit the language model. Torch-free."""

from __future__ import annotations

from landiff.configs.problems import Problem, problems_of
from landiff.data_pipeline.format.column_checks import require_encoder
from landiff.data_pipeline.format.schema import Column, Manifest
from landiff.model_zoo.config import TokenizerConfig
from landiff.model_zoo.registry import ZooEntry
from landiff.model_zoo.token_layout import TokenLayout
from landiff.training.checks import bucket_shapes
from landiff.training.lm.config import LMTrainConfig


def check_lm_tokenizer(config: LMTrainConfig, entry: ZooEntry) -> list[Problem]:
    """Whether a tokenizer has the token layout of the model."""
    assert isinstance(entry.config, TokenizerConfig), entry.reference
    layout = TokenLayout.of(config.model)
    found = TokenLayout.of(entry.config)
    if found == layout:
        return []
    return [
        Problem(
            f"tokenizer {entry.reference} makes tokens of {found}, the model is for {layout}; set "
            "model.codebook_size, iframe_tokens, pframe_tokens and segment_frames to the "
            "tokenizer's"
        )
    ]


def check_lm_columns(
    manifest: Manifest, config: LMTrainConfig, entry: ZooEntry | None
) -> list[Problem]:
    """Whether tokens and text states were made for this model.

    `entry`: the tokenizer that the config names, if any.
    """
    problems = []
    if entry is not None:
        what = f"tokenizer = {entry.reference}"
        problems += problems_of(
            lambda: require_encoder(
                manifest, config.tokens_column, entry.fingerprint, what, adopt=config.data.adopt
            )
        )
    text = manifest.columns[config.text_column]
    problems += _check_text(text, config)
    problems += _check_length(manifest.columns[config.tokens_column], text, config)
    return problems


def _rows(text: Column) -> int:
    """Rows of each clip's text states, 0 if clips differ."""
    return text.shape[0] if len(text.shape) == 2 else 0


def _check_text(text: Column, config: LMTrainConfig) -> list[Problem]:
    """Whether the text states have the model's width and not too many rows."""
    model = config.model
    width = text.shape[-1]
    problems = []
    if width and width != model.text_dim:
        problems.append(
            Problem(
                f"column {config.text_column} was made by {text.encoder} with states of width "
                f"{width}, the model takes model.text_dim = {model.text_dim}"
            )
        )
    rows = _rows(text)
    if rows > model.max_text_tokens:
        problems.append(
            Problem(
                f"column {config.text_column} was made by {text.encoder} with {rows} rows for "
                f"every clip, more than model.max_text_tokens = {model.max_text_tokens}"
            )
        )
    return problems


def _check_length(tokens: Column, text: Column, config: LMTrainConfig) -> list[Problem]:
    """Whether tokens and text together fit into the model's positions.

    Clips with different numbers of frames have different numbers of tokens, given as 0 in the
    manifest. `batch.pack` checks these sample by sample.
    """
    counts = {"clip": tokens.shape[-1]}
    if config.data.buckets is not None:
        shapes = bucket_shapes(config.data, config.tokens_column)
        counts = {f"clip of {name}": shape[-1] for name, shape in shapes.items()}
    problems = []
    for what, num_tokens in counts.items():
        if num_tokens:
            problems += _check_count(num_tokens, what, tokens, text, config)
    return problems


def _check_count(
    num_tokens: int, what: str, tokens: Column, text: Column, config: LMTrainConfig
) -> list[Problem]:
    """Whether a number of tokens is that of whole frames and fits into the model's positions."""
    layout = TokenLayout.of(config.model)
    rows = max(_rows(text), 1)
    try:
        length = layout.sequence_length(layout.num_frames(num_tokens), rows)
    except ValueError as error:
        text_of_problem = f"column {config.tokens_column} was made by {tokens.encoder}: {error}"
        return [Problem(text_of_problem)]
    if length <= config.model.max_positions:
        return []
    return [
        Problem(
            f"column {config.tokens_column} holds {num_tokens} tokens for each {what}, which take "
            f"{length} positions with {rows} of text, more than model.max_positions = "
            f"{config.model.max_positions}"
        )
    ]
