"""The errors that Isthmus raises for what its user asked of it. Imports nothing of the package."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that can't work; the message names the field and the limit."""
