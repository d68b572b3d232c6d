"""The command `landiff demo`. Torch and Gradio are imported after the checks."""

from __future__ import annotations

import argparse
import os

from landiff.configs import ownership
from landiff.configs.ownership import OWNER
from landiff.configs.problems import require_none
from landiff.launchers.checks import load_checked
from landiff.launchers.commands import print_dry_run
from landiff.launchers.config import SampleConfig
from landiff.training.checks import Launch, check_package

FOLDER = "demo"  # below the `out` of the config


def demo_command(args: argparse.Namespace) -> int:
    """Serves the page until it is interrupted. Returns the exit code."""
    config, problems = load_checked(
        "sample", SampleConfig, args.config, args.overrides, launch=Launch()
    )
    way_out = "pip install 'landiff-pretrain[demo]'"
    problems += check_package("gradio", "landiff demo", "the page", way_out)
    require_none(problems)
    folder = config.out / FOLDER
    if args.dry_run:
        print_dry_run(config, f"would serve a page on {args.host}:{args.port}, videos in {folder}")
        return 0
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported
    from landiff.launchers.demo.server import DemoServer, is_local

    with ownership.take(folder / OWNER, f"folder of the demo {folder}"):
        server = DemoServer(config.model_copy(update={"out": folder}), args.host, args.port)
        print(f"demo: open {server.address}  (Ctrl-C ends it; videos are in {folder})", flush=True)
        if not is_local(args.host):
            print("demo: everybody who reaches this address can use the page", flush=True)
        server.run()
    return 0
