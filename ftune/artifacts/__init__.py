"""What a run leaves behind, and what is done with it: run directory, evaluation, merge, model card."""
