"""Every file stands on a floor and imports strictly downwards; outside libraries come in by their doors alone."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "models.train": 8,
    "models.batches": 7,
    "models.finetune": 8,
    "models.state": 6,
    "models.average": 6,
    "models.teacher": 6,
    "models.initial": 6,
    "models.objective": 6,
    "models.evaluate": 6,
    "models.checkpoint": 5,
    "models.published": 4,
    "models.data": 4,
    "models.supervit": 3,
    "models.plots": 3,
    "models.layers": 2,
    "models.profiles": 2,
    "models.latency": 1,
    "models.flops": 1,
    "models.tokens": 1,
    "models.recipe": 1,
    "models.calibration": 3,
    "models.devices": 0,
    "models.muon": 0,
    "models.subnetwork": 0,
    "service.cli": 13,
    "service.client": 12,
    "service.ray_app": 12,
    "service.serve": 12,
    "service.app": 11,
    "service.runtime": 10,
    "service.api": 9,
    "service.pipeline": 8,
    "service.sizing": 8,
    "service.batcher": 7,
    "service.simulator": 7,
    "service.scheduler": 6,
    "service.admission": 5,
    "service.policies": 5,
    "service.decoding": 4,
    "service.latency_model": 4,
    "service.policy": 4,
    "service.baselines": 3,
    "service.estimates": 3,
    "service.feasibility": 3,
    "service.http_errors": 3,
    "service.outcomes": 3,
    "service.reasons": 3,
    "service.request_queue": 3,
    "service.results": 3,
    "service.engines": 2,
    "service.metrics": 2,
    "service.profile_store": 2,
    "service.schemas": 2,
    "service.state": 2,
    "service.workers": 2,
    "service.arrivals": 1,
    "service.catalog": 1,
    "service.disconnects": 1,
    "service.images": 1,
    "service.monitor": 1,
    "service.openvino_engine": 1,
    "service.profiler": 1,
    "service.shared_counts": 1,
    "service.uploads": 1,
    "service.connections": 0,
    "service.domain": 0,
    "service.engine": 0,
    "service.errors": 0,
    "service.interpreter": 0,
    "service.openvino_graph": 0,
    "service.replicas": 0,
    "service.request_ids": 0,
    "service.resources": 0,
    "service.settings": 0,
    "service.throttle": 0,
    "service.watchdog": 0,
}

HTTP = {
    "service.api",
    "service.app",
    "service.http_errors",
    "service.ray_app",
    "service.request_ids",
    "service.disconnects",
    "service.uploads",
}

# Which rooms an outside library may enter by.
DOORS = {
    "PIL": {"models.data", "service.images"},
    "fastapi": HTTP,
    "matplotlib": {"models.plots"},
    "openvino": {"service.openvino_graph", "service.openvino_engine"},
    "psutil": {"service.monitor"},
    "pynvml": {"service.monitor"},
    "prometheus_client": {"service.metrics", "service.shared_counts"},
    "ray": {"service.ray_app", "service.replicas"},
    "safetensors": {"models.checkpoint"},
    "starlette": HTTP,
    "torchvision": {"models.data"},
}

# Rooms that read the environment: the settings, and what torchrun says to its processes.
ENVIRONMENT_READERS = {"service.settings", "models.train"}

WITHOUT_TORCH = {
    "models.subnetwork",
    "models.flops",
    "models.profiles",
    "models.latency",
    "service.catalog",
    "service.state",
    "service.policy",
    "service.baselines",
    "service.scheduler",
    "service.estimates",
    "service.throttle",
    "service.arrivals",
    "service.simulator",
    "service.reasons",
    "service.replicas",
    "service.sizing",
    "service.policies",
    "service.request_queue",
    "service.latency_model",
    "service.admission",
    "service.feasibility",
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
