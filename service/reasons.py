"""Why a choice was made, in words for a person. Decides nothing."""

from collections.abc import Sequence

from service.menu import Menu
from service.situation import Choice, Entry, Situation, Wish

NOTEWORTHY = 1.05  # prudence that a person should hear of


def cleared(situation: Situation, line: Sequence[Entry], expects: bool, option: int) -> str:
    """Say why an option was chosen with which everybody who waits is answered in time.

    Args:
        situation: the moment.
        line: who waits, the most urgent first.
        expects: whether others were reckoned with who have not come yet.
        option: that was chosen.
    """
    menu, waiting = situation.menu, len(line)
    subnetwork = menu.options[option].row.subnetwork
    quality = _quality(menu)
    if option == menu.num_levels - 1:
        if waiting == 1:
            return f"nothing else waits: {subnetwork} is {quality} sub-network"
        return f"{waiting} waiting: {subnetwork}, {quality} sub-network, answers all of them in time"
    prudently = ""
    if situation.prudence > NOTEWORTHY:
        prudently = f" if better ones take {situation.prudence:.1f} times as long (requests were missed of late)"
    if waiting > 1:
        return f"{waiting} waiting: {subnetwork} is {quality} that answers all of them in time{prudently}"
    left = f"{1000 * (line[0].deadline_at - situation.now):.0f} ms left"
    if expects:
        return f"{left} and others expected: {subnetwork} is {quality} that answers all of them in time{prudently}"
    return f"{left}: {subnetwork} is {quality} that answers in time{prudently}"


def outrun(situation: Situation, waiting: int) -> str:
    """Say why the cheapest level was chosen although a better one would do for those who wait."""
    cheapest = situation.menu.options[0].row.subnetwork
    return f"{waiting} waiting and, for seconds now, more coming than even {cheapest} carries for long"


def overloaded(menu: Menu, waiting: int, option: int) -> str:
    """Say why an option was chosen with which not everybody is answered in time."""
    subnetwork = menu.options[option].row.subnetwork
    return f"{waiting} waiting and more expected than can be answered in time: {subnetwork} answers the most"


def explain(menu: Menu, wish: Wish, budget_gflops: float | None, option: int, choice: Choice) -> str:
    """Say why a request got its option: because of its own wish where that decided, because of the line otherwise."""
    subnetwork = menu.options[option].row.subnetwork
    if wish.only is not None:
        return f"{subnetwork} was asked for by name"
    if budget_gflops is None or option != (wish.limit if wish.beyond is None else wish.beyond):
        return choice.reason
    quality = _quality(menu)
    if option == menu.num_levels - 1:
        return f"{budget_gflops:.12g} GFLOPs admit {quality} sub-network, {subnetwork}"
    dearer = menu.next_better(option)
    if dearer is None:
        return choice.reason
    return (
        f"{subnetwork} is {quality} within {budget_gflops:.12g} GFLOPs; the next better one, {dearer.subnetwork}, "
        f"costs {dearer.gflops}"
    )


def _quality(menu: Menu) -> str:
    return "the most accurate" if menu.is_measured else "the largest"
