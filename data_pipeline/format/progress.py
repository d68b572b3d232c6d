"""Type of the progress callbacks of the data pipeline."""

from __future__ import annotations

from collections.abc import Callable

# Called as `progress(done, total, what)`: items finished, items in total (of this task), and a
# short text for the progress line, such as the stage or the counts of rejected clips.
ProgressCallback = Callable[[int, int, str], None]
