"""`landiff`: one command for every step of the walk. Imports nothing heavy before a command is known."""

from __future__ import annotations

import os
import sys

from launchers.arguments import build_parser, split_overrides


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn a mistake into one clear line: exit code 2 where it is the user's, 3 the disk's, 1 else."""
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    words, overrides = split_overrides(parser, argv)
    args, unknown = parser.parse_known_args(words)
    if args.command == "submit":  # the stage's own parser looks at what is left
        args, rest = parser.parse_known_args(argv)
        args.argv, args.rest, args.overrides = argv, rest, []
    else:
        takes_overrides = getattr(args, "config", None) is not None or args.command == "convert"
        bad = unknown or ([] if takes_overrides else overrides)
        if bad:
            parser.error(f"unrecognised argument {bad[0]!r}" + ("; overrides are written key=value" if takes_overrides else ""))
        args.overrides = overrides
    if args.workdir:
        os.makedirs(args.workdir, exist_ok=True)
        os.chdir(args.workdir)

    from configs.base import ConfigError
    from configs.disk_errors import explain
    from configs.secrets import redact
    from launchers import jobs
    from launchers.slurm import SlurmError

    try:
        return jobs.run(args)
    except (ConfigError, jobs.JobFailed, SlurmError) as error:
        print(redact(f"landiff {args.command}: {error}"), file=sys.stderr)
        return 1 if isinstance(error, jobs.JobFailed) else 2
    except OSError as error:
        print(redact(f"landiff {args.command}: {explain(error)}"), file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print(f"landiff {args.command}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
