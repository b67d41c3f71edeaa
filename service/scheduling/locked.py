"""A decorator that serialises the methods of an object which several threads share."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class Lockable(Protocol):
    """An object with a reentrant lock."""

    lock: AbstractContextManager[object]


S = TypeVar("S", bound=Lockable)
P = ParamSpec("P")
R = TypeVar("R")


def locked(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method hold the lock of its object."""

    @functools.wraps(method)
    def one_at_a_time(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return one_at_a_time
