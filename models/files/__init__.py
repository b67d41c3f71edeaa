"""Checkpoint files as they come: their formats, where they lie, and what can be wrong with them."""
