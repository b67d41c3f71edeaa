"""The images of one request, which has one answer: if one fails, the others are cancelled for the same reason."""

import asyncio
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from service.errors import ServiceError


class ImageGroup:
    """A context manager for the tasks that answer the images, one task each; it enters `watch` inside."""

    def __init__(self, watch: AbstractContextManager[object] | None) -> None:
        """Start without tasks; `watch` raises a ClientGoneError out of its block once the client has left."""
        self._watch = watch or nullcontext()
        self._tasks: set[asyncio.Task[object]] = set()
        self._failure: ServiceError | None = None

    def __enter__(self) -> "ImageGroup":
        """Register the current task, which answers an image.

        Raises:
            ServiceError: the error of another image, which failed before this one began.
        """
        if self._failure:
            raise self._failure
        if task := asyncio.current_task():
            self._tasks.add(task)
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel the other images if this one has failed.

        Raises:
            ServiceError: the error of another image, if that failure cancelled this block.
        """
        try:
            self._watch.__exit__(kind, error, trace)
        except ServiceError as gone:
            error = gone
            raise
        finally:
            task = asyncio.current_task()
            if task:
                self._tasks.discard(task)
            if isinstance(error, ServiceError) and self._failure is None:
                self._failure = error
                for other in self._tasks:
                    other.cancel()
        if isinstance(error, asyncio.CancelledError) and self._failure and task and not task.uncancel():
            raise self._failure from None
