import os
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.profiles import SubNetworkProfile
from models.subnetwork import SubNetwork
from models.supervit import PatchTrace, SuperViT
from models.tokens import FUSED
from service.decoding.decoder import Decoder
from service.domain import ApiKey, InferenceRequest
from service.errors import OverloadedError
from service.execution.explainer import NICENESS, Explainer
from service.scheduling.key_ledger import KeyLedger
from tests.service.conftest import opening

pytestmark = pytest.mark.anyio

PROFILE = SubNetworkProfile(SubNetwork(4, 0.5), 3_000_000_000)


class Traced(SuperViT):
    """Returns the traces that a test sets, and records the niceness of the thread that runs it."""

    traces: tuple[PatchTrace, ...] = ()
    niceness: int | None = None

    def trace(self, images: Tensor, subnetwork: SubNetwork) -> tuple[Tensor, tuple[PatchTrace, ...]]:
        self.niceness = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        assert images.shape == (1, 3, 16, 16)
        assert subnetwork == SubNetwork(4, 0.5)
        return torch.zeros(1, 7), self.traces


@pytest.fixture
def model(checkpoint: Checkpoint) -> Traced:
    return Traced(checkpoint.config).eval()


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    decoder = Decoder(opening(lambda _: torch.zeros(3, 16, 16, dtype=torch.uint8)), 1, 10**9)
    yield decoder
    decoder.close()


@pytest.fixture
def explainer(model: Traced, decoder: Decoder) -> Iterator[Explainer]:
    explainer = Explainer(model, decoder, KeyLedger(1.0))
    yield explainer
    explainer.close()


async def test_patches_are_in_order_with_their_scores_and_the_fused_token_is_separate(
    explainer: Explainer, model: Traced
) -> None:
    model.traces = (
        PatchTrace(1, torch.tensor([[9, 2, 14]]), torch.tensor([[0.5, 0.25, 0.125]])),
        PatchTrace(2, torch.tensor([[14, FUSED]]), torch.tensor([[0.5, 0.25]])),
    )
    first, second = await explainer.explain(b"", PROFILE, InferenceRequest(0.0))
    assert (first.block, first.patches, first.scores, first.keeps_fused) == (1, (2, 9, 14), (0.25, 0.5, 0.125), False)
    assert (second.block, second.patches, second.scores, second.keeps_fused) == (2, (14,), (0.5,), True)


async def test_the_explainer_thread_has_low_priority_and_other_threads_keep_theirs(
    explainer: Explainer, model: Traced
) -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    await explainer.explain(b"", PROFILE, InferenceRequest(0.0))
    assert model.niceness == NICENESS
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own < NICENESS


async def test_only_one_turn_is_held_at_a_time_and_a_failure_releases_it(explainer: Explainer) -> None:
    with suppress(ZeroDivisionError), explainer.turn():
        with pytest.raises(OverloadedError) as refused, explainer.turn():
            raise AssertionError("there are two")
        assert refused.value.reason == "full"
        raise ZeroDivisionError
    with explainer.turn():
        pass


async def test_an_explanation_is_charged_to_the_key(model: Traced, decoder: Decoder) -> None:
    told: list[tuple[str, float]] = []
    ledger, key = KeyLedger(1.0, observe=lambda *spent: told.append(spent)), ApiKey("a", 1.0, 10.0)
    explainer = Explainer(model, decoder, ledger, lambda: 5.0)
    await explainer.explain(b"", PROFILE, InferenceRequest(0.0, key=key))
    await explainer.explain(b"", PROFILE, InferenceRequest(0.0))
    assert (told, ledger.left_gflops(key, 5.0)) == ([("a", 3.0)], 7.0)
    explainer.close()
