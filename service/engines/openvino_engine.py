"""The engine for CPUs: one compiled graph runs every sub-network at every batch size."""

import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import cache, lru_cache, partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import openvino as ov  # type: ignore[import-untyped] # it publishes no types
import torch
from torch import Tensor

from models.subnetwork import SubNetwork
from models.supervit import SuperViT
from service.engines.openvino_graph import (
    build_classifier,
    build_resizing,
    build_scaling,
    resize_inputs,
    subnetwork_inputs,
)
from service.engines.openvino_products import Floats, IntegerProducts, Products

Precision = Literal["float32", "float16", "bfloat16"]

SUBNETWORKS_KEPT = 256  # sub-networks whose inputs stay prepared, a few kB each
# OpenVINO keeps a dozen kernels for each batch shape, which take milliseconds to make and, in 8 bits, 7 MB. These
# bounds suffice for what the profile measures and for the sizes between at the levels of a policy. With OpenVINO's own
# bound, 5000 kernels, the default checkpoint took 2.9 GB.
KERNELS_PER_SHAPE, SIZES_KEPT, OTHER_SHAPES_KEPT = 13, 5, 32
PAUSE_S = 0.3  # between two graphs that are freed
HINTS: dict[Precision, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class OpenVINOEngine:
    """OpenVINO on a CPU, by default in the precision that OpenVINO considers fastest there."""

    is_on_gpu = False
    pads_batches = False

    def __init__(
        self,
        model: SuperViT,
        threads: int,
        precision: Precision | None = None,
        products: Products | None = None,
        in_floating_point: Collection[SubNetwork] = (),
        compiled: Callable[[Callable[[bytes], Any]], Iterable[Any]] | None = None,
    ) -> None:
        """Compile the model, or take it over compiled.

        Args:
            model: in eval mode, float32, on the CPU.
            threads: number of threads that compute.
            precision: precision of floating point; by default what OpenVINO considers fastest on this CPU.
            products: how the products of the blocks are computed; in floating point by default.
            in_floating_point: trained sub-networks whose products are computed in floating point whatever `products`
                are; the same holds for keep rates between one of these and its neighbour.
            compiled: returns what `export` returned for an engine with the same other arguments; compiles by default.
        """
        # A worker thread of torch spins for milliseconds after its work is done, on a core that OpenVINO needs by then.
        torch.set_num_threads(1)
        self._model = model
        config = model.config
        core = _core()
        self._shapes_kept = SIZES_KEPT * len(config.subnetworks) + OTHER_SHAPES_KEPT
        self._ran: dict[tuple[SubNetwork, int], None] = {}  # the shapes that ran, by the order of their last runs
        with suppress(RuntimeError):  # a version without this property keeps its own bound
            core.set_property("CPU", {"CPU_RUNTIME_CACHE_CAPACITY": KERNELS_PER_SHAPE * self._shapes_kept})
        options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        exact = options | {"INFERENCE_PRECISION_HINT": "f32"}
        chosen = options if precision is None else options | {"INFERENCE_PRECISION_HINT": HINTS[precision]}
        if compiled is None:
            products_of_graphs = (products, None) if in_floating_point else (products,)
            self._classifiers = [
                core.compile_model(build_classifier(model, each), "CPU", chosen) for each in products_of_graphs
            ]
        else:
            self._classifiers = list(compiled(partial(core.import_model, device_name="CPU", config=chosen)))
        self._is_int8, self._in_floating_point = isinstance(products, IntegerProducts), frozenset(in_floating_point)
        self._requests = [each.create_infer_request() for each in self._classifiers]  # the last one in floating point
        self._scale, self._resize = (
            core.compile_model(build(config), "CPU", exact).create_infer_request()
            for build in (build_scaling, build_resizing)
        )
        self._cpu = str(core.get_property("CPU", "FULL_DEVICE_NAME")).strip()
        floating = self._in_floating_point
        self._is_floating = lru_cache(SUBNETWORKS_KEPT)(
            lambda subnetwork: not floating.isdisjoint(config.nearest_trained(subnetwork))
        )
        # Bound to the model alone: a cache that held the engine would keep its weights until the next garbage
        # collection.
        self._inputs = lru_cache(SUBNETWORKS_KEPT)(partial(_prepare_inputs, model))

    def run(self, images: Tensor, subnetwork: SubNetwork) -> Tensor:
        """Map (B, 3, S, S) uint8 images on the CPU to (B, classes) float32 logits.

        Raises:
            ValueError: the patch grid was not trained.
        """
        self._ran.pop((subnetwork, len(images)), None)
        self._ran[subnetwork, len(images)] = None
        resizing, classifying = self._inputs(subnetwork)
        pixels = np.ascontiguousarray(images.numpy())
        prepared = _infer(self._resize if resizing else self._scale, (ov.Tensor(pixels, shared_memory=True), *resizing))
        logits = _infer(self._requests[-1 if self._is_floating(subnetwork) else 0], (prepared, *classifying))
        return torch.from_numpy(logits.data.copy())

    def observe(self, images: Tensor, subnetwork: SubNetwork) -> list[Floats]:
        """Run a batch, and return the outputs that follow the logits: what the products record."""
        self.run(images, subnetwork)
        outputs = range(1, len(self._classifiers[0].outputs))
        return [self._requests[0].get_output_tensor(index).data.copy() for index in outputs]

    def export(self) -> list[bytes]:
        """Return the compiled classifiers, which an engine in another process on this machine can take over."""
        return [each.export_model().getvalue() for each in self._classifiers]

    def warm_up(self) -> None:
        """Run every trained sub-network once."""
        config = self._model.config
        images = torch.zeros(1, 3, config.image_side, config.image_side, dtype=torch.uint8)
        for subnetwork in config.subnetworks:
            self.run(images, subnetwork)

    def prepare(self, subnetwork: SubNetwork, batch_size: int) -> None:
        """Run a batch of a shape whose kernels may have been evicted; a new shape gets its kernels in its first run."""
        shape = subnetwork, batch_size
        if shape in self._ran and shape not in islice(reversed(self._ran), self._shapes_kept):
            side = self._model.config.image_side
            self.run(torch.zeros(batch_size, 3, side, side, dtype=torch.uint8), subnetwork)

    def captured(self) -> None:
        """Return None: there are no CUDA graphs."""

    def fitting_images(self) -> int | None:
        """Return None: memory is no limit."""
        return None

    def describe(self) -> str:
        """Return the library, the CPU, the precision and the threads."""
        hint = self._classifiers[0].get_property("INFERENCE_PRECISION_HINT").to_string()
        floating = next((name for name, short in HINTS.items() if short == hint), hint)
        precision = "int8" if self._is_int8 else floating
        if self._in_floating_point:
            precision += f" ({floating} for {', '.join(map(str, sorted(self._in_floating_point)))})"
        threads = self._classifiers[0].get_property("INFERENCE_NUM_THREADS")
        version = ov.__version__.partition("-")[0]
        return f"openvino {version} on {self._cpu}, {precision}, {threads} threads"

    def close(self) -> None:
        """Free the compiled graphs one by one: each holds the interpreter's lock for a tenth of a second."""
        while self._classifiers:
            self._requests.pop()
            self._classifiers.pop()
            if self._classifiers:
                time.sleep(PAUSE_S)


def _prepare_inputs(model: SuperViT, subnetwork: SubNetwork) -> tuple[tuple[ov.Tensor, ...], tuple[ov.Tensor, ...]]:
    """Return the inputs of the resizing and of the classifier after the images; none for resizing at full size."""
    config = model.config
    classifying = map(ov.Tensor, subnetwork_inputs(model, subnetwork))
    grid_side = subnetwork.patch_grid * config.patch_kernel
    smaller = grid_side < config.image_side
    resizing = map(ov.Tensor, resize_inputs(config.image_side, grid_side) if smaller else ())
    return tuple(resizing), tuple(classifying)


@cache
def _core() -> ov.Core:
    """Return the only OpenVINO core of this process, which lives as long as the process.

    A core gives the thread that creates it a signal stack; when destroyed, it removes that stack and restores the one
    that it found. Of two cores destroyed in the order of their creation, the second restores the stack of the first,
    which is gone: the next signal that Python handles, such as the one to stop, would then end in a segmentation fault.
    """
    return ov.Core()


def _infer(request: ov.InferRequest, inputs: Iterable[ov.Tensor]) -> ov.Tensor:
    # Tensors are set one by one: calling the request with a list of arrays costs 0.6 ms more.
    for index, tensor in enumerate(inputs):
        request.set_input_tensor(index, tensor)
    request.infer()
    return request.get_output_tensor(0)


def has_bfloat16() -> bool:
    """Return whether this CPU computes in bfloat16."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
