"""The autoscaling policy for Ray Serve, which chooses the number of replicas and runs in Ray's controller.

It adds replicas if answers have been losing accuracy, and removes them if the remaining ones would lose none.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the controller does without torch, and a test without Ray
    from ray.serve.config import AutoscalingContext

MIN_REQUESTS_PER_S = 1.0  # at lower rates, a loss counts proportionally less


@dataclass(frozen=True)
class ReplicaPolicy:
    """Chooses the number of replicas; the `policy_kwargs` of the config set its attributes.

    The *engines wanted* are the number of engines that the current requests would keep busy if every answer came from
    the most accurate sub-network; or, if greater, the number of replicas whose decode threads they keep busy. A loss of
    accuracy adds replicas only if the present engines would be busier than `max_utilization`: otherwise the loss has
    causes that another replica does not cure, such as small budgets of the clients. Whatever the accuracy, there are at
    least as many replicas as the requests under way need at Ray's target for each replica.

    Attributes:
        accuracy_loss_points: points of top-1 lost per request above which replicas are added; a request that was late
            or has no answer has lost all 100.
        max_utilization: largest share of the time for which an engine should be busy, 0..1.
    """

    accuracy_loss_points: float = 1.0
    max_utilization: float = 0.8

    def __call__(self, context: "AutoscalingContext") -> tuple[float, dict[str, Any]]:
        """Return the number of replicas, before Ray's bounds, factors and delays, and an empty state."""
        reports = context.aggregated_metrics or {}
        requests_per_s, lost_per_s, engines_wanted = (
            sum(reports.get(name, {}).values()) for name in ("requests_per_s", "accuracy_loss_per_s", "engines_wanted")
        )
        wanted = engines_wanted / self.max_utilization
        lost_points = 100 * lost_per_s / max(requests_per_s, MIN_REQUESTS_PER_S)
        limit = max if lost_points > self.accuracy_loss_points else min
        # Requests under way show a burst before its answers have lost any accuracy.
        ongoing = 0.0 if context.config is None else context.config.get_target_ongoing_requests()
        crowded = context.total_num_requests / ongoing if ongoing else 0.0
        return max(limit(wanted, context.current_num_replicas), crowded), {}
