"""Options of the commands around weights. Torch-free."""

from __future__ import annotations

from landiff.launchers import help_texts
from landiff.launchers.command_options import Commands, add


def add_weight_commands(commands: Commands) -> None:
    """Adds `landiff convert` and `landiff zoo`."""
    add_convert(commands)
    add_zoo(commands)


def add_convert(commands: Commands) -> None:
    """`landiff convert`."""
    convert = add(
        commands,
        "convert",
        "Convert weights between formats; export the newest checkpoint of a run to the zoo.",
        epilog=help_texts.CONVERT,
    )
    convert.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="run, checkpoint, zoo entry, or file or folder of weights; with --to diffusers also a "
        "config of `landiff sample`; `inspect PATH` describes the weights at PATH",
    )
    convert.add_argument(
        "--to",
        choices=["zoo", "release", "megatron", "deepspeed", "diffusers", "transformers"],
        default="zoo",
        help="format to write (default: zoo)",
    )
    convert.add_argument(
        "--name",
        help="name of the zoo entry; several models are named NAME-<kind> (default: their kinds)",
    )
    convert.add_argument("--out", metavar="FOLDER", help="new folder; for all formats but zoo")
    convert.add_argument("--zoo", default="zoo", help="zoo folder (default: zoo)")
    convert.add_argument(
        "--model",
        default="landiff/model",
        help="model sizes of a release, or of a Megatron folder without its config.yaml: packaged "
        "config or .yaml file (default: landiff/model)",
    )
    convert.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="cast the weights (default: keep their dtype)",
    )
    convert.add_argument(
        "--allow-missing",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keys that may be missing in the source, with the wildcards * and ?; they are "
        "initialized as in a new model",
    )
    convert.add_argument(
        "--merge",
        nargs="?",
        type=float,
        const=1.0,
        metavar="SCALE",
        help="add the given adapters to their base, which must be given too (default SCALE: 1)",
    )
    convert.add_argument(
        "--weights",
        choices=["ema", "raw"],
        help="of a run: the moving average of the weights (ema), or the weights themselves (raw); "
        "default: ema if the checkpoint has it",
    )
    convert.add_argument(
        "--weights-only",
        action="store_true",
        help="--to megatron or deepspeed: drop the optimizer of a checkpoint",
    )
    convert.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="--to deepspeed: number of ranks (default: that of the source)",
    )
    convert.add_argument(
        "--dry-run",
        action="store_true",
        help="read the headers and check every key; change nothing",
    )


def add_zoo(commands: Commands) -> None:
    """`landiff zoo`."""
    zoo = add(
        commands,
        "zoo",
        "List, show or verify the entries of a zoo, or package small models.",
        epilog=help_texts.ZOO,
    )
    zoo.add_argument("action", choices=["list", "show", "verify", "pack"])
    zoo.add_argument(
        "reference",
        nargs="?",
        help="name, name@fingerprint or path; pack: the folder of `landiff learn`",
    )
    zoo.add_argument(
        "--zoo",
        default="zoo",
        help="zoo folder, or `packaged` for the one that comes with landiff (default: zoo)",
    )
    zoo.add_argument("--out", metavar="FOLDER", help="pack: the new zoo")
