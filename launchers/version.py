"""The version of the project. setup.py, `landiff --version` and exports read it here."""

__version__ = "0.1.0"
