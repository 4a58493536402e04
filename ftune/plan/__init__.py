"""From a recipe to what will be trained: tokens, steps, memory, and then the model itself."""
