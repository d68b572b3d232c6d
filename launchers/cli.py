"""`landiff`: one command for every step. Imports nothing heavy before a command is known."""

from __future__ import annotations

import argparse
import locale
import os
import sys

from landiff.launchers.arguments import build_parser, parse_command
from landiff.launchers.local.children import follow_parent

PIPE_CLOSED = 141  # what a shell reports of a command that SIGPIPE ended
READERS = (
    "config",
    "completion",
    "zoo",
    "status",
    "logs",
    "plan",
    "doctor",
)  # nothing is lost when nobody reads on


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Returns its exit code. A mistake is reported as one clear line: code 2 for the user's, 3 for the
    disk's, else 1; 141 where standard output was closed.
    """
    if argv is None:
        use_utf8()
    follow_parent()
    open_missing_streams()
    parser = build_parser()
    args = parse_command(parser, sys.argv[1:] if argv is None else argv)

    from landiff.configs.base import ConfigError
    from landiff.configs.disk_errors import explain
    from landiff.configs.secrets import redact

    try:
        if args.workdir:
            os.makedirs(args.workdir, exist_ok=True)
            os.chdir(args.workdir)
        code = run_command(args)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        sys.stdout.flush()
        print(redact(f"landiff {args.command}: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:
        silence_stdout()
        if args.command not in READERS:
            print(
                f"landiff {args.command}: standard output was closed, so the command ended; "
                "redirect it to a file and run "
                "the same command again",
                file=sys.stderr,
            )
        return PIPE_CLOSED
    except OSError as error:
        print(redact(f"landiff {args.command}: {explain(error)}"), file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print(
            f"landiff {args.command}: interrupted; run the same command again to resume",
            file=sys.stderr,
        )
        return 130


def run_command(args: argparse.Namespace) -> int:
    """Exit code of a parsed command; failures of jobs and of SLURM are reported here."""
    from landiff.configs.secrets import redact
    from landiff.launchers import jobs
    from landiff.launchers.slurm.client import SlurmError

    try:
        return jobs.run(args)
    except (jobs.JobFailed, SlurmError) as error:
        sys.stdout.flush()
        print(redact(f"landiff {args.command}: {error}"), file=sys.stderr)
        return 1 if isinstance(error, jobs.JobFailed) else 2


def use_utf8() -> None:
    """Starts this process again in Python's UTF-8 mode where the locale has another encoding.

    Paths, prompts and configs are UTF-8; in a C or Latin-1 locale they could not be read or printed.
    """
    encoding = locale.getencoding().lower().replace("-", "")
    if sys.flags.utf8_mode or encoding == "utf8" or not sys.executable:
        return
    os.environ["PYTHONUTF8"] = "1"  # for child processes too
    os.execv(sys.executable, sys.orig_argv)


def open_missing_streams() -> None:
    """Sends output nowhere where the descriptor was closed before Python started."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
            setattr(sys, name, stream)


def silence_stdout() -> None:
    """What is still buffered goes nowhere, so that the interpreter does not fail on it at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end


if __name__ == "__main__":
    sys.exit(main())
