"""Every file stands on a floor and imports strictly downwards; outside libraries come in by their doors alone."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "models.train": 11,
    "models.batches": 10,
    "models.compilation": 10,
    "models.finetune": 11,
    "models.state": 9,
    "models.average": 6,
    "models.teacher": 6,
    "models.initial": 6,
    "models.setup": 10,
    "models.convert": 7,
    "models.head": 6,
    "models.onnx_weights": 6,
    "models.plain_vit": 6,
    "models.objective": 6,
    "models.evaluate": 6,
    "models.checkpoint": 5,
    "models.torch_files": 2,
    "models.safetensors_files": 1,
    "models.pickles": 1,
    "models.sources": 2,
    "models.hub": 1,
    "models.checkpoint_errors": 0,
    "models.published": 4,
    "models.token_labels": 5,
    "models.loaders": 5,
    "models.datasets": 4,
    "models.images": 3,
    "models.supervit": 3,
    "models.plots": 3,
    "models.layers": 2,
    "models.profiles": 2,
    "models.latency": 1,
    "models.flops": 1,
    "models.crops": 1,
    "models.mix_token": 1,
    "models.tokens": 1,
    "models.recipe": 8,
    "models.progress": 9,
    "models.calibration": 3,
    "models.processes": 1,
    "models.devices": 0,
    "models.muon": 0,
    "models.subnetwork": 0,
    "service.cli": 12,
    "service.serve": 10,
    "service.ray_app": 9,
    "service.client": 9,
    "service.app": 8,
    "service.api": 7,
    "service.pipeline": 6,
    "service.batcher": 5,
    "service.sizing": 7,
    "service.simulator": 6,
    "service.engines": 4,
    "service.http_errors": 3,
    "service.workers": 2,
    "service.shortcut": 2,
    "service.schemas": 2,
    "service.line": 4,
    "service.baselines": 5,
    "service.openvino_engine": 3,
    "service.policy": 4,
    "service.reasons": 3,
    "service.engine": 2,
    "service.openvino_graph": 2,
    "service.profiler": 2,
    "service.monitor": 2,
    "service.decoding": 2,
    "service.results": 3,
    "service.guard": 0,
    "service.connections": 0,
    "service.request_ids": 0,
    "service.interpreter": 0,
    "service.arrivals": 1,
    "service.situation": 2,
    "service.estimates": 1,
    "service.pacer": 1,
    "service.metrics": 2,
    "service.images": 1,
    "service.uploads": 1,
    "service.menu": 1,
    "service.replicas": 0,
    "service.shared_counts": 1,
    "service.domain": 0,
    "service.errors": 0,
    "service.resources": 0,
    "service.settings": 0,
}

HTTP = {
    "service.api",
    "service.app",
    "service.http_errors",
    "service.ray_app",
    "service.request_ids",
    "service.shortcut",
    "service.uploads",
}

# Which rooms an outside library may enter by.
DOORS = {
    "PIL": {"models.crops", "models.images", "models.token_labels", "service.images"},
    "fastapi": HTTP,
    "matplotlib": {"models.plots"},
    "openvino": {"models.onnx_weights", "service.openvino_graph", "service.openvino_engine"},
    "psutil": {"service.monitor"},
    "pynvml": {"service.monitor"},
    "prometheus_client": {"service.metrics", "service.shared_counts"},
    "ray": {"service.ray_app", "service.replicas"},
    "huggingface_hub": {"models.hub"},
    "safetensors": {"models.safetensors_files"},
    "starlette": HTTP,
    "torchvision": {"models.crops", "models.datasets", "models.images"},
}

# Rooms that read the environment: the settings, and what torchrun says to its processes.
ENVIRONMENT_READERS = {"service.settings", "models.processes"}

WITHOUT_TORCH = {
    "models.checkpoint_errors",
    "models.hub",
    "models.sources",
    "models.subnetwork",
    "models.flops",
    "models.profiles",
    "models.latency",
    "service.menu",
    "service.situation",
    "service.policy",
    "service.baselines",
    "service.line",
    "service.estimates",
    "service.pacer",
    "service.arrivals",
    "service.simulator",
    "service.reasons",
    "service.replicas",
    "service.sizing",
}
TORCH = {"torch", "torchvision", "timm", "safetensors"}


def rooms() -> list[str]:
    files = [path for package in ("models", "service") for path in sorted((ROOT / package).glob("*.py"))]
    return [f"{path.parent.name}.{path.stem}" for path in files if path.stem not in ("__init__", "__main__")]


@cache
def syntax(room: str) -> ast.Module:
    return ast.parse((ROOT / room.replace(".", "/")).with_suffix(".py").read_text())


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Name everything that is imported anywhere, `from models import flops` as models.flops."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor they lead to"
            if node.module in ("models", "service"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def imported_rooms(room: str) -> set[str]:
    return {
        ".".join(module.split(".")[:2])
        for module in imported_modules(syntax(room))
        if module.split(".")[0] in ("models", "service")
    }


def reachable(room: str) -> set[str]:
    """Find every room that importing `room` imports, itself included."""
    found, waiting = {room}, [room]
    while waiting:
        new = imported_rooms(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def outside_libraries(room: str) -> set[str]:
    return {module.split(".")[0] for module in imported_modules(syntax(room))} - {"models", "service"}


@pytest.mark.parametrize("room", rooms())
def test_a_room_stands_on_a_floor_and_imports_strictly_downwards(room: str) -> None:
    assert room in FLOORS, f"{room} has no floor"
    package = room.split(".")[0]
    for other in imported_rooms(room):
        assert other in FLOORS, f"{room} imports {other}, which has no floor"
        if other.startswith(package):
            assert FLOORS[other] < FLOORS[room], f"{room} imports {other}, which does not stand below it"
        else:
            assert package == "service", f"{room} imports {other}: models knows nothing of service"


@pytest.mark.parametrize("room", rooms())
def test_outside_libraries_come_in_by_their_doors(room: str) -> None:
    strays = {library for library in outside_libraries(room) if room not in DOORS.get(library, {room})}
    assert not strays, f"{room} is no door for {strays}"


@pytest.mark.parametrize("room", sorted(set(rooms()) - ENVIRONMENT_READERS))
def test_the_environment_is_read_by_the_settings_alone(room: str) -> None:
    names = {node.attr for node in ast.walk(syntax(room)) if isinstance(node, ast.Attribute)}
    assert not names & {"environ", "environb", "getenv"}


@pytest.mark.parametrize("room", sorted(WITHOUT_TORCH & set(rooms())))
def test_rooms_of_pure_values_run_without_torch(room: str) -> None:
    for other in reachable(room):
        assert not outside_libraries(other) & TORCH, f"{room} reaches torch through {other}"


def test_the_reach_of_a_room_is_followed_through_every_floor() -> None:
    assert reachable("models.profiles") == {"models.profiles", "models.flops", "models.subnetwork"}
    assert outside_libraries("models.supervit") & TORCH
    assert "models.tokens" in reachable("models.train")


def test_importing_a_package_imports_none_of_its_rooms() -> None:
    """The reach above would otherwise be larger than it looks."""
    for package in ("models", "service"):
        opening = ROOT / package / "__init__.py"
        if opening.exists():
            modules = imported_modules(ast.parse(opening.read_text()))
            assert not [module for module in modules if module.split(".")[0] in ("models", "service")]
