"""A benchmark of which one group fails, for test_gpu.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.support.isolated import Report, write_report
from benchmarks.support.rows import Row

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", action="store_true")
    parser.add_argument("--only")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    if options.only == "bad":
        sys.exit(3)
    write_report(options.report, Report("title", [Row(options.only, 1.0, "s")]))
