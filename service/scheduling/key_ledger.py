"""Accounts for the work of API keys: a token bucket per key, and fair shares of the capacity under overload.

Pure: no clock, no threads. Work is counted in GFLOPs, 1e9 multiply-accumulates.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.domain import ApiKey
from service.errors import OverloadedError

ACTIVE_S = 1.0  # after its last request, admitted or not, for which a key counts as active, i.e. as wanting its share
CREDIT_ANSWERS = 128  # at the cheapest variant, that an active key which asks for little may lag behind the others
STEPS = 6  # of demotion, within one step of priority: 1 from FIRST_ANSWERS on, and one more with each doubling
FIRST_ANSWERS = 4  # ahead; with fewer, requests that could run as one batch would often be separated
RETRY_AFTER_S = 1.0


@dataclass(slots=True)
class _Account:
    tokens: float  # GFLOPs that may be spent at once; negative where requests together spent more than was left
    refilled_at: float
    weight: float
    finish: float = 0.0  # work received over weight, as if the key had always asked for its share
    in_flight: int = 0
    asked_at: float = -math.inf


@dataclass(slots=True)
class Charge:
    """The cost of a request.

    Attributes:
        spent_gflops: the work spent on the request.
        may_have_spent: whether work has begun; if the request is cancelled then, `spent_gflops` may not be known.
    """

    spent_gflops: float = 0.0
    may_have_spent: bool = False


class KeyLedger:
    """Accounts for the work of each key.

    Under overload, work is shared as in start-time fair queueing (Goyal et al., SIGCOMM 1996): the key that has had the
    least work for its weight comes first, by a fraction of a step of priority, which admission, decoding and shedding
    respect already. Where there is enough capacity for all, this changes nothing.

    Attributes:
        answer_gflops: cost of the cheapest answer of the model that is served.
    """

    def __init__(
        self, answer_gflops: float, share: float = 1.0, observe: Callable[[str, float], object] = lambda *_: None
    ) -> None:
        """Start with full buckets.

        Args:
            answer_gflops: cost of the cheapest answer.
            share: fraction of each key's rate, burst and requests in flight that this process, of several, grants.
            observe: called with the name of a key and the GFLOPs that it was charged, once they are known.
        """
        self.answer_gflops = answer_gflops
        self._share, self._observe = share, observe
        self._accounts: dict[str, _Account] = {}

    def left_gflops(self, key: ApiKey, now: float) -> float:
        """Return how many GFLOPs a request of a key may cost now; infinite where its rate is not bounded."""
        if key.gflops_per_s is None:
            return math.inf
        account, burst = self._account(key, now), self._burst(key)
        account.tokens = min(burst, account.tokens + (now - account.refilled_at) * key.gflops_per_s * self._share)
        account.refilled_at = now
        return account.tokens

    def wait_s(self, key: ApiKey, gflops: float, now: float) -> float:
        """Return the seconds until a request of that cost is allowed; infinite where it never is."""
        if key.gflops_per_s is None:
            return 0.0
        if gflops > self._burst(key):
            return math.inf
        return max(0.0, gflops - self.left_gflops(key, now)) / (key.gflops_per_s * self._share)

    def asked(self, key: ApiKey, now: float) -> None:
        """Record that a request came with this key, whether it is admitted or not."""
        account = self._account(key, now)
        if now > account.asked_at + ACTIVE_S:  # an idle key earns no credit
            account.finish = max(account.finish, self._least(now)[0])
        account.asked_at, account.weight = now, key.weight

    def demotion(self, key: ApiKey, now: float) -> float:
        """Return the fraction of a step of priority, 0..0.5, by which a request stands behind others of its priority.

        The lead of a key is counted in answers of the active key with the highest weight. So the demotion takes effect
        within a few answers, on slow machines, too, and depends only on the ratios of the weights.
        """
        least, answer = self._least(now)
        ahead = max(0.0, self._account(key, now).finish - least) / answer
        return min(STEPS, int(ahead / FIRST_ANSWERS).bit_length()) / (2 * STEPS)

    @contextmanager
    def charging(self, key: ApiKey | None, most_gflops: float, now: float) -> "Iterator[Charge]":
        """Charge the most that a request may cost while the block runs, and then the cost that the block reports.

        A request that is cancelled once work on it has begun, as when its client leaves, is charged the cheapest
        answer.

        Raises:
            OverloadedError: the key has as many requests in flight as it may have.
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
        except Exception:  # an error of any kind: the block has reported what was spent
            raise
        except BaseException:  # a cancellation, such as CancelledError: the block could not report it any more
            if charge.may_have_spent:
                charge.spent_gflops = answer_gflops
            raise
        finally:
            account.in_flight -= 1
            account.tokens += most_gflops - charge.spent_gflops
            account.finish += (charge.spent_gflops - answer_gflops) / key.weight
            self._observe(key.name, charge.spent_gflops)

    def charge(self, key: ApiKey, gflops: float, now: float) -> None:
        """Charge a key for work on a request besides its answer."""
        account = self._account(key, now)
        account.tokens -= gflops
        account.finish += gflops / key.weight
        self._observe(key.name, gflops)

    def _least(self, now: float) -> tuple[float, float]:
        """Find the active key that has received the least, after limiting how far active keys lag behind the others.

        Returns:
            Its `finish`, or the highest of all keys where none is active; and what the cheapest answer adds to the
            `finish` of the active key with the highest weight.
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
        # This process's part must be enough for an answer if the whole burst is.
        return max(self._share * key.burst_gflops, min(key.burst_gflops, self.answer_gflops))

    def _account(self, key: ApiKey, now: float) -> _Account:
        account = self._accounts.get(key.name)
        if account is None:
            account = self._accounts[key.name] = _Account(self._burst(key), now, key.weight)
        return account
