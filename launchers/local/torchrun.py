"""torchrun without a traceback of its own: ranks say why they failed, this says how they ended.

`python -m landiff.launchers.local.torchrun TORCHRUN_OPTIONS... -m MODULE ARGUMENTS...`; the exit code is that of
the rank that failed first, 128 + n where signal n ended it. It ends with the process that started
it, and the ranks end with it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from landiff.launchers.local.children import PARENT, follow_parent
from landiff.training.checkpoint.errors import RankLost, write_cause

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def main(arguments: list[str]) -> int:
    """Run torchrun; what it raises about itself goes on."""
    follow_parent()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ[PARENT] = str(os.getpid())  # of the ranks
    # It would log a line for every rank that it ends, and leave a folder in the temporary directory.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun([f"--log-dir={os.devnull}", *arguments])
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        if failure.exitcode >= 0:
            return failure.exitcode
        said = f"rank {rank} was ended by {failure.signal_name()}"  # the rank could not say so
        print(said, file=sys.stderr, flush=True)
        run = run_folder(arguments)
        if run is not None:
            write_cause(run, rank, RankLost(said))
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """(rank, failure) that caused the others.

    That is the first one; of several in the same second one that a signal ended, since its peers
    fail because of it. torchrun itself ends the others with SIGTERM.
    """
    when = min(failure.timestamp for failure in failures.values())  # in seconds
    first = {rank: failure for rank, failure in failures.items() if failure.timestamp == when}
    killed = {
        rank: failure
        for rank, failure in first.items()
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM
    }
    return next(iter((killed or first).items()))


def run_folder(arguments: list[str]) -> Path | None:
    """Of the ranks that are started through landiff.launchers.local.rank."""
    if "landiff.launchers.local.rank" not in arguments:
        return None
    words = arguments[arguments.index("landiff.launchers.local.rank") + 1 :]
    return Path(next(word for word in words if not word.startswith("--")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
