"""What the holders of keys have had, and what they may have now: a rate of work each, and fair shares of what there is.

Pure: no clock, no threads. Work is counted in GFLOPs, 1e9 multiply-accumulates.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.domain import ApiKey
from service.errors import OverloadedError

ACTIVE_S = 1.0  # after its last request, admitted or not, for which a key counts as one that wants its share
CREDIT_ANSWERS = 128  # at the cheapest variant, that a key which asks for little may be behind its share
STEPS = 6  # of demotion, within one step of priority: 1 from FIRST_ANSWERS on, and one more with each doubling
FIRST_ANSWERS = 4  # ahead; with less, what could run as one batch would often stand apart
RETRY_AFTER_S = 1.0


@dataclass(slots=True)
class _Account:
    tokens: float  # GFLOPs that may be spent at once; below zero where requests together spent more than was left
    refilled_at: float
    weight: float
    finish: float = 0.0  # work that it had over its weight, as if it had asked for its share ever since
    in_flight: int = 0
    asked_at: float = -math.inf


@dataclass(slots=True)
class Charge:
    """What a request has cost.

    Attributes:
        spent_gflops: that.
        may_have_spent: whether work on it has begun, of which nothing may be known if it is broken off.
    """

    spent_gflops: float = 0.0
    may_have_spent: bool = False


class KeyLedger:
    """Counts the work of each key.

    Under overload, work is shared as in start-time fair queueing (Goyal et al., SIGCOMM 1996): the key that has had the
    least for its weight comes first. Here it does so by a fraction of a step of priority, which admission, decoding
    and shedding heed already; where there is enough for all, it changes nothing.

    Attributes:
        answer_gflops: cost of the cheapest answer of the model that is served.
    """

    def __init__(
        self, answer_gflops: float, share: float = 1.0, observe: Callable[[str, float], object] = lambda *_: None
    ) -> None:
        """Start with full buckets.

        Args:
            answer_gflops: cost of the cheapest answer.
            share: of each key's rate and requests in flight that are this process's to grant: one of several.
            observe: called with the name of a key and what a request of it was charged, once it has ended.
        """
        self.answer_gflops = answer_gflops
        self._share, self._observe = share, observe
        self._accounts: dict[str, _Account] = {}

    def left_gflops(self, key: ApiKey, now: float) -> float:
        """Return what a request of a key may cost now; infinite where its rate is not bounded."""
        if key.gflops_per_s is None:
            return math.inf
        account, burst = self._account(key, now), self._burst(key)
        account.tokens = min(burst, account.tokens + (now - account.refilled_at) * key.gflops_per_s * self._share)
        account.refilled_at = now
        return account.tokens

    def wait_s(self, key: ApiKey, gflops: float, now: float) -> float:
        """Return how long it takes until a request of that cost may come; infinite where it never may."""
        if key.gflops_per_s is None:
            return 0.0
        if gflops > self._burst(key):
            return math.inf
        return max(0.0, gflops - self.left_gflops(key, now)) / (key.gflops_per_s * self._share)

    def asked(self, key: ApiKey, now: float) -> None:
        """Take note that a key wants something, whatever becomes of it."""
        account = self._account(key, now)
        if now > account.asked_at + ACTIVE_S:  # it gets no more for having asked for nothing
            account.finish = max(account.finish, self._least(now)[0])
        account.asked_at, account.weight = now, key.weight

    def demotion(self, key: ApiKey, now: float) -> float:
        """Return the fraction of a step, 0..0.5, by which a request stands behind others of its priority.

        It is counted in answers of the active key of most weight, so that it follows within a few, on slow machines,
        too, and that only what weights are beside each other says anything.
        """
        least, answer = self._least(now)
        ahead = max(0.0, self._account(key, now).finish - least) / answer
        return min(STEPS, int(ahead / FIRST_ANSWERS).bit_length()) / (2 * STEPS)

    @contextmanager
    def charging(self, key: ApiKey | None, most_gflops: float, now: float) -> "Iterator[Charge]":
        """Take what a request may cost at most until the block ends, and then what it says that it cost.

        One that is broken off once work on it has begun, as where its client leaves, is charged the cheapest answer.

        Raises:
            OverloadedError: as many requests of this key as may be are in flight.
        """
        charge = Charge()
        if key is None:
            yield charge
            return
        account, answer_gflops = self._account(key, now), self.answer_gflops
        if key.max_in_flight is not None and account.in_flight >= math.ceil(key.max_in_flight * self._share):
            message = f"{key.max_in_flight} requests with this key are in the server already; try again later"
            raise OverloadedError(message, "key", RETRY_AFTER_S)
        account.in_flight += 1
        account.finish += answer_gflops / key.weight
        account.tokens -= most_gflops
        try:
            yield charge
        except Exception:  # an error of any kind: it says itself what was spent
            raise
        except BaseException:  # what breaks a request off, such as CancelledError: it could not say so any more
            if charge.may_have_spent:
                charge.spent_gflops = answer_gflops
            raise
        finally:
            account.in_flight -= 1
            account.tokens += most_gflops - charge.spent_gflops
            account.finish += (charge.spent_gflops - answer_gflops) / key.weight
            self._observe(key.name, charge.spent_gflops)

    def charge(self, key: ApiKey, gflops: float, now: float) -> None:
        """Take what was spent on a request beside its answer."""
        account = self._account(key, now)
        account.tokens -= gflops
        account.finish += gflops / key.weight
        self._observe(key.name, gflops)

    def _least(self, now: float) -> tuple[float, float]:
        """Return what the active key has had that has had the least; no active one is far behind another.

        Returns:
            That, and what an answer counts for the one of them of most weight.
        """
        accounts = self._accounts.values()
        active = [account for account in accounts if now <= account.asked_at + ACTIVE_S]
        answer = self.answer_gflops / max((account.weight for account in active), default=1.0)
        if not active:
            return max((account.finish for account in accounts), default=0.0), answer
        floor = max(account.finish for account in active) - CREDIT_ANSWERS * answer
        for account in active:
            account.finish = max(account.finish, floor)
        return min(account.finish for account in active), answer

    def _burst(self, key: ApiKey) -> float:
        if key.burst_gflops is None:
            return math.inf
        # A part of it must do for an answer, if the whole does.
        return max(self._share * key.burst_gflops, min(key.burst_gflops, self.answer_gflops))

    def _account(self, key: ApiKey, now: float) -> _Account:
        account = self._accounts.get(key.name)
        if account is None:
            account = self._accounts[key.name] = _Account(self._burst(key), now, key.weight)
        return account
