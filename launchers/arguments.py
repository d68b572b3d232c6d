"""What can be typed behind `landiff`: commands, options, and the texts that explain them. Torch-free."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import NoReturn

from landiff.launchers.version import __version__

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


OVERRIDES = """\
Any key of the config can be set behind the options, e.g.  {example}
An unknown key is refused and the nearest known one is named.
"""

PROMPTS = """
A prompt that looks like an option or an override stands behind --, where nothing is parsed:

  landiff sample --config nano/sample seed=7 -- "seed=7 is written on a wall" "--- a dashed line"
"""

TRAINERS = {
    "tokenizer": "Semantic tokenizer (torch DDP).",
    "lm": "Language model over semantic tokens (Megatron-core: tensor, pipeline, sequence, data parallel).",
    "diffusion": "Diffusion model (DeepSpeed ZeRO): the main transformer, then its control branch.",
}

TAKE_OVER = "do not wait until the lock of a run folder expires whose owner, on another machine, may be gone"

CONVERT = """\
  landiff convert runs/lm --name lm                             newest checkpoint of a run -> zoo
  landiff convert inspect weights/LanDiff                       what is it?
  landiff convert weights/LanDiff                               the whole release -> zoo: lm, tokenizer, transformer, diffusion
  landiff convert lm --to megatron --out start/lm               zoo entry -> Megatron checkpoint for any parallel layout
  landiff convert main --to diffusers --out CogVideoX-ours      main transformer -> CogVideoXTransformer3DModel
  landiff convert diffusion tokenizer lm --to release --out out back to the release's files

A checkpoint of a run, with its optimizer, for another layout; train goes on from it with --config OUT/config.yaml. What changes
is said as in the config of the run:

  landiff convert runs/lm --to megatron --out runs/lm-2 parallel.distributed_optimizer=true parallel.tensor=2 vocab_multiple=256
  landiff convert runs/diffusion-main --to deepspeed --out runs/main-2 --world-size 16 zero.stage=3

(Tensor, pipeline and data parallel layouts of Megatron need no conversion, nor do other stages and world sizes of our own diffusion
trainer; DeepSpeed alone does.) Weights that start a run take vocab_multiple, head_multiple and zero.stage in the same way.
"""


COMPLETION = """\
Print a completion script, once for each shell that you use:

  bash   landiff completion bash > ~/.local/share/bash-completion/completions/landiff
  zsh    landiff completion zsh  > a file called _landiff in a folder of your $fpath
  fish   landiff completion fish > ~/.config/fish/completions/landiff.fish

New shells complete commands, options, choices, packaged config names and paths.
"""


SUBMIT = """\
All other arguments are those of the stage itself:

  landiff submit lm --config landiff/lm --cluster my-site.yaml --nodes 4 optim.lr=2e-4
  landiff submit precompute --config landiff/precompute --cluster my-site.yaml
  landiff submit convert runs/lm --name lm --cluster my-site.yaml
  landiff submit pipeline --preset nano --cluster my-site.yaml lm.loop.steps=100

Submitting again skips what is done and resumes what isn't. See docs/cluster.md.
"""


class Parser(argparse.ArgumentParser):
    """Names the nearest of the known words for a mistyped one."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        near = (
            difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1)
            if found
            else []
        )
        super().error(f"{message}; did you mean {near[0]!r}?" if near else message)


Commands = argparse._SubParsersAction


def build_parser() -> Parser:
    parser = Parser(
        prog="landiff",
        description="Pretrain LanDiff text-to-video models, from clips to samples.",
        epilog=WALK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-C",
        dest="workdir",
        metavar="DIR",
        help="run as if started in DIR (relative paths in configs are below it)",
    )
    parser.add_argument("--version", action="version", version=f"landiff {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_data_commands(commands)
    add_train(commands)
    add_weights_commands(commands)
    add_results_commands(commands)
    add_cluster_commands(commands)
    return parser


def add(
    commands: Commands,
    name: str,
    help: str,
    *,
    config: str | None = None,
    epilog: str | None = None,
) -> Parser:
    sub = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if config:
        sub.add_argument(
            "--config",
            required=True,
            metavar="NAME",
            help=f"packaged name ({config}) or a .yaml file",
        )
        sub.add_argument(
            "--dry-run",
            action="store_true",
            help="print the resolved config and the plan; change nothing",
        )
    return sub


def add_data_commands(commands: Commands) -> None:
    """shards, precompute."""
    shards = add(
        commands,
        "shards",
        "Cut videos into captioned clips and write WebDataset shards.",
        config="nano/shards",
        epilog=OVERRIDES.format(example="num_frames=17 source=videos/captions.csv"),
    )
    shards.add_argument(
        "action",
        nargs="?",
        choices=["run", "finalize", "status"],
        default="run",
        help="run (default; finalizes where it is the only task), finalize (write the manifest), status",
    )
    shards.add_argument(
        "--task", metavar="I/N", help="this task's share; SLURM arrays set it by themselves"
    )
    precompute = add(
        commands,
        "precompute",
        "Compute columns (features, tokens, latents, text) for raw shards.",
        config="nano/precompute",
        epilog=OVERRIDES.format(example="batch_size=8"),
    )
    precompute.add_argument(
        "action",
        nargs="?",
        default="run",
        choices=["run", "finalize", "status", "retry", "verify", "estimate"],
        help="run (default; finalizes when nothing is left), finalize (merge into the manifest), status (how far, how "
        "fast), retry (the array expression of what is missing), verify (read and make a share again), "
        "estimate (disk and hours, before anything runs)",
    )
    precompute.add_argument(
        "--no-finalize",
        action="store_true",
        help="leave the merge to a later job, where several columns are computed side by side",
    )
    precompute.add_argument(
        "--task", metavar="I/N", help="this task's share; SLURM arrays set it by themselves"
    )
    precompute.add_argument(
        "--tasks",
        type=int,
        metavar="N",
        help="of how many tasks, where only some of an array run again",
    )
    precompute.add_argument(
        "--sample",
        default="1%",
        metavar="SHARE",
        help="verify: of the finished shards, e.g. 1%% or 0.5 (at least one)",
    )
    precompute.add_argument(
        "--clips", type=int, default=16, metavar="N", help="estimate: from so many clips"
    )


def add_train(commands: Commands) -> None:
    train = add(commands, "train", "Train one of the three models.")
    stages = train.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for stage, text in TRAINERS.items():
        sub = add(
            stages,
            stage,
            text,
            config=f"nano/{stage if stage != 'diffusion' else 'diffusion-main'}",
            epilog=OVERRIDES.format(example="loop.steps=100 optim.lr=3e-4"),
        )
        sub.add_argument(
            "--nproc",
            type=int,
            metavar="N",
            help="processes on this machine (default: one per GPU, or 1)",
        )
        sub.add_argument("--take-over", action="store_true", help=TAKE_OVER)
        sub.add_argument(
            "--adopt",
            action="store_true",
            help="take columns whose fingerprints do not fit as they are (data.adopt=true)",
        )


def add_weights_commands(commands: Commands) -> None:
    """convert, zoo."""
    convert = add(
        commands,
        "convert",
        "Weights from one format to another; the newest checkpoint of a run to the zoo.",
        epilog=CONVERT,
    )
    convert.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="run or checkpoint, zoo entry, file or folder of weights; `inspect PATH` says what it is",
    )
    convert.add_argument(
        "--to",
        choices=["zoo", "release", "megatron", "deepspeed", "diffusers", "transformers"],
        default="zoo",
        help="what to write (default: zoo)",
    )
    convert.add_argument(
        "--name", help="name in the zoo; of several parts NAME-<kind> (default: their kinds)"
    )
    convert.add_argument(
        "--out", metavar="FOLDER", help="new folder to write; for every --to but zoo"
    )
    convert.add_argument("--zoo", default="zoo", help="zoo folder (default: zoo)")
    convert.add_argument(
        "--model",
        default="landiff/model",
        help="sizes of a release, or of a Megatron folder without its "
        "config.yaml: packaged name or .yaml file (default: landiff/model)",
    )
    convert.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="cast the weights (default: keep theirs)",
    )
    convert.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keys of the source that may be missing, with * and ?; they start as in a fresh model",
    )
    convert.add_argument(
        "--weights-only",
        action="store_true",
        help="--to megatron or deepspeed: leave the optimizer of a checkpoint behind",
    )
    convert.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="--to deepspeed: for so many ranks (default: as it is)",
    )
    convert.add_argument(
        "--dry-run", action="store_true", help="read the headers, check every key, change nothing"
    )

    zoo = add(commands, "zoo", "Look at the zoo: list, show, verify.")
    zoo.add_argument("action", choices=["list", "show", "verify"])
    zoo.add_argument("reference", nargs="?", help="name, name@fingerprint or path")
    zoo.add_argument("--zoo", default="zoo", help="zoo folder (default: zoo)")


def add_results_commands(commands: Commands) -> None:
    """sample, evaluate, config, completion, quickstart."""
    sample = add(
        commands,
        "sample",
        "Prompts -> videos.",
        config="nano/sample",
        epilog=OVERRIDES.format(example="seed=7 guidance=6.5") + PROMPTS,
    )
    sample.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT_OR_KEY=VALUE",
        help="prompts (default: those of the config); whatever stands behind -- is a prompt",
    )
    add(
        commands,
        "evaluate",
        "Do the trained models use their conditions? Losses with the right and with wrong ones.",
        config="nano/evaluate",
        epilog=OVERRIDES.format(example="seeds=5"),
    )

    config = add(commands, "config", "List the packaged configs, or print one.")
    config.add_argument("name", nargs="?", help="packaged name or .yaml file")

    completion = add(
        commands, "completion", "Print a shell completion script for landiff.", epilog=COMPLETION
    )
    completion.add_argument("shell", choices=["bash", "zsh", "fish"], help="shell to print it for")

    quickstart = add(
        commands,
        "quickstart",
        "The whole walk on the packaged clips, on one CPU. Run it again to continue.",
    )
    quickstart.add_argument(
        "--out",
        default="runs/quickstart",
        help="folder of everything it makes (default: runs/quickstart)",
    )
    quickstart.add_argument(
        "--prompt", action="append", help="prompt to sample at the end (may be repeated)"
    )
    quickstart.add_argument(
        "--dry-run", action="store_true", help="print the commands; run nothing"
    )


def add_cluster_commands(commands: argparse._SubParsersAction) -> None:
    """Jobs on a cluster: submit, status, logs, stop; before they cost anything: doctor, plan."""
    submit = commands.add_parser(
        "submit",
        help="A stage, or the whole walk, as SLURM jobs.",
        epilog=SUBMIT,
        allow_abbrev=False,
        description="A stage, or the whole walk, as SLURM jobs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    submit.add_argument(
        "stage",
        metavar="STAGE",
        choices=["shards", "precompute", *TRAINERS, "convert", "sample", "evaluate", "pipeline"],
        help="shards, tokenizer, precompute, lm, diffusion, convert, sample, evaluate; or pipeline",
    )
    submit.add_argument(
        "--cluster",
        required=True,
        metavar="NAME",
        help="packaged name (local, sandbox) or a .yaml file of your site",
    )
    submit.add_argument(
        "--nodes", type=int, metavar="N", help="nodes of a trainer (default: the cluster file's)"
    )
    submit.add_argument("--preset", default="nano", help="pipeline: whose configs (default: nano)")
    submit.add_argument(
        "--prompt", action="append", help="pipeline: prompt to sample at the end (may be repeated)"
    )
    submit.add_argument(
        "--after",
        action="append",
        metavar="JOB",
        help="wait for this job to end well (may be repeated)",
    )
    submit.add_argument(
        "--here",
        action="store_true",
        help="run now, in this allocation (salloc), instead of queueing",
    )
    submit.add_argument("--take-over", action="store_true", help=TAKE_OVER)
    submit.add_argument(
        "--dry-run",
        action="store_true",
        help="print resolved configs, plan and batch scripts; touch nothing",
    )

    status = commands.add_parser(
        "status", help="Runs: job, step, rate, time left, restarts, last error."
    )
    status.add_argument("run", nargs="?", help="run folder (default: all below runs/)")
    status.add_argument("--all", action="store_true", help="all runs below runs/")
    status.add_argument("--json", action="store_true", help="for scripts")
    logs = commands.add_parser("logs", help="A run's log, with the failing rank first.")
    logs.add_argument("run", help="run folder")
    logs.add_argument(
        "--rank",
        type=int,
        help="of this rank (default: the batch script's, and the last words of a failing rank)",
    )
    logs.add_argument(
        "--lines", type=int, default=40, metavar="N", help="last lines to show (default: 40)"
    )
    logs.add_argument("--follow", action="store_true", help="go on as it grows; Ctrl-C ends")
    doctor = commands.add_parser(
        "doctor",
        help="Will training run on this machine? Versions, GPUs, all-reduce, disk, memory, clock.",
    )
    doctor.add_argument(
        "--gpus", type=int, default=0, metavar="N", help="GPUs this machine must have"
    )
    doctor.add_argument(
        "--node", action="store_true", help="the quick checks of a job's pre-flight"
    )
    doctor.add_argument(
        "--report", metavar="DIR", help="also write DIR/<node>.ok or DIR/<node>.bad"
    )
    plan = commands.add_parser(
        "plan",
        help="What a training config costs: memory by part, FLOPs, days. No GPU needed.",
        epilog=OVERRIDES.format(example="parallel.tensor=4 data.micro_batch_size=2"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument(
        "stage", choices=list(TRAINERS), metavar="STAGE", help="tokenizer, lm or diffusion"
    )
    plan.add_argument(
        "--config", required=True, metavar="NAME", help="packaged name (landiff/lm) or a .yaml file"
    )
    plan.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs in all (default: 8)")
    plan.add_argument(
        "--gpu",
        default="h100",
        choices=["a100", "h100", "h200", "b200", "l40s"],
        help="which (default: h100)",
    )
    plan.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        help="share of the peak that training reaches (default: 0.4; measure yours)",
    )
    plan.add_argument(
        "--steps", type=int, metavar="N", help="optimizer steps of the budget (default: loop.steps)"
    )
    plan.add_argument(
        "--search",
        action="store_true",
        help="rank tensor, pipeline, ZeRO, recompute and micro-batch choices that fit",
    )
    plan.add_argument(
        "--top", type=int, default=10, metavar="N", help="lines of --search (default: 10)"
    )
    plan.add_argument("--json", action="store_true", help="for scripts")
    stop = commands.add_parser("stop", help="Let a run save a checkpoint and end.")
    stop.add_argument("run", help="run folder")
    stop.add_argument(
        "--restart", action="store_true", help="save and start again, as at a time limit"
    )


OVERRIDE = re.compile(r"([A-Za-z_][\w.-]*)=")


def parse_command(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command line, with its `key=value` words in `overrides`.

    Of `submit`, `rest` holds what belongs to the stage. Words behind `--` are prompts of `sample`, whatever they look
    like. Mistakes end the process with exit code 2.
    """
    head, texts = list(argv), []
    if "--" in head:
        at = head.index("--")
        head, texts = head[:at], head[at + 1 :]
    words, overrides = split_overrides(parser, head)
    args, unknown = parser.parse_known_args(words)
    if args.command == "submit":  # the stage's own arguments are parsed with the stage
        args, rest = parser.parse_known_args(head)
        args.argv = list(argv)
        args.rest = [*rest, *argv[len(head) :]]
        args.overrides = []
        return args
    if args.command == "sample":
        prompts, overrides = prompts_among(parser, overrides)
        args.prompts = [*args.prompts, *prompts, *texts]
    elif texts:
        args, unknown = parser.parse_known_args([*words, "--", *texts])
    takes_overrides = getattr(args, "config", None) is not None or args.command == "convert"
    bad = unknown or ([] if takes_overrides else overrides)
    if bad:
        hint = "; overrides are written key=value" if takes_overrides else ""
        parser.error(f"unrecognised argument {bad[0]!r}{hint}")
    args.argv = list(argv)
    args.overrides = overrides
    return args


def split_overrides(parser: Parser, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(everything else, `dotted.key=value` words). A word behind an option that takes a value belongs to the option."""
    flags = {
        word
        for action in all_options(parser)
        if action.nargs == 0
        for word in action.option_strings
    }
    words, overrides = [], []
    for before, word in zip(["", *argv], argv, strict=False):
        belongs = before.startswith("-") and "=" not in before and before not in flags
        (overrides if OVERRIDE.match(word) and not belongs else words).append(word)
    return words, overrides


def prompts_among(parser: Parser, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(prompts, overrides) of `sample` among words that begin with `KEY=`.

    An override begins with a key of the config; a text of several words with any other KEY is a prompt. The
    rest is an error: a mistyped key must not become a video.
    """
    from landiff.launchers.config import SampleConfig

    prompts, overrides = [], []
    for word in words:
        key = OVERRIDE.match(word)[1]
        if key.split(".")[0] in SampleConfig.model_fields:
            overrides.append(word)
        elif any(letter.isspace() for letter in word):
            prompts.append(word)
        else:
            near = difflib.get_close_matches(key, SampleConfig.model_fields, n=1, cutoff=0.5)
            meant = f"; did you mean {near[0]!r}?" if near else "."
            parser.error(
                f"unknown config key {key!r} in {word!r}{meant} A prompt that begins with KEY= stands behind --, as "
                f"in  landiff sample --config ... -- {shlex.quote(word)}"
            )
    return prompts, overrides


def all_options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of the parser and its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from all_options(sub)
        else:
            yield action
