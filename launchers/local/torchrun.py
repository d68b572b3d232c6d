"""torchrun without its own traceback. Ranks report why they failed.

    python -m landiff.launchers.local.torchrun TORCHRUN_OPTIONS... -m MODULE ARGUMENTS...

The exit code is that of the rank that failed first, or 128 + n if signal n ended it. The process
ends with its parent, and the ranks end with it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from landiff.launchers.local.children import PARENT, end_without_collection, follow_parent
from landiff.training.checkpoint.errors import RankLost, write_cause

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def main(arguments: list[str]) -> int:
    """Run torchrun. Returns the exit code. Errors of torchrun itself are raised."""
    follow_parent()
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ[PARENT] = str(os.getpid())  # of the ranks
    # Otherwise torchrun logs a line for every rank that it ends.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = [f"--log-dir={os.devnull}"]
    if "--standalone" in arguments:
        # The name of a container or laptop often has no address, and ranks would wait for it.
        options.append("--local-addr=127.0.0.1")
    try:
        # Without a log folder, torchrun creates one in the temporary directory and leaves it there.
        torchrun([*options, *arguments])
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        if failure.exitcode >= 0:
            return failure.exitcode
        # The rank could not report it itself.
        message = f"rank {rank} was ended by {failure.signal_name()}"
        print(message, file=sys.stderr, flush=True)
        run = run_folder(arguments)
        if run is not None:
            write_cause(run, rank, RankLost(message))
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Rank and failure that caused the other failures.

    This is the first failure. Of several in the same second, it is one of a rank that a signal
    killed, since its peers fail because of it. torchrun itself ends the others with SIGTERM.
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
    """Run folder of ranks that run through landiff.launchers.local.rank; None for others."""
    if "landiff.launchers.local.rank" not in arguments:
        return None
    words = arguments[arguments.index("landiff.launchers.local.rank") + 1 :]
    return Path(next(word for word in words if not word.startswith("--")))


if __name__ == "__main__":
    end_without_collection()
    sys.exit(main(sys.argv[1:]))
