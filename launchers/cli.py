"""The `landiff` command: parses the command line, calls the command, turns errors into exit codes.

Nothing heavy is imported before the command is known, not even pydantic, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import locale
import os
import sys
from collections.abc import Callable

from landiff.launchers.arguments import build_parser, parse_command

FAILED = 1
CONFIG_ERROR = 2
DISK_ERROR = 3
INTERRUPTED = 130  # what a shell reports of a command that SIGINT ended
PIPE_CLOSED = 141  # what a shell reports of a command that SIGPIPE ended
READ_ONLY_COMMANDS = (
    "config",
    "completion",
    "zoo",
    "status",
    "logs",
    "plan",
    "doctor",
    "compare",
    "check",
)
"""Commands that only print: a closed standard output loses no work."""

Handler = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Errors are reported as one message. Exit codes: 1 job failed, 2 mistake in config or arguments,
    3 disk or file error, 130 interrupted, 141 standard output closed.
    """
    if argv is None:
        use_utf8()
    open_missing_streams()
    args = parse_command(build_parser(), sys.argv[1:] if argv is None else argv)

    from landiff.configs.base import ConfigError
    from landiff.configs.disk_errors import explain
    from landiff.launchers.local.children import end_without_collection, follow_parent

    follow_parent()
    if argv is None:  # this process ends with the command
        end_without_collection()
    try:
        if args.workdir:
            enter(args.workdir)
        code = run_command(args)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        sys.stdout.flush()
        return report(args, str(error), CONFIG_ERROR)
    except BrokenPipeError:
        silence_stdout()
        if args.command not in READ_ONLY_COMMANDS:
            report(
                args,
                "standard output was closed, so the command ended; redirect it to a file and run "
                "the same command again",
                PIPE_CLOSED,
            )
        return PIPE_CLOSED
    except OSError as error:
        return report(args, explain(error), DISK_ERROR)
    except KeyboardInterrupt:
        return report(args, "interrupted; run the same command again to resume", INTERRUPTED)


def enter(folder: str) -> None:
    """Makes a folder the working directory, and creates it if needed. Raises ConfigError."""
    from landiff.configs.base import ConfigError

    try:
        os.makedirs(folder, exist_ok=True)
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"-C {folder} cannot be the working directory: {error.strerror}; name a folder"
        ) from None


def run_command(args: argparse.Namespace) -> int:
    """Runs a parsed command and returns its exit code. Reports failures of jobs and of SLURM."""
    from landiff.configs.problems import require_none
    from landiff.launchers.commands import JobFailed, check_outputs
    from landiff.launchers.slurm.client import SlurmError

    handler = find_handler(args.command)
    require_none(check_outputs(args))
    try:
        return handler(args)
    except JobFailed as error:
        sys.stdout.flush()
        return report(args, str(error), FAILED)
    except SlurmError as error:
        sys.stdout.flush()
        return report(args, str(error), CONFIG_ERROR)


def find_handler(command: str) -> Handler:
    """The function behind a command. Imports only the modules of that command."""
    match command:
        case "shards":
            from landiff.launchers.data.commands import shards_command as handler
        case "precompute":
            from landiff.launchers.data.commands import precompute_command as handler
        case "captions":
            from landiff.launchers.data.captions import captions_command as handler
        case "data":
            from landiff.launchers.data.report import data_command as handler
        case "shapes":
            from landiff.launchers.data.shapes import shapes_command as handler
        case "attribute":
            from landiff.launchers.results.attribution import attribute_command as handler
        case "fit-codec":
            from landiff.launchers.data.shapes import fit_codec_command as handler
        case "train":
            from landiff.launchers.local.train import train_command as handler
        case "convert":
            from landiff.launchers.weights.commands import convert_command as handler
        case "zoo":
            from landiff.launchers.weights.commands import zoo_command as handler
        case "sample":
            from landiff.launchers.results.commands import sample_command as handler
        case "demo":
            from landiff.launchers.demo.commands import demo_command as handler
        case "evaluate":
            from landiff.launchers.results.commands import evaluate_command as handler
        case "config":
            from landiff.launchers.show_config import config_command as handler
        case "completion":
            from landiff.launchers.completion import completion_command as handler
        case "quickstart":
            from landiff.launchers.pipeline import quickstart_command as handler
        case "new":
            from landiff.launchers.project.new import new_command as handler
        case "check":
            from landiff.launchers.project.check import check_command as handler
        case "learn":
            from landiff.launchers.learn import learn_command as handler
        case "submit":
            from landiff.launchers.slurm.commands import submit_command as handler
        case "status":
            from landiff.launchers.slurm.commands import status_command as handler
        case "logs":
            from landiff.launchers.slurm.commands import logs_command as handler
        case "stop":
            from landiff.launchers.slurm.commands import stop_command as handler
        case "doctor":
            from landiff.launchers.slurm.commands import doctor_command as handler
        case "compare":
            from landiff.launchers.run.compare import compare_command as handler
        case "report":
            from landiff.launchers.run.report import report_command as handler
        case "plan":
            from landiff.launchers.budget.plan import plan_command as handler
        case _:
            raise AssertionError(f"no handler for the command {command!r}")
    return handler


def report(args: argparse.Namespace, message: str, code: int) -> int:
    """Prints an error message without secrets to standard error. Returns `code`."""
    from landiff.configs.secrets import redact

    print(redact(f"landiff {args.command}: {message}"), file=sys.stderr)
    return code


def use_utf8() -> None:
    """Restarts this process in Python's UTF-8 mode if the locale has another encoding.

    Paths, prompts and configs are UTF-8. A C or Latin-1 locale cannot read or print all of them.
    """
    encoding = locale.getencoding().lower().replace("-", "")
    if sys.flags.utf8_mode or encoding == "utf8" or not sys.executable:
        return
    os.environ["PYTHONUTF8"] = "1"  # for child processes too
    os.execv(sys.executable, sys.orig_argv)


def open_missing_streams() -> None:
    """Opens the null device for a standard stream that was closed before Python started."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until exit
            setattr(sys, name, stream)


def silence_stdout() -> None:
    """Discards buffered output, so that the interpreter does not fail on it at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until exit


if __name__ == "__main__":
    sys.exit(main())
