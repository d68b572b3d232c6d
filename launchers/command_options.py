"""Options of the `landiff` commands that no subpackage owns, and what all commands share.

Torch-free. The options of the others are in `options.py` of their subpackage.

The function behind each command is listed in `landiff.launchers.cli.find_handler`.
"""

from __future__ import annotations

import argparse

from landiff.launchers import help_texts
from landiff.launchers.help_texts import TRAINERS

Commands = argparse._SubParsersAction
STAGES = ("shards", "precompute", *TRAINERS, "convert", "sample", "evaluate")
TASK = "do part I of N of the work, counted from 0; set automatically in SLURM arrays"


def add_stage_commands(commands: Commands) -> None:
    """Adds `landiff shards`, `precompute` and `train`."""
    add_shards(commands)
    add_precompute(commands)
    add_train(commands)


def add_other_commands(commands: Commands) -> None:
    """Adds `landiff quickstart`, `submit`, `plan`, `doctor`, `config` and `completion`."""
    add_quickstart(commands)
    add_submit(commands)
    add_plan(commands)
    add_doctor(commands)
    add_config(commands)
    add_completion(commands)


def add(
    commands: Commands,
    name: str,
    help: str,
    *,
    config: str | None = None,
    default_config: str | None = None,
    epilog: str | None = None,
    allow_abbrev: bool = True,
) -> argparse.ArgumentParser:
    """Add the command `name`. With the example `config`, it gets --config and --dry-run.

    `default_config`: taken without --config; None makes the option required.
    """
    command = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=epilog,
        allow_abbrev=allow_abbrev,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if config:
        default = f" (default: {default_config})" if default_config else ""
        command.add_argument(
            "--config",
            required=default_config is None,
            default=default_config,
            metavar="NAME",
            help=f"packaged config ({config}) or a .yaml file{default}",
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="print the resolved config and what the command would do; change nothing",
        )
    return command


def add_shards(commands: Commands) -> None:
    """`landiff shards`."""
    shards = add(
        commands,
        "shards",
        "Cut videos into captioned clips and write WebDataset shards.",
        config="nano/shards",
        epilog=help_texts.OVERRIDES.format(example="num_frames=17 source=videos/captions.csv"),
    )
    shards.add_argument(
        "action",
        nargs="?",
        choices=["run", "finalize", "status"],
        default="run",
        help="run (default; also finalizes if there is one task), finalize (write the manifest), "
        "status",
    )
    shards.add_argument("--task", metavar="I/N", help=TASK)


def add_precompute(commands: Commands) -> None:
    """`landiff precompute`."""
    precompute = add(
        commands,
        "precompute",
        "Compute columns (features, tokens, latents, text) for raw shards.",
        config="nano/precompute",
        epilog=help_texts.OVERRIDES.format(example="batch_size=8"),
    )
    add_column_options(precompute)


def add_column_options(command: argparse.ArgumentParser, **further: str) -> None:
    """The options of commands that compute columns. `further`: more actions with their help."""
    command.add_argument(
        "action",
        nargs="?",
        default="run",
        choices=["run", "finalize", "status", "retry", "verify", "estimate", *further],
        help="run (default; also finalizes once every column is complete), finalize (merge columns "
        "into the manifest), status (progress and speed), retry (print the array expression of "
        "missing tasks), verify (recompute and compare some shards), estimate (disk space and "
        "hours, before a run)" + "".join(f", {name} ({text})" for name, text in further.items()),
    )
    command.add_argument(
        "--no-finalize",
        action="store_true",
        help="do not merge columns into the manifest; for jobs that compute columns in parallel",
    )
    command.add_argument("--task", metavar="I/N", help=TASK)
    command.add_argument(
        "--tasks",
        type=int,
        metavar="N",
        help="number of tasks of the original array, if only some of its tasks run again",
    )
    command.add_argument(
        "--sample",
        default="1%",
        metavar="FRACTION",
        help="verify: fraction of the finished shards, e.g. 1%% or 0.5 (at least one shard)",
    )
    command.add_argument(
        "--clips", type=int, default=16, metavar="N", help="estimate: number of clips to measure"
    )


def add_train(commands: Commands) -> None:
    """`landiff train`, with one sub-command for each trainer."""
    train = add(commands, "train", "Train one of the three models.")
    trainers = train.add_subparsers(dest="stage", metavar="STAGE", required=True)
    configs = {"tokenizer": "nano/tokenizer", "lm": "nano/lm", "diffusion": "nano/diffusion-main"}
    for name, text in TRAINERS.items():
        trainer = add(
            trainers,
            name,
            text,
            config=configs[name],
            epilog=help_texts.OVERRIDES.format(example="loop.steps=100 optim.lr=3e-4"),
        )
        trainer.add_argument(
            "--nproc",
            type=int,
            metavar="N",
            help="number of processes on this machine (default: one per GPU; without GPUs, as many "
            "as one model replica needs)",
        )
        trainer.add_argument("--take-over", action="store_true", help=help_texts.TAKE_OVER)
        trainer.add_argument(
            "--adopt",
            action="store_true",
            help="use columns whose fingerprints do not match (data.adopt=true)",
        )


def add_config(commands: Commands) -> None:
    """`landiff config`."""
    config = add(
        commands,
        "config",
        "List the packaged configs, print one, or explain a key.",
        epilog=help_texts.CONFIG,
    )
    config.add_argument("name", nargs="?", help="packaged config, .yaml file, or `explain`")
    config.add_argument("key", nargs="?", metavar="KEY", help="explain: dotted key of a config")
    config.add_argument(
        "--config",
        dest="explained_config",
        metavar="NAME",
        help="explain: packaged config or .yaml file that has the key (default: all commands)",
    )


def add_completion(commands: Commands) -> None:
    """`landiff completion`."""
    completion = add(
        commands,
        "completion",
        "Print a shell completion script for landiff.",
        epilog=help_texts.COMPLETION,
    )
    completion.add_argument("shell", choices=["bash", "zsh", "fish"], help="shell to print it for")


def add_quickstart(commands: Commands) -> None:
    """`landiff quickstart`."""
    quickstart = add(
        commands,
        "quickstart",
        "Run the whole pipeline on this machine, by default with small models on generated and "
        "packaged clips. Run it again to resume.",
    )
    quickstart.add_argument(
        "--preset",
        default="quickstart",
        metavar="PRESET",
        help=f"{help_texts.PRESET} (default: quickstart)",
    )
    quickstart.add_argument(
        "--out",
        help="output folder (default: runs/quickstart, or the project folder given by --preset)",
    )
    quickstart.add_argument(
        "--prompt", action="append", help="prompt to sample at the end (may be repeated)"
    )
    add_selection(quickstart, "")
    quickstart.add_argument(
        "--dry-run", action="store_true", help="print the commands; run nothing"
    )


def add_selection(command: argparse.ArgumentParser, prefix: str) -> None:
    """--from and --skip of a command that runs the pipeline; `prefix` begins their help."""
    command.add_argument(
        "--from",
        dest="first",
        metavar="STAGE",
        help=f"{prefix}first stage to run; the outputs of earlier stages must exist",
    )
    command.add_argument(
        "--skip",
        action="append",
        metavar="STAGE",
        help=f"{prefix}stage to skip (may be repeated); the model of a skipped training stage "
        "must be in the zoo",
    )


def add_doctor(commands: Commands) -> None:
    """`landiff doctor`."""
    doctor = add(
        commands,
        "doctor",
        "Check this machine for training: versions, GPUs, all-reduce, disk, memory, clock.",
    )
    doctor.add_argument(
        "--gpus", type=int, default=0, metavar="N", help="number of GPUs this machine must have"
    )
    doctor.add_argument(
        "--node", action="store_true", help="only the quick checks that jobs run on each node"
    )
    doctor.add_argument(
        "--report", metavar="DIR", help="also write DIR/<node>.ok or DIR/<node>.bad"
    )


def add_plan(commands: Commands) -> None:
    """`landiff plan`."""
    plan = add(
        commands,
        "plan",
        "Estimate memory, FLOPs and duration of a training config. Needs no GPU.",
        epilog=help_texts.OVERRIDES.format(example="parallel.tensor=4 data.micro_batch_size=2"),
    )
    plan.add_argument(
        "stage",
        choices=[*TRAINERS, "all"],
        metavar="STAGE",
        help="tokenizer, lm or diffusion; or all: the sum over all training stages of --preset",
    )
    config = plan.add_mutually_exclusive_group(required=True)
    config.add_argument(
        "--config", metavar="NAME", help="packaged config (landiff/lm) or a .yaml file"
    )
    config.add_argument(
        "--preset",
        metavar="PRESET",
        help=f"{help_texts.PRESET}; for diffusion, phase `main` is planned",
    )
    plan.add_argument(
        "--gpus", type=int, default=8, metavar="N", help="total number of GPUs (default: 8)"
    )
    plan.add_argument(
        "--gpu",
        default="h100",
        choices=["a100", "h100", "h200", "b200", "l40s"],
        help="GPU model (default: h100)",
    )
    plan.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="model FLOPs utilization of whole steps, a fraction of the peak (default: 0.4)",
    )
    plan.add_argument(
        "--calibrate",
        metavar="RUN",
        help="use the MFU that a run of this trainer has measured, instead of --mfu",
    )
    plan.add_argument("--price", type=float, metavar="P", help="price of a GPU hour")
    plan.add_argument(
        "--clips",
        type=int,
        metavar="N",
        help="all: number of clips for which columns are computed (default: those of the data)",
    )
    plan.add_argument(
        "--steps", type=int, metavar="N", help="optimizer steps (default: loop.steps)"
    )
    plan.add_argument(
        "--search",
        action="store_true",
        help="list the fastest parallel layouts, ZeRO stages and micro-batch sizes that fit",
    )
    plan.add_argument(
        "--top", type=int, default=10, metavar="N", help="lines of --search (default: 10)"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")


def add_submit(commands: Commands) -> None:
    """`landiff submit`. Arguments of the stage are parsed later, with the stage's own parser."""
    submit = add(
        commands,
        "submit",
        "Submit a stage, or the whole pipeline, as SLURM jobs.",
        epilog=help_texts.SUBMIT,
        allow_abbrev=False,
    )
    submit.add_argument(
        "stage",
        metavar="STAGE",
        choices=[*STAGES, "pipeline"],
        help="shards, tokenizer, precompute, lm, diffusion, convert, sample, evaluate; or pipeline",
    )
    submit.add_argument(
        "--cluster",
        required=True,
        metavar="NAME",
        help="packaged cluster file (local, sandbox) or the .yaml file of your site",
    )
    submit.add_argument(
        "--nodes", type=int, metavar="N", help="nodes of a trainer (default: the cluster file's)"
    )
    submit.add_argument(
        "--preset", default="nano", help=f"pipeline: {help_texts.PRESET} (default: nano)"
    )
    submit.add_argument(
        "--prompt", action="append", help="pipeline: prompt to sample at the end (may be repeated)"
    )
    add_selection(submit, "pipeline: ")
    submit.add_argument(
        "--after",
        action="append",
        metavar="JOB",
        help="start after this job has succeeded (may be repeated)",
    )
    submit.add_argument(
        "--here",
        action="store_true",
        help="run now, in this allocation (salloc), instead of queueing",
    )
    submit.add_argument("--take-over", action="store_true", help=help_texts.TAKE_OVER)
    submit.add_argument(
        "--dry-run",
        action="store_true",
        help="print resolved configs, plan and batch scripts; change nothing",
    )
