"""Options of `landiff new` and `landiff check`. Torch-free."""

from __future__ import annotations

import argparse

from landiff.launchers import help_texts

NEW = """\
Each size is said once. Grids of features and latents, tokens of a frame,
positions and prefixes follow.

  landiff new my-model --frames 49 --size 480x720 --from landiff --source videos
  cd my-model
  landiff check --preset .
  landiff quickstart --preset . --out .                     here; or as SLURM jobs:
  landiff submit pipeline --preset . --cluster cluster.yaml
"""
CHECK = """\
Nothing is started or written. All mistakes are listed at once. `landiff quickstart` and `landiff
submit pipeline` check the same before they start anything.
"""


def add_project_commands(commands: argparse._SubParsersAction) -> None:
    """Add `landiff new` and `landiff check`."""
    text = "Write the configs of a project for clips of any size, with a README of all commands."
    new = commands.add_parser(
        "new",
        help=text,
        description=text,
        epilog=NEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new.add_argument("folder", metavar="FOLDER", help="new folder of the project")
    new.add_argument(
        "--frames", type=int, metavar="N", help="frames of a clip, 4 n + 1 (default: the preset's)"
    )
    new.add_argument(
        "--size",
        metavar="HEIGHTxWIDTH",
        help="pixels of a clip, multiples of 16 (default: the preset's)",
    )
    new.add_argument(
        "--from",
        dest="base",
        metavar="PRESET",
        default="nano",
        choices=["nano", "landiff", "shapes"],
        help="packaged preset that all other values are from: nano (default), landiff or shapes",
    )
    new.add_argument(
        "--source",
        metavar="PATH",
        help="your videos, as `source` of shards (default: the preset's)",
    )
    new.add_argument(
        "--captions",
        choices=["reject", "file_name", "folder_name", "none"],
        help="clips without a caption: as `missing_captions` of shards (default: reject)",
    )
    text = "Check that all stages of a preset fit each other, before any of them starts."
    check = commands.add_parser(
        "check",
        help=text,
        description=text,
        epilog=CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument(
        "--preset", default="nano", metavar="PRESET", help=f"{help_texts.PRESET} (default: nano)"
    )
    check.add_argument(
        "--config", metavar="NAME", help="check this config of one stage alone, instead of a preset"
    )
