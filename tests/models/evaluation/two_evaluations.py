"""The script that test_evaluate runs under torchrun: two processes measure a checkpoint.

    python -m torch.distributed.run --nproc-per-node 2 two_evaluations.py CHECKPOINT DATA FOUND_JSON

The first process writes the results of both, how many images each has seen, and which of its own threads for the
exchange are left at the end, to FOUND_JSON.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import load_checkpoint
from models.evaluation.evaluate import evaluate
from models.processes import gather, joined_processes

if __name__ == "__main__":
    checkpoint, data, found_json = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    num_seen = 0

    def count(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pass batches on and count their images."""
        global num_seen
        for batch in loader:
            num_seen += len(batch[1])
            yield batch

    with joined_processes("cpu") as process:
        found = evaluate(
            load_checkpoint(checkpoint),
            data,
            batch_size=5,
            workers=1,
            max_bad_images=0.2,
            progress=count,
            process=process,
        )
        profiles, seen = gather(repr(found.profile)), gather(num_seen)
    threads = [(each / "comm").read_text().strip() for each in Path("/proc/self/task").iterdir()]
    if process.is_first:
        left = [name for name in threads if "gloo" in name]
        content = {"profiles": profiles, "num_seen": seen, "basis": found.basis, "left": left}
        found_json.write_text(json.dumps(content))
