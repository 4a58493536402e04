"""How much memory a run needs: one frozen request in, itemised bytes out; sharding, and what to change."""
