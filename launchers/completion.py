"""The command `landiff completion`: shell completion from the argument parser. Torch-free."""

from __future__ import annotations

import argparse
from typing import Literal

import shtab

from landiff.configs.loader import packaged_names
from landiff.launchers.arguments import all_options, build_parser

Shell = Literal["bash", "zsh", "fish"]

CLUSTER = "cluster/"  # packaged configs below it are cluster files
CONFIG_OPTIONS = {"config", "explained_config"}
FOLDER_OPTIONS = {"workdir", "zoo", "out", "run", "runs", "report"}
CONFIG_FUNCTION = "_landiff_config_names"
CLUSTER_FUNCTION = "_landiff_cluster_names"


def completion_command(args: argparse.Namespace) -> int:
    """Prints the completion script of the shell `args.shell`. Returns the exit code."""
    print(completion_script(build_parser(), args.shell), end="")
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: Shell) -> str:
    """The completion script of `parser` for one shell.

    Completes commands, options and their choices, packaged config names, files and folders.
    """
    for option in all_options(parser):
        completer = completer_of(option)
        if completer is not None:
            vars(option)["complete"] = completer  # the attribute that shtab reads
    names = packaged_names()
    stages = [name for name in names if not name.startswith(CLUSTER)]
    clusters = [name.removeprefix(CLUSTER) for name in names if name.startswith(CLUSTER)]
    functions = [
        names_or_files(CONFIG_FUNCTION, stages, shell),
        names_or_files(CLUSTER_FUNCTION, clusters, shell),
    ]
    return shtab.complete(parser, shell, preamble={shell: "\n".join(functions)})


def completer_of(option: argparse.Action) -> dict[str, str] | None:
    """How each shell completes the values of an option; None for shtab's default."""
    if option.dest in CONFIG_OPTIONS:
        return calls(CONFIG_FUNCTION)
    if option.dest == "cluster":
        return calls(CLUSTER_FUNCTION)
    if option.dest in FOLDER_OPTIONS or option.dest == "preset":
        return shtab.DIRECTORY
    if option.dest == "sources":
        return shtab.FILE
    return None


def calls(function: str) -> dict[str, str]:
    """How each shell calls the completion function `function`."""
    return {"bash": function, "zsh": function, "fish": f"({function})"}


def names_or_files(function: str, names: list[str], shell: Shell) -> str:
    """A shell function that offers `names` and the files of the current folder."""
    words = " ".join(names)
    if shell == "bash":
        body = [f'compgen -W "{words}" -- "$1"', 'compgen -f -- "$1"']
        return "\n".join([f"{function}() {{", *body, "}"])
    if shell == "zsh":
        body = [f"compadd -- {words}", "_files"]
        return "\n".join([f"{function}() {{", *body, "}"])
    body = [f"printf '%s\\n' {words}", "__fish_complete_path (commandline -ct)"]
    return "\n".join([f"function {function}", *body, "end"])
