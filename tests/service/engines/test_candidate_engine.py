import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.header import Header
from models.profiles import ProfileTable
from models.quantization import BlockRanges, Quantization, Range
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT
from service.engines.candidate_engine import open_candidate
from service.engines.factory import EngineChoice, open_engine
from service.errors import NotReadyError

CONFIG = SuperViTConfig(
    width=16, depth=3, num_heads=2, patch_kernel=4, patch_grids=(2, 4), prune_blocks=(1,), num_classes=3
)
LOSSY = SubNetwork(2, 0.5)
ON_CPU = EngineChoice("auto", "cpu", "auto", 1)
IN_FLOAT32 = replace(ON_CPU, precision="float32")


@pytest.fixture
def prepared(tmp_path: Path) -> Checkpoint:
    """A checkpoint prepared for 8 bits, in which one sub-network loses too much: it needs two graphs."""
    torch.manual_seed(1)
    ranges = BlockRanges(Range.of(-3.0, 3.0), Range.of(-1.0, 1.0), Range.of(-3.0, 3.0), Range.of(-0.2, 3.0))
    rows = [replace(row, top1=0.8) for row in ProfileTable.unmeasured(CONFIG).rows]
    lossy = [replace(row, top1=0.7) if row.subnetwork == LOSSY else row for row in rows]
    int8 = Quantization((ranges,) * CONFIG.depth, ProfileTable(tuple(lossy)))
    header = Header("tiny", CONFIG, ("a", "b", "c"), ProfileTable(tuple(rows)), int8)
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, SuperViT(CONFIG), header)
    return load_checkpoint(path)


def never() -> bool:
    return False


def test_the_engine_is_the_one_that_the_server_would_compile_itself(prepared: Checkpoint) -> None:
    engine, served = open_candidate(prepared, ON_CPU, 1, never)
    expected, expected_served = open_engine(prepared, ON_CPU)
    assert engine.describe() == expected.describe()
    assert served.profile == expected_served.profile
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for subnetwork in CONFIG.subnetworks:
        assert torch.equal(engine.run(images, subnetwork), expected.run(images, subnetwork)), subnetwork


@pytest.mark.parametrize(("served", "nice"), [(2, 2), (1, 0)])
def test_no_thread_of_lower_priority_takes_part_in_a_batch(prepared: Checkpoint, served: int, nice: int) -> None:
    """This runs in a separate process, because OpenVINO uses the threads of destroyed engines again."""
    script = f"""
import os
from pathlib import Path
import torch
from models.checkpoint import load_checkpoint
from service.engines.candidate_engine import NICENESS, open_candidate
from service.engines.factory import EngineChoice, open_engine

def nanoseconds_of_nice_threads():
    threads = [each.name for each in Path("/proc/self/task").iterdir()]
    nice = [each for each in threads if os.getpriority(os.PRIO_PROCESS, int(each)) == NICENESS]
    return [int(Path(f"/proc/self/task/{{each}}/schedstat").read_text().split()[0]) for each in nice]

checkpoint = load_checkpoint({str(prepared.path)!r})
served, _ = open_engine(checkpoint, EngineChoice("auto", "cpu", "float32", {served}))
served.warm_up()
engine, _ = open_candidate(checkpoint, EngineChoice("auto", "cpu", "float32", 2), {served}, lambda: False)
before = nanoseconds_of_nice_threads()
for subnetwork in checkpoint.config.subnetworks * 10:
    engine.run(torch.zeros(64, 3, 16, 16, dtype=torch.uint8), subnetwork)
print(len(before), nanoseconds_of_nice_threads() == before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{nice} True\n"


def test_a_checkpoint_that_was_replaced_meanwhile_is_not_compiled(prepared: Checkpoint) -> None:
    assert prepared.path is not None
    header = Header("other", CONFIG, ("a", "b", "c"), prepared.profile)
    save_checkpoint(prepared.path, SuperViT(CONFIG), header)
    with pytest.raises(RuntimeError, match=r"ended with 1: the checkpoint was replaced while it was loaded$"):
        open_candidate(prepared, IN_FLOAT32, 1, never)


def test_the_process_has_the_lowest_priority_and_ends_with_the_server(prepared: Checkpoint) -> None:
    seen: list[psutil.Process] = []

    def is_stopping() -> bool:
        """Stop as soon as the process has lowered its priority, which it does before its slow imports."""
        seen[:] = [each for each in psutil.Process().children() if each.nice() == 19]
        return bool(seen) or time.monotonic() > deadline

    deadline = time.monotonic() + 20
    with pytest.raises(NotReadyError, match="the server is stopping"):
        open_candidate(prepared, IN_FLOAT32, 1, is_stopping)
    assert [each.is_running() for each in seen] == [False]


def test_only_openvino_needs_the_process(prepared: Checkpoint) -> None:
    moved = replace(prepared, path=Path("/no/such/file"))
    engine, _ = open_candidate(moved, replace(IN_FLOAT32, kind="torch"), 1, never)
    assert engine.describe().startswith("torch")


def test_a_checkpoint_without_a_file_is_compiled_at_once(prepared: Checkpoint) -> None:
    engine, _ = open_candidate(replace(prepared, path=None), IN_FLOAT32, 1, never)
    assert engine.describe().startswith("openvino")
