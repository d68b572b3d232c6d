"""Base class of all config classes, and the error for mistakes of the user.

Config classes are defined beside the code they configure, in modules that do not import torch, so
that the command line checks a config in milliseconds. They are frozen.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationInfo


class ConfigError(ValueError):
    """A mistake in the user's input.

    The message names the dotted key, the value and the way out.
    """


class Config(BaseModel):
    """Typed, frozen section of a config; unknown keys are errors (see `load`)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=()
    )


LENIENT = {"lenient": True}
"""Validation context of `landiff.configs.loader.load_leniently`."""


def refuse_values(info: ValidationInfo, messages: Sequence[str]) -> None:
    """Raise one ValueError with the messages of a validator that compares fields.

    Nothing is raised in a lenient validation, whose result only serves to find further problems.
    """
    if messages and info.context != LENIENT:
        raise ValueError("; ".join(messages))
