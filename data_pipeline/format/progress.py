"""Type of the progress callbacks of long-running commands."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[int, int, str], None]  # called with (done, total, what is counted)
