"""The variants to choose from: a sub-network, or a cascade of two, with accuracy, cost and latency on this machine.

Runs without torch. Chooses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork
from service.domain import SecondLook

Latencies = Sequence[Sequence[float]]  # seconds by variant, then by batch size minus one


@dataclass(frozen=True, slots=True)
class Variant:
    """What a policy can choose: a sub-network, or a cascade, two sub-networks with a threshold between them.

    Attributes:
        index: its index in the catalog.
        profile: cost and accuracy of the sub-network that looks first.
        latency_by_batch_s: profiled latency of batches of 1, 2, 3, ..., never falling; of a cascade the expected one.
            Not compared: with a better profile, it is still the same variant.
        first_index: index of the variant that is the first look alone; its own where there is no second look.
        second_look: the second look of a cascade; None for a sub-network.
    """

    index: int
    profile: SubNetworkProfile
    latency_by_batch_s: tuple[float, ...] = field(compare=False)
    first_index: int
    second_look: SecondLook | None = None

    @property
    def subnetworks(self) -> tuple[SubNetwork, ...]:
        """The sub-networks that look at the image, in order."""
        looks = (self.profile,) if self.second_look is None else (self.profile, self.second_look.profile)
        return tuple(look.subnetwork for look in looks)

    @property
    def top1(self) -> float | None:
        """Expected accuracy, 0..1; None where unmeasured."""
        return self.profile.top1 if self.second_look is None else self.second_look.top1

    @property
    def top1_without_second_look(self) -> float | None:
        """Expected accuracy to credit an unsure first look that gets no second one; None where unmeasured.

        Without any second look, the average over all images must be the accuracy of the first look. The whole loss is
        in the unsure share of the images, so each of these is credited with less.
        """
        second = self.second_look
        if second is None or self.profile.top1 is None or not second.share:
            return self.top1
        return min(1.0, max(0.0, second.top1 - (second.top1 - self.profile.top1) / second.share))  # clips noise

    @property
    def worth(self) -> float:
        """The value by which variants are ranked: accuracy or, where that is unmeasured, multiply-accumulates."""
        return self.profile.macs if self.top1 is None else self.top1

    @property
    def gflops(self) -> float:
        """Expected cost in 1e9 multiply-accumulates."""
        second = self.second_look
        return self.profile.gflops + (0.0 if second is None else second.share * second.profile.gflops)

    @property
    def work(self) -> float:
        """What its latency is expected to grow with: the work of its sub-networks, the second weighted by its share."""
        second = self.second_look
        return self.profile.work + (0.0 if second is None else second.share * second.profile.work)

    @property
    def most_gflops(self) -> float:
        """Highest cost in 1e9 multiply-accumulates: both looks of a cascade."""
        second = self.second_look
        return self.profile.gflops if second is None else (self.profile.macs + second.profile.macs) / 1e9

    def __str__(self) -> str:
        """Return its name for use in a sentence."""
        second = self.second_look
        looks = "" if second is None else f", then {second.profile.subnetwork} if less than {second.threshold:.0%} sure"
        return f"{self.profile.subnetwork}{looks}"


@dataclass(frozen=True, slots=True, eq=False)
class Grant:
    """The variants that a request may get. The catalog makes each grant once; compared by identity, which is fast.

    Attributes:
        by_level: index of the variant that the request gets at each level of the policy.
        highest_level: the level up to which these are the levels themselves; -1 where not even the lowest is.
        best: the most accurate variant that the request may get.
        is_pinned: whether it is the only one: it was asked for by name, or is chosen for a further look.
    """

    by_level: tuple[int, ...]
    highest_level: int
    best: Variant
    is_pinned: bool = False


def with_second_look(first_s: Sequence[float], second_s: Sequence[float], share: float) -> tuple[float, ...]:
    """Return the expected seconds of a cascade by batch size, from the seconds of its two looks.

    The second looks of a batch are due before others and so form a batch of their own, of fractional size.
    """

    def second(size: float) -> float:
        whole = int(size)
        lower = second_s[whole - 1] if whole else 0.0
        return lower + (size - whole) * (second_s[min(whole, len(second_s) - 1)] - lower)

    return tuple(seconds + second(share * size) for size, seconds in enumerate(first_s, start=1))
