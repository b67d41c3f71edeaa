"""Made-up answers of the pipeline."""

import numpy as np

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork
from service.domain import Classification, Decision, Look, LookCode, Prediction, ReasonCode, Timing

NAMES = ("cat", "dog", "bird")


def answer(*probabilities: float, top_k: int = 3, grid: int = 4) -> Classification:
    """Create the answer for one image from the probabilities of NAMES."""
    profile = SubNetworkProfile(SubNetwork(grid, 0.5), 2_000_000_000, 0.75, 0.9)
    best = sorted(range(len(probabilities)), key=lambda index: -probabilities[index])[:top_k]
    return Classification(
        predictions=tuple(Prediction(index, NAMES[index], probabilities[index]) for index in best),
        probabilities=np.array(probabilities, np.float32),
        looks=(Look(profile, best[0], 0.9, 0.1, 5.0),),
        stopped=LookCode.SURE,
        decision=Decision(profile, 1, 0.1, ReasonCode.ALONE, "because"),
        timing=Timing(read_s=0.0, decode_wait_s=0.0, decode_s=0.01, queue_s=0.02, inference_s=0.1, total_s=0.25),
        budget_s=1.0,
        expected_top1=0.75,
        accuracy_loss=0.0,
        saved_gflops=0.0,
    )
