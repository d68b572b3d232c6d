"""The commands `landiff convert` and `landiff zoo`.

Heavy modules are imported in the functions that need them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from landiff.configs import ConfigError, load
from landiff.configs.problems import require_none
from landiff.launchers.commands import print_lines
from landiff.launchers.weights.pipeline_folder import (
    check_pipeline,
    describe_pipeline,
    write_pipeline,
)
from landiff.launchers.weights.request import (
    ConvertRequest,
    check_request,
    names_config,
    request_of,
)
from landiff.model_zoo import registry
from landiff.training.checks import Launch

if TYPE_CHECKING:
    from landiff.model_zoo.registry import ZooEntry


def convert_command(args: argparse.Namespace) -> int:
    """Converts weights, or describes them with `inspect PATH`. Returns the exit code."""
    if args.sources[0] == "inspect":
        inspect_weights(args, args.sources[1:])
        return 0
    request = request_of(args)
    if names_config(request):
        return _convert_config(request, dry_run=args.dry_run)
    require_none(check_request(request, Launch()))
    from landiff.launchers.weights.convert import convert_weights, plan

    if args.dry_run:
        for line in plan(request):
            print(line)
    else:
        print_lines("convert", convert_weights(request))
    return 0


def _convert_config(request: ConvertRequest, *, dry_run: bool) -> int:
    """Writes the pipeline of a config. Returns the exit code."""
    require_none(check_pipeline(request, Launch()))
    if dry_run:
        print("\n".join(describe_pipeline(request)))
    else:
        print_lines("convert", write_pipeline(request))
    return 0


def inspect_weights(args: argparse.Namespace, paths: Sequence[str]) -> None:
    """Prints what each file or folder of weights holds."""
    if not paths:
        raise ConfigError("landiff convert inspect needs a path")
    from landiff.launchers.weights.convert import find_source
    from landiff.model_zoo.config import ModelConfig
    from landiff.model_zoo.convert.known_formats import describe_source
    from landiff.model_zoo.convert.parts import Options

    options = Options(load(ModelConfig, args.model), tuple(args.allow_missing), args.weights)
    descriptions = [describe_source(find_source(path, Path(args.zoo), options)) for path in paths]
    print("\n".join(descriptions))


def zoo_command(args: argparse.Namespace) -> int:
    """Lists, shows or verifies zoo entries, or packs those of a run. Returns the exit code."""
    zoo = Path(args.zoo)
    if args.action == "pack":
        if not args.reference or not args.out:
            raise ConfigError("landiff zoo pack needs the folder of a run, and --out FOLDER")
        from landiff.launchers.weights.pack import pack

        print_lines("zoo", pack(Path(args.reference), Path(args.out)))
        return 0
    if args.action != "show" and not args.reference:
        return print_all_entries(zoo, verify=args.action == "verify")
    if not args.reference:
        raise ConfigError("landiff zoo show needs a reference: name, name@fingerprint or a path")
    entry = registry.resolve(zoo, args.reference)
    if args.action == "verify":
        registry.verify_entry(entry)
        print(f"{entry.reference}: config and weights match the fingerprint")
    elif args.action == "list":
        print(describe_entry(entry))
    else:
        shown = {
            "kind": entry.kind,
            "path": str(entry.path),
            "config": entry.config.model_dump(mode="json"),
            "provenance": entry.provenance,
        }
        print(json.dumps(shown, indent=1))
    return 0


def print_all_entries(zoo: Path, *, verify: bool) -> int:
    """Lists all entries, after verifying each with `verify`.

    Damaged entries are listed with the reason. Returns 2 if there is one, else 0.
    """
    num_damaged = 0
    for folder in registry.entry_folders(zoo):
        try:
            entry = registry.read_entry(folder)
            line = describe_entry(entry)
            if verify:
                registry.verify_entry(entry)
                line += "  verified"
        except ConfigError as error:
            num_damaged += 1
            line = f"{'damaged':<14}{folder.parent.name}@{folder.name}  {error}"
        print(line)
    return 2 if num_damaged else 0


def describe_entry(entry: ZooEntry) -> str:
    """Kind, reference, step and origin of an entry, in one line."""
    provenance = entry.provenance
    paths = [source.get("path", "?") for source in provenance.get("sources", ())]
    origin = ", ".join(paths) or "unknown origin"
    if provenance.get("weights") == "ema":
        origin = f"moving average of {origin}"
    if provenance.get("step") is not None:
        return f"{entry.kind:<14}{entry.reference}  step {provenance['step']}, from {origin}"
    return f"{entry.kind:<14}{entry.reference}  from {origin}"
