"""`opdlm serve`: requests of OpenAI's protocol, answered by our own decoder, lossless mode included.

A request is checked, split into choices and decoded by one thread; its answer is written whole or as a
stream. Settings that a request leaves out are those of the server. The HTTP routes are in `app`.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from opdlm.checkpoints.convert import load_decoder
from opdlm.checkpoints.load import check_decode, max_total_tokens, vocabulary_rows
from opdlm.data.chat_template import encode_prompt, token_ids, unread_keys
from opdlm.data.rows import check_text
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import grid_of
from opdlm.decoding.rollout import Rollout
from opdlm.decoding.streaming import StablePrefix, StopStrings
from opdlm.errors import ConfigError, require_package
from opdlm.modeling.compiled import compiled_decoding
from opdlm.seeds import seed_of
from opdlm.serving.answers import AnswerFormat, FinishedChoice, Usage, Values, error_answer, sse
from opdlm.serving.app import make_app
from opdlm.serving.decode_thread import DecodeThread, Job
from opdlm.serving.protocol import ChatRequest, CompletionRequest, InvalidRequest

DEFAULT_LENGTH = 4096
MAX_CHOICES = 4096
"""Of one request, over all of its prompts."""
API_KEY_VARIABLE = "OPDLM_API_KEY"


@dataclass(frozen=True, slots=True)
class PendingChoice:
    """A choice while it is decoded. Events: the text that is final so far, then the rollout or an error."""

    job: Job
    stable_prefix: StablePrefix
    events: asyncio.Queue[str | Rollout | Exception]

    async def rollout(self) -> Rollout:
        """The response of a job that is not streamed. Raises what decoding raises."""
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        assert isinstance(event, Rollout)
        return event


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A checked request: its choices, prompt by prompt."""

    request: ChatRequest | CompletionRequest
    choices: list[PendingChoice]

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    def cancel(self) -> None:
        """Stop decoding; choices that are complete are not affected."""
        for choice in self.choices:
            choice.job.cancelled.set()


@dataclass(frozen=True, slots=True)
class Server:
    """Answers requests with one model."""

    thread: DecodeThread
    tokenizer: PreTrainedTokenizerBase
    name: str
    config: DecodeConfig
    """Settings of requests that name none."""
    api_key: str = ""
    """The key that requests must carry. Empty: none."""

    def check_key(self, authorization: str) -> None:
        """Raises InvalidRequest (401) unless the header (bytes read as latin-1) carries the key."""
        given, expected = authorization.encode("latin-1"), f"Bearer {self.api_key}".encode()
        if self.api_key and not hmac.compare_digest(given, expected):
            raise InvalidRequest(
                "this server wants `Authorization: Bearer KEY` with its --api-key.", status=401
            )

    def parse(self, request: ChatRequest | CompletionRequest) -> ParsedRequest:
        """Prepare the jobs of a request. Raises InvalidRequest with key, value and rule."""
        if request.model not in (None, self.name):
            raise InvalidRequest(f"model ({request.model}) is not served here; {self.name} is.", status=404)
        config = request.decode_config(self.config, logprobs=request.wants_logprobs)
        stops = StopStrings(self.tokenizer, request.stop_strings)
        prompts = [self.chat_ids(request)] if isinstance(request, ChatRequest) else self.prompt_ids(request)
        num_tokens, n = self.check_lengths(request, prompts), request.n or 1
        if len(prompts) * n > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n ({n}) are {len(prompts) * n} choices: ask for at most "
                f"{MAX_CHOICES} in a request."
            )
        seed = random.getrandbits(62) if request.seed is None else request.seed
        choices = [
            self.pending_choice(ids, seed_of(seed, place), num_tokens, config, stops, bool(request.stream))
            for place, ids in enumerate(ids for ids in prompts for _ in range(n))
        ]
        return ParsedRequest(request=request, choices=choices)

    def chat_ids(self, request: ChatRequest) -> list[int]:
        """Token ids of a conversation. DataError where the chat template does not show it."""
        conversation = request.conversation()
        ids = encode_prompt(self.tokenizer, conversation)
        if conversation.tools and "tools" in unread_keys(self.tokenizer, conversation):
            raise InvalidRequest("tools are not shown by the model's chat template: leave them out.")
        return ids

    def prompt_ids(self, request: CompletionRequest) -> list[list[int]]:
        """Token ids of each prompt."""
        prompts = [
            token_ids(self.tokenizer, check_text("prompt", prompt)) if isinstance(prompt, str) else prompt
            for prompt in request.prompts()
        ]
        if not all(prompts):
            raise InvalidRequest("prompt is empty: give some text.")
        return prompts

    def check_lengths(
        self, request: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]]
    ) -> int:
        """The response tokens at most. Raises InvalidRequest for prompts that do not fit beside them, and for
        token ids that no prompt may have.
        """
        key, num_tokens = request.length_limit(self.config.max_new_tokens)
        model = self.thread.model
        mask_token_id = model.spec.mask_token_id
        num_ids = min(len(self.tokenizer), vocabulary_rows(model.student))
        if any(not 0 <= token < num_ids or token == mask_token_id for ids in prompts for token in ids):
            raise InvalidRequest(
                f"prompt has token ids beyond {num_ids - 1}, or the mask token: remove them."
            )
        longest = max(len(ids) for ids in prompts)
        if longest + num_tokens > self.thread.max_length:
            raise InvalidRequest(
                f"the prompt ({longest} tokens) and {key} ({num_tokens}) exceed the {self.thread.max_length} "
                "tokens of a request (--max-length)."
            )
        return num_tokens

    def pending_choice(
        self,
        ids: Sequence[int],
        seed: int,
        num_tokens: int,
        config: DecodeConfig,
        stops: StopStrings,
        is_streamed: bool,
    ) -> PendingChoice:
        spec, response = self.thread.model.spec, range(len(ids), len(ids) + num_tokens)
        stable_prefix = StablePrefix(stops, spec, grid_of(config.mode, spec), response)
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

    def submit(self, parsed: ParsedRequest) -> None:
        """Let the thread decode the choices of a request."""
        for choice in parsed.choices:
            self.thread.arrivals.put(choice.job)

    def finished(self, choice: PendingChoice, rollout: Rollout) -> FinishedChoice:
        """The text of a complete response, and its tokens without the stop token if they are asked for."""
        tokens = None
        if choice.job.config.logprobs:
            stops = self.thread.model.spec.stop_token_ids
            ids = [token for token in rollout.text_ids if token not in stops]
            texts = [str(self.tokenizer.decode([token])) for token in ids]
            tokens = list(zip(texts, rollout.logprobs, strict=False))
        text = choice.stable_prefix.whole(rollout)
        return FinishedChoice(text=text, finish_reason=rollout.finish_reason, tokens=tokens)

    async def answer(self, parsed: ParsedRequest) -> Values:
        """Decode all choices of a request and answer when they are complete. Raises what decoding raises."""
        self.submit(parsed)
        rollouts = [await choice.rollout() for choice in parsed.choices]
        finished = [self.finished(*pair) for pair in zip(parsed.choices, rollouts, strict=True)]
        return AnswerFormat.new(self.name, is_chat=parsed.is_chat).whole(finished, Usage.of(rollouts))

    async def stream(self, parsed: ParsedRequest) -> AsyncIterator[str]:
        """Decode a request and answer with server-sent events, the choices one after the other."""
        answer, rollouts = AnswerFormat.new(self.name, is_chat=parsed.is_chat), list[Rollout]()
        try:
            self.submit(parsed)
            for index, choice in enumerate(parsed.choices):
                num_sent, finished = 0, None
                while finished is None:
                    event = await choice.events.get()
                    if isinstance(event, Exception):
                        yield sse(error_answer(f"decoding failed: {event}", status=500))
                        return
                    if isinstance(event, str):
                        text = event
                    else:
                        rollouts.append(event)
                        finished = self.finished(choice, event)
                        text = finished.text
                    if len(text) > num_sent or finished is not None:
                        new, is_first = text[num_sent:], num_sent == 0
                        yield sse(answer.event([answer.choice(index, new, finished, names_role=is_first)]))
                        num_sent = len(text)
            if parsed.request.wants_usage:
                yield sse(answer.event([], usage=Usage.of(rollouts)))
            yield "data: [DONE]\n\n"
        finally:
            parsed.cancel()


def thread_safe(call: Callable[[Any], object]) -> Callable[[Any], None]:
    """The same call for another thread; it has no effect once the event loop is closed."""
    loop = asyncio.get_running_loop()

    def call_later(value: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(call, value)

    return call_later


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections. Small packets leave at once: otherwise an answer that follows its
    headers, or an event of a stream, waits up to 40 ms for the client's acknowledgement.
    """
    if not 0 <= port < 2**16:
        raise ConfigError(f"port ({port}) must lie between 0 (any free one) and {2**16 - 1}.")
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"`host={host}` `port={port}` cannot be listened on: {error.strerror}. Choose another `port` "
            "(0: any free one)."
        ) from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


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
    for package in ("fastapi", "uvicorn"):
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
    listener = listen(host, port)
    thread = DecodeThread(model, max_rows, max_length)
    thread.start()
    key = api_key or os.environ.get(API_KEY_VARIABLE, "")
    app = make_app(Server(thread, tokenizer, name or folder, decode, key))
    host, port = listener.getsockname()[:2]
    print(f"serving {name or folder} ({decode.mode}) at http://{host}:{port}/v1, until Ctrl-C", flush=True)
    import uvicorn

    with compiled_decoding(model, compile), suppress(KeyboardInterrupt):  # uvicorn raises it again
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
