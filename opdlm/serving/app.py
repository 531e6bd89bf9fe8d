"""The HTTP routes of `opdlm serve` as a FastAPI application. Every error has OpenAI's shape.

FastAPI is an optional package, imported inside functions. It resolves annotations that are strings among the
names of a module only, so this file does without `from __future__ import annotations`.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from opdlm.errors import OpdlmError
from opdlm.serving.answers import ChatCompletion, ErrorAnswer, TextCompletion, error_answer
from opdlm.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    InvalidRequest,
    explain,
    shorten,
)

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response
    from fastapi.routing import APIRoute

    from opdlm.serving.server import ParsedRequest, Server

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, type[GenerationRequest]] = {CHAT: ChatRequest, COMPLETION: CompletionRequest}
CLIENT_CLOSED_REQUEST = 499


def make_app(server: "Server") -> "FastAPI":
    """The application that answers with `server`."""
    from fastapi import APIRouter, FastAPI, Request

    app = FastAPI(title="opdlm serve", redoc_url=None, strict_content_type=False)
    router = APIRouter(route_class=checked_route(server))
    documented: Any = {
        "response_model_exclude_unset": True,
        "responses": {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}},
    }

    @router.post(CHAT, response_model=ChatCompletion, **documented)
    async def chat(body: ChatRequest, request: Request) -> Any:
        return await respond(server, server.parse(body), request)

    @router.post(COMPLETION, response_model=TextCompletion, **documented)
    async def complete(body: CompletionRequest, request: Request) -> Any:
        return await respond(server, server.parse(body), request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": server.name, "object": "model", "owned_by": "opdlm"}]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok" if server.thread.is_alive() else "stopped"}

    app.include_router(router)
    add_error_handlers(app)
    return app


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
                try:
                    return await handle(JsonRequest(request.scope, request.receive))
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
        return error_response(str(error), error.status if isinstance(error, InvalidRequest) else 400)

    @app.exception_handler(AnyHTTPException)
    async def refuse_route(request: "Request", error: AnyHTTPException) -> "Response":
        if isinstance(error, HTTPException):
            return error_response(error.detail, error.status_code, error.headers)
        message = (
            f"{request.method} {request.url.path[:80]} is not served here: POST {CHAT} and {COMPLETION}, GET "
            "/v1/models and /health are."
        )
        return error_response(message, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def report(_: "Request", error: Exception) -> "Response":
        return error_response(f"the server failed: {error}", 500)


def error_response(message: str, status: int, headers: Mapping[str, str] | None = None) -> "Response":
    from fastapi.responses import JSONResponse

    return JSONResponse(error_answer(message, status=status), status, headers)


async def respond(server: "Server", parsed: "ParsedRequest", request: "Request") -> Any:
    """The answer to a request, or the stream of it. A client that leaves cancels its jobs."""
    from fastapi.responses import Response, StreamingResponse

    if parsed.request.stream:
        return StreamingResponse(server.stream(parsed), media_type="text/event-stream")
    answer = asyncio.create_task(server.answer(parsed))
    disconnect = asyncio.create_task(wait_for_disconnect(request))
    try:
        await asyncio.wait({answer, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        return await answer if answer.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    except Exception as error:  # of decoding: the thread has logged it
        return error_response(f"decoding failed: {error}", 500)
    finally:
        parsed.cancel()
        answer.cancel()
        disconnect.cancel()


async def wait_for_disconnect(request: "Request") -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
