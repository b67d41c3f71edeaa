"""How many connections there are, whose they are and which of them wait.

A connection waits unless a whole request of it is being answered. Those that wait cost their client next to nothing,
so that no number of them may keep others out: for a new connection, the one that has waited longest is closed.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Protocol


class Connection(Protocol):
    """What is counted."""

    def give_way(self) -> None:
        """Close, so that another may be opened."""


class Connections:
    """Counts connections, and keeps them within bounds."""

    def __init__(
        self,
        max_connections: int,
        max_per_address: int,
        max_fileno: int | None = None,
        *,
        trusted: frozenset[str] = frozenset(),
        observe: Callable[[str], None] = lambda _: None,
        observe_number: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Start with none.

        Args:
            max_connections: at once.
            max_per_address: at once, from one address.
            max_fileno: descriptors are numbered from the lowest that is free, so that few are left above this one.
            trusted: addresses of proxies, whose connections are many clients'.
            observe: told why a connection was closed or refused.
            observe_number: told how many there are.
        """
        self._max_connections, self._max_per_address, self._trusted = max_connections, max_per_address, trusted
        self._max_fileno = max_fileno
        self._observe, self._observe_number = observe, observe_number
        self._addresses: dict[Connection, str | None] = {}
        self._by_address: Counter[str | None] = Counter()
        self._waiting: OrderedDict[Connection, None] = OrderedDict()  # since when, the oldest first

    def __len__(self) -> int:
        """Count those that are open."""
        return len(self._addresses)

    def admit(self, connection: Connection, address: str | None, fileno: int = 0) -> bool:
        """Count a new connection in, if need be in place of one that waits; return whether there is room for it.

        Args:
            connection: it waits for its first request.
            address: of its client, or None where it has none.
            fileno: its descriptor.
        """
        is_bounded = address is not None and address not in self._trusted
        if is_bounded and self._by_address[address] >= self._max_per_address and not self._make_room(address):
            self._observe("address")
            return False
        is_last = self._max_fileno is not None and fileno > self._max_fileno
        if (is_last or len(self._addresses) >= self._max_connections) and not self._make_room():
            self._observe("files" if is_last else "full")
            return False
        self._addresses[connection] = address
        self._by_address[address] += 1
        self._waiting[connection] = None
        self._observe_number(len(self._addresses))
        return True

    def waits(self, connection: Connection) -> None:
        """Take note that a connection waits from now on, or anew: for its next request, or for the rest of one."""
        if connection in self._addresses:
            self._waiting[connection] = None
            self._waiting.move_to_end(connection)

    def works(self, connection: Connection) -> None:
        """Take note that a whole request of a connection is being answered."""
        self._waiting.pop(connection, None)

    def forget(self, connection: Connection) -> None:
        """Count a connection out; one that is out already is no error."""
        if connection not in self._addresses:
            return
        address = self._addresses.pop(connection)
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]
        self._waiting.pop(connection, None)
        self._observe_number(len(self._addresses))

    def _make_room(self, address: str | None = None) -> bool:
        """Close what has waited longest, of all or of one address."""
        for connection in self._waiting:
            if address is None or self._addresses[connection] == address:
                self.forget(connection)
                self._observe("gave_way")
                connection.give_way()
                return True
        return False
