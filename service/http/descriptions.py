"""Conversion of the domain's objects to the answer models of `schemas`."""

from collections.abc import Sequence
from operator import attrgetter

from models.checkpoint import Checkpoint
from models.data.images import resized_side
from models.profiles import SubNetworkProfile
from models.subnetwork import SuperViTConfig
from service.domain import Classification, Decision, Forecast, SecondLook, Timing
from service.execution.explainer import KeptPatches
from service.http.schemas import (
    CascadeRow,
    ClassifyAnswer,
    DecideAnswer,
    DecisionAnswer,
    ExplainAnswer,
    ExplanationAnswer,
    LookAnswer,
    ModelAnswer,
    PlannedLookAnswer,
    PredictionAnswer,
    PruningAnswer,
    SubNetworkAnswer,
    SubNetworkRow,
    SubNetworksAnswer,
    TimingAnswer,
)
from service.scheduling.catalog import VariantCatalog


def describe_model(checkpoint: Checkpoint) -> ModelAnswer:
    """Return the name and the version of a checkpoint."""
    return ModelAnswer(name=checkpoint.name, version=checkpoint.version)


def describe_subnetwork(row: SubNetworkProfile, config: SuperViTConfig) -> SubNetworkAnswer:
    """Describe one row of a profile."""
    subnetwork = row.subnetwork
    return SubNetworkAnswer(
        patch_grid=subnetwork.patch_grid,
        patch_size_px=config.patch_size_px(subnetwork),
        keep_rate=subnetwork.keep_rate,
        num_tokens=config.num_tokens(subnetwork),
        gflops=row.gflops,
        expected_accuracy=row.top1,
    )


def describe_decision(decision: Decision) -> DecisionAnswer:
    """Convert a decision."""
    return DecisionAnswer(
        reason=decision.reason,
        batch_size=decision.batch_size,
        predicted_inference_ms=ms(decision.predicted_s),
    )


def describe_planned(look: SecondLook | None) -> PlannedLookAnswer | None:
    """Convert a planned second look, if there is one."""
    if look is None:
        return None
    return PlannedLookAnswer(
        patch_grid=look.profile.subnetwork.patch_grid,
        keep_rate=look.profile.subnetwork.keep_rate,
        gflops=look.profile.gflops,
        threshold=look.threshold,
        share=look.share,
    )


def describe_forecast(forecast: Forecast, config: SuperViTConfig) -> DecideAnswer:
    """Convert a forecast."""
    return DecideAnswer(
        subnetwork=describe_subnetwork(forecast.decision.profile, config),
        second_look=describe_planned(forecast.decision.second_look),
        decision=describe_decision(forecast.decision),
        answered_in_ms=ms(forecast.answered_in_s),
    )


def describe_timing(timing: Timing) -> TimingAnswer:
    """Convert the times of the stages to milliseconds."""
    return TimingAnswer(
        decode_wait=ms(timing.decode_wait_s),
        decode=ms(timing.decode_s),
        queue=ms(timing.queue_s),
        inference=ms(timing.inference_s),
        total=ms(timing.total_s),
    )


def describe_answer(answer: Classification, checkpoint: Checkpoint) -> ClassifyAnswer:
    """Convert a finished classification."""
    return ClassifyAnswer(
        predictions=[
            PredictionAnswer(label=prediction.label, index=prediction.index, probability=prediction.probability)
            for prediction in answer.predictions
        ],
        subnetwork=describe_subnetwork(answer.decision.profile, checkpoint.config),
        looks=[
            LookAnswer(
                patch_grid=look.profile.subnetwork.patch_grid,
                keep_rate=look.profile.subnetwork.keep_rate,
                gflops=look.profile.gflops,
                confidence=look.confidence,
                inference_ms=ms(look.inference_s),
            )
            for look in answer.looks
        ],
        stopped=answer.stopped,
        gflops=answer.gflops,
        decision=describe_decision(answer.decision),
        timing_ms=describe_timing(answer.timing),
        budget_ms=ms(answer.budget_s),
        deadline_met=answer.deadline_met,
        model=describe_model(checkpoint),
    )


def describe_explanation(answer: Classification, kept: Sequence[KeptPatches], checkpoint: Checkpoint) -> ExplainAnswer:
    """Convert a classification and the patches that were kept for it."""
    config = checkpoint.config
    prunings = [
        PruningAnswer(
            block=each.block,
            kept=list(each.patches),
            scores=[round(score, 6) for score in each.scores],
            keeps_fused=each.keeps_fused,
        )
        for each in kept
    ]
    explanation = ExplanationAnswer(seen_share=config.image_side / resized_side(config), prunings=prunings)
    return ExplainAnswer(**describe_answer(answer, checkpoint).model_dump(), explanation=explanation)


def describe_subnetworks(
    checkpoint: Checkpoint, catalog: VariantCatalog, engine: str, profiled_at: str, batch_sizes: tuple[int, ...]
) -> SubNetworksAnswer:
    """List the sub-networks and the cascades, cheapest first."""
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


def ms(seconds: float) -> float:
    """Convert seconds to milliseconds, rounded to three decimals."""
    return round(1000 * seconds, 3)
