"""Options of `landiff new` and `landiff check`. Torch-free."""

from __future__ import annotations

import argparse

from landiff.launchers import help_texts

NEW = """\
Set the clip size once. Grids of features and latents, tokens per frame, positions and prefixes are
computed from it.

  landiff new my-model --frames 49 --size 480x720 --from landiff --source videos
  cd my-model
  landiff check --preset .
  landiff quickstart --preset . --out .                         run on this machine, or
  landiff submit pipeline --preset . --cluster cluster.yaml     run as SLURM jobs
"""
CHECK = """\
Lists all mistakes at once. Starts and writes nothing. `landiff quickstart` and `landiff submit
pipeline` run the same check first.
"""


def add_project_commands(commands: argparse._SubParsersAction) -> None:
    """Add `landiff new` and `landiff check`."""
    text = "Create a project folder: configs of all stages for your clip size, and a README."
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
        choices=["nano", "landiff", "quickstart", "shapes"],
        help="packaged preset with all other values: landiff (the released sizes, for GPUs), "
        "quickstart (small models that learn a few dozen clips on a CPU in a quarter of an hour), "
        "shapes (the same models, trained longer), nano (default; the shortest trainings, for a "
        "first look at all stages)",
    )
    new.add_argument(
        "--source",
        metavar="PATH",
        help="your videos, the `source` of shards.yaml (default: the preset's)",
    )
    new.add_argument(
        "--captions",
        choices=["reject", "file_name", "folder_name", "none"],
        help="handling of clips without a caption, `missing_captions` of shards.yaml (default: "
        "reject)",
    )
    text = "Check the configs of all stages of a preset, and that they match each other."
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
        "--config", metavar="NAME", help="check only this config of one stage, instead of a preset"
    )
