"""How many replicas there should be: the autoscaling policy for Ray Serve, which runs in Ray's controller.

It adds replicas where answers have been losing accuracy, and takes them away where the others would lose none.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the controller need not hold torch for our sake, nor a test Ray
    from ray.serve.config import AutoscalingContext

MIN_REQUESTS_PER_S = 1.0  # below it, a loss counts as that much less


@dataclass(frozen=True)
class ReplicaPolicy:
    """Chooses the number of replicas; `policy_kwargs` of the config are its attributes.

    The *engines wanted* are those that the present requests would keep busy if every answer came from the most accurate
    sub-network; or, where decoding takes more than that, how many replicas' decode threads it keeps busy. More replicas
    come only where accuracy is lost and that many would be busier than wished: otherwise the loss has causes that
    another replica does not cure, as small budgets of the clients.

    Attributes:
        accuracy_loss_points: of top-1 per request, above which replicas are added; a request that was late or has no
            answer has lost all 100.
        max_utilization: share of the time in which an engine should be busy, 0..1.
    """

    accuracy_loss_points: float = 1.0
    max_utilization: float = 0.8

    def __call__(self, context: "AutoscalingContext") -> tuple[float, dict[str, Any]]:
        """Return the number, before Ray's bounds, factors and delays, and nothing to remember."""
        reports = context.aggregated_metrics or {}
        requests_per_s, lost_per_s, engines_wanted = (
            sum(reports.get(name, {}).values()) for name in ("requests_per_s", "accuracy_loss_per_s", "engines_wanted")
        )
        wanted = engines_wanted / self.max_utilization
        lost_points = 100 * lost_per_s / max(requests_per_s, MIN_REQUESTS_PER_S)
        limit = max if lost_points > self.accuracy_loss_points else min
        # Those under way tell of a burst before its answers have lost anything.
        ongoing = 0.0 if context.config is None else context.config.get_target_ongoing_requests()
        crowded = context.total_num_requests / ongoing if ongoing else 0.0
        return max(limit(wanted, context.current_num_replicas), crowded), {}
