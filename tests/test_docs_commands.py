"""Every `landiff` command in the documentation parses, and every config key in it exists.

tests/test_documented_runs.py runs them.
"""

from __future__ import annotations

import pytest

from landiff.configs.loader import load
from landiff.launchers.arguments import build_parser, parse_command
from landiff.launchers.show_config import class_names_of
from landiff.launchers.stages import EVALUATIONS, STAGE_CONFIGS
from tests.docs_commands import ROOT, commands, words_of


def test_there_are_commands():
    assert len(commands()) > 40


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda text: text[:60])
def test_a_documented_command_parses_and_its_keys_exist(page, command):
    words = words_of(command)
    if words in (["--help"], ["--version"]):
        return
    args = parse_command(build_parser(), words)
    stage = getattr(args, "stage", None) or args.command
    config = getattr(args, "config", None)
    if args.command == "submit":
        inner = parse_command(build_parser(), submitted(args))
        stage, config, args = inner_stage(inner), getattr(inner, "config", None), inner
    if not config or not packaged(config):
        return
    if stage in ("attribute", "demo"):  # read the config of the samples
        stage = "sample"
    if stage == "captions":
        stage = "precompute"
    if stage == "data":  # reads the config of any trainer
        stage = class_names_of(config)[0]
    cls = STAGE_CONFIGS[stage]
    if stage == "evaluate":
        cls = EVALUATIONS[args.action][1]
    assert load(cls, config, args.overrides)


def submitted(args) -> list[str]:
    """The command of the stage that a `submit` line runs."""
    if args.stage == "pipeline":
        return ["doctor"]
    command = (
        ["train", args.stage] if args.stage in ("tokenizer", "lm", "diffusion") else [args.stage]
    )
    return [*command, *args.rest]


def inner_stage(args) -> str:
    return getattr(args, "stage", None) or args.command


def packaged(name: str) -> bool:
    """Whether a config is one of the packaged ones; others do not exist here."""
    return (ROOT / "configs" / f"{name}.yaml").is_file()
