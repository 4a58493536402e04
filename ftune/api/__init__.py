"""The way in from Python: what ``ftune`` exports. Each function takes a recipe as a path, a mapping or a ``Recipe``."""

from ftune.api.planning import Planned, plan
from ftune.api.recipes import Recipe, load
from ftune.api.results import Conversion, Evaluation, Generation, Merge
from ftune.api.runs import Run
from ftune.api.training import train
from ftune.api.using import convert, evaluate, generate, merge

__all__ = [
    "Conversion",
    "Evaluation",
    "Generation",
    "Merge",
    "Planned",
    "Recipe",
    "Run",
    "convert",
    "evaluate",
    "generate",
    "load",
    "merge",
    "plan",
    "train",
]
