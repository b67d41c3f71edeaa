"""Defaults that several commands share. Needs no torch: the help of a command names them."""

import os

MAX_BAD_IMAGES = 0.01  # part of a data set
# Each worker holds two batches ready: of 256 float32 images of 224 pixels they take 300 MB.
MOST_WORKERS = 16


def default_workers() -> int:
    """Count the workers that decode images for this process: one for each core that it may use and shares with none."""
    return max(1, min(MOST_WORKERS, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def count_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # where no process can be kept to some of them
