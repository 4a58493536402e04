"""The version, for who must not import all of the package for it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
