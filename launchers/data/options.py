"""Options of the commands about data, and of those around the shapes world. Torch-free."""

from __future__ import annotations

from landiff.launchers import help_texts
from landiff.launchers.command_options import Commands, add, add_column_options


def add_data_commands(commands: Commands) -> None:
    """Adds `landiff captions` and `landiff data`."""
    captions = add(
        commands,
        "captions",
        "Generate captions of clips with a vision-language model, or read them from a file.",
        config="landiff/captions",
        epilog=help_texts.CAPTIONS,
    )
    add_column_options(captions, stats="lengths and repetitions of finished captions")
    data = add(
        commands,
        "data",
        "Write an HTML page about a data folder: rejects by reason, histograms, contact sheets, "
        "weights, disk.",
        epilog=help_texts.DATA,
    )
    data.add_argument("action", choices=["report"], help="report (write the page)")
    data.add_argument("folder", nargs="?", metavar="FOLDER", help="data folder with a manifest")
    data.add_argument(
        "--config", metavar="NAME", help="instead of FOLDER: all data sets in a trainer's config"
    )
    data.add_argument("--out", metavar="FILE", help="the page (default: report.html in FOLDER)")
    data.add_argument(
        "--clips", type=int, default=48, metavar="N", help="clips on each contact sheet (48)"
    )


def add_shape_commands(commands: Commands) -> None:
    """Adds `landiff shapes`, `landiff fit-codec`, `landiff attribute`, `landiff learn`."""
    add_shapes(commands)
    add_fit_codec(commands)
    add_attribute(commands)
    add_learn(commands)


def add_shapes(commands: Commands) -> None:
    """`landiff shapes`."""
    shapes = add(
        commands,
        "shapes",
        "Make clips of moving shapes with captions, and score generated videos.",
    )
    shapes.add_argument(
        "action",
        choices=["make", "pairs", "score", "show"],
        help="make (training clips, true clips, labels and prompts of the shapes world), pairs "
        "(clips of two objects), score (compare videos with their labels), show (an animated "
        "picture of videos with captions and verdicts)",
    )
    shapes.add_argument(
        "--out",
        metavar="PATH",
        help="make, pairs: the folder; score: a JSON file of the rates; show: a GIF",
    )
    shapes.add_argument("--clips", type=int, default=2000, help="number of training clips")
    shapes.add_argument(
        "--true-clips", type=int, default=108, help="clips in each set that is not trained on"
    )
    shapes.add_argument("--size", type=int, default=64, help="height and width in pixels")
    shapes.add_argument("--frames", type=int, default=17, help="make: frames of a clip, at 8 fps")
    shapes.add_argument("--seed", type=int, default=0, help="seed of positions, sizes and order")
    shapes.add_argument("--videos", metavar="FOLDER", help="score, show: the videos")
    shapes.add_argument(
        "--labels", metavar="FILE", help="score, show: JSONL with a label per video"
    )
    shapes.add_argument("--count", type=int, default=12, help="show: number of videos")
    shapes.add_argument("--details", metavar="FILE", help="score: JSONL of what each video shows")
    shapes.add_argument(
        "--chunks",
        type=int,
        default=1,
        metavar="N",
        help="score: parts of each video that are compared, such as the chunks of a long one",
    )


def add_fit_codec(commands: Commands) -> None:
    """`landiff fit-codec`."""
    fit = add(commands, "fit-codec", "Fit a latent codec of principal components to clips.")
    fit.add_argument(
        "--clips", required=True, nargs="+", metavar="FOLDER", help="mp4 files of one shape"
    )
    fit.add_argument("--out", required=True, metavar="FILE", help="the codec, *.safetensors")
    fit.add_argument("--channels", type=int, default=16, help="channels of the latents")
    fit.add_argument("--limit", type=int, default=1000, help="maximum number of clips of a folder")
    fit.add_argument(
        "--whiten",
        type=float,
        default=0.0,
        metavar="POWER",
        help="0 (one scale for all channels) to 1 (every channel has the same variance)",
    )
    fit.add_argument(
        "--codec",
        metavar="CODEC",
        help="file or packaged codec whose components are taken, instead of a fit; needs --refine",
    )
    fit.add_argument(
        "--refine",
        type=int,
        default=0,
        metavar="STEPS",
        help="steps that train a convolutional refinement of decoded frames (default: none)",
    )
    fit.add_argument("--seed", type=int, default=0, help="seed of --refine")
    fit.add_argument(
        "--bf16",
        action="store_true",
        help="train the refinement in bfloat16, about twice as fast on CPUs with AMX",
    )


def add_attribute(commands: Commands) -> None:
    """`landiff attribute`."""
    attribute = add(
        commands,
        "attribute",
        "Score true clips of the shapes world after each stage, to see what each stage loses.",
        config="shapes/sample",
    )
    attribute.add_argument("--videos", required=True, metavar="FOLDER", help="true clips")
    attribute.add_argument("--labels", required=True, metavar="FILE", help="their labels")
    attribute.add_argument("--out", metavar="FILE", help="JSON file of the results")
    attribute.add_argument(
        "--vision-blocks",
        type=int,
        choices=(5, 11),
        default=5,
        help="`blocks` of efficientnet-lite0",
    )
    attribute.add_argument(
        "--vision-pooling",
        choices=("mean", "stack"),
        default="stack",
        help="`pooling` of efficientnet-lite0",
    )
    attribute.add_argument(
        "--probe-clips", type=int, default=612, help="clips that the probes are trained on"
    )


def add_learn(commands: Commands) -> None:
    """`landiff learn`."""
    learn = add(
        commands,
        "learn",
        "Train on the shapes world from scratch, on the CPU, and score videos of held-out "
        "captions.",
    )
    learn.add_argument("--out", default="runs/learn", metavar="DIR", help="output folder")
    learn.add_argument("--seed", type=int, default=0, help="seed of data and training")
    learn.add_argument(
        "--long",
        action="store_true",
        help="also train a language model on longer clips, and score videos of four chunks",
    )
    learn.add_argument(
        "--dry-run", action="store_true", help="print the commands and start nothing"
    )
