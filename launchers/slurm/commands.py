"""The commands for jobs and machines: `landiff submit`, `status`, `logs`, `stop`, `doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path


def submit_command(args: argparse.Namespace) -> int:
    """Submits a stage or the whole pipeline. Returns the exit code."""
    from landiff.launchers.slurm.submit import submit

    return submit(args, args.argv)


def stop_command(args: argparse.Namespace) -> int:
    """Asks a run to save a checkpoint and end. Returns the exit code."""
    from landiff.launchers.run.stop import stop

    print(stop(Path(args.run), args.restart))
    return 0


def status_command(args: argparse.Namespace) -> int:
    """Prints a table of runs. Returns the exit code."""
    from landiff.launchers.run.status import show_status

    return show_status(args.run, args.json)


def logs_command(args: argparse.Namespace) -> int:
    """Prints the log of a run. Returns the exit code."""
    from landiff.launchers.run.logs import show_logs

    return show_logs(Path(args.run), args.rank, args.lines, args.follow)


def doctor_command(args: argparse.Namespace) -> int:
    """Checks this machine for training. Returns the exit code."""
    from landiff.launchers.doctor.checks import doctor

    report = Path(args.report) if args.report else None
    return doctor(Path.cwd(), args.gpus, args.node, report)
