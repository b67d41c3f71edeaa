"""The decoding of images on the batcher's threads: how long one takes, and how many stand before a newcomer."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from service.errors import DeadlineError
from service.estimates import Delay

FADES_S = 5.0


@dataclass(slots=True, eq=False)
class Decoding:
    """The decoding of one image, called on a thread; counted among the `unfinished` until it is over."""

    decode: Callable[[bytes], Tensor]
    deadline_at: float
    clock: Callable[[], float]
    unfinished: "set[Decoding]"
    data: bytes = b""
    started_at: float | None = None
    seconds: float | None = None

    def submitted(self, data: bytes) -> "Decoding":
        """From now on others stand behind it."""
        self.data = data
        self.unfinished.add(self)
        return self

    def __call__(self) -> Tensor:
        """Decode; notes how many seconds it took.

        Raises:
            DeadlineError: it would be in vain.
            ServiceError: the image cannot be decoded.
        """
        self.started_at = self.clock()
        try:
            if self.started_at > self.deadline_at:
                raise DeadlineError("the deadline passed before the image could be decoded")
            image = self.decode(self.data)
            self.seconds = self.clock() - self.started_at
            return image
        finally:
            self.unfinished.discard(self)


class Decoder:
    """Hands out decodings, and foretells from those that are over and those that are not."""

    def __init__(self, decode: Callable[[bytes], Tensor], threads: int, clock: Callable[[], float]) -> None:
        """Take the collaborators.

        Args:
            decode: bytes to a (3, S, S) uint8 image; called on one of the threads.
            threads: how many there are.
            clock: monotonic, in seconds; the one that deadlines are on.
        """
        self._decode, self._threads, self._clock = decode, threads, clock
        self._unfinished: set[Decoding] = set()
        self._delay = Delay(FADES_S)  # of one image

    def prepare(self, deadline_at: float) -> Decoding:
        """Make the decoding of an image whose answer is due at `deadline_at`; its bytes are yet to come."""
        return Decoding(self._decode, deadline_at, self._clock, self._unfinished)

    def over(self, decoding: Decoding) -> None:
        """Learn from one that was prepared, whatever became of it."""
        now = self._clock()
        if decoding.started_at is None:  # its client has left before a thread took it up
            self._unfinished.discard(decoding)
        elif decoding.seconds is not None:
            self._delay.observe(decoding.seconds, now)
        elif decoding in self._unfinished:  # it takes longer than its client would wait, who knows how much
            self._delay.observe(max(now - decoding.started_at, self._delay.expected_s(now)), now)

    def expected_s(self, now: float) -> float:
        """How long an image will take."""
        return self._delay.expected_s(now)

    def queue_s(self, now: float) -> float:
        """How long a newcomer will wait for a thread.

        Images that hold every thread for longer than images take are expected to hold them for as long again.
        """
        ahead = max(0, len(self._unfinished) + 1 - self._threads)
        expected_s = self._delay.expected_s(now)
        started_at = [one.started_at for one in tuple(self._unfinished) if one.started_at is not None] if ahead else []
        held_s = now - max(started_at) if len(started_at) == self._threads else 0.0
        return ahead / self._threads * expected_s + max(0.0, held_s - expected_s)
