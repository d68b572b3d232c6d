"""torchrun without a traceback of its own: the ranks have said why they failed, this says how they ended.

`python -m launchers.torchrun TORCHRUN_OPTIONS... -m MODULE ARGUMENTS...`; the exit code is that of the rank that failed
first, 128 + n where signal n ended it.
"""

from __future__ import annotations

import logging
import sys


def main(arguments: list[str]) -> int:
    """Run torchrun; what it raises about itself goes on."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a line for every rank that it ends
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # nobody else can say so
            print(f"rank {rank} was ended by {failure.signal_name()}", file=sys.stderr, flush=True)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
