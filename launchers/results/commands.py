"""The commands `landiff sample` and `landiff evaluate`.

Torch is imported after the checks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from landiff.configs import ConfigError, ownership
from landiff.configs.ownership import OWNER
from landiff.configs.problems import Problem, problems_of, require_none
from landiff.launchers.budget.sampling import choose_offload, parse_memory
from landiff.launchers.checks import load_checked
from landiff.launchers.commands import load_for_job, parse_task, print_dry_run
from landiff.launchers.config import EvaluateConfig, SampleConfig, VideoMetricsConfig
from landiff.launchers.local.gpus import check_processes, visible_gpus
from landiff.launchers.progress import ProgressLine
from landiff.launchers.results.prompts import STDIN, sample_units, sample_values
from landiff.launchers.results.sampling.processes import sample_in_processes
from landiff.model_zoo.evaluate.vbench import DIMENSIONS
from landiff.training.checks import Launch

VBENCH_OPTIONS = ("vbench_python", "dimensions", "augmented", "nproc", "task")


def sample_command(args: argparse.Namespace) -> int:
    """Generates the videos of prompts. Returns the exit code."""
    processes = 1 if args.nproc is None else args.nproc
    problems = check_division(args.task, processes)
    if args.memory is not None:
        problems += problems_of(lambda: parse_memory(args.memory))

    def describe(config: SampleConfig) -> str:
        require_pairs(config, processes, args.pair)
        return describe_sample(config)

    try:
        values = sample_values(args)
        config = load_for_job(args, SampleConfig, describe, values=values, problems=problems)
    except ConfigError as error:
        if any(" " in override for override in args.overrides):
            hint = "(write a prompt that begins with KEY= after --)"
            raise ConfigError(f"{error}\n{hint}") from None
        raise
    if config is None:
        return 0
    require_pairs(config, processes, args.pair)
    if args.memory is not None:
        offload = choose_offload(config, parse_memory(args.memory))
        print(f"sample: offload={offload} fits --memory {args.memory}")
        config = config.model_copy(update={"offload": offload})
    if processes > 1:
        stdin = config.prompts if args.prompts_file == STDIN else None
        return sample_in_processes(
            args.argv, processes, in_pairs=config.split_guidance, stdin=stdin
        )
    task = parse_task(args.task)
    suffix = "" if task == (0, 1) else f".{task[0]}"
    from landiff.launchers.results import sample
    from landiff.launchers.results.sampling import pair

    place = None if args.pair is None else pair.Pair.parse(args.pair)
    if place is not None and place.rank:
        return pair.serve(config, place)
    with ownership.take(config.out / f"{OWNER}{suffix}", f"folder of samples {config.out}"):
        if place is not None:
            return pair.lead(config, place, task)
        sample.sample_videos(config, task)
    return 0


def check_division(task: str | None, processes: int) -> list[Problem]:
    """Problems of `--task` and `--nproc`."""
    problems = check_processes(processes, visible_gpus())
    problems += problems_of(lambda: parse_task(task))
    if processes > 1 and task is not None:
        problems.append(Problem("--nproc divides the work itself; leave --task out"))
    return problems


def require_pairs(config: SampleConfig, processes: int, pair: str | None) -> None:
    """Raises ConfigError for `split_guidance` without two processes for each video."""
    if config.split_guidance and processes % 2 and pair is None:
        raise ConfigError(
            "split_guidance = true takes two processes for each video; set --nproc 2 or another "
            "even number"
        )


def describe_sample(config: SampleConfig) -> str:
    """What `landiff sample` would do."""
    units = sample_units(config)
    return f"would sample {len(units)} video(s) into {config.out}"


def evaluate_command(args: argparse.Namespace) -> int:
    """Compares losses under conditions, measures videos, or runs VBench. Returns the exit code."""
    refuse_vbench_options(args)
    if args.action == "vbench":
        return vbench_command(args)
    if args.action == "videos":
        return videos_command(args)
    config = load_for_job(args, EvaluateConfig, describe_evaluate)
    if config is not None:
        from landiff.launchers.results.evaluate import evaluate_conditions

        evaluate_conditions(config)
    return 0


def videos_command(args: argparse.Namespace) -> int:
    """Measures a folder of videos, beside a folder of real ones. Returns the exit code."""
    config, problems = load_checked(
        "videos", VideoMetricsConfig, args.config, args.overrides, launch=Launch()
    )
    require_none(problems)
    if args.dry_run:
        print_dry_run(config, f"would measure {config.videos} and write {config.out}")
        return 0
    from landiff.launchers.evaluation.video_metrics import evaluate_videos

    evaluate_videos(config)
    return 0


def vbench_command(args: argparse.Namespace) -> int:
    """Samples the prompts of VBench, runs it in its own interpreter, and scores the results."""
    from landiff.launchers.evaluation import vbench

    config, problems = load_checked(
        "sample", SampleConfig, args.config, args.overrides, launch=Launch()
    )
    problems += problems_of(lambda: require_pairs(config, 1, None))
    processes = 1 if args.nproc is None else args.nproc
    problems += check_division(args.task, processes)
    require_none([*problems, *check_vbench(args)])
    python = Path(args.vbench_python)
    dimensions = args.dimensions.split(",") if args.dimensions else list(DIMENSIONS)
    info = vbench.find_info(python)
    official = vbench.read_prompts(info)
    prompts = vbench.chosen(official, dimensions)
    texts = {}
    if args.augmented:
        texts = vbench.read_augmented(Path(args.augmented))
        vbench.check_augmented(texts, official, prompts)
    units = vbench.vbench_units(config, prompts, texts)
    plan = f"would sample {len(units)} videos of {len(prompts)} prompts into {config.out}, and run "
    if args.dry_run:
        print_dry_run(config, f"{plan}{', '.join(dimensions)}")
        return 0
    from landiff.launchers.results.sample import sample_videos

    folder = config.out
    videos = folder / vbench.VIDEOS
    sampled = config.model_copy(update={"out": videos})
    if args.task is not None:
        task = parse_task(args.task)
        with ownership.take(folder / f"{OWNER}.{task[0]}", f"evaluation {folder}"):
            sample_videos(sampled, task, units=units)
        return 0
    if processes > 1:
        code = sample_in_processes(args.argv, processes, command="evaluate")
        if code:
            return code
    with ownership.take(folder / OWNER, f"evaluation {folder}"):
        sample_videos(sampled, units=units)
        frames = vbench.check_lengths(videos, [unit.name for unit in units])
        long = vbench.is_long(frames, config.fps)
        progress = ProgressLine("vbench", "dimensions", every_s=0.0)
        for number, name in enumerate(dimensions):
            progress(number, len(dimensions), name)
            vbench.run_dimension(python, info, videos, folder / vbench.RESULTS, name, long=long)
        progress(len(dimensions), len(dimensions))
        evaluation = vbench.read_results(folder / vbench.RESULTS, dimensions, prompts, long=long)
        vbench.write_scores(folder, evaluation, config.diffusion, augmented=bool(texts))
    print(vbench.summary(evaluation))
    print(f"vbench: look at {folder / 'scores.html'}")
    return 0


def refuse_vbench_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for options of `landiff evaluate vbench` with another action."""
    if args.action == "vbench":
        return
    given = [
        "--" + name.replace("_", "-") for name in VBENCH_OPTIONS if getattr(args, name) is not None
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: only `landiff evaluate vbench` has "
            f"{'this option' if len(given) == 1 else 'these options'}; leave out what "
            f"`landiff evaluate {args.action}` does not use"
        )


def check_vbench(args: argparse.Namespace, *, inputs_exist: bool = True) -> list[Problem]:
    """Problems of the options of `landiff evaluate vbench`.

    inputs_exist: False if their files are not on this machine, or not yet.
    """
    problems = []
    if args.vbench_python is None:
        problems.append(
            Problem("give --vbench-python PATH, the interpreter of an environment with vbench")
        )
    for name in args.dimensions.split(",") if args.dimensions else ():
        if name not in DIMENSIONS:
            known = ", ".join(DIMENSIONS)
            problems.append(Problem(f"{name!r} is no dimension of VBench; known: {known}"))
    files = {"--vbench-python": args.vbench_python, "--augmented": args.augmented}
    for option, path in files.items():
        if inputs_exist and path is not None and not Path(path).is_file():
            problems.append(Problem(f"{option} {path} does not exist"))
    return problems


def describe_evaluate(config: EvaluateConfig) -> str:
    """What `landiff evaluate` would do."""
    return f"would evaluate {config.lm} and {config.diffusion} on {config.samples} samples"
