"""Where the running code lies: the source checkout, an installed wheel, or a copy made for a job."""

from __future__ import annotations

from pathlib import Path

import landiff

IMPORT_ROOT = Path(landiff.__file__).resolve().parent.parent
"""The folder that must be on a child process's PYTHONPATH so that it imports this code."""
