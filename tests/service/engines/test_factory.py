import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from models.checkpoint import Checkpoint
from models.errors import DeviceError
from models.profiles import ProfileTable
from models.quantization import BlockRanges, Quantization, Range
from models.subnetwork import SubNetwork, SuperViTConfig
from models.supervit import SuperViT
from service.engines.factory import EngineChoice, make_engine, open_engine
from service.engines.openvino_engine import OpenVINOEngine
from service.engines.torch_engine import TorchEngine
from service.settings import EngineKind

CONFIG = SuperViTConfig(
    width=16, depth=3, num_heads=2, patch_kernel=4, patch_grids=(2, 4), prune_blocks=(1,), num_classes=3
)


@pytest.fixture
def build() -> Callable[..., SuperViT]:
    def build(**changes: bool) -> SuperViT:
        torch.manual_seed(1)
        return SuperViT(replace(CONFIG, **changes)).eval()  # type: ignore[arg-type] # only flags

    return build


def test_openvino_serves_on_a_cpu_unless_torch_is_requested(build: Callable[..., SuperViT]) -> None:
    assert isinstance(make_engine(build(), ON_CPU), OpenVINOEngine)
    assert isinstance(make_engine(build(), replace(ON_CPU, kind="openvino")), OpenVINOEngine)
    assert isinstance(make_engine(build(), replace(ON_CPU, kind="torch")), TorchEngine)


def test_a_model_that_fuses_pruned_tokens_runs_only_on_torch(build: Callable[..., SuperViT]) -> None:
    model = build(fuse_pruned=True)
    engine = make_engine(model, ON_CPU)
    assert isinstance(engine, TorchEngine)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    subnetwork = replace(CONFIG.largest, keep_rate=0.5)
    assert not torch.equal(engine.run(images, subnetwork), TorchEngine(build(), "cpu", 1).run(images, subnetwork))
    with pytest.raises(DeviceError, match="does not support models that fuse"):
        make_engine(model, replace(ON_CPU, kind="openvino"))


AVX2: dict[str, object] = {"avx2": True}
ON_CPU = EngineChoice("auto", "cpu", "auto", 1)
BLOCK = BlockRanges(Range.of(-3.0, 3.0), Range.of(-1.0, 1.0), Range.of(-3.0, 3.0), Range.of(-0.2, 3.0))


def measured(top1: float | None) -> ProfileTable:
    return ProfileTable(tuple(replace(row, top1=top1) for row in ProfileTable.unmeasured(CONFIG).rows))


def checkpoint(model: SuperViT, top1_in_int8: float | None) -> Checkpoint:
    int8 = Quantization((BLOCK,) * CONFIG.depth, measured(top1_in_int8))
    return Checkpoint("tiny", "1", model, model.config, ("a", "b", "c"), measured(0.8), int8=int8)


def test_int8_is_served_if_the_checkpoint_is_prepared_for_it_and_loses_little_accuracy(
    build: Callable[..., SuperViT],
) -> None:
    for top1, precision, expected in (
        (0.7975, "auto", "int8"),
        (0.7965, "auto", "float"),
        (0.7965, "int8", "int8"),
        (None, "auto", "float"),
        (0.7975, "float32", "float32"),
    ):
        given = checkpoint(build(), top1)
        engine, served = open_engine(given, replace(ON_CPU, precision=precision), AVX2)  # type: ignore[arg-type] # as listed
        assert expected in engine.describe()
        assert ("int8" in engine.describe()) == (expected == "int8")
        assert given.int8 is not None
        assert served.profile == (given.int8.profile if expected == "int8" else given.profile)


def test_only_sub_networks_that_lose_too_much_in_int8_are_served_in_floating_point(
    build: Callable[..., SuperViT],
) -> None:
    lossy, given = SubNetwork(2, 0.5), checkpoint(build(), 0.8)
    assert given.int8 is not None
    rows = tuple(replace(row, top1=0.7) if row.subnetwork == lossy else row for row in given.int8.profile.rows)
    given = replace(given, int8=replace(given.int8, profile=ProfileTable(rows)))
    engine, served = open_engine(given, ON_CPU, AVX2)
    floating, int8 = (open_engine(given, replace(ON_CPU, precision=each), AVX2)[0] for each in ("float32", "int8"))
    assert re.search(r", int8 \(b?float\d\d for grid 2 at keep rate 0.5\), 1 threads", engine.describe())
    assert served.profile.by_subnetwork[lossy].top1 == 0.8
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for subnetwork, is_floating in (
        (lossy, True),
        (SubNetwork(2, 0.6), True),  # between the lossy one and one in 8 bits
        (SubNetwork(2, 0.7), False),
        (SubNetwork(2, 0.8), False),
        (SubNetwork(4, 0.5), False),
    ):
        logits, beside = engine.run(images, subnetwork), (floating if is_floating else int8).run(images, subnetwork)
        assert torch.allclose(logits, beside, atol=0.02 if is_floating else 0), subnetwork  # perhaps in bfloat16


def test_auto_falls_back_to_floating_point_where_int8_is_not_available(build: Callable[..., SuperViT]) -> None:
    given = checkpoint(build(), 0.8)
    for kind, change, capabilities in (
        ("torch", {}, AVX2),
        ("auto", {"int8": None}, AVX2),
        ("auto", {}, {"avx2": False}),
    ):
        offered = replace(given, **change)  # type: ignore[arg-type] # as listed
        engine, served = open_engine(offered, replace(ON_CPU, kind=kind), capabilities)  # type: ignore[arg-type] # as listed
        assert "int8" not in engine.describe()
        assert served is offered


@pytest.mark.parametrize(
    ("kind", "change", "capabilities", "problem"),
    [
        ("torch", {}, AVX2, "it requires the OpenVINO engine on a CPU"),
        ("auto", {"int8": None}, AVX2, "the checkpoint is not prepared for it; run `supervit quantize`"),
        ("auto", {}, {"avx2": False}, "this CPU has neither AVX2 nor VNNI"),
    ],
)
def test_int8_that_is_not_available_is_refused_with_the_reason(
    build: Callable[..., SuperViT],
    kind: EngineKind,
    change: dict[str, None],
    capabilities: dict[str, object],
    problem: str,
) -> None:
    given = replace(checkpoint(build(), 0.8), **change)  # type: ignore[arg-type] # as listed
    with pytest.raises(DeviceError) as caught:
        open_engine(given, replace(ON_CPU, kind=kind, precision="int8"), capabilities)
    assert str(caught.value) == f"precision int8 is not available: {problem}"


def test_bfloat16_is_available_from_both_engines_or_from_neither(build: Callable[..., SuperViT]) -> None:
    described = []
    for kind in ("openvino", "torch"):
        try:
            described.append(
                "bfloat16" in make_engine(build(), replace(ON_CPU, kind=kind, precision="bfloat16")).describe()
            )
        except DeviceError as error:
            assert "precision bfloat16 is not available" in str(error)  # noqa: PT017 - it depends on the CPU
            described.append(False)
    assert described[0] == described[1]


def test_float32_is_available_from_both_engines(build: Callable[..., SuperViT]) -> None:
    for kind in ("openvino", "torch"):
        assert ", float32, " in make_engine(build(), replace(ON_CPU, kind=kind, precision="float32")).describe()
