"""Shell completion for `landiff`, generated from its argument parser. Torch-free."""

from __future__ import annotations

import argparse
from typing import Literal

import shtab

from landiff.configs.loader import packaged_names
from landiff.launchers.arguments import all_options

Shell = Literal["bash", "zsh", "fish"]

CLUSTER = "cluster/"  # packaged configs below it are cluster files
FOLDER_OPTIONS = {"workdir", "zoo", "out", "run", "report"}
CONFIG_FUNCTION = "_landiff_config_names"
CLUSTER_FUNCTION = "_landiff_cluster_names"


def completion_script(parser: argparse.ArgumentParser, shell: Shell) -> str:
    """The completion script of `parser` for one shell.

    Completes commands, options and their choices, packaged config names, files and folders.
    """
    for option in all_options(parser):
        if option.dest == "config":
            option.complete = calls(CONFIG_FUNCTION)
        elif option.dest == "cluster":
            option.complete = calls(CLUSTER_FUNCTION)
        elif option.dest in FOLDER_OPTIONS:
            option.complete = shtab.DIRECTORY
        elif option.dest == "sources":
            option.complete = shtab.FILE
    names = packaged_names()
    stages = [name for name in names if not name.startswith(CLUSTER)]
    clusters = [name.removeprefix(CLUSTER) for name in names if name.startswith(CLUSTER)]
    functions = [
        names_or_files(CONFIG_FUNCTION, stages, shell),
        names_or_files(CLUSTER_FUNCTION, clusters, shell),
    ]
    return shtab.complete(parser, shell, preamble={shell: "\n".join(functions)})


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
