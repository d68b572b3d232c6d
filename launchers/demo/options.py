"""Options of `landiff demo`. Torch-free."""

from __future__ import annotations

from landiff.launchers import help_texts
from landiff.launchers.command_options import Commands, add


def add_demo(commands: Commands) -> None:
    """Adds `landiff demo`."""
    demo = add(
        commands,
        "demo",
        "Serve a web page on this machine that generates videos, with a queue and a gallery.",
        config="nano/sample",
        default_config="shapes/packaged",
        epilog=help_texts.OVERRIDES.format(example="steps=10 out=videos") + help_texts.DEMO,
    )
    demo.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this machine only). There is no password: "
        "with another address, everybody who reaches it can generate videos and see all of them",
    )
    demo.add_argument(
        "--port",
        type=int,
        default=7860,
        metavar="N",
        help="port to listen on (default: 7860); 0 uses any free port",
    )
