"""Where events go: the terminal, ``metrics.jsonl``, and other people's trackers."""
