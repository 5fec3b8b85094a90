"""The version of this package, which also runs from a source tree that was not installed."""

__version__ = "0.1.0"
