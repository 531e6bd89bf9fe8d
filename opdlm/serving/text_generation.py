"""Text in, text out: `opdlm.generate`, which `opdlm generate` and `opdlm chat` call.

Prompts become token ids (through the chat template, or with gaps to fill), are decoded together, and come
back as rollouts with their text. With a console every response is shown while it is written, one after the
other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from opdlm.checkpoints.load import check_decode, check_fits, vocabulary_rows
from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation, conversation_of
from opdlm.decoding.decode_config import DecodeConfig, Mode, check_is_read
from opdlm.decoding.generate import generate as generate_ids
from opdlm.decoding.generate import grid_of
from opdlm.decoding.rollout import Rollout
from opdlm.decoding.streaming import ResponseView, StablePrefix, StopStrings, encode_gaps
from opdlm.errors import ConfigError
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.seeds import seed_of

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A conversation: `{"role": "user", "content": "..."}` and so on; a last one of the assistant goes on."""
PromptInput: TypeAlias = str | Messages | Conversation | Sequence[int]


def generate(
    model: DiffusionLM,
    prompts: Sequence[PromptInput],
    config: DecodeConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    mode: Mode | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    denoising_steps: int | None = None,
    confidence_threshold: float | None = None,
    ar_accept_threshold: float | None = None,
    logprobs: bool | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    infill: bool = False,
    stream: Console | None = None,
) -> list[Rollout]:
    """Answer prompts, or fill the gaps in them.

    Args:
        model: what `opdlm.load` returned.
        prompts: texts (each one user's turn), conversations (lists of `{"role", "content"}`), or token ids
            (each at least one, taken as they are). Texts and conversations need `tokenizer`.
        config: every decoding setting; `DecodeConfig()` if left out.
        tokenizer: the one that `opdlm.load` returned. With it, rollouts have their `text`.
        mode: `ar`, `static`, `threshold`, `entropy`, `left_to_right` or `lossless`. This and the keywords up
            to `logprobs` replace single fields of `config`, which documents them.
        seed: prompt i draws from (seed, i), whatever stands beside it.
        stop: a response ends before the first of these strings.
        infill: prompts are templates. `<gap>` in a text stands for one block of unknown tokens, `<gap:12>`
            for 12; token ids hold the mask id where a token is unknown. Texts are not put into the chat
            template. `ar_accept_threshold` is 0 then: a rejected token would mask the text after a gap.
        stream: show each response on this console while it is written.

    Returns:
        One `Rollout` per prompt, in the order of the prompts: `text`, `text_ids` (up to and including the
        stop token), `unmask_step` (the step that revealed each token), `finish_reason`, `num_forwards`.

    Raises:
        ConfigError: a setting outside its range, one that this checkpoint cannot do, or a keyword that the
            mode does not read.
        DataError: a prompt and `max_new_tokens` exceed the model's context.

    Example:
        >>> model, tokenizer = opdlm.load("runs/tiny/model")
        >>> (rollout,) = opdlm.generate(model, ["add 47 38"], tokenizer=tokenizer, mode="lossless")
        >>> print(rollout.text, rollout.num_forwards)
    """
    changes: dict[str, Any] = {
        "mode": mode,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "denoising_steps": denoising_steps,
        "confidence_threshold": confidence_threshold,
        "ar_accept_threshold": ar_accept_threshold,
        "logprobs": logprobs,
    }
    config = with_changes(config or DecodeConfig(), changes)
    check_has_effect(config, [name for name, value in changes.items() if value is not None])
    check_decode(config, model.spec)
    has_mask = model.mask_embedding is not None or model.spec.noise_vocab_size is not None
    is_plain = not has_mask and model.spec.mask_token_id >= vocabulary_rows(model.student)
    if config.mode != "ar" and is_plain:
        raise ConfigError(
            f"`mode={config.mode}` needs a diffusion model, and this one is a plain autoregressive "
            "checkpoint: convert it with opdlm.convert, or use `mode=ar`."
        )
    if infill:
        check_infill(config, stop, ar_accept_threshold)
        config = replace(config, ar_accept_threshold=0.0)
    if not all(stop):
        raise ConfigError("`stop` is empty: give the text that ends a response.")
    if isinstance(prompts, str):
        raise ConfigError("prompts is one text: give a list of them.")
    ids = [encode(prompt, model, tokenizer, infill=infill) for prompt in prompts]
    if not ids:
        return []
    check_fits(model, ids, 0 if infill else config.max_new_tokens, "max_new_tokens")
    seeds = [seed_of(seed, place) for place in range(len(ids))]
    with filling_gaps(model, infill):
        if tokenizer is None:
            if stop or stream is not None:
                raise ConfigError("tokenizer is missing: `stop` and `stream` need the text of the response.")
            return generate_ids(model, ids, config, seeds)
        stops = StopStrings(tokenizer, tuple(stop))
        if stream is not None:
            rollouts = [
                generate_on_console(model, one, config, seed, stops, stream, infill=infill)
                for one, seed in zip(ids, seeds, strict=True)
            ]
        else:
            find_end = stops.find_end if stops.strings else None
            rollouts = generate_ids(model, ids, config, seeds, find_end=find_end)
    return [replace(rollout, text=text_of(rollout, stops, infill=infill)) for rollout in rollouts]


def with_changes(config: DecodeConfig, changes: Mapping[str, Any]) -> DecodeConfig:
    """The settings with those that are not None in their place; ConfigError where one is out of range."""
    try:
        return replace(config, **{name: value for name, value in changes.items() if value is not None})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_has_effect(config: DecodeConfig, given: Sequence[str]) -> None:
    """ConfigError for a setting that is given and that the mode does not read."""
    try:
        check_is_read(config, given)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_infill(config: DecodeConfig, stop: Sequence[str], ar_accept_threshold: float | None) -> None:
    """Raises ConfigError for what would lose the text after a gap."""
    if stop:
        raise ConfigError("`stop` ends a response, and `infill` keeps the text after a gap: choose one.")
    if config.mode in ("ar", "lossless"):
        raise ConfigError(
            f"`infill` with `mode={config.mode}`, which writes from left to right and would cut off what "
            "follows a gap: use threshold, static, entropy or left_to_right."
        )
    if ar_accept_threshold:
        raise ConfigError(
            f"`infill` with `ar_accept_threshold={ar_accept_threshold:g}`: a rejected token masks all that "
            "follows, the text after the gap too. Leave `ar_accept_threshold` out."
        )


def encode(
    prompt: PromptInput, model: DiffusionLM, tokenizer: PreTrainedTokenizerBase | None, *, infill: bool
) -> list[int]:
    """A prompt as token ids, with the mask id only where a gap is to be filled."""
    mask_token_id = model.spec.mask_token_id
    if not isinstance(prompt, str | Conversation) and all(isinstance(token, int) for token in prompt):
        ids: list[Any] = list(prompt)
        if not ids:
            raise ConfigError("PROMPT has no token: give at least one.")
        if infill:
            check_has_gap(ids, mask_token_id)
        elif mask_token_id in ids:
            raise ConfigError(
                f"PROMPT contains the mask token ({mask_token_id}), which stands for unknown text: fill it "
                "with `infill=True`, or remove it."
            )
        return ids
    if tokenizer is None:
        raise ConfigError("tokenizer is missing: prompts that are text need the one of opdlm.load.")
    if isinstance(prompt, Conversation):
        conversation = prompt
    else:
        given = (
            prompt
            if isinstance(prompt, str)
            else [dict(turn) for turn in prompt if not isinstance(turn, int)]
        )
        conversation = conversation_of("PROMPT", {"prompt": given})
    if infill and not isinstance(conversation.prompt, str):
        raise ConfigError("`infill` fills the gaps of one text, and PROMPT is a conversation: give its text.")
    if any(mask_token_id in tokenizer(message["content"])["input_ids"] for message in conversation.messages):
        raise ConfigError("PROMPT contains the mask token, which stands for unknown text: remove it.")
    if infill:
        return encode_gaps(tokenizer, conversation.last_text, mask_token_id, model.spec.block_size)
    return encode_prompt(tokenizer, conversation)


def check_has_gap(ids: Sequence[int], mask_token_id: int) -> None:
    """ConfigError for token ids that have no gap, or start with one."""
    if mask_token_id not in ids:
        raise ConfigError(
            f"PROMPT has no gap to fill: put the mask token ({mask_token_id}) where a token is unknown, or "
            "leave out `infill`."
        )
    if ids[0] == mask_token_id:
        raise ConfigError(
            "PROMPT starts with a gap, and the model needs a token to start from: put a token first."
        )


@contextmanager
def filling_gaps(model: DiffusionLM, infill: bool) -> Iterator[None]:
    """No gap is filled with a stop token, and one of the template does not cut off the text after it."""
    spec = model.spec
    if infill:
        banned = (*spec.banned_token_ids, *spec.stop_token_ids)
        model.spec = replace(spec, banned_token_ids=banned, stop_token_ids=())
    try:
        yield
    finally:
        model.spec = spec


def generate_on_console(
    model: DiffusionLM,
    ids: list[int],
    config: DecodeConfig,
    seed: int,
    stops: StopStrings,
    console: Console,
    *,
    infill: bool,
) -> Rollout:
    """Answer one prompt, or fill its gaps, shown step by step."""
    shown = range(len(ids)) if infill else range(len(ids), len(ids) + config.max_new_tokens)
    stable_prefix = StablePrefix(stops, model.spec, grid_of(config.mode, model.spec), shown)
    find_end = stops.find_end if stops.strings else None
    with ResponseView(stable_prefix, console) as view:
        (rollout,) = generate_ids(model, [ids], config, [seed], view.on_step, find_end)
        view.finish(rollout)
    return rollout


def text_of(rollout: Rollout, stops: StopStrings, *, infill: bool) -> str:
    ids = rollout.prompt_ids + rollout.text_ids if infill else rollout.text_ids
    return stops.cut(stops.text(ids))
