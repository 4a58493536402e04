"""Studies: whether another method beats LoRA on this data, and how certain that is."""
