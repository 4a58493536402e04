"""Training: one objective, one loop, checkpoints and events."""
