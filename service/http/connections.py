"""Bounds on the number of connections, in all and per address, and the record of which of them wait.

A connection waits unless a whole request of it is being answered. Waiting costs a client next to nothing, so waiting
connections must not keep others out: to admit a new connection, the one that has waited longest is closed.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from typing import Any, Protocol, cast

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

# The answer to a connection that is refused.
UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 21\r\nconnection: close\r\n\r\nToo many connections."
)


def proxy_check(names: Collection[str]) -> Callable[[str], bool]:
    """Return a function that tells whether uvicorn believes what an address forwards.

    Args:
        names: addresses, networks such as 10.0.0.0/8, or "*" alone for every address.
    """
    no_app = cast(Any, None)  # never called: uvicorn has no other public way to these addresses
    return ProxyHeadersMiddleware(no_app, list(names)).trusted_hosts.__contains__


class Connection(Protocol):
    """A connection that Connections counts and may close."""

    def evict(self) -> None:
        """Close to make room for a new connection."""


class Connections:
    """Counts the open connections and keeps them within bounds."""

    def __init__(
        self,
        max_connections: int,
        max_per_address: int,
        max_fileno: int | None = None,
        *,
        is_proxy: Callable[[str], bool] = lambda _: False,
        observe: Callable[[str], None] = lambda _: None,
        observe_number: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Start with none.

        Args:
            max_connections: most connections at once.
            max_per_address: most connections at once from one address.
            max_fileno: highest file descriptor that is admitted without closing a waiting connection; None for no
                bound. The system assigns the lowest free number, so few are left once it assigns one above this.
            is_proxy: returns whether an address is that of a proxy, whose connections serve many clients;
                `max_per_address` does not apply to it.
            observe: called with the reason when a connection is closed or refused.
            observe_number: called with the number of open connections when it changes.
        """
        self._max_connections, self._max_per_address, self._is_proxy = max_connections, max_per_address, is_proxy
        self._max_fileno = max_fileno
        self._observe, self._observe_number = observe, observe_number
        self._addresses: dict[Connection, str | None] = {}
        self._by_address: Counter[str | None] = Counter()
        self._waiting: OrderedDict[Connection, None] = OrderedDict()  # the one that has waited longest first

    def __len__(self) -> int:
        """Return the number of open connections."""
        return len(self._addresses)

    def admit(self, connection: Connection, address: str | None, fileno: int = 0) -> bool:
        """Admit a new connection, closing a waiting one if need be; return whether there is room for it.

        Args:
            connection: the new connection, which waits for its first request.
            address: address of its client; None where it has none.
            fileno: its file descriptor.
        """
        is_bounded = address is not None and not self._is_proxy(address)
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

    def mark_waiting(self, connection: Connection) -> None:
        """Record that a connection waits from now on, for its next request or for the rest of one."""
        if connection in self._addresses:
            self._waiting[connection] = None
            self._waiting.move_to_end(connection)

    def mark_answering(self, connection: Connection) -> None:
        """Record that a whole request of a connection is being answered."""
        self._waiting.pop(connection, None)

    def forget(self, connection: Connection) -> None:
        """Remove a connection from the count; do nothing if it is not counted."""
        if connection not in self._addresses:
            return
        address = self._addresses.pop(connection)
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]
        self._waiting.pop(connection, None)
        self._observe_number(len(self._addresses))

    def _make_room(self, address: str | None = None) -> bool:
        """Close the connection that has waited longest, of all or of one address; return whether there was one."""
        for connection in self._waiting:
            if address is None or self._addresses[connection] == address:
                self.forget(connection)
                self._observe("gave_way")
                connection.evict()
                return True
        return False
