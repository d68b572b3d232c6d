"""Location of the running code: a source checkout, an installed wheel, or a copy made for a job."""

from __future__ import annotations

from pathlib import Path

import landiff

IMPORT_ROOT = Path(landiff.__file__).resolve().parent.parent
"""Folder that must be on the PYTHONPATH of a child process for it to import this code."""
