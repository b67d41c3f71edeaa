"""The process that compiles a checkpoint for a server, without taking time from its requests.

`service.engines.candidate_engine` starts it. Its priority is the lowest, which no thread of a server may have.
"""

import json
import os
import struct
import sys

from service.engines.priority import use_spare_time

LENGTH = struct.Struct("<Q")  # of a graph, in bytes


def main(path: str, version: str, choice: str, file: str) -> None:
    """Compile the engine that `open_engine` creates for the same arguments.

    Args:
        path: the checkpoint's file.
        version: its expected version.
        choice: the engine, as JSON.
        file: descriptor of the file to which the exported graphs are written, each after its LENGTH.

    Raises:
        SystemExit: the checkpoint has another version.
    """
    use_spare_time()
    # These imports take seconds of a processor, so they wait for the low priority.
    import torch

    from models.checkpoint import load_checkpoint
    from service.engines.factory import EngineChoice, open_engine
    from service.engines.openvino_engine import OpenVINOEngine

    torch.set_num_threads(1)  # several would spin while they wait for the processors of others
    checkpoint = load_checkpoint(path)
    if checkpoint.version != version:
        sys.exit("the checkpoint was replaced while it was loaded")
    engine, _ = open_engine(checkpoint, EngineChoice(**json.loads(choice)))
    if not isinstance(engine, OpenVINOEngine):
        sys.exit("this engine is not compiled")
    with os.fdopen(int(file), "wb") as output:
        for graph in engine.export():
            output.write(LENGTH.pack(len(graph)))
            output.write(graph)


if __name__ == "__main__":
    main(*sys.argv[1:])
