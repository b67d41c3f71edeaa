"""What can be chosen for a request: a sub-network, or a cascade of two, with accuracy, cost and latency here.

Runs without torch. Chooses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork

Latencies = Sequence[Sequence[float]]  # seconds by variant and then by batch size, less one


@dataclass(frozen=True, slots=True)
class SecondLook:
    """What a cascade does where its first look is unsure.

    Attributes:
        index: place in the catalog of the variant that looks again, alone.
        profile: of its sub-network.
        threshold: probability of the first answer, 0..1, under which it does.
        share: fraction of images that it is for, 0..1.
        top1: accuracy of what both answer together, 0..1.
    """

    index: int
    profile: SubNetworkProfile
    threshold: float
    share: float
    top1: float


@dataclass(frozen=True, slots=True)
class Variant:
    """What a policy can choose: a sub-network, or two with a threshold between, a cascade.

    Attributes:
        index: its place in the catalog.
        profile: of the sub-network that looks first, its cost and accuracy.
        latency_by_batch_s: profiled latency of batches of 1, 2, 3, ..., never falling; of a cascade the expected one.
            A better profile makes no other variant.
        first_index: place of the variant that is the first look alone; its own where there is no second.
        second_look: of a cascade.
    """

    index: int
    profile: SubNetworkProfile
    latency_by_batch_s: tuple[float, ...] = field(compare=False)
    first_index: int
    second_look: SecondLook | None = None

    @property
    def subnetworks(self) -> tuple[SubNetwork, ...]:
        """What looks, in order."""
        looks = (self.profile,) if self.second_look is None else (self.profile, self.second_look.profile)
        return tuple(look.subnetwork for look in looks)

    @property
    def top1(self) -> float | None:
        """Expected accuracy, 0..1; None where unmeasured."""
        return self.profile.top1 if self.second_look is None else self.second_look.top1

    @property
    def top1_of_one_look(self) -> float | None:
        """Expected accuracy where images whose first look is unsure get no second; None where unmeasured.

        Averaged over all images without a second look it is the first look's. So each of the unsure share, for which
        that makes the difference, is worth the less.
        """
        second = self.second_look
        if second is None or self.profile.top1 is None or not second.share:
            return self.top1
        return min(1.0, max(0.0, second.top1 - (second.top1 - self.profile.top1) / second.share))  # chance aside

    @property
    def worth(self) -> float:
        """What it is chosen for: its accuracy or, where that is unmeasured, its cost."""
        return self.profile.macs if self.top1 is None else self.top1

    @property
    def gflops(self) -> float:
        """Expected cost in 1e9 multiply-accumulates."""
        second = self.second_look
        return self.profile.gflops + (0.0 if second is None else second.share * second.profile.gflops)

    @property
    def work(self) -> float:
        """What its latency is expected to grow with, as that of its sub-networks."""
        second = self.second_look
        return self.profile.work + (0.0 if second is None else second.share * second.profile.work)

    @property
    def most_gflops(self) -> float:
        """Cost where it looks twice."""
        second = self.second_look
        return self.profile.gflops if second is None else (self.profile.macs + second.profile.macs) / 1e9

    def __str__(self) -> str:
        """Name it in a sentence."""
        second = self.second_look
        looks = "" if second is None else f", then {second.profile.subnetwork} where under {second.threshold:.0%} sure"
        return f"{self.profile.subnetwork}{looks}"


@dataclass(frozen=True, slots=True, eq=False)
class Grant:
    """What a request may get. The catalog makes each once, so they are told apart as objects, which is fast.

    Attributes:
        by_level: index of the variant that it gets at each level of the policy.
        highest_level: the level up to which these are the levels themselves; -1 where not even the lowest is.
        best: the most accurate of what it may get.
        is_pinned: whether that was asked for by name.
    """

    by_level: tuple[int, ...]
    highest_level: int
    best: Variant
    is_pinned: bool = False


def with_second_look(first_s: Sequence[float], second_s: Sequence[float], share: float) -> tuple[float, ...]:
    """Return the expected seconds of a cascade by batch size, of those of its looks.

    The second looks of a batch are due before others and so form a batch of their own, of fractional size.
    """

    def second(size: float) -> float:
        whole = int(size)
        lower = second_s[whole - 1] if whole else 0.0
        return lower + (size - whole) * (second_s[min(whole, len(second_s) - 1)] - lower)

    return tuple(seconds + second(share * size) for size, seconds in enumerate(first_s, start=1))
