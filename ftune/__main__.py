"""``python -m ftune``."""

from ftune.cli import main

main()
