"""Where the time of a lossless decoding step goes, and how often it waits for the device.

    OMP_NUM_THREADS=1 python benchmarks/decode_step.py MODEL PROMPTS.jsonl --batch-sizes 1 64 --json OUT

Milliseconds a step, on a CPU those of one thread, which other processes change little: of the forward, of the
LM head with the draft head, and of the rest (policy, packing, sampling, bookkeeping).

Waits are counted without a GPU: what the model computes is a tensor of a class that stays with all that is
computed from it, and counts what moves. `reads` are copies to the host, which wait for the device; `hidden
reads` are waits that the code does not spell out (an `if` on a tensor, `.item()`, an index by a mask);
`writes` are copies to the device, which do not wait.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from opdlm.checkpoints.load import load
from opdlm.data.prompts import load_tasks
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.draft_policy import clock
from opdlm.decoding.generate import Decoder, make_requests
from opdlm.evaluation.retention import versions
from opdlm.files import write_atomic
from opdlm.modeling.diffusion_lm import DiffusionLM

HIDDEN_READS = {
    "tolist",
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "numpy",
    "nonzero",
    "unique",
}
"""Methods that wait for the device and give the host a value, or a tensor whose size depends on values."""
WARM_UP = 3
"""Steps that are not counted."""


class OnDevice(Tensor):
    """A tensor that the device has computed, and everything computed from it."""

    counts: ClassVar[Counter[str]] = Counter()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        result = super().__torch_function__(func, types, args, kwargs or {})
        if name == "cpu":
            cls.counts["reads"] += 1
            return result.as_subclass(Tensor)
        if name in HIDDEN_READS or (name == "__getitem__" and has_mask(args[1])):
            cls.counts["hidden reads"] += 1
        return result


def has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


class CountWrites(TorchFunctionMode):
    """Counts tensors of the host that `.to(device)` moves."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        moves = getattr(func, "__name__", "") == "to" and any(isinstance(x, torch.device) for x in args)
        if moves and not isinstance(args[0], OnDevice):
            OnDevice.counts["writes"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def replaced(model: DiffusionLM, **methods: Callable[[Any], Any]) -> Iterator[None]:
    """Methods of the model, wrapped by these functions."""
    for name, wrap in methods.items():
        setattr(model, name, wrap(getattr(model, name)))
    try:
        yield
    finally:
        for name in methods:
            delattr(model, name)


def steps(model: DiffusionLM, prompts: list[tuple[int, ...]], config: DecodeConfig) -> Iterator[int]:
    """The tokens of the responses that each step of decoding all prompts together has completed."""
    longest = max(map(len, prompts)) + config.max_new_tokens
    decoder = Decoder(model, config, len(prompts), longest)
    decoder.waiting.extend(make_requests(prompts, range(len(prompts)), config))
    while decoder.is_busy:
        yield sum(rollout.num_response for rollout in decoder.step().values())


def time_steps(model: DiffusionLM, prompts: list[tuple[int, ...]], config: DecodeConfig) -> dict[str, float]:
    """Milliseconds a step, by part, and tokens a step."""
    spent: dict[str, float] = defaultdict(float)

    def timed(part: str) -> Callable[[Any], Any]:
        def wrap(method: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                started = clock(model.device)
                result = method(*args, **kwargs)
                spent[part] += clock(model.device) - started
                return result

            return call

        return wrap

    head = timed("heads")
    with replaced(model, packed_hidden=timed("forward"), logits=head, candidate_logits=head):
        number, tokens, started = 0, 0, clock(model.device)
        for number, completed in enumerate(steps(model, prompts, config), 1):
            tokens += completed
            if number == WARM_UP:
                spent.clear()
                started = clock(model.device)
        whole = clock(model.device) - started
    parts = {**spent, "rest": whole - sum(spent.values())}
    measured = {name: round(1000 * seconds / (number - WARM_UP), 3) for name, seconds in parts.items()}
    return {"tokens": round(tokens / number, 2), **measured}


def count_waits(model: DiffusionLM, prompts: list[tuple[int, ...]], config: DecodeConfig) -> dict[str, float]:
    """Reads and writes a step."""

    def wrap(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if isinstance(result, tuple):
                return result[0].as_subclass(OnDevice), *result[1:]
            return result.as_subclass(OnDevice)

        return call

    OnDevice.counts.clear()
    with replaced(model, packed_hidden=wrap, logits=wrap, candidate_logits=wrap), CountWrites():
        number = sum(1 for _ in steps(model, prompts, config))
    return {name: round(OnDevice.counts[name] / number, 2) for name in ("reads", "hidden reads", "writes")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = load(options.model)
    tasks = load_tasks(
        str(options.prompts), tokenizer, model.spec.mask_token_id, limit=max(options.batch_sizes)
    )
    rows = []
    for size in options.batch_sizes:
        prompts = [task.prompt.ids for task in tasks[:size]]
        for mode in ("ar", "lossless"):
            config = DecodeConfig(mode=mode, batch_size=size, max_new_tokens=options.max_new_tokens)
            parts = time_steps(model, prompts, config)
            rows.append({"mode": mode, "batch_size": size, **parts, **count_waits(model, prompts, config)})
            print(json.dumps(rows[-1]))
    if options.json:
        write_atomic(options.json, json.dumps({"rows": rows, "versions": versions()}, indent=1))


if __name__ == "__main__":
    main()
