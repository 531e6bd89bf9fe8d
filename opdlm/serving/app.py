"""The HTTP routes of `opdlm serve` as a FastAPI application. Every error has OpenAI's shape.

FastAPI is an optional package, imported inside functions. It resolves annotations that are strings among the
names of a module only, so this file does without `from __future__ import annotations`.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, MutableMapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json, to_json

import opdlm
from opdlm.errors import OpdlmError
from opdlm.serving.answers import ChatCompletion, ErrorAnswer, TextCompletion, error_answer
from opdlm.serving.http_limits import CLIENT_CLOSED_REQUEST, read_body
from opdlm.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    InvalidRequest,
    ModelRequest,
    TokenizeRequest,
    explain,
    shorten,
)

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from fastapi.routing import APIRoute
    from starlette.types import ASGIApp

    from opdlm.serving.server import Server

CHAT, COMPLETION, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
BODIES: dict[str, type[ModelRequest]] = {
    CHAT: ChatRequest,
    COMPLETION: CompletionRequest,
    TOKENIZE: TokenizeRequest,
}
LONGEST_PATH = 80
"""Characters of a path that logs and errors repeat."""
REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")
"""What a client may call its request."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing, and speaks to this server only."""


def make_app(server: "Server", cors_origins: Sequence[str] = ()) -> "ASGIApp":
    """The application that answers with `server`. `cors_origins`: web pages that may read its answers."""
    from fastapi import APIRouter, FastAPI, Request
    from fastapi.middleware.cors import CORSMiddleware

    app = FastAPI(title="opdlm serve", redoc_url=None, strict_content_type=False)
    router = APIRouter(route_class=checked_route(server))
    errors: Any = {"responses": {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}}
    documented: Any = {"response_model_exclude_unset": True, **errors}

    @router.post(CHAT, response_model=ChatCompletion, **documented)
    async def chat(body: ChatRequest, request: Request) -> Any:
        return await respond(server, body, request)

    @router.post(COMPLETION, response_model=TextCompletion, **documented)
    async def complete(body: CompletionRequest, request: Request) -> Any:
        return await respond(server, body, request)

    @router.post(TOKENIZE, **errors)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        tokens = await asyncio.to_thread(server.tokenize, body)
        return {"count": len(tokens), "max_model_len": server.thread.max_length, "tokens": tokens}

    app.include_router(router)
    add_information(app, server, errors)
    add_error_handlers(app)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=[*cors_origins], allow_methods=["*"], allow_headers=["*"]
        )
    return counted(app, server)


def add_information(app: "FastAPI", server: "Server", errors: Mapping[str, Any]) -> None:
    """The page, and what GET tells about the server."""
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

    model = {
        "id": server.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "opdlm",
        "max_model_len": server.thread.max_length,
    }

    @app.get("/", include_in_schema=False)
    async def page() -> Any:
        return HTMLResponse(chat_page(), headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", **errors)
    async def one_model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return model

    @app.get("/health")
    async def health() -> Any:
        is_alive = server.thread.is_alive()
        return JSONResponse({"status": "ok" if is_alive else "stopped"}, 200 if is_alive else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": opdlm.__version__}

    @app.get("/metrics")
    async def metrics() -> Any:
        return PlainTextResponse(server.metrics.text(server.thread))


@cache
def chat_page() -> str:
    """The page at `/`."""
    return (Path(__file__).parents[1] / "templates" / "chat.html").read_text(encoding="utf-8")


def counted(app: "ASGIApp", server: "Server") -> "ASGIApp":
    """The application, with requests counted and logged. Each has an id: the client's `X-Request-Id`, or a
    new one.
    """

    async def call(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        status, started = CLIENT_CLOSED_REQUEST, time.perf_counter()

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await app(scope, receive, send_with_id)
        finally:
            path, seconds = (
                scope["path"] if scope["path"] in BODIES else "other",
                time.perf_counter() - started,
            )
            server.metrics.count_request(path, status, seconds)
            if server.request_log is not None:
                parsed = scope.get("state", {}).get("parsed")
                line = {
                    "time": round(time.time(), 3),
                    "id": request_id.decode(),
                    "path": scope["path"][:LONGEST_PATH],
                    "status": status,
                    "seconds": round(seconds, 4),
                    **(parsed.log_fields() if parsed is not None else {}),
                }
                server.request_log.info(to_json(line).decode())

    return call


def checked_route(server: "Server") -> type["APIRoute"]:
    """The class of the routes that take a request's body. They check the key before they read the body, and
    turn every refusal of the body into one InvalidRequest.
    """
    from fastapi import HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.routing import APIRoute

    class JsonRequest(Request):
        async def json(self) -> Any:
            """pydantic's parser also refuses NaN, lone surrogates and deep nesting, which `json` lets in."""
            try:
                return from_json(await self.body(), allow_inf_nan=False)
            except ValueError as error:
                raise HTTPException(400, f"the body is not JSON: {error}.") from error

    class CheckedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, "Response"]]:
            handle, model = super().get_route_handler(), BODIES[self.path]

            async def handle_checked(request: Request) -> "Response":
                server.check_key(request.headers.get("authorization", ""))
                check_content_type(request.headers.get("content-type", ""))
                checked = JsonRequest(request.scope, request.receive)
                checked._body = await read_body(checked)
                try:
                    return await handle(checked)
                except RequestValidationError as error:
                    location = error.errors()[0]["loc"][1:]  # without "body"
                    raise InvalidRequest(explain(model, error.body, location)) from error

            return handle_checked

    return CheckedRoute


def check_content_type(content_type: str) -> None:
    """Raises InvalidRequest (415) for a body that says it is not JSON; one that says nothing is tried."""
    if content_type and content_type.split(";")[0].strip().lower() != "application/json":
        raise InvalidRequest(f"Content-Type ({shorten(content_type)}) must be application/json.", status=415)


def add_error_handlers(app: "FastAPI") -> None:
    """Answer errors in OpenAI's shape instead of FastAPI's."""
    from fastapi import HTTPException
    from starlette.exceptions import HTTPException as AnyHTTPException

    @app.exception_handler(OpdlmError)
    async def refuse(_: "Request", error: OpdlmError) -> "Response":
        if not isinstance(error, InvalidRequest):
            return error_response(str(error), 400)
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return error_response(str(error), error.status, headers)

    @app.exception_handler(AnyHTTPException)
    async def refuse_route(request: "Request", error: AnyHTTPException) -> "Response":
        if isinstance(error, HTTPException):
            return error_response(error.detail, error.status_code, error.headers)
        message = (
            f"{request.method} {request.url.path[:LONGEST_PATH]} is not served here: "
            f"POST {', '.join(BODIES)}, GET /, /v1/models, /health, /version and /metrics are."
        )
        return error_response(message, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def report(_: "Request", error: Exception) -> "Response":
        return error_response(f"the server failed: {error}", 500)


def error_response(message: str, status: int, headers: Mapping[str, str] | None = None) -> "Response":
    from fastapi.responses import JSONResponse

    return JSONResponse(error_answer(message, status=status), status, headers)


async def respond(server: "Server", body: "ChatRequest | CompletionRequest", request: "Request") -> Any:
    """The answer to a request, or the stream of it. A client that leaves cancels its jobs."""
    from fastapi.responses import Response, StreamingResponse

    parsed = await asyncio.to_thread(server.parse, body, asyncio.get_running_loop())
    request.state.parsed = parsed
    server.submit(parsed)
    if parsed.request.stream:

        class CancellingStream(StreamingResponse):
            async def __call__(self, *connection: Any) -> None:
                try:  # a client that leaves early may keep the stream from being started
                    await super().__call__(*connection)
                finally:
                    parsed.cancelled.set()

        return CancellingStream(server.stream(parsed), media_type="text/event-stream")
    answer = asyncio.create_task(server.answer(parsed))
    disconnect = asyncio.create_task(wait_for_disconnect(request))
    try:
        await asyncio.wait({answer, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        return await answer if answer.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    except Exception as error:  # of decoding: the thread has logged it
        return error_response(f"decoding failed: {error}", 500)
    finally:
        parsed.cancelled.set()
        answer.cancel()
        disconnect.cancel()


async def wait_for_disconnect(request: "Request") -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
