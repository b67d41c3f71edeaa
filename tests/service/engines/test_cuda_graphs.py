import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from models.subnetwork import SubNetwork
from service.engines.base import Captured
from service.engines.cuda_graphs import MEMORY_SHARE, WARM_UPS, CudaDevice, GraphCache
from tests.service.engines.fake_graphs import FakeGraphDevice

SMALL, LARGE = SubNetwork(2, 0.5), SubNetwork(4, 1.0)
SIDE = 4


def forward(images: Tensor, subnetwork: SubNetwork) -> Tensor:
    """Return (B, 2) numbers that differ for every image and sub-network."""
    if subnetwork.patch_grid not in (2, 4):
        raise ValueError("not trained")
    sums = images.float().sum(dim=(1, 2, 3))
    return torch.stack([sums * subnetwork.patch_grid, sums * subnetwork.keep_rate], dim=1)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture
def device() -> FakeGraphDevice:
    return FakeGraphDevice()


@pytest.fixture
def cache(device: FakeGraphDevice) -> GraphCache:
    return GraphCache(forward, SIDE, device)


def test_running_a_batch_captures_nothing(cache: GraphCache, device: FakeGraphDevice) -> None:
    assert cache.run(images(2), SMALL) is None
    assert (device.num_captures, cache.captured) == (0, Captured(0, 0))


def test_captured_batches_run_in_any_order_without_another_capture(cache: GraphCache, device: FakeGraphDevice) -> None:
    cells = [(subnetwork, size) for subnetwork in (SMALL, LARGE) for size in (1, 2, 4)]
    for cell in cells:
        cache.prepare(*cell)
    for seed in range(3):
        for subnetwork, size in reversed(cells):
            cache.prepare(subnetwork, size)
            batch = images(size, seed)
            answer = cache.run(batch, subnetwork)
            assert answer is not None
            assert torch.equal(answer, forward(batch, subnetwork))
    assert device.num_captures == len(cells)
    assert device.num_replays == 3 * len(cells)
    assert cache.captured == Captured(len(cells), len(cells) * device.held_bytes)


def test_a_smaller_batch_runs_in_the_first_rows_of_the_next_larger_graph(
    cache: GraphCache, device: FakeGraphDevice
) -> None:
    for size in (4, 8):
        cache.prepare(SMALL, size)
    cache.run(images(4, seed=1), SMALL)  # its last image stays in the fourth row
    for count in (3, 5, 6, 7):
        batch = images(count, seed=count)
        answer = cache.run(batch, SMALL)
        assert answer is not None
        assert torch.equal(answer, forward(batch, SMALL))
    assert device.num_captures == 2


def test_a_batch_is_not_padded_to_twice_its_size_or_more(cache: GraphCache) -> None:
    cache.prepare(SMALL, 4)
    assert cache.run(images(2), SMALL) is None
    assert cache.run(images(5), SMALL) is None
    assert cache.run(images(3), LARGE) is None


def test_logits_stay_unchanged_when_the_graph_runs_again(cache: GraphCache) -> None:
    cache.prepare(SMALL, 2)
    first = cache.run(images(2, seed=1), SMALL)
    cache.run(images(2, seed=2), SMALL)
    assert first is not None
    assert torch.equal(first, forward(images(2, seed=1), SMALL))


def test_graphs_of_the_same_batch_size_share_their_buffers(cache: GraphCache, device: FakeGraphDevice) -> None:
    for subnetwork in (SMALL, LARGE):
        for size in (1, 2):
            cache.prepare(subnetwork, size)
    assert device.buffer_sizes == [1, 2]


def test_a_failed_capture_is_logged_once_and_ends_all_capturing(
    cache: GraphCache, device: FakeGraphDevice, caplog: pytest.LogCaptureFixture
) -> None:
    cache.prepare(SMALL, 1)
    device.error = RuntimeError("operation not permitted when stream is capturing")
    for _ in range(2):
        cache.prepare(LARGE, 1)
        cache.prepare(LARGE, 2)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "not permitted" in caplog.text
    device.error = None
    cache.prepare(LARGE, 1)
    assert cache.run(images(1), LARGE) is None
    assert cache.run(images(1), SMALL) is not None
    assert cache.captured.num_graphs == 1


def test_a_sub_network_that_cannot_run_raises_and_does_not_end_capturing(cache: GraphCache) -> None:
    with pytest.raises(ValueError, match="not trained"):
        cache.prepare(SubNetwork(3, 1.0), 1)
    cache.prepare(SMALL, 1)
    assert cache.captured.num_graphs == 1


def test_capturing_ends_at_the_memory_share_and_captured_graphs_stay(
    cache: GraphCache, device: FakeGraphDevice, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    room = int(MEMORY_SHARE * device.total_bytes) // device.held_bytes
    for size in range(1, room + 5):
        cache.prepare(SMALL, size)
    assert cache.captured == Captured(room + 1, (room + 1) * device.held_bytes)
    assert all(cache.run(images(size), SMALL) is not None for size in range(1, room + 2))
    assert cache.run(images(room + 2), SMALL) is None
    assert [record.getMessage() for record in caplog.records] == [
        "11 CUDA graphs take 110 bytes; no more will be captured"
    ]


@dataclass
class Gpu:
    """The calls that a capture makes to torch.cuda, in order, and the free memory at each query."""

    asked: list[str]
    free_bytes: Iterator[int]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Replace torch.cuda by a fake that records its calls; there is no GPU."""
    found = Gpu([], iter([1000, 930]))

    def say(what: str) -> Callable[..., None]:
        return lambda *_: found.asked.append(what)

    def within(what: str) -> Callable[..., object]:
        @contextmanager
        def entered(*arguments: object, **options: object) -> Iterator[None]:
            found.asked.append(" ".join(map(str, (what, *arguments[what == "capture" :], *options.values()))))
            yield
            found.asked.append(f"end {what}")

        return entered

    class Stream:
        def __init__(self, _: torch.device) -> None: ...
        def __str__(self) -> str:
            return "side"

        def wait_stream(self, other: str) -> None:
            found.asked.append(f"side waits for {other}")

    replacements: dict[str, object] = {
        "Stream": Stream,
        "CUDAGraph": lambda: SimpleNamespace(replay=say("replay")),
        "current_stream": lambda _: "current",
        "device": within("device"),
        "empty_cache": say("empty cache"),
        "get_device_properties": lambda _: SimpleNamespace(total_memory=10_000),
        "graph": within("capture"),
        "graph_pool_handle": lambda: "pool",
        "mem_get_info": lambda: (next(found.free_bytes), 10_000),
        "stream": within("stream"),
        "synchronize": say("synchronize"),
    }
    for name, value in replacements.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def test_a_gpu_warms_up_and_captures_on_a_side_stream_and_counts_the_memory_of_the_driver(gpu: Gpu) -> None:
    device = CudaDevice(torch.device("cuda", 1))
    assert device.total_bytes == 10_000

    def logits() -> Tensor:
        gpu.asked.append("forward")
        return torch.zeros(1, 2)

    graph = device.capture(logits)
    assert graph.held_bytes == 70
    measured = ["synchronize", "empty cache"]  # what a warm-up leaves in PyTorch's cache belongs to no graph
    assert gpu.asked == [
        "side waits for current",
        "device cuda:1",
        "stream side",
        *["forward"] * WARM_UPS,
        *measured,
        "capture pool side thread_local",
        "forward",
        "end capture",
        "replay",
        *measured,
        "end stream",
        "end device",
    ]
    graph.replay()
    assert gpu.asked[-1] == "replay"
