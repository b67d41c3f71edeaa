"""Runs what the scheduler decides: the batcher, the engine's thread and the work of idle moments."""
