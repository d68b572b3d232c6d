"""Parses the command line of `landiff`. Torch-free."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import NoReturn

from landiff.launchers import help_texts
from landiff.launchers.command_options import add_other_commands, add_stage_commands
from landiff.launchers.data.options import add_data_commands, add_shape_commands
from landiff.launchers.demo.options import add_demo
from landiff.launchers.project.options import add_project_commands
from landiff.launchers.results.options import add_result_commands
from landiff.launchers.run.options import add_run_commands
from landiff.launchers.version import __version__
from landiff.launchers.weights.options import add_weight_commands

OVERRIDE = re.compile(r"([A-Za-z_][\w.-]*)=")
INVALID_CHOICE = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """Argument parser that suggests the nearest known word for a mistyped one."""

    def error(self, message: str) -> NoReturn:
        """Prints usage and message, and exits with code 2."""
        found = INVALID_CHOICE.search(message)
        if found:
            choices = re.findall(r"[\w-]+", found[2])
            nearest = difflib.get_close_matches(found[1], choices, n=1)
            if nearest:
                message = f"{message}; did you mean {nearest[0]!r}?"
        super().error(message)


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="landiff",
        description="Pretrain LanDiff text-to-video models, from clips to samples.",
        epilog=help_texts.PIPELINE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-C",
        dest="workdir",
        metavar="DIR",
        help="run in DIR: relative paths on the command line and in configs refer to it",
    )
    parser.add_argument("--version", action="version", version=f"landiff {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_project_commands(commands)
    add_stage_commands(commands)
    add_data_commands(commands)
    add_weight_commands(commands)
    add_result_commands(commands)
    add_demo(commands)
    add_run_commands(commands)
    add_other_commands(commands)
    add_shape_commands(commands)
    return parser


def parse_command(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses one command line; its `key=value` words are returned in `overrides`.

    For `submit`, `rest` holds the arguments of the stage. For `sample`, all words after `--` are
    prompts, whatever they contain. Mistakes end the process with exit code 2.
    """
    head = list(argv)
    texts: list[str] = []
    if "--" in head:
        position = head.index("--")
        texts = head[position + 1 :]
        head = head[:position]
    words, overrides = split_overrides(parser, head)
    args, unknown = parser.parse_known_args(words)
    if args.command == "submit":
        # The stage's own arguments, overrides among them, are parsed with the stage's parser.
        args, rest = parser.parse_known_args(head)
        args.argv = list(argv)
        args.rest = [*rest, *argv[len(head) :]]
        args.overrides = []
        return args
    if args.command == "sample":
        prompts, overrides = split_prompts(parser, overrides)
        refuse_files(parser, args.prompts)
        args.prompts = [*args.prompts, *prompts, *texts]
    elif texts:
        args, unknown = parser.parse_known_args([*words, "--", *texts])
    has_config = getattr(args, "config", None) is not None
    takes_overrides = args.command in ("convert", "plan") or has_config
    if unknown and takes_overrides:
        parser.error(f"unrecognised argument {unknown[0]!r}; overrides are written key=value")
    if not takes_overrides and (unknown or overrides):
        parser.error(f"unrecognised argument {[*unknown, *overrides][0]!r}")
    args.argv = list(argv)
    args.overrides = overrides
    return args


def split_overrides(parser: Parser, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into (all other words, `dotted.key=value` words).

    A word after an option that takes a value is that option's value.
    """
    flags: set[str] = set()
    for action in all_options(parser):
        if action.nargs == 0:
            flags.update(action.option_strings)
    words: list[str] = []
    overrides: list[str] = []
    previous = ""
    for word in argv:
        is_value = previous.startswith("-") and "=" not in previous and previous not in flags
        if OVERRIDE.match(word) and not is_value:
            overrides.append(word)
        else:
            words.append(word)
        previous = word
    return words, overrides


def split_prompts(parser: Parser, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits words of `sample` that begin with `KEY=` into (prompts, overrides).

    If KEY is a key of the config, the word is an override. Otherwise a word that contains white
    space is a prompt, and any other word is an error, so that a mistyped key is not sampled.
    """
    from landiff.launchers.config import SampleConfig

    prompts = []
    overrides = []
    for word in words:
        key = word.partition("=")[0]
        if key.split(".")[0] in SampleConfig.model_fields:
            overrides.append(word)
        elif any(letter.isspace() for letter in word):
            prompts.append(word)
        else:
            nearest = difflib.get_close_matches(key, SampleConfig.model_fields, n=1, cutoff=0.5)
            problem = f"unknown config key {key!r} in {word!r}"
            if nearest:
                problem += f"; did you mean {nearest[0]!r}?"
            parser.error(
                f"{problem} (Write a prompt that begins with KEY= after --:  "
                f"landiff sample --config ... -- {shlex.quote(word)})"
            )
    return prompts, overrides


def refuse_files(parser: Parser, prompts: Sequence[str]) -> None:
    """Ends the process if a prompt is the name of a file: the file was probably meant."""
    for prompt in prompts:
        if os.path.isfile(prompt):
            parser.error(
                f"{prompt!r} is a file; sample its prompts with --prompts {shlex.quote(prompt)}, "
                "or write it after -- if it is the prompt itself"
            )


def all_options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All options and positional arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from all_options(command)
        else:
            yield action
