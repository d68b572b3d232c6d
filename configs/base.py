"""The base class of every configuration in the project, and the one error a user can cause with it.

Configuration classes live beside the code they configure, in files that never import torch, so that the
command line can check a config in milliseconds. They are frozen: a resolved config is a value.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationInfo


class ConfigError(ValueError):
    """Something the user wrote is wrong: the message holds the dotted name, the value and the way out."""


class Config(BaseModel):
    """Typed, frozen, and strict about unknown keys (see `landiff.configs.loader.load`)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=()
    )


LENIENT = {"lenient": True}  # validation context of `landiff.configs.loader.load_leniently`


def refuse_values(info: ValidationInfo, messages: Sequence[str]) -> None:
    """Raises the messages of a validator that compares fields as one ValueError.

    In a lenient validation, whose result only serves to find further problems, nothing is raised.
    """
    if messages and info.context != LENIENT:
        raise ValueError("; ".join(messages))
