"""`opdlm serve`: OpenAI's protocol over HTTP around our own decode loop, lossless drafting included.

POST /v1/chat/completions and /v1/completions (streamed or not), GET /v1/models and /health. What a request
does not say is as the command line has it. starlette and uvicorn are an extra.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from opdlm.checkpoints.convert import load_decoder
from opdlm.checkpoints.load import check_decode, max_total_tokens
from opdlm.data.prompts import encode_prompt, messages_of
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import grid_of
from opdlm.decoding.rollout import Rollout
from opdlm.decoding.streaming import StablePrefix, StopStrings
from opdlm.errors import ConfigError, OpdlmError, require_package
from opdlm.modeling.compiled import compiled_decoding
from opdlm.seeds import seed_of
from opdlm.serving.decode_thread import DecodeThread, Job
from opdlm.serving.protocol import (
    Body,
    InvalidRequest,
    asks_for_logprobs,
    asks_for_usage,
    check_body,
    error_body,
    head,
    is_ids,
    logprobs_of,
    number,
    sse,
    strings,
    switch,
    usage_of,
    whole,
    with_plain_text,
)

DEFAULT_LENGTH = 4096
MOST_CHOICES = 128
LARGEST = 2**62
API_KEY_VARIABLE = "OPDLM_API_KEY"


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request as it was understood: its choices, prompt by prompt."""

    jobs: tuple[PendingChoice, ...]
    is_streamed: bool
    with_usage: bool


@dataclass(frozen=True, slots=True)
class PendingChoice:
    """A choice while it is written: text as it settles, then the response or what went wrong."""

    job: Job
    stable_prefix: StablePrefix
    events: asyncio.Queue[str | Rollout | Exception]


@dataclass(frozen=True, slots=True)
class Server:
    """What answers requests."""

    thread: DecodeThread
    tokenizer: PreTrainedTokenizerBase
    name: str
    config: DecodeConfig
    """What a request does not say."""
    api_key: str = ""
    """What requests must bring; empty: nothing."""

    def check_key(self, authorization: str) -> None:
        wanted = f"Bearer {self.api_key}".encode()
        if self.api_key and not hmac.compare_digest(authorization.encode(), wanted):
            raise InvalidRequest(
                "this server wants `Authorization: Bearer KEY` with its --api-key.", status=401
            )

    def read(self, body: Any, *, is_chat: bool) -> ParsedRequest:
        """Check a request and prepare its jobs; InvalidRequest says which key, which value, which rule."""
        body = check_body(body, self.name)
        config = replace(
            self.config,
            temperature=number(body, "temperature", self.config.temperature, 0, 100),
            top_p=number(body, "top_p", self.config.top_p or 1.0, 1e-9, 1),
            top_k=whole(body, "top_k", self.config.top_k or 0, 0, LARGEST) or None,
            logprobs=asks_for_logprobs(body, is_chat=is_chat),
        )
        stops = StopStrings(self.tokenizer, strings(body, "stop"))
        prompts = [self.chat_ids(body)] if is_chat else self.prompt_ids(body)
        num_tokens = self.limit(body, prompts)
        num_choices = whole(body, "n", 1, 1, MOST_CHOICES)
        seed = whole(body, "seed", random.getrandbits(62), -LARGEST, LARGEST)
        is_streamed = switch(body, "stream")
        places = [ids for ids in prompts for _ in range(num_choices)]
        jobs = [
            self.pending(ids, seed_of(seed, place), num_tokens, config, stops, is_streamed)
            for place, ids in enumerate(places)
        ]
        return ParsedRequest(tuple(jobs), is_streamed, asks_for_usage(body))

    def chat_ids(self, body: Body) -> list[int]:
        messages = body.get("messages")
        if isinstance(messages, list):
            messages = [with_plain_text(message) for message in messages]
        try:
            return encode_prompt(self.tokenizer, messages_of("the request", {"messages": messages}, ""))
        except TemplateError as error:
            raise InvalidRequest(f"messages do not fit the model's chat template: {error}.") from error

    def prompt_ids(self, body: Body) -> list[list[int]]:
        """One text, several, one list of token ids, or several."""
        prompt = body.get("prompt")
        prompts = prompt if isinstance(prompt, list) and prompt and not is_ids(prompt) else [prompt]
        found = []
        for one in prompts:
            if not (isinstance(one, str) or is_ids(one)):
                raise InvalidRequest("prompt must be text, a list of texts, or token ids.")
            ids = list(self.tokenizer(one)["input_ids"]) if isinstance(one, str) else one
            if not ids:
                raise InvalidRequest("prompt is empty: give some text.")
            found.append(ids)
        return found

    def limit(self, body: Body, prompts: Sequence[Sequence[int]]) -> int:
        """New tokens; prompts that leave no room for them, or hold the mask token, are refused."""
        key = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        num_tokens = whole(body, key, self.config.max_new_tokens, 1, LARGEST)
        spec, longest = self.thread.model.spec, max(len(ids) for ids in prompts)
        num_rows = len(self.tokenizer)
        if any(not 0 <= token < num_rows or token == spec.mask_token_id for ids in prompts for token in ids):
            raise InvalidRequest(
                f"prompt has token ids beyond {num_rows - 1}, or the mask token: remove them."
            )
        if longest + num_tokens > self.thread.max_length:
            raise InvalidRequest(
                f"the prompt ({longest} tokens) and {key} ({num_tokens}) exceed the {self.thread.max_length} "
                "tokens of a request (--max-length)."
            )
        return num_tokens

    def pending(
        self,
        ids: Sequence[int],
        seed: int,
        num_tokens: int,
        config: DecodeConfig,
        stops: StopStrings,
        is_streamed: bool,
    ) -> PendingChoice:
        spec, shown = self.thread.model.spec, range(len(ids), len(ids) + num_tokens)
        stable_prefix = StablePrefix(stops, spec, grid_of(config.mode, spec), shown)
        events: asyncio.Queue[str | Rollout | Exception] = asyncio.Queue()
        put = thread_safe(events.put_nowait)
        job = Job(
            ids=tuple(ids),
            seed=seed,
            max_new_tokens=num_tokens,
            config=config,
            find_end=stops.find_end if stops.strings else None,
            on_step=(lambda tokens: put(stable_prefix.after_step(tokens)[0])) if is_streamed else None,
            on_end=put,
        )
        return PendingChoice(job, stable_prefix, events)

    def with_logprobs(self, choice: Body, pending: PendingChoice, rollout: Rollout, *, is_chat: bool) -> Body:
        """The choice, and what it was asked to say about its tokens (the stop token left out)."""
        if not pending.job.config.logprobs:
            return choice
        stops = self.thread.model.spec.stop_token_ids
        pieces = [str(self.tokenizer.decode([token])) for token in rollout.text_ids if token not in stops]
        return choice | {"logprobs": logprobs_of(rollout, pieces, is_chat=is_chat)}

    async def whole_answer(self, asked: ParsedRequest, is_chat: bool) -> Body:
        """Every choice when all are written."""
        rollouts = [await ending(pending) for pending in asked.jobs]
        choices = []
        for index, (pending, rollout) in enumerate(zip(asked.jobs, rollouts, strict=True)):
            text = pending.stable_prefix.whole(rollout)
            answer = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            choice = {"index": index, **answer, "finish_reason": rollout.finish_reason}
            choices.append(self.with_logprobs(choice, pending, rollout, is_chat=is_chat))
        kind = "chat.completion" if is_chat else "text_completion"
        return head(kind, self.name) | {"choices": choices, "usage": usage_of(rollouts)}

    async def streamed_answer(self, asked: ParsedRequest, is_chat: bool) -> AsyncIterator[str]:
        """Server-sent events; the choices of a request are sent one after the other."""
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        start = head(kind, self.name)
        rollouts = []
        try:
            for index, pending in enumerate(asked.jobs):
                sent, rollout = "", None
                while rollout is None:
                    event = await pending.events.get()
                    if isinstance(event, Exception):
                        yield sse({"error": {"message": str(event), "type": "server_error"}})
                        return
                    rollout = event if isinstance(event, Rollout) else None
                    text = pending.stable_prefix.whole(event) if isinstance(event, Rollout) else event
                    reason = None if rollout is None else rollout.finish_reason
                    if len(text) > len(sent) or reason:
                        new = text[len(sent) :]
                        part: Body = {"delta": {"content": new}} if is_chat else {"text": new}
                        if is_chat and not sent:
                            part["delta"]["role"] = "assistant"
                        choice = {"index": index, **part, "finish_reason": reason}
                        if rollout is not None:  # all at the end: pieces of text are not tokens
                            choice = self.with_logprobs(choice, pending, rollout, is_chat=is_chat)
                        yield sse(start | {"choices": [choice]})
                        sent = text
                rollouts.append(rollout)
            if asked.with_usage:
                yield sse(start | {"choices": [], "usage": usage_of(rollouts)})
            yield "data: [DONE]\n\n"
        finally:
            cancel(asked)

    async def answer(self, request: Any, *, is_chat: bool) -> Any:
        """One POST, whichever it is."""
        from starlette.responses import JSONResponse, StreamingResponse

        try:
            self.check_key(request.headers.get("authorization", ""))
            asked = self.read(json.loads(await request.body()), is_chat=is_chat)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            return JSONResponse(error_body(f"the body is not JSON: {error}."), 400)
        except OpdlmError as error:
            status = error.status if isinstance(error, InvalidRequest) else 400
            return JSONResponse(error_body(str(error)), status)
        for pending in asked.jobs:
            self.thread.arrivals.put(pending.job)
        if asked.is_streamed:
            return StreamingResponse(self.streamed_answer(asked, is_chat), media_type="text/event-stream")
        answer = asyncio.create_task(self.whole_answer(asked, is_chat))
        gone = asyncio.create_task(until_gone(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await answer) if answer.done() else JSONResponse({}, 499)
        except Exception as error:
            return JSONResponse(error_body(f"decoding failed: {error}", "server_error"), 500)
        finally:
            cancel(asked)
            answer.cancel()
            gone.cancel()

    def app(self) -> Any:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        async def chat(request: Any) -> Any:
            return await self.answer(request, is_chat=True)

        async def complete(request: Any) -> Any:
            return await self.answer(request, is_chat=False)

        async def models(_: Any) -> Any:
            entry = {"id": self.name, "object": "model", "owned_by": "opdlm"}
            return JSONResponse({"object": "list", "data": [entry]})

        async def health(_: Any) -> Any:
            return JSONResponse({"status": "ok"} if self.thread.is_alive() else {"status": "stopped"})

        return Starlette(
            routes=[
                Route("/v1/chat/completions", chat, methods=["POST"]),
                Route("/v1/completions", complete, methods=["POST"]),
                Route("/v1/models", models),
                Route("/health", health),
            ]
        )


def thread_safe(call: Callable[[Any], object]) -> Callable[[Any], None]:
    """The same from another thread, as long as the server runs."""
    loop = asyncio.get_running_loop()

    def later(value: Any) -> None:
        with suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(call, value)

    return later


async def ending(pending: PendingChoice) -> Rollout:
    event = await pending.events.get()
    if isinstance(event, Exception):
        raise event
    assert isinstance(event, Rollout)
    return event


async def until_gone(request: Any) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def cancel(asked: ParsedRequest) -> None:
    for pending in asked.jobs:
        pending.job.cancelled.set()


def serve_folder(
    folder: str,
    *,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    max_rows: int,
    max_length: int | None,
    decode: DecodeConfig,
    dtype: str,
    compile: bool,
) -> None:
    """Serve a folder until Ctrl-C; `opdlm.serve` documents the arguments."""
    if max_rows < 1:
        raise ConfigError(f"max_rows ({max_rows}) must be at least 1.")
    for package in ("starlette", "uvicorn"):
        require_package(package, "serve", "opdlm serve")
    model, tokenizer = load_decoder(folder, dtype)
    check_decode(decode, model.spec)
    longest = max_total_tokens(model)
    max_length = max_length or int(min(longest, DEFAULT_LENGTH))
    if not decode.max_new_tokens < max_length <= longest:
        raise ConfigError(
            f"max_length ({max_length}) must be more than max_new_tokens ({decode.max_new_tokens}) "
            f"and at most {longest}, the model's context less two blocks of drafts."
        )
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"`host={host}` `port={port}` cannot be listened on: {error.strerror}. Choose another `port` "
            "(0: any free one)."
        ) from error
    thread = DecodeThread(model, max_rows, max_length)
    thread.start()
    name = name or folder
    host, port = listener.getsockname()[:2]
    print(f"serving {name} ({decode.mode}) at http://{host}:{port}/v1, until Ctrl-C", flush=True)
    import uvicorn

    app = Server(thread, tokenizer, name, decode, api_key or os.environ.get(API_KEY_VARIABLE, "")).app()
    with compiled_decoding(model, compile), suppress(KeyboardInterrupt):  # uvicorn raises it again
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
