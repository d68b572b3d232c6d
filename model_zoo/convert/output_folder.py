"""Folders that appear under their final name complete or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from landiff.configs import ConfigError, ownership
from landiff.configs.files import commit_dir, remove_abandoned, temporary_name, write_text
from landiff.configs.ownership import OWNER

PROVENANCE = "provenance.json"


@contextmanager
def new_folder(target: Path, provenance: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `target` at the end, or removed on an error.

    `provenance` is written into it. Raises ConfigError if `target` exists, OwnedError if another
    process is writing it.
    """
    with ownership.take(target.with_name(f".{target.name}{OWNER}"), str(target)):
        if target.exists():
            raise ConfigError(f"{target} exists already; name a folder that doesn't")
        with _temporary_folder(target, provenance) as temporary:
            yield temporary


@contextmanager
def _temporary_folder(target: Path, provenance: Mapping[str, Any]) -> Iterator[Path]:
    """`new_folder` without the checks."""
    remove_abandoned(target.parent, target.name)
    temporary = temporary_name(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        write_text(temporary / PROVENANCE, json.dumps(provenance, indent=1, sort_keys=True))
        commit_dir(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
