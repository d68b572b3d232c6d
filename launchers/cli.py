"""`landiff`: one command for every step of the walk. Imports nothing heavy before a command is known."""

from __future__ import annotations

import argparse
import os
import sys

WALK = """\
The walk, in order; every step can be run alone, stopped and run again:

  landiff shards      --config nano/shards         clips + captions -> raw shards        data/raw
  landiff precompute  --config nano/features       vision features of the clips         data/features
  landiff train tokenizer --config nano/tokenizer  semantic tokenizer                   runs/tokenizer
  landiff convert     runs/tokenizer --name tokenizer        checkpoint -> zoo          zoo/tokenizer
  landiff precompute  --config nano/precompute     tokens, latents, text states         data/tokens ...
  landiff train lm    --config nano/lm             language model (Megatron-core)       runs/lm
  landiff train diffusion --config nano/diffusion-main      main transformer (DeepSpeed)
  landiff convert     runs/diffusion-main --name main
  landiff train diffusion --config nano/diffusion-control   control branch, main frozen
  landiff convert     runs/lm --name lm;  landiff convert runs/diffusion-control --name diffusion
  landiff sample      --config nano/sample "a rabbit runs over a meadow"                mp4
  landiff evaluate    --config nano/evaluate       do the models use their conditions?

  landiff quickstart  --out runs/quickstart        all of it, on the packaged clips, on one CPU
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="landiff", description="Pretrain LanDiff text-to-video models, from clips to samples.",
        epilog=WALK, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-C", dest="workdir", metavar="DIR", help="run as if started in DIR (relative paths in configs are below it)")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help: str, *, config: str | None = None, epilog: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, epilog=epilog,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        if config:
            configurable(sub, config)
        return sub

    def configurable(sub: argparse.ArgumentParser, example: str) -> None:
        sub.add_argument("--config", required=True, metavar="NAME", help=f"packaged name ({example}) or a .yaml file")
        sub.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan; change nothing")

    shards = add("shards", "Cut videos into captioned clips and write WebDataset shards.", config="nano/shards",
                 epilog=OVERRIDES.format(example="num_frames=17 source=videos/captions.csv"))
    shards.add_argument("action", nargs="?", choices=["run", "finalize", "status"], default="run",
                        help="run (default; finalizes where it is the only task), finalize (write the manifest), status")
    shards.add_argument("--task", metavar="I/N", help="this task's share; SLURM arrays set it by themselves")
    precompute = add("precompute", "Compute columns (features, tokens, latents, text) for raw shards.", config="nano/precompute",
                     epilog=OVERRIDES.format(example="batch_size=8"))
    precompute.add_argument("action", nargs="?", choices=["run", "finalize", "status"], default="run",
                            help="run (default; finalizes when nothing is left), finalize (merge into the manifest), status")
    precompute.add_argument("--task", metavar="I/N", help="this task's share; SLURM arrays set it by themselves")

    train = commands.add_parser("train", help="Train one of the three models.", description="Train one of the three models.")
    stages = train.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for stage, text in TRAINERS.items():
        sub = stages.add_parser(stage, help=text, description=text, epilog=OVERRIDES.format(example="loop.steps=100 optim.lr=3e-4"),
                                formatter_class=argparse.RawDescriptionHelpFormatter)
        configurable(sub, f"nano/{stage if stage != 'diffusion' else 'diffusion-main'}")
        sub.add_argument("--nproc", type=int, metavar="N", help="processes on this machine (default: one per GPU, or 1)")

    convert = add("convert", "Export the newest checkpoint of a run to the zoo.")
    convert.add_argument("run", help="run folder, or one checkpoint folder in it")
    convert.add_argument("--name", required=True, help="name in the zoo")
    convert.add_argument("--zoo", default="zoo", help="zoo folder (default: zoo)")
    convert.add_argument("--dry-run", action="store_true", help="say what would be exported; change nothing")

    zoo = add("zoo", "Look at the zoo: list, show, verify.")
    zoo.add_argument("action", choices=["list", "show", "verify"])
    zoo.add_argument("reference", nargs="?", help="name, name@fingerprint or path")
    zoo.add_argument("--zoo", default="zoo", help="zoo folder (default: zoo)")

    sample = add("sample", "Prompts -> videos.", config="nano/sample",
                 epilog=OVERRIDES.format(example="seed=7 guidance=6.5"))
    sample.add_argument("prompts", nargs="*", metavar="PROMPT_OR_KEY=VALUE", help="prompts (default: those of the config)")
    add("evaluate", "Do the trained models use their conditions? Losses with the right and with wrong ones.", config="nano/evaluate",
        epilog=OVERRIDES.format(example="seeds=5"))

    config = add("config", "List the packaged configs, or print one.")
    config.add_argument("name", nargs="?", help="packaged name or .yaml file")

    quickstart = add("quickstart", "The whole walk on the packaged clips, on one CPU. Run it again to continue.")
    quickstart.add_argument("--out", default="runs/quickstart", help="folder of everything it makes (default: runs/quickstart)")
    quickstart.add_argument("--prompt", action="append", help="prompt to sample at the end (may be repeated)")
    quickstart.add_argument("--dry-run", action="store_true", help="print the commands; run nothing")
    return parser


OVERRIDES = """\
Any key of the config can be set behind the options, e.g.  {example}
An unknown key is refused and the nearest known one is named.
"""

TRAINERS = {
    "tokenizer": "Semantic tokenizer (torch DDP).",
    "lm": "Language model over semantic tokens (Megatron-core: tensor, pipeline, sequence, data parallel).",
    "diffusion": "Diffusion model (DeepSpeed ZeRO): the main transformer, then its control branch.",
}


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn a user's mistake into one clear line and exit code 2."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    unknown = [a for a in rest if a.startswith("-") or "=" not in a]
    takes_overrides = getattr(args, "config", None) is not None
    if unknown or (rest and not takes_overrides):
        bad = unknown or rest
        parser.error(f"unrecognised argument {bad[0]!r}" + ("; overrides are written key=value" if takes_overrides else ""))
    args.overrides = rest
    if args.workdir:
        os.makedirs(args.workdir, exist_ok=True)
        os.chdir(args.workdir)

    from configs.base import ConfigError
    from launchers import jobs

    try:
        return jobs.run(args)
    except (ConfigError, jobs.JobFailed) as error:
        print(f"landiff {args.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"landiff {args.command}: {error.filename or ''}: {error.strerror or error}".replace(": :", ":"), file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print(f"landiff {args.command}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
