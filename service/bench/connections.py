"""Connections to a server, without a bound on their number. Only this module imports aiohttp.

httpx takes ten times the CPU time for a request (2.5 ms of a core, aiohttp 0.3 ms), and a load generator that is
short of CPU time measures itself.
"""

from typing import Self

import aiohttp

from service.bench.client_protocols import Request
from service.errors import ConnectionFailedError, ResponseTimeoutError
from service.retries import bearer, tls_problem


class Connections:
    """Sends requests; to be used in an `async with` block."""

    def __init__(self, url: str, timeout_s: float, api_key: str | None = None) -> None:
        """Create a session, which opens no connection before `send`.

        Args:
            url: URL of the server.
            timeout_s: longest time that a request may take in all.
            api_key: API key, if the server asks for one.
        """
        self._url = url.rstrip("/")
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=bearer(api_key))

    async def send(self, request: Request) -> tuple[int, bytes]:
        """Send a request, with POST if it has a body, and return the status and the body of the answer.

        Raises:
            ConnectionFailedError: nothing listens at the URL, or the server has closed the connection.
            ResponseTimeoutError: the answer took too long.
        """
        method = "GET" if request.body is None else "POST"
        try:
            async with self._session.request(
                method, self._url + request.path, data=request.body, headers=request.headers
            ) as answer:
                return answer.status, await answer.read()
        except TimeoutError as error:
            raise ResponseTimeoutError(f"{self._url} did not answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            why = tls_problem(error) or ", or it closed the connection"
            raise ConnectionFailedError(f"cannot connect to {self._url}{why}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
