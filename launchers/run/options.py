"""Options of the commands that watch and stop runs. Torch-free."""

from __future__ import annotations

from landiff.launchers import help_texts
from landiff.launchers.command_options import Commands, add


def add_run_commands(commands: Commands) -> None:
    """Adds `landiff status`, `logs`, `compare`, `report` and `stop`."""
    add_status(commands)
    add_logs(commands)
    add_compare(commands)
    add_report(commands)
    add_stop(commands)


def add_status(commands: Commands) -> None:
    """`landiff status`."""
    status = add(
        commands, "status", "Show runs: job, step, speed, time left, restarts, last error."
    )
    status.add_argument("run", nargs="?", help="run folder (default: all below runs/)")
    status.add_argument("--all", action="store_true", help="all runs below runs/")
    status.add_argument("--json", action="store_true", help="print JSON")


def add_logs(commands: Commands) -> None:
    """`landiff logs`."""
    logs = add(commands, "logs", "Show the logs of a run, that of a failed rank first.")
    logs.add_argument("run", help="run folder")
    logs.add_argument(
        "--rank",
        type=int,
        help="rank to show (default: the batch script's log and the end of a failed rank's log)",
    )
    logs.add_argument(
        "--lines", type=int, default=40, metavar="N", help="number of last lines (default: 40)"
    )
    logs.add_argument(
        "--follow", action="store_true", help="print new lines as they are written, until Ctrl-C"
    )


def add_compare(commands: Commands) -> None:
    """`landiff compare`."""
    compare = add(
        commands,
        "compare",
        "Compare runs: config keys that differ, curves by step, last validation.",
        epilog=help_texts.COMPARE,
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folders, two or more")
    compare.add_argument(
        "--metric",
        action="append",
        metavar="TAG",
        help="metric to compare, with * and ? as wildcards (may be repeated; default: training and "
        "validation loss)",
    )
    compare.add_argument("--plot", metavar="FILE", help="also plot the curves to this PNG file")
    compare.add_argument("--json", action="store_true", help="print JSON, with all logged steps")


def add_report(commands: Commands) -> None:
    """`landiff report`."""
    report = add(
        commands,
        "report",
        "Write one HTML page about a run: curves, previews, validation, config, errors.",
    )
    report.add_argument("run", help="run folder")
    report.add_argument("--out", metavar="FILE", help="page to write (default: RUN/report.html)")


def add_stop(commands: Commands) -> None:
    """`landiff stop`."""
    stop = add(commands, "stop", "Ask a run to save a checkpoint and stop.")
    stop.add_argument("run", help="run folder")
    stop.add_argument("--restart", action="store_true", help="save and restart, as at a time limit")
