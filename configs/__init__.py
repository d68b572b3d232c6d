"""Configuration: typed base class, loader, and packaged YAML files."""

from landiff.configs.base import Config, ConfigError
from landiff.configs.loader import dump, find, load, validate

__all__ = ["Config", "ConfigError", "dump", "find", "load", "validate"]
