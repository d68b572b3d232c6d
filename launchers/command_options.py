"""Options of every `landiff` command. Torch-free.

The function behind each command is listed in `landiff.launchers.cli.find_handler`.
"""

from __future__ import annotations

import argparse

from landiff.launchers import help_texts
from landiff.launchers.help_texts import TRAINERS

Commands = argparse._SubParsersAction
STAGES = ("shards", "precompute", *TRAINERS, "convert", "sample", "evaluate")
TASK = "the part of the work that this task does; SLURM arrays set it themselves"


def add_commands(commands: Commands) -> None:
    """Add all commands, in the order of `landiff --help`."""
    add_shards(commands)
    add_precompute(commands)
    add_train(commands)
    add_convert(commands)
    add_zoo(commands)
    add_sample(commands)
    add_evaluate(commands)
    add_config(commands)
    add_completion(commands)
    add_quickstart(commands)
    add_submit(commands)
    add_status(commands)
    add_logs(commands)
    add_compare(commands)
    add_report(commands)
    add_doctor(commands)
    add_plan(commands)
    add_stop(commands)


def add(
    commands: Commands,
    name: str,
    help: str,
    *,
    config: str | None = None,
    epilog: str | None = None,
    allow_abbrev: bool = True,
) -> argparse.ArgumentParser:
    """Add the command `name`. With the example `config`, it gets --config and --dry-run."""
    command = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=epilog,
        allow_abbrev=allow_abbrev,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if config:
        command.add_argument(
            "--config",
            required=True,
            metavar="NAME",
            help=f"packaged config ({config}) or a .yaml file",
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
    precompute.add_argument(
        "action",
        nargs="?",
        default="run",
        choices=["run", "finalize", "status", "retry", "verify", "estimate"],
        help="run (default; also finalizes once every column is complete), finalize (merge columns "
        "into the manifest), status (progress and speed), retry (print the array expression of "
        "missing tasks), verify (recompute and compare some shards), estimate (disk space and "
        "hours, before a run)",
    )
    precompute.add_argument(
        "--no-finalize",
        action="store_true",
        help="leave the merge to a later job; for jobs that compute columns in parallel",
    )
    precompute.add_argument("--task", metavar="I/N", help=TASK)
    precompute.add_argument(
        "--tasks",
        type=int,
        metavar="N",
        help="number of tasks of the original array, if only some of them run again",
    )
    precompute.add_argument(
        "--sample",
        default="1%",
        metavar="FRACTION",
        help="verify: fraction of the finished shards, e.g. 1%% or 0.5 (at least one shard)",
    )
    precompute.add_argument(
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
            help="processes on this machine (default: one for each GPU; without GPUs, as many as "
            "one copy of the model needs)",
        )
        trainer.add_argument("--take-over", action="store_true", help=help_texts.TAKE_OVER)
        trainer.add_argument(
            "--adopt",
            action="store_true",
            help="use columns whose fingerprints do not match (data.adopt=true)",
        )


def add_convert(commands: Commands) -> None:
    """`landiff convert`."""
    convert = add(
        commands,
        "convert",
        "Convert weights between formats; export the newest checkpoint of a run to the zoo.",
        epilog=help_texts.CONVERT,
    )
    convert.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="run, checkpoint, zoo entry, or file or folder of weights; with --to diffusers also a "
        "config of `landiff sample`; `inspect PATH` describes the weights at PATH",
    )
    convert.add_argument(
        "--to",
        choices=["zoo", "release", "megatron", "deepspeed", "diffusers", "transformers"],
        default="zoo",
        help="format to write (default: zoo)",
    )
    convert.add_argument(
        "--name",
        help="name of the zoo entry; several models are named NAME-<kind> (default: their kinds)",
    )
    convert.add_argument("--out", metavar="FOLDER", help="new folder; for all formats but zoo")
    convert.add_argument("--zoo", default="zoo", help="zoo folder (default: zoo)")
    convert.add_argument(
        "--model",
        default="landiff/model",
        help="model sizes of a release, or of a Megatron folder without its config.yaml: packaged "
        "config or .yaml file (default: landiff/model)",
    )
    convert.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="cast the weights (default: keep their dtype)",
    )
    convert.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keys that the source may lack, with the wildcards * and ?; they are initialised as "
        "in a new model",
    )
    convert.add_argument(
        "--merge",
        nargs="?",
        type=float,
        const=1.0,
        metavar="SCALE",
        help="add the adapters among the sources to their base, which is a source too (SCALE: 1)",
    )
    convert.add_argument(
        "--weights",
        choices=["ema", "raw"],
        help="of a run: the moving average of the weights, or the weights themselves (default: the "
        "average, if the checkpoint holds one)",
    )
    convert.add_argument(
        "--weights-only",
        action="store_true",
        help="--to megatron or deepspeed: drop the optimizer of a checkpoint",
    )
    convert.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="--to deepspeed: number of ranks (default: that of the source)",
    )
    convert.add_argument(
        "--dry-run",
        action="store_true",
        help="read the headers and check every key; change nothing",
    )


def add_zoo(commands: Commands) -> None:
    """`landiff zoo`."""
    zoo = add(commands, "zoo", "List, show or verify entries of the zoo.")
    zoo.add_argument("action", choices=["list", "show", "verify"])
    zoo.add_argument("reference", nargs="?", help="name, name@fingerprint or path")
    zoo.add_argument("--zoo", default="zoo", help="zoo folder (default: zoo)")


def add_sample(commands: Commands) -> None:
    """`landiff sample`."""
    example = help_texts.OVERRIDES.format(example="seed=7 guidance=6.5")
    sample = add(
        commands,
        "sample",
        "Generate a video for each prompt.",
        config="nano/sample",
        epilog=example + help_texts.PROMPTS,
    )
    sample.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT_OR_KEY=VALUE",
        help="prompts (default: those of the config); everything after -- is a prompt",
    )
    sample.add_argument(
        "--prompts",
        dest="prompts_file",
        metavar="FILE",
        help="file of prompts: .txt (one per line), .csv or .jsonl (prompt, seed, frames, motion, "
        "negative); - reads lines from standard input",
    )
    sample.add_argument(
        "--seeds", metavar="A-B,C", help="seeds of each prompt; one video for each of them"
    )
    sample.add_argument(
        "--num-videos", type=int, metavar="N", help="videos for each prompt and seed (default: 1)"
    )
    sample.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="processes on this machine that divide the videos, each with its own GPU (default: 1)",
    )
    sample.add_argument("--task", metavar="I/N", help=TASK)


def add_evaluate(commands: Commands) -> None:
    """`landiff evaluate`."""
    evaluate = add(
        commands,
        "evaluate",
        "Compare losses under right and wrong conditions: do the models use their conditions?",
        config="nano/evaluate",
        epilog=help_texts.OVERRIDES.format(example="seeds=5") + help_texts.VBENCH,
    )
    evaluate.add_argument(
        "action",
        nargs="?",
        choices=["conditions", "vbench"],
        default="conditions",
        help="conditions (default), or vbench: sample the prompts of VBench, run it and score it; "
        "its config is that of `landiff sample`",
    )
    evaluate.add_argument(
        "--vbench-python", metavar="PATH", help="vbench: Python of an environment with vbench"
    )
    evaluate.add_argument(
        "--dimensions", metavar="A,B", help="vbench: dimensions to evaluate (default: all 16)"
    )
    evaluate.add_argument(
        "--augmented",
        metavar="FILE",
        help="vbench: JSON object of official to augmented prompts, which videos are made from",
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
        "Run the whole pipeline on this machine, by default nano on packaged clips, on one CPU. "
        "Run it again to resume.",
    )
    quickstart.add_argument(
        "--preset", default="nano", metavar="PRESET", help=f"{help_texts.PRESET} (default: nano)"
    )
    quickstart.add_argument(
        "--out",
        help="output folder (default: runs/quickstart; of a project, its folder)",
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
        help=f"{prefix}first stage to run; what the earlier ones make must be there",
    )
    command.add_argument(
        "--skip",
        action="append",
        metavar="STAGE",
        help=f"{prefix}stage that does not run (may be repeated); the model of a skipped training "
        "must be in the zoo",
    )


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
    logs = add(commands, "logs", "Show a run's log; a failed rank's log comes first.")
    logs.add_argument("run", help="run folder")
    logs.add_argument(
        "--rank",
        type=int,
        help="rank to show (default: the batch script's log, and the end of a failed rank's)",
    )
    logs.add_argument(
        "--lines", type=int, default=40, metavar="N", help="number of last lines (default: 40)"
    )
    logs.add_argument(
        "--follow", action="store_true", help="print new lines as they are written; Ctrl-C ends"
    )


def add_compare(commands: Commands) -> None:
    """`landiff compare`."""
    compare = add(
        commands,
        "compare",
        "Compare runs: differing config keys, curves by step, last validation.",
        epilog=help_texts.COMPARE,
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folders, two or more")
    compare.add_argument(
        "--metric",
        action="append",
        metavar="TAG",
        help="metric to compare, with * and ? as wildcards (may be repeated; default: loss in "
        "training and validation)",
    )
    compare.add_argument("--plot", metavar="FILE", help="also draw the curves into this PNG file")
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


def add_doctor(commands: Commands) -> None:
    """`landiff doctor`."""
    doctor = add(
        commands,
        "doctor",
        "Check this machine for training: versions, GPUs, all-reduce, disk, memory, clock.",
    )
    doctor.add_argument(
        "--gpus", type=int, default=0, metavar="N", help="GPUs that this machine must have"
    )
    doctor.add_argument(
        "--node", action="store_true", help="only the quick checks of a job's pre-flight"
    )
    doctor.add_argument(
        "--report", metavar="DIR", help="also write DIR/<node>.ok or DIR/<node>.bad"
    )


def add_plan(commands: Commands) -> None:
    """`landiff plan`."""
    plan = add(
        commands,
        "plan",
        "Estimate the cost of a training config: memory by part, FLOPs, days. Needs no GPU.",
        epilog=help_texts.OVERRIDES.format(example="parallel.tensor=4 data.micro_batch_size=2"),
    )
    plan.add_argument(
        "stage", choices=list(TRAINERS), metavar="STAGE", help="tokenizer, lm or diffusion"
    )
    config = plan.add_mutually_exclusive_group(required=True)
    config.add_argument(
        "--config", metavar="NAME", help="packaged config (landiff/lm) or a .yaml file"
    )
    config.add_argument(
        "--preset",
        metavar="PRESET",
        help=f"{help_texts.PRESET}; of diffusion, the main transformer is planned",
    )
    plan.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs in all (default: 8)")
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
        help="model FLOPs utilization, a fraction of the peak (default: 0.4; measure yours)",
    )
    plan.add_argument(
        "--steps", type=int, metavar="N", help="optimizer steps (default: loop.steps)"
    )
    plan.add_argument(
        "--search",
        action="store_true",
        help="rank tensor, pipeline, ZeRO, recompute and micro-batch choices that fit",
    )
    plan.add_argument(
        "--top", type=int, default=10, metavar="N", help="lines of --search (default: 10)"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")


def add_stop(commands: Commands) -> None:
    """`landiff stop`."""
    stop = add(commands, "stop", "Ask a run to save a checkpoint and end.")
    stop.add_argument("run", help="run folder")
    stop.add_argument("--restart", action="store_true", help="save and restart, as at a time limit")
