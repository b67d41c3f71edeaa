"""Cascades, whose second sub-network runs only where the first is unsure: which are worth it, and what they gain.

As in "Wisdom of Committees" (Wang et al., ICLR 2022), but over one set of weights.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from models.profiles import CascadeProfile, SubNetworkProfile
from models.subnetwork import SubNetwork

THRESHOLDS = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)


class Cascade(NamedTuple):
    """Two sub-networks: where the confidence of the first is below the threshold, the second answers."""

    first: SubNetwork
    second: SubNetwork
    threshold: float


class _Priced(NamedTuple):
    macs: float
    worth: float
    cascade: Cascade | None


def choose_cascades(rows: Sequence[SubNetworkProfile], confidences: Mapping[SubNetwork, Tensor]) -> list[Cascade]:
    """Choose the pairs and thresholds that give the most accuracy for their cost, on images that are held out.

    Accuracy is estimated by the mean calibrated confidence of the answers, which varies far less from one set of images
    to another than the count of right answers. Chosen by confidence on half of 2,500 images, the cascades of
    supervit-micro-cifar10 gained 0.97 points on the other half; chosen by the count, 0.71 (30 random halves).

    Args:
        rows: profiles of the trained sub-networks.
        confidences: by sub-network, (M,) calibrated probabilities of its answers to the same images.

    Returns:
        The cascades on the convex hull of accuracy over expected cost, cheapest first: no mixture of others is better.
    """
    macs = {row.subnetwork: float(row.macs) for row in rows}
    priced = [_Priced(macs[each], float(confidences[each].mean()), None) for each in macs]
    for first, second in permutations(macs, 2):
        if macs[first] < macs[second]:
            for threshold in THRESHOLDS:
                is_unsure = confidences[first] < threshold
                share = float(is_unsure.double().mean())
                worth = float(torch.where(is_unsure, confidences[second], confidences[first]).mean())
                if 0 < share < 1:
                    cascade = Cascade(first, second, threshold)
                    priced.append(_Priced(macs[first] + share * macs[second], worth, cascade))
    return [one.cascade for one in _convex_hull(priced) if one.cascade is not None]


def measure_cascade(cascade: Cascade, judged: Mapping[SubNetwork, Tensor], first_top1: float) -> CascadeProfile:
    """Measure a cascade on images that were not used to fit scalings or to choose cascades.

    Args:
        cascade: the cascade to measure.
        judged: by sub-network, (M, 3) for the same images: whether its answer is right first, its confidence last; NaN
            where an image has no label.
        first_top1: accuracy of the first sub-network in the profile, perhaps on more images; the gain from the second
            is measured and added.
    """
    has_label = ~judged[cascade.first][:, 0].isnan()
    first, second = judged[cascade.first][has_label], judged[cascade.second][has_label]
    is_unsure = first[:, 2] < cascade.threshold
    gain = (torch.where(is_unsure, second[:, 0], first[:, 0]) - first[:, 0]).mean()
    top1 = min(1.0, max(0.0, first_top1 + float(gain)))
    return CascadeProfile(*cascade, share=float(is_unsure.double().mean()), top1=top1)


def _convex_hull(priced: Sequence[_Priced]) -> list[_Priced]:
    """Return the upper hull of worth over cost, up to the highest worth."""
    hull: list[_Priced] = []
    for one in sorted(priced, key=lambda each: (each.macs, -each.worth)):
        if hull and one.worth <= hull[-1].worth:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], one):
            hull.pop()
        hull.append(one)
    return hull


def _slope(low: _Priced, high: _Priced) -> float:
    return (high.worth - low.worth) / (high.macs - low.macs)
