"""Pure tensor code and arithmetic: no recipe, no model, no state."""
