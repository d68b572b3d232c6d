"""What each `landiff` command does. Everything heavy is imported inside the job that needs it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from landiff.configs import ConfigError, dump, find, load
from landiff.configs.loader import packaged_names, write_config
from landiff.configs.problems import Problem, problems_of, require_none
from landiff.configs.secrets import redact
from landiff.launchers.checks import check, check_processes, load_checked, load_with_problems
from landiff.launchers.progress import Progress
from landiff.launchers.slurm.stage_jobs import config_class
from landiff.launchers.weights.request import check_request, request_of
from landiff.training.checks import Launch

if TYPE_CHECKING:
    from landiff.data_pipeline.precompute.config import PrecomputeConfig
    from landiff.launchers.config import ShardsJobConfig
    from landiff.model_zoo.registry import ZooEntry


class JobFailed(RuntimeError):
    """A job that ended without doing its work; the message says why and what to do."""


def run(args: argparse.Namespace) -> int:
    """Dispatch; returns the exit code."""
    return globals()[f"{args.command}_job"](args)


def checked(
    args: argparse.Namespace,
    stage: str,
    plan: Callable[[Any], str],
    launch: Launch | None = None,
    values: Mapping[str, Any] | None = None,
    problems: Sequence[Problem] = (),
) -> Any:
    """The config of a stage, ready to run; None for --dry-run, after config and plan were printed.

    Raises one ConfigError with all problems that can be known before the job starts, `problems` among them.
    """
    config, found = load_checked(
        stage, config_class(stage), args.config, args.overrides, launch or Launch(), values
    )
    if args.dry_run:
        show(config, plan(config))
    require_none([*problems, *found])
    return None if args.dry_run else config


def describe_shards(config: ShardsJobConfig) -> str:
    """What `landiff shards` would do, with what the source holds."""
    from landiff.data_pipeline.ingest.sources import report as source_report

    plan = f"would write raw shards to {config.data}"
    try:
        summary = source_report.summarize_source(config.content)
    except ConfigError:
        return plan  # the checks report why the source cannot be read
    return f"{plan}\n# source: {summary}"


def shards_job(args: argparse.Namespace) -> int:
    if args.action == "run":
        problems = problems_of(lambda: parse_task(args.task))
        config = checked(args, "shards", describe_shards, problems=problems)
        if config is None:
            return 0
    else:
        config = load(config_class("shards"), args.config, args.overrides)
        if args.dry_run:
            return show(config, f"would {args.action} the raw shards of {config.data}")
    from landiff.data_pipeline.ingest import job as ingest
    from landiff.data_pipeline.ingest.sources import report as source_report

    if args.action == "status":
        found = ingest.status(config.content, config.data)
        if found is None:
            others = ingest.other_shards(config.content, config.data)
            print(f"shards: nothing is planned in {config.data} for this source and config{others}")
        elif not found.shards:
            print(
                f"shards: {found.probed} of {found.videos} videos were looked at; no shard of {config.data} is planned yet"
            )
        else:
            print(
                f"shards: {found.finished} of {found.shards} shards of {config.data} are finished, with {found.finished_clips} of {found.clips} clips; "
                f"the plan set {found.rejected} aside"
            )
        if found is not None and found.ignored.counts:
            print(f"shards: ignored: {found.ignored}")
        return 0
    task = parse_task(args.task)
    if args.action == "run":
        summary = ingest.make_task_shards(
            config.content, config.data, task, progress=Progress("shards", "clips")
        )
        if task != (0, 1):
            print(
                f"shards: task {task[0]}/{task[1]} made {summary.made} shards, {summary.present} were there, of {summary.planned} in all; "
                f"set aside: {counted(summary.reject_counts)}; when every task is done: landiff shards finalize"
            )
            print_lines("shards", source_report.result_lines(summary.rejected, summary.ignored))
            return 0
    manifest = ingest.finalize(config.content, config.data)
    print(
        f"shards: {manifest.num_samples} samples in {len(manifest.shards)} shards of {config.data}; set aside: {counted(manifest.reject_counts)}"
    )
    print_lines("shards", source_report.manifest_lines(manifest))
    return 0


def print_lines(command: str, lines: list[str]) -> None:
    """Print result lines of a command, its name before each."""
    for line in lines:
        print(f"{command}: {line}")


def precompute_job(args: argparse.Namespace) -> int:
    if args.action in ("run", "estimate", "verify"):
        config = checked(
            args,
            "precompute",
            lambda config: (
                f"would compute {', '.join(config.columns)} for the shards of {config.data}"
            ),
            problems=problems_of(lambda: parse_task(args.task, args.tasks)),
        )
        if config is None:
            return 0
    else:
        config = load(config_class("precompute"), args.config, args.overrides)
        if args.dry_run:
            return show(
                config,
                f"would {args.action} the columns {', '.join(config.columns)} of {config.data}",
            )
    from landiff.data_pipeline.precompute import commands as precompute

    if args.action in ("status", "retry", "verify", "estimate"):
        return precompute_question(args, config)
    task = parse_task(args.task, args.tasks)
    if args.action == "run":
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # as Ctrl-C: units in work leave nothing behind
        summary = precompute.run(
            config, task=task, progress=Progress("precompute", "clips", every_s=60.0)
        )
        print(f"precompute: {summary}")
    if args.action == "finalize" or (task == (0, 1) and not args.no_finalize):
        manifest = precompute.finalize(config)
        print(
            f"precompute: manifest of {config.data} has the columns {', '.join(manifest.columns)}; set aside: {counted(manifest.reject_counts)}"
        )
        if "latents" in config.columns:
            from landiff.launchers.results.preview import codec_round_trip

            try:
                codec_round_trip(config, Path("runs/precompute"))
            except OSError as error:
                print(
                    f"precompute: the columns are finished; their preview in runs/precompute could not be written: {error.strerror or error}",
                    file=sys.stderr,
                )
    return 0


def precompute_question(args: argparse.Namespace, config: PrecomputeConfig) -> int:
    """status, retry, verify, estimate: what changes nothing."""
    from landiff.data_pipeline.precompute import commands as precompute
    from landiff.data_pipeline.precompute.status import format_table

    if args.action == "status":
        print(format_table(precompute.status(config)))
    elif args.action == "estimate":
        print(precompute.estimate(config, args.clips))
    elif args.action == "retry":
        if not args.tasks:
            raise ConfigError(
                "landiff precompute retry needs --tasks N: of how many tasks the array was"
            )
        for column, expression in precompute.retry(config, args.tasks).items():
            print(f"{column:<24}{f'--array={expression}' if expression else 'nothing is missing'}")
    else:
        checks = precompute.verify(config, parse_share(args.sample))
        print("\n".join(map(str, checks)))
        if any(check.problems for check in checks):
            raise JobFailed("columns are not what they should be; see the lines marked WRONG")
    return 0


def train_job(args: argparse.Namespace) -> int:
    from landiff.launchers.local.start import (
        default_processes,
        explain_exit,
        own_run,
        run_trainer,
        visible_gpus,
    )
    from landiff.launchers.slurm.stage_jobs import command_line

    if args.adopt:
        args.overrides.append("data.adopt=true")
    cls = config_class(args.stage)
    config, problems = load_with_problems(cls, args.config, args.overrides)
    processes = default_processes(config) if args.nproc is None else args.nproc
    problems += check_processes(processes, visible_gpus())
    problems += check(args.stage, config, Launch(max(1, processes)))
    if args.dry_run:
        show(config, f"would train in {config.run} on {processes} process(es)")
    require_none(problems)
    if args.dry_run:
        return 0
    command = command_line(args.argv)
    with own_run(config, args.stage, processes, command, take_over=args.take_over) as owned:
        resolved = config.run / "resolved.yaml"
        write_config(resolved, config)
        code = run_trainer(f"landiff.training.{args.stage}", resolved, config.run, processes, owned)
    if code:
        raise (ConfigError if code == 2 else JobFailed)(
            f"{config.run} failed: {explain_exit(config.run, code)}"
        )
    return 0


def convert_job(args: argparse.Namespace) -> int:
    first, *rest = args.sources
    zoo = Path(args.zoo)
    if first == "inspect":
        if not rest:
            raise ConfigError("landiff convert inspect needs a path")
        from landiff.launchers.weights.convert import find_source
        from landiff.model_zoo.config import ModelConfig
        from landiff.model_zoo.convert.known_formats import Options, describe_source

        options = Options(load(ModelConfig, args.model), tuple(args.allow_missing))
        print("\n".join(describe_source(find_source(path, zoo, options)) for path in rest))
        return 0
    request = request_of(args)
    require_none(check_request(request, Launch()))
    from landiff.launchers.weights.convert import convert_weights, plan

    if args.dry_run:
        print("\n".join(plan(request)))
        return 0
    for line in convert_weights(request):
        print(f"convert: {line}")
    return 0


def zoo_job(args: argparse.Namespace) -> int:
    from landiff.model_zoo import registry

    zoo = Path(args.zoo)
    if args.action != "show" and not args.reference:
        return every_entry(zoo, args.action)
    if not args.reference:
        raise ConfigError("landiff zoo show needs a reference: name, name@fingerprint or a path")
    entry = registry.resolve(zoo, args.reference)
    if args.action == "verify":
        registry.verify_entry(entry)
        print(f"{entry.reference}: the weights give its fingerprint")
    elif args.action == "list":
        print(entry_line(entry))
    else:
        print(
            json.dumps(
                {
                    "kind": entry.kind,
                    "path": str(entry.path),
                    "config": entry.config.model_dump(mode="json"),
                    "provenance": entry.provenance,
                },
                indent=1,
            )
        )
    return 0


def every_entry(zoo: Path, action: str) -> int:
    """List or verify all of them; a damaged one is named and does not keep the others from it. -> 0, or 2 where one is damaged."""
    from landiff.model_zoo import registry

    damaged = 0
    for folder in registry.entry_folders(zoo):
        try:
            entry = registry.read_entry(folder)
            if action == "verify":
                registry.verify_entry(entry)
            print(entry_line(entry) + ("  verified" if action == "verify" else ""))
        except ConfigError as error:
            damaged += 1
            print(f"{'damaged':<14}{folder.parent.name}@{folder.name}  {error}")
    return 2 if damaged else 0


def entry_line(entry: ZooEntry) -> str:
    """Kind, reference, and where it comes from."""
    made = entry.provenance
    origin = (
        ", ".join(source.get("path", "?") for source in made.get("sources", ())) or "unknown origin"
    )
    return (
        f"{entry.kind:<14}{entry.reference}  "
        + (f"step {made['step']}, " if made.get("step") is not None else "")
        + f"from {origin}"
    )


def sample_job(args: argparse.Namespace) -> int:
    values = {"prompts": args.prompts} if args.prompts else None
    try:
        config = checked(
            args,
            "sample",
            lambda config: f"would sample {len(config.prompts)} video(s) into {config.out}",
            values=values,
        )
    except ConfigError as error:
        if any(" " in override for override in args.overrides):
            raise ConfigError(
                f"{error}\n(a prompt that begins with KEY= stands behind --)"
            ) from None
        raise
    if config is None:
        return 0
    from landiff.launchers.results.sample import sample_videos

    sample_videos(config)
    return 0


def evaluate_job(args: argparse.Namespace) -> int:
    config = checked(
        args,
        "evaluate",
        lambda config: (
            f"would evaluate {config.lm} and {config.diffusion} on {config.samples} samples"
        ),
    )
    if config is None:
        return 0
    from landiff.launchers.results.evaluate import evaluate_conditions

    evaluate_conditions(config)
    return 0


def config_job(args: argparse.Namespace) -> int:
    if not args.name:
        print("\n".join(packaged_names()))
    else:
        print(find(args.name).read_text(encoding="utf-8"), end="")
    return 0


def completion_job(args: argparse.Namespace) -> int:
    """Prints the completion script of the shell `args.shell`."""
    from landiff.launchers.arguments import build_parser
    from landiff.launchers.completion import completion_script

    print(completion_script(build_parser(), args.shell), end="")
    return 0


def quickstart_job(args: argparse.Namespace) -> int:
    from landiff.launchers.pipeline import quickstart

    return quickstart(Path(args.out), args.prompt or (), args.dry_run)


def submit_job(args: argparse.Namespace) -> int:
    from landiff.launchers.slurm.submit import submit

    return submit(args, args.argv)


def stop_job(args: argparse.Namespace) -> int:
    from landiff.launchers.run.stop import stop

    print(stop(Path(args.run), args.restart))
    return 0


def status_job(args: argparse.Namespace) -> int:
    from landiff.launchers.run.status import show_status

    return show_status(args.run, args.json)


def logs_job(args: argparse.Namespace) -> int:
    from landiff.launchers.run.logs import show_logs

    return show_logs(Path(args.run), args.rank, args.lines, args.follow)


def doctor_job(args: argparse.Namespace) -> int:
    from landiff.launchers.doctor.checks import doctor

    return doctor(Path.cwd(), args.gpus, args.node, Path(args.report) if args.report else None)


def plan_job(args: argparse.Namespace) -> int:
    from landiff.launchers.budget.plan import print_budget

    return print_budget(args)


def show(config, plan: str) -> int:
    """--dry-run: the resolved config and the plan, without secrets."""
    print(redact(f"{dump(config)}\n# {plan}"))
    return 0


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "none"


def parse_share(text: str) -> float:
    """`1%` or `0.01` -> 0.01."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise ConfigError(f"--sample {text} must be a share above 0, at most 1, e.g. 1% or 0.5")
    return share


def parse_task(text: str | None, tasks: int | None = None) -> tuple[int, int]:
    """`3/50` -> (3, 50), 0-based; a SLURM array's own variables where nothing is given.

    `tasks`: of how many, where the array holds only some of them (`landiff precompute retry`).
    """
    if text is None and tasks is not None and "SLURM_ARRAY_TASK_ID" in os.environ:
        text = f"{os.environ['SLURM_ARRAY_TASK_ID']}/{tasks}"
    if text is None and "SLURM_ARRAY_TASK_ID" in os.environ:
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        return int(os.environ["SLURM_ARRAY_TASK_ID"]) - first, int(
            os.environ["SLURM_ARRAY_TASK_COUNT"]
        )
    if text is None:
        return 0, 1
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"--task {text} must be I/N with 0 <= I < N, e.g. 0/8")
    return int(index), int(count)
