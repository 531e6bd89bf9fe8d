"""Limits that keep one client from holding the server: time for the header and the body of a request, and the
size of the body.

uvicorn and starlette have neither; a proxy in front of the server may have stricter ones. uvicorn is an
optional package, imported inside functions.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from opdlm.serving.protocol import InvalidRequest

if TYPE_CHECKING:
    from fastapi import Request
    from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 60.0
"""From a new connection, or the end of an answer, to the end of the next request's header."""
BODY_SECONDS = 60.0
MAX_BODY_BYTES = 8 * 2**20
CLIENT_CLOSED_REQUEST = 499
"""The status, as counted and logged, of a request whose client has left."""


def timed_protocol() -> type[H11Protocol]:
    """uvicorn's protocol; it closes a connection on which no request begins within `HEADER_SECONDS`."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimedProtocol(H11Protocol):
        header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.timeout_keep_alive = HEADER_SECONDS  # type: ignore[assignment]
            self.wait_for_header()

        def on_response_complete(self) -> None:
            self.wait_for_header()
            super().on_response_complete()  # a pipelined request may begin here

        def wait_for_header(self) -> None:
            self.cancel_timer()
            self.header_timer = self.loop.call_later(HEADER_SECONDS, self.close_without, self.cycle)

        def close_without(self, cycle: Any) -> None:
            if self.cycle is cycle:
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self.cancel_timer()
            super().connection_lost(exc)

        def cancel_timer(self) -> None:
            if self.header_timer is not None:
                self.header_timer.cancel()

    return TimedProtocol


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises InvalidRequest if it is too long (413), takes too long (408) or does not
    come to its end (499).
    """
    from starlette.requests import ClientDisconnect

    told = request.headers.get("content-length", "")
    num_bytes, parts = 0, list[bytes]()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if told.isdecimal() and int(told[:20]) > MAX_BODY_BYTES:
                num_bytes = int(told[:20])
            else:
                async for part in request.stream():
                    num_bytes += len(part)
                    if num_bytes > MAX_BODY_BYTES:
                        break
                    parts.append(part)
    except TimeoutError as error:
        raise InvalidRequest(f"the body took more than {BODY_SECONDS:g} s.", status=408) from error
    except ClientDisconnect as error:
        raise InvalidRequest("the client has left.", status=CLIENT_CLOSED_REQUEST) from error
    if num_bytes > MAX_BODY_BYTES:
        raise InvalidRequest(f"the body exceeds {MAX_BODY_BYTES} bytes.", status=413)
    return b"".join(parts)
