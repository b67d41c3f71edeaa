"""Defaults that several commands share. Imports no torch, because the help of a command states them."""

import os

MAX_BAD_IMAGES = 0.01  # fraction of a data set's images that may be unreadable
# Bounds memory: each worker prefetches two batches, which take 300 MB at 256 float32 images of 224 pixels each.
MAX_WORKERS = 16


def default_workers() -> int:
    """Return how many workers decode images for this process: one per core of its share, at most MAX_WORKERS."""
    return max(1, min(MAX_WORKERS, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def count_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # on systems without CPU affinity
