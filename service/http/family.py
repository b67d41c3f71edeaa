"""What GET /subnetworks answers: everything that can be had of a checkpoint on this machine."""

from operator import attrgetter

from pydantic import BaseModel, Field

from models.checkpoint import Checkpoint
from service.http.schemas import ModelAnswer, SubNetworkAnswer, describe_model, describe_subnetwork, ms
from service.scheduling.catalog import VariantCatalog


class SubNetworkRow(SubNetworkAnswer):
    """One row of the table."""

    expected_top5_accuracy: float | None
    is_trained: bool = Field(description="whether the weights were trained at this keep rate")
    is_interpolated: bool = Field(description="whether the accuracy lies between two measured ones")
    temperature: float = Field(description="logits are divided by temperature * H ** entropy_exponent for the softmax")
    entropy_exponent: float = Field(description="0..1; H is the entropy of softmax(logits) over log(classes), 1e-6..1")
    calibration_error: float | None = Field(description="expected, 0..1, as measured; null where not measured")
    on_frontier: bool = Field(description="whether no cheaper sub-network is as accurate; others run only by name")
    latency_ms: dict[int, float] = Field(description="profiled latency on this machine by batch size")


class CascadeRow(BaseModel):
    """Two looks, the second only where the first is unsure."""

    first: SubNetworkAnswer
    second: SubNetworkAnswer
    threshold: float = Field(description="probability of the first answer, 0..1, under which the second looks")
    share: float = Field(description="fraction of images, 0..1, that were looked at again where it was measured")
    gflops: float = Field(description="expected cost, in 1e9 multiply-accumulates")
    most_gflops: float = Field(description="cost of both looks; budget_gflops is held against it")
    expected_accuracy: float = Field(description="top-1, 0..1")


class SubNetworksAnswer(BaseModel):
    """Answer to GET /subnetworks."""

    model: ModelAnswer
    image_side_px: int
    num_classes: int
    engine: str
    profiled_at: str = Field(description="when the latencies were measured")
    subnetworks: list[SubNetworkRow] = Field(description="cheapest first")
    cascades: list[CascadeRow] = Field(description="that the policy chooses from, cheapest first")


def describe_family(
    checkpoint: Checkpoint, catalog: VariantCatalog, engine: str, profiled_at: str, batch_sizes: tuple[int, ...]
) -> SubNetworksAnswer:
    """List every variant, cheapest first."""
    config = checkpoint.config
    rows = [
        SubNetworkRow(
            **describe_subnetwork(variant.profile, config).model_dump(),
            expected_top5_accuracy=variant.profile.top5,
            is_trained=variant.profile.is_trained,
            is_interpolated=variant.profile.is_interpolated,
            temperature=variant.profile.temperature,
            entropy_exponent=variant.profile.entropy_exponent,
            calibration_error=variant.profile.calibration_error,
            on_frontier=variant in catalog.frontier,
            latency_ms={size: ms(variant.latency_by_batch_s[size - 1]) for size in batch_sizes},
        )
        for variant in sorted(catalog.variants, key=attrgetter("profile.macs"))
        if variant.second_look is None
    ]
    return SubNetworksAnswer(
        model=describe_model(checkpoint),
        image_side_px=config.image_side,
        num_classes=config.num_classes,
        engine=engine,
        profiled_at=profiled_at,
        subnetworks=rows,
        cascades=[
            CascadeRow(
                first=describe_subnetwork(variant.profile, config),
                second=describe_subnetwork(variant.second_look.profile, config),
                threshold=variant.second_look.threshold,
                share=variant.second_look.share,
                gflops=variant.gflops,
                most_gflops=variant.most_gflops,
                expected_accuracy=variant.second_look.top1,
            )
            for variant in catalog.levels
            if variant.second_look is not None
        ],
    )
