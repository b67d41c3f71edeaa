import pytest

from service.hosting.ports import why_no_changes
from service.settings import Settings


@pytest.mark.parametrize("given", [{}, {"host": "localhost"}, {"host": "::1"}, {"host": "0.0.0.0", "admin_port": 9000}])
def test_operators_may_change_the_model(given: dict[str, object]) -> None:
    assert why_no_changes(Settings(**given)) is None  # type: ignore[arg-type] # one of its fields each


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "example.org"])
def test_strangers_may_not(host: str) -> None:
    assert "--admin-port" in str(why_no_changes(Settings(host=host)))


def test_one_of_several_workers_is_not_changed_alone() -> None:
    assert "--watch-checkpoint" in str(why_no_changes(Settings(workers=2, admin_port=9000)))
