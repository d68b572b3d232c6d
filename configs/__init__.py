"""Configuration: a strict typed base class, the loader, and the packaged YAML files."""

from configs.base import Config, ConfigError
from configs.loader import dump, find, load, validate

__all__ = ["Config", "ConfigError", "dump", "find", "load", "validate"]
