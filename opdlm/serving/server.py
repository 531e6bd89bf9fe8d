"""`opdlm serve`: requests of OpenAI's protocol, answered by our own decoder, lossless mode included.

A request is checked, tokenised and split into choices in a thread of a pool, so that a long prompt keeps no
other client waiting, and decoded by one thread; its answer is written whole or as a stream. Settings that a
request leaves out are those of the server. The HTTP routes are in `app`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from ipaddress import ip_address
from threading import Event
from typing import TYPE_CHECKING

from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from opdlm.checkpoints.convert import load_decoder
from opdlm.checkpoints.load import check_decode, max_total_tokens, vocabulary_rows
from opdlm.data.chat_template import encode_prompt, token_ids, unread_keys
from opdlm.data.rows import check_text
from opdlm.data.token_bytes import TokenBytes
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import PROCESSED_MODES, grid_of
from opdlm.decoding.rollout import Rollout
from opdlm.decoding.streaming import StablePrefix, StopStrings
from opdlm.environment import free_memory
from opdlm.errors import ConfigError, require_package
from opdlm.modeling.compiled import compiled_decoding
from opdlm.seeds import seed_of
from opdlm.serving.answers import (
    AnswerFormat,
    FinishedChoice,
    ScoredToken,
    TokenChoice,
    Usage,
    Values,
    error_answer,
    sse,
)
from opdlm.serving.app import make_app
from opdlm.serving.decode_thread import DecodeThread, Job, QueueFull
from opdlm.serving.grammar import GrammarProcessor, grammar_tokenizer, matcher_of
from opdlm.serving.http_limits import timed_protocol
from opdlm.serving.metrics import Metrics, open_request_log
from opdlm.serving.pending_choice import (
    PendingChoice,
    Progress,
    Ranking,
    progress_sender,
    scored,
    thread_safe,
    without_suffix,
)
from opdlm.serving.protocol import ChatRequest, CompletionRequest, InvalidRequest, TokenizeRequest
from opdlm.serving.tool_calls import ToolFormat, tool_format_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

log = logging.getLogger(__name__)

DEFAULT_LENGTH = 4096
STOP_SECONDS = 30
"""How long requests in flight may go on after Ctrl-C or SIGTERM."""
SMALLEST_LOGPROB = -9999.0
"""Written where float32 rounds a probability to 0, as in OpenAI's API: JSON has no infinity."""
API_KEY_VARIABLE = "OPDLM_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A checked request: its choices, prompt by prompt."""

    request: ChatRequest | CompletionRequest
    choices: list[PendingChoice]
    cancelled: Event
    """Set to stop decoding; choices that are complete are not affected."""
    tool_format: ToolFormat | None
    """How tool calls are written, where the response may hold some."""
    rollouts: list[Rollout] = field(default_factory=list)
    """The responses that are complete."""
    parsed_at: float = field(default_factory=time.perf_counter)

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    def usage(self) -> Usage:
        """Token counts of the responses that are complete."""
        return Usage.of(self.rollouts, self.request.n or 1)

    def log_fields(self) -> Values:
        """What the request log tells of its decoding."""
        usage, started = self.usage(), self.choices[0].job.admitted
        return {
            "queue_seconds": round(started[0] - self.parsed_at, 4) if started else None,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "tokens_per_forward": round(usage.completion_tokens / max(1, usage.num_forwards), 3),
        }


@dataclass(frozen=True)
class Server:
    """Answers requests with one model."""

    thread: DecodeThread
    tokenizer: PreTrainedTokenizerBase
    name: str
    config: DecodeConfig
    """Settings of requests that name none."""
    api_keys: tuple[str, ...] = ()
    """Requests must carry one of these keys. Empty: none."""
    metrics: Metrics = field(default_factory=Metrics)
    request_log: logging.Logger | None = None
    """Receives a line of JSON per request."""

    def check_key(self, authorization: str) -> None:
        """Raises InvalidRequest (401) unless the header (bytes read as latin-1) carries a key."""
        scheme, _, given = authorization.partition(" ")
        is_known = [hmac.compare_digest(given.encode("latin-1"), key.encode()) for key in self.api_keys]
        if self.api_keys and not (scheme.lower() == "bearer" and any(is_known)):
            raise InvalidRequest(
                "this server wants `Authorization: Bearer KEY` with its --api-key.", status=401
            )

    def parse(
        self, request: ChatRequest | CompletionRequest, loop: asyncio.AbstractEventLoop
    ) -> ParsedRequest:
        """Prepare the jobs of a request, whose events go to the event loop. Raises InvalidRequest with key,
        value and rule.
        """
        self.check_model(request.model)
        if request.num_alternatives and self.config.mode not in ("ar", "lossless"):
            raise InvalidRequest(
                f"the most likely tokens (top_logprobs, logprobs above 0) are those of the AR model, and "
                f"this server decodes in mode {self.config.mode}: ask for the chosen tokens only."
            )
        config = request.decode_config(self.config, logprobs=request.wants_logprobs)
        stops = StopStrings(self.tokenizer, request.stop_strings, tuple(request.stop_token_ids or ()))
        n, num_prompts = request.n or 1, 1 if isinstance(request, ChatRequest) else len(request.prompts())
        if num_prompts * n > self.thread.max_waiting:
            raise InvalidRequest(
                f"{num_prompts} prompts with n ({n}) are {num_prompts * n} choices: ask for at most "
                f"{self.thread.max_waiting} in a request (--max-waiting)."
            )
        prompts = [self.chat_ids(request)] if isinstance(request, ChatRequest) else self.prompt_ids(request)
        suffix = () if isinstance(request, ChatRequest) else self.suffix_ids(request)
        config = replace(config, max_new_tokens=self.check_lengths(request, prompts, suffix))
        grammar = self.grammar(request)
        seed = random.getrandbits(62) if request.seed is None else request.seed
        cancelled, echoes = Event(), self.echoes(request, prompts)
        model = self.thread.model
        ignore_eos = bool(request.ignore_eos or suffix)  # a stop token would cut the suffix off
        gap = (model.spec.mask_token_id,) * config.max_new_tokens if suffix else ()
        spec = replace(model.spec, stop_token_ids=()) if ignore_eos else model.spec
        choices = []
        for place in range(num_prompts * n):
            ids, events = prompts[place // n], asyncio.Queue[Progress | Rollout | Exception]()
            response = range(len(ids), len(ids) + config.max_new_tokens)
            stable_prefix = StablePrefix(stops, spec, grid_of(config.mode, spec), response)
            put, alternatives, awaited = thread_safe(events.put_nowait, loop), list[Ranking](), Event()
            on_end, num = put, request.num_alternatives
            if suffix:
                on_end = without_suffix(put, len(gap), suffix)
            elif num:
                on_end = scored(put, model, num, alternatives)
            processors = self.logits_processors(request, ids, stable_prefix, config)
            if grammar is not None:  # before min_p, which counts the likely tokens among the allowed
                processor = GrammarProcessor(grammar.deep_copy(), len(ids), spec.stop_token_ids)
                processors.insert(0, processor)
                on_end = processor.checked(on_end)
            job = Job(
                ids=(*ids, *gap, *suffix),
                seed=seed_of(seed, place),
                config=config,
                find_end=stops.find_end if stops.strings or stops.token_ids else None,
                on_step=progress_sender(stable_prefix, put, awaited, include_drafts=request.wants_drafts)
                if request.stream
                else None,
                ignore_eos=ignore_eos,
                logits_processor=processors or None,
                on_end=on_end,
                cancelled=cancelled,
            )
            choices.append(
                PendingChoice(job, stable_prefix, events, alternatives, echoes[place // n], awaited)
            )
        may_call = isinstance(request, ChatRequest) and bool(request.tools) and request.tool_choice != "none"
        tool_format = self.tool_format if may_call else None
        return ParsedRequest(request=request, choices=choices, cancelled=cancelled, tool_format=tool_format)

    def logits_processors(
        self,
        request: ChatRequest | CompletionRequest,
        ids: Sequence[int],
        stable_prefix: StablePrefix,
        config: DecodeConfig,
    ) -> LogitsProcessorList:
        """What the request does to the AR model's logits. Raises InvalidRequest in modes in which it does not
        choose every token.
        """
        stops = sorted(stable_prefix.stop_token_ids)
        found = request.logits_processor(len(ids), self.num_ids, stops, config.temperature)
        if found and config.mode not in PROCESSED_MODES:
            raise InvalidRequest(
                "penalties, logit_bias, min_p and min_tokens change the AR model's logits, and this server "
                f"decodes in mode {config.mode}: `opdlm serve --mode lossless` follows them."
            )
        return found

    def grammar(self, request: ChatRequest | CompletionRequest) -> LLMatcher | None:
        """The grammar that `response_format` asks for. Raises InvalidRequest where it cannot be followed."""
        schema = request.schema_of_response
        if schema is None:
            return None
        if self.config.mode not in PROCESSED_MODES:
            raise InvalidRequest(
                "response_format: a grammar restricts what the AR model chooses, and this server decodes in "
                f"mode {self.config.mode}: `opdlm serve --mode lossless` follows it."
            )
        for key in ("ignore_eos", "min_tokens"):
            if getattr(request, key):
                raise InvalidRequest(
                    f"response_format with {key}: a stop token follows the JSON. Leave it out."
                )
        if isinstance(request, ChatRequest) and request.tools and request.tool_choice != "none":
            raise InvalidRequest("response_format with tools: a call would break the grammar. Leave one out.")
        return matcher_of(self.grammar_tokenizer, schema)

    @cached_property
    def grammar_tokenizer(self) -> LLTokenizer:
        """The tokenizer as the grammars read it."""
        return grammar_tokenizer(self.tokenizer, self.thread.model.spec.stop_token_ids)

    def check_model(self, name: str | None) -> None:
        """Raises InvalidRequest (404) for a model that is not served."""
        if name not in (None, self.name):
            raise InvalidRequest(f"model ({name}) is not served here; {self.name} is.", status=404)

    def chat_ids(self, request: ChatRequest) -> list[int]:
        """Token ids of a conversation. DataError where the chat template does not show it."""
        conversation, variables = request.conversation(), request.template_variables()
        self.check_characters("messages", sum(len(message["content"]) for message in conversation.messages))
        ids = encode_prompt(self.tokenizer, conversation, variables)
        unread = unread_keys(self.tokenizer, conversation, variables)
        if conversation.tools and "tools" in unread:
            raise InvalidRequest("tools are not shown by the model's chat template: leave them out.")
        unread_variables = sorted(unread & variables.keys())
        if unread_variables or (variables and not self.tokenizer.chat_template):
            raise InvalidRequest(
                f"chat_template_kwargs ({', '.join(unread_variables or variables)}) are not read by the "
                "model's chat template: leave them out."
            )
        return ids

    def prompt_ids(self, request: CompletionRequest) -> list[list[int]]:
        """Token ids of each prompt."""
        prompts = []
        for prompt in request.prompts():
            if isinstance(prompt, str):
                self.check_characters("prompt", len(prompt))
                prompt = token_ids(self.tokenizer, check_text("prompt", prompt))
            prompts.append(prompt)
        if not all(prompts):
            raise InvalidRequest("prompt is empty: give some text.")
        return prompts

    def suffix_ids(self, request: CompletionRequest) -> tuple[int, ...]:
        """Token ids of the text after the gap. Raises InvalidRequest where this server fills no gaps."""
        if not request.suffix:
            return ()
        if self.config.mode in ("ar", "lossless"):
            raise InvalidRequest(
                f"suffix: this server decodes in mode {self.config.mode}, which writes from left to right "
                "and fills no gap before a text; `opdlm serve --mode threshold` does."
            )
        if self.thread.model.spec.format == "preserve" and self.config.ar_accept_threshold > 0:
            raise InvalidRequest(
                f"suffix: --ar-accept-threshold {self.config.ar_accept_threshold:g} would mask it where the "
                "AR model rejects a token of the gap; `opdlm serve --ar-accept-threshold 0` fills gaps."
            )
        self.check_characters("suffix", len(request.suffix))
        text = check_text("suffix", request.suffix)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def tokenize(self, request: TokenizeRequest) -> list[int]:
        """Token ids of one prompt or conversation."""
        self.check_model(request.model)
        given = request.request()
        return self.chat_ids(given) if isinstance(given, ChatRequest) else self.prompt_ids(given)[0]

    def echoes(self, request: ChatRequest | CompletionRequest, prompts: Sequence[list[int]]) -> list[str]:
        """The text of each prompt if the answer repeats it, else empty."""
        if isinstance(request, ChatRequest) or not request.echo:
            return [""] * len(prompts)
        given = zip(request.prompts(), prompts, strict=True)
        return [text if isinstance(text, str) else str(self.tokenizer.decode(ids)) for text, ids in given]

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def check_characters(self, key: str, num_characters: int) -> None:
        """Raises InvalidRequest for a text that cannot fit, before it is tokenised."""
        largest = self.longest_token * self.thread.max_length
        if num_characters > largest:
            raise InvalidRequest(
                f"{key} of {num_characters} characters exceeds the {self.thread.max_length} tokens of a "
                "request (--max-length)."
            )

    def check_lengths(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: Sequence[Sequence[int]],
        suffix: Sequence[int],
    ) -> int:
        """The response tokens at most. Raises InvalidRequest for prompts that do not fit beside them, and for
        token ids that no prompt may have.
        """
        key, num_tokens = request.length_limit(self.config.max_new_tokens)
        model = self.thread.model
        mask_token_id = model.spec.mask_token_id
        if any(
            not 0 <= token < self.num_ids or token == mask_token_id
            for ids in (*prompts, suffix)
            for token in ids
        ):
            raise InvalidRequest(
                f"prompt has token ids beyond {self.num_ids - 1}, or the mask token: remove them."
            )
        if (request.min_tokens or 0) > num_tokens:
            raise InvalidRequest(f"min_tokens ({request.min_tokens}) exceeds {key} ({num_tokens}).")
        longest = max(len(ids) for ids in prompts) + len(suffix)
        if longest + num_tokens > self.thread.max_length:
            raise InvalidRequest(
                f"the prompt ({longest} tokens) and {key} ({num_tokens}) exceed the {self.thread.max_length} "
                "tokens of a request (--max-length)."
            )
        return num_tokens

    def submit(self, parsed: ParsedRequest) -> None:
        """Let the thread decode the choices of a request. Raises InvalidRequest where the queue is full (429)
        or the thread has ended (503).
        """
        if not self.thread.is_alive():
            raise InvalidRequest("the decoding thread has ended: start the server again.", status=503)
        try:
            self.thread.submit([choice.job for choice in parsed.choices])
        except QueueFull as full:
            raise InvalidRequest(
                f"{self.thread.num_waiting} responses wait, and {len(parsed.choices)} more exceed the "
                f"{self.thread.max_waiting} of the queue (--max-waiting): try again in {full.seconds} s.",
                status=429,
                retry_after=full.seconds,
            ) from full

    @cached_property
    def num_ids(self) -> int:
        """Token ids from here on cannot be given."""
        return min(len(self.tokenizer), vocabulary_rows(self.thread.model.student))

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        """How the family writes tool calls; None if that is not known."""
        template = self.tokenizer.get_chat_template(tools=[{}]) if self.tokenizer.chat_template else ""
        return tool_format_of(template)

    def finished(self, parsed: ParsedRequest, choice: PendingChoice, rollout: Rollout) -> FinishedChoice:
        """The text of a complete response, its tool calls, and its tokens without the stop token if they are
        asked for.
        """
        tokens = None
        if choice.job.config.logprobs:
            stops = choice.stable_prefix.stop_token_ids
            rankings = choice.alternatives or [[]] * rollout.num_response
            tokens = [
                TokenChoice(
                    self.scored_token(token, logprob, is_first=place == 0),
                    [self.scored_token(*one, is_first=place == 0) for one in ranking],
                )
                for place, (token, logprob, ranking) in enumerate(
                    zip(rollout.text_ids, rollout.logprobs, rankings, strict=True)
                )
                if token not in stops
            ]
        text = choice.echo + choice.stable_prefix.whole(rollout.text_ids)
        self.metrics.count_response(rollout)
        parsed.rollouts.append(rollout)
        text, calls = parsed.tool_format.split(text) if parsed.tool_format else (text, [])
        if isinstance(parsed.request, ChatRequest) and parsed.request.parallel_tool_calls is False:
            calls = calls[:1]
        reason = "tool_calls" if calls else rollout.finish_reason
        return FinishedChoice(text=text, finish_reason=reason, tokens=tokens, tool_calls=calls)

    def scored_token(self, token: int, logprob: float, *, is_first: bool) -> ScoredToken:
        """A token with its text and its log-probability as JSON can hold it. `is_first`: it starts a text."""
        text, found = str(self.tokenizer.decode([token])), self.token_bytes.of(token, is_first=is_first)
        return ScoredToken(token, text, found, max(logprob, SMALLEST_LOGPROB))

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of tokens."""
        return TokenBytes(self.tokenizer)

    async def answer(self, parsed: ParsedRequest) -> Values:
        """Answer when all choices of a submitted request are complete. Raises what decoding raises."""
        rollouts = [await choice.rollout() for choice in parsed.choices]
        finished = [self.finished(parsed, *pair) for pair in zip(parsed.choices, rollouts, strict=True)]
        return AnswerFormat.new(self.name, is_chat=parsed.is_chat).whole(finished, parsed.usage())

    async def stream(self, parsed: ParsedRequest) -> AsyncIterator[str]:
        """Answer a submitted request with server-sent events, the choices one after the other."""
        answer = AnswerFormat.new(self.name, is_chat=parsed.is_chat)
        for index, choice in enumerate(parsed.choices):
            num_sent, names_role, finished = 0, True, None
            while finished is None:
                choice.awaited.set()
                event, drafts = await choice.events.get(), None
                if isinstance(event, Exception):
                    yield sse(error_answer(f"decoding failed: {event}", status=500))
                    return
                if isinstance(event, Progress):
                    text, drafts = choice.echo + event.text, event.drafts
                    text = parsed.tool_format.text_before(text) if parsed.tool_format else text
                else:
                    finished = self.finished(parsed, choice, event)
                    text = finished.text
                if len(text) > num_sent or finished is not None or drafts is not None:
                    piece = answer.choice(index, text[num_sent:], finished, names_role=names_role)
                    extra = {} if drafts is None else {"drafts": drafts}
                    yield sse(answer.event([piece | extra]))
                    num_sent, names_role = max(num_sent, len(text)), False
        if parsed.request.wants_usage:
            yield sse(answer.event([], usage=parsed.usage()))
        yield "data: [DONE]\n\n"


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


def check_cache_fits(thread: DecodeThread) -> int:
    """Bytes of keys and values that the rows take. ConfigError if so many are not free."""
    needed, free = thread.cache_bytes(), free_memory(thread.model.device)
    if needed > free:
        raise ConfigError(
            f"max_rows ({thread.num_rows}) of max_length ({thread.max_length}) tokens need "
            f"{needed / 2**30:.1f} GiB for keys and values, and {free / 2**30:.1f} GiB are free: lower "
            "one of the two."
        )
    return needed


def accepted_keys(given: Sequence[str]) -> tuple[str, ...]:
    """The keys of which a request must bring one: those given, else $OPDLM_API_KEY. An empty one is none."""
    return tuple(filter(None, given)) or tuple(filter(None, [os.environ.get(API_KEY_VARIABLE)]))


def serve_folder(
    folder: str,
    *,
    host: str,
    port: int,
    name: str | None,
    api_key: Sequence[str],
    cors_origins: Sequence[str],
    max_rows: int,
    max_waiting: int,
    max_length: int | None,
    decode: DecodeConfig,
    dtype: str,
    compile: bool,
    request_log: str | None,
) -> None:
    """Serve a folder until Ctrl-C; `opdlm.serve` documents the arguments."""
    for key, value in (("max_rows", max_rows), ("max_waiting", max_waiting)):
        if value < 1:
            raise ConfigError(f"{key} ({value}) must be at least 1.")
    requests = open_request_log(request_log) if request_log else None
    keys = accepted_keys(api_key)
    for package in ("fastapi", "uvicorn"):
        require_package(package, "serve", "opdlm serve")
    model, tokenizer = load_decoder(folder, dtype)
    check_decode(decode, model.spec)
    longest = max_total_tokens(model)
    if max_length is None:
        max_length = int(min(longest, DEFAULT_LENGTH))
    if not decode.max_new_tokens < max_length <= longest:
        raise ConfigError(
            f"max_length ({max_length}) must be more than max_new_tokens ({decode.max_new_tokens}) "
            f"and at most {longest}, the model's context less two blocks of drafts."
        )
    thread = DecodeThread(model, decode, max_rows, max_length, max_waiting)
    num_bytes = check_cache_fits(thread)
    listener = listen(host, port)
    thread.start()
    server = Server(thread, tokenizer, name or folder, decode, keys, request_log=requests)
    app = make_app(server, cors_origins)
    host, port = listener.getsockname()[:2]
    if not keys and not ip_address(host).is_loopback:
        log.warning(f"{host} can be reached from other machines, and anyone may send requests: set --api-key")
    print(
        f"serving {name or folder} ({decode.mode}) at http://{host}:{port}/v1, until Ctrl-C; "
        f"http://{host}:{port} is a page to chat on; {max_rows} rows of {max_length} tokens take up to "
        f"{num_bytes / 2**20:,.0f} MiB",
        flush=True,
    )
    import uvicorn

    with compiled_decoding(model, compile), suppress(KeyboardInterrupt):  # uvicorn raises it again
        config = uvicorn.Config(
            app,
            log_level="warning",
            http=timed_protocol(),
            ws="none",
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        uvicorn.Server(config).run(sockets=[listener])
