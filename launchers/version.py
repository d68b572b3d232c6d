"""The version of the project, read by setup.py, `landiff --version` and exported weights."""

__version__ = "0.1.0"
