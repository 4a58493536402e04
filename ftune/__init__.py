"""Declarative fine-tuning: a recipe in, a proven adapter out."""

__version__ = "0.1.0"
