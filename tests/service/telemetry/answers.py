"""Answers to a request that arrived at 100 s, as observers receive them."""

import numpy as np

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork
from service.domain import Classification, Decision, Look, LookCode, ReasonCode, Timing

ARRIVED_AT = 100.0
SMALL = SubNetworkProfile(SubNetwork(8, 0.5), 500_000_000, 0.7, 0.9)
LARGE = SubNetworkProfile(SubNetwork(14, 1.0), 2_000_000_000, 0.8, 0.9)


def answer(*looks: tuple[SubNetworkProfile, float, float], budget_s: float = 1.0) -> Classification:
    """Create an answer after 0.5 s; each look is given by its profile, its start and its inference time in seconds.

    The image was read within 0.125 s, waited 0.0625 s for a decoder and was decoded in another 0.0625 s.
    """
    took_s = sum(inference_s for _, _, inference_s in looks)
    return Classification(
        predictions=(),
        probabilities=np.ones(1, np.float32),
        looks=tuple(Look(profile, 0, 0.75, inference_s, started_at) for profile, started_at, inference_s in looks),
        stopped=LookCode.SURE,
        decision=Decision(looks[-1][0], 4, 0.1, ReasonCode.ALONE, "because"),
        timing=Timing(0.125, 0.0625, 0.0625, 0.0625, took_s, 0.5),
        budget_s=budget_s,
        expected_top1=0.7,
        accuracy_loss=0.1,
        saved_gflops=1.5,
    )


ONE_LOOK = answer((SMALL, 100.375, 0.0625))
