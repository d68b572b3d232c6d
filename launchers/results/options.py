"""Options of the commands that generate and evaluate videos. Torch-free."""

from __future__ import annotations

import argparse

from landiff.launchers import help_texts
from landiff.launchers.command_options import TASK, Commands, add


def add_result_commands(commands: Commands) -> None:
    """Adds `landiff sample` and `landiff evaluate`."""
    add_sample(commands)
    add_evaluate(commands)


def add_sample(commands: Commands) -> None:
    """`landiff sample`."""
    example = help_texts.OVERRIDES.format(example="seed=7 guidance=6.5")
    sample = add(
        commands,
        "sample",
        "Generate a video for each prompt.",
        config="nano/sample",
        default_config="shapes/packaged",
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
        help="file of prompts: .txt (one per line), .csv or .jsonl (prompt or schedule, seed, "
        "frames, motion, negative), .schedule (lines FRAME: TEXT); - reads lines from standard "
        "input",
    )
    sample.add_argument(
        "--at",
        action="append",
        metavar="'FRAME: TEXT'",
        help="prompt of one video from this RGB frame on; repeat the option, starting at frame 0",
    )
    sample.add_argument(
        "--first-frame",
        metavar="FILE",
        help="image or video whose first frame the videos start with",
    )
    sample.add_argument(
        "--continue",
        dest="continue_video",
        metavar="VIDEO",
        help="video to continue: the videos start with its last frames",
    )
    sample.add_argument(
        "--tokens",
        dest="tokens_from",
        metavar="FILE",
        help="video, or file of --tokens-only, whose semantic tokens are rendered",
    )
    sample.add_argument(
        "--tokens-only",
        action="store_true",
        help="only sample the tokens; the same command without this option renders them",
    )
    sample.add_argument(
        "--seeds", metavar="A-B,C", help="seeds of each prompt, such as 0-3,7; one video per seed"
    )
    sample.add_argument(
        "--num-videos", type=int, metavar="N", help="videos per prompt and seed (default: 1)"
    )
    sample.add_argument(
        "--size",
        metavar="HxW",
        help="height and width in pixels; the models must have been trained on this size",
    )
    sample.add_argument(
        "--frames", type=int, metavar="N", help="frames of each video, 4 n + 1; 1 is an image"
    )
    sample.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="number of processes on this machine, each with its own GPU (default: 1)",
    )
    sample.add_argument(
        "--memory",
        metavar="SIZE",
        help="GPU memory to use, or memory of the machine if it has no GPU, such as 24GB; selects "
        "offload=",
    )
    sample.add_argument("--task", metavar="I/N", help=TASK)
    sample.add_argument("--pair", help=argparse.SUPPRESS)  # of processes that --nproc starts


def add_evaluate(commands: Commands) -> None:
    """`landiff evaluate`."""
    evaluate = add(
        commands,
        "evaluate",
        "Compare losses with right and wrong conditions (text, tokens), or score videos.",
        config="nano/evaluate",
        epilog=help_texts.OVERRIDES.format(example="seeds=5") + help_texts.VBENCH,
    )
    evaluate.add_argument(
        "action",
        nargs="?",
        choices=["conditions", "videos", "vbench"],
        default="conditions",
        help="conditions (default); videos: flicker, motion, FVD and KVD of a folder, with the "
        "config nano/videos; vbench: sample the prompts of VBench, run it and score it, with a "
        "config of `landiff sample`",
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
        help="vbench: JSON object that maps official prompts to augmented ones to sample from",
    )
    evaluate.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="vbench: number of processes that sample, each with its own GPU (default: 1)",
    )
    evaluate.add_argument(
        "--task",
        metavar="I/N",
        help="vbench: only sample part I of N of the videos, counted from 0; the command without "
        "--task then runs VBench",
    )
