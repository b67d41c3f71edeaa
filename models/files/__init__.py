"""Checkpoint files: their formats, where they come from, and what can be wrong with them."""
