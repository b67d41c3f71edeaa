import pytest

from service.http.connections import Connections, proxy_check


class Connection:
    def __init__(self) -> None:
        self.gave_way = False

    def evict(self) -> None:
        self.gave_way = True


def admitted(connections: Connections, address: str | None = "a") -> Connection:
    connection = Connection()
    assert connections.admit(connection, address)
    return connection


def test_the_connection_that_has_waited_longest_is_closed_for_a_new_one() -> None:
    connections = Connections(3, 3)
    first, second, third = [admitted(connections) for _ in range(3)]
    connections.mark_answering(first)
    connections.mark_waiting(second)
    admitted(connections)
    assert [one.gave_way for one in (first, second, third)] == [False, False, True]
    connections.mark_waiting(first)
    admitted(connections)
    assert [one.gave_way for one in (first, second)] == [False, True]
    assert len(connections) == 3


def test_a_new_connection_is_refused_while_every_open_connection_is_being_answered() -> None:
    reasons: list[str] = []
    connections = Connections(2, 2, observe=reasons.append)
    working = [admitted(connections) for _ in range(2)]
    for connection in working:
        connections.mark_answering(connection)
    assert not connections.admit(Connection(), "b")
    connections.forget(working[0])
    connections.forget(working[0])
    assert connections.admit(Connection(), "b")
    assert reasons == ["full"]


def test_an_address_at_its_limit_makes_room_only_among_its_own_connections() -> None:
    reasons: list[str] = []
    connections = Connections(9, 2, observe=reasons.append)
    other = admitted(connections, "b")
    first, second = admitted(connections), admitted(connections)
    third = admitted(connections)
    assert (other.gave_way, first.gave_way, second.gave_way) == (False, True, False)
    connections.mark_answering(second)
    connections.mark_answering(third)
    assert not connections.admit(Connection(), "a")
    assert reasons == ["gave_way", "address"]
    for _ in range(2):
        admitted(connections, None)
    assert len(connections) == 5


def test_the_limit_per_address_does_not_apply_to_a_trusted_proxy() -> None:
    connections = Connections(3, 1, is_proxy=proxy_check(["proxy"]))
    assert not any(admitted(connections, "proxy").gave_way for _ in range(3))


@pytest.mark.parametrize(
    ("names", "address", "expected"),
    [
        (["10.0.0.1"], "10.0.0.1", True),
        (["10.0.0.1"], "10.0.0.2", False),
        (["192.0.2.1", "10.0.0.0/8"], "10.1.2.3", True),
        (["10.0.0.0/8"], "11.0.0.1", False),
        (["::1"], "0:0:0:0:0:0:0:1", True),
        (["10.0.0.0/8"], "::1", False),
        (["10.0.0.0/8"], "a socket", False),
        (["*"], "203.0.113.9", True),
        ([], "127.0.0.1", False),
    ],
)
def test_proxies_are_named_by_address_or_network(names: list[str], address: str, expected: bool) -> None:
    assert proxy_check(names)(address) is expected


def test_the_last_file_descriptors_are_kept_free() -> None:
    reasons, numbers = list[str](), list[int]()
    connections = Connections(9, 9, 100, observe=reasons.append, observe_number=numbers.append)
    waiting, working = Connection(), Connection()
    assert connections.admit(waiting, "a", 100)
    assert connections.admit(working, "a", 101)
    assert waiting.gave_way
    connections.mark_answering(working)
    assert not connections.admit(Connection(), "a", 101)
    assert reasons == ["gave_way", "files"]
    assert numbers == [1, 0, 1]
