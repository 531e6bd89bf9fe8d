"""Does every hostile or odd input end in one sentence? Feeds them to the command line and prints one table.

    python benchmarks/fuzz.py --inputs 2400 --json docs/results/fuzz.json     # minutes; make test-fuzz
    python benchmarks/fuzz.py --inputs 60 --seed 1                            # as in the everyday tests

Everything runs in one process. `clear` counts inputs that were refused with exit code 2 and one sentence (a
request: with status 4xx and an error in OpenAI's shape), `accepted` those that worked (listed in the file),
`tracebacks` all other ends, and `hangs` those that took longer than --seconds. The last two should be 0, and
are printed with their input. With --json a command that was killed goes on. Some inputs ask for all memory,
which is therefore limited. Linux only.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported: odd names are not asked for

import argparse
import contextlib
import http.client
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tally import ROOT, Tally
from transformers import AutoTokenizer

import opdlm.serving.text_generation  # noqa: F401  (imported before the clock runs)
from opdlm.cli.main import main as opdlm_main
from opdlm.config.loader import describe_fields
from opdlm.config.recipes import bundled_recipes
from opdlm.config.sections import Config, DataSection, resolve_path
from opdlm.config.text import TextConfig, TextSection
from opdlm.data.documents import load_documents
from opdlm.data.prompts import load_prompts, load_tasks
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.errors import DataError, OpdlmError
from opdlm.serving.app import BODIES, CHAT, COMPLETION, TOKENIZE

sys.path.append(str(ROOT / "tests" / "support"))
from loopback_server import Served, serve

Input = tuple[object, Callable[[], object]]
"""What is given, and what runs it; the result is an exit code."""
MEMORY = 2 * 2**30
"""Bytes that the process may take beside those that it has at the start."""


def words(text: str) -> list[str]:
    return text.split()


SURROGATE = "\ud800"
VALUES = [
    *words(
        """
        1 0 -1 1.5 1e400 1e20 1e-320 .nan .inf -.inf 0x10 0o7 010 1_000 1:30 12:30:45 2026-13-45 on off yes
        no y true null ~ x auto = << ' " [ ] { [] {} a,b , [1,2] [2,3] [1,1] [[1,2]] [null] [[0,4],[0,4]]
        [[null,[0,1]]] a[/b] [red]x m[/x] :bug: ../x /dev/null /proc/x %s {0} <|end|>
        """
    ),
    *("bundled:", "bundled:../../x", "&a", "*a", "!x", "\0", "\x1b[31m", "é"),
    *("", " ", "{a: 1}", "{a: 1, a: 2}", "&a [*a]", "--- 1\n--- 2", "!!python/name:os.system x", "\u2028"),
    *("!!bool x", "!!int x", "!!float x", "!!timestamp x", "!!binary é", "!!null x", "!!set {a}", "!!omap x"),
    *(SURROGATE, "9" * 30, "9" * 5000, "[" * 5000, "{a: " * 5000, "a/" * 3000, "x" * 300),
]
JSON_VALUES: list[Any] = [
    *(None, True, 0, -1, 0.5, 1e308, 10**30, float("nan"), float("inf"), "", " ", "a", "\0", "\u2028", "[1"),
    *(
        SURROGATE,
        "é" * 99,
        "<|end|>",
        "[/b]",
        [],
        {},
        [None],
        [[]],
        ["a"],
        {"a": 1},
        [{}],
        [{"role": "user"}],
    ),
    *([{"role": role, "content": "hi"}] for role in ("user", "wizard", 1, SURROGATE)),
    *([{"role": "user", "content": content}] for content in ([], [{"type": "image"}], None, 5, "")),
    [{"role": "assistant", "tool_calls": [1]}],
    [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
]
GOOD_ROWS: list[dict[str, Any]] = [
    {"prompt": "add 1 2", "answer": "3"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"text": "one two three"},
]
COLUMNS = [
    *words(
        """
        prompt messages conversations instruction input output response completion text answer skill tools
        system history prompt_ids held_out options
        """
    ),
    *("\0", SURROGATE),
]
LOOPS = "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3
TEMPLATES = [
    *("", "{", "{{", "{%", "{% for %}", "{% for m in messages %}", "{{ messages[5].content }}", "{{ x.y }}"),
    *("{{ raise_exception('no') }}", "{{ raise_exception('a\nb') }}", "{{ 1 / 0 }}", "{{ 'a' * 10**11 }}"),
    *("{% include 'x' %}", "{% extends 'x' %}", "{% import 'os' as os %}", "{{ ''.__class__.__mro__ }}"),
    *("{{ cycler.__init__.__globals__ }}", "{{ lipsum.__globals__['os'] }}", "{{ messages.append(1) }}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages | nothing }}", "{{ [] | first }}"),
    *("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ '%d' % 'x' }}", "{{ 5() }}"),
    *("{{ range(10**9) | list }}", "{{ strftime_now(5) }}", "{{ messages | tojson(indent='x') }}", "\0"),
    "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "{% set x = 'ab' %}" + "{% set x = x + x %}" * 60,
    "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    *("{{ messages[0].content }}", SURROGATE, "{% break %}", "{{ " + "(" * 3000, "{{ " + "9" * 5000 + " }}"),
    *(LOOPS, "{% for m in messages %}{{ m.content }}{{ m.missing.deep }}{% endfor %}"),
]
SMALL_RUN = [
    *words(
        """
        data.path=bundled:prompts.jsonl data.limit=24 eval.path= eval.held_back=0 lora.r=4
        rollout.prompts_per_step=2 rollout.decode.max_new_tokens=4 train.rows_per_update=2
        train.micro_batch_rows=2 train.num_steps=1 train.resume_from_checkpoint=false
        """
    ),
]
HUGE = [
    *words(
        """
        lora.r lora.alpha format.block_size rollout.prompts_per_step rollout.decode.max_new_tokens
        rollout.decode.batch_size rollout.decode.top_k rollout.ramp_steps train.num_steps train.save_every
        train.epochs_per_rollout train.micro_batch_rows train.seed data.max_prompt_tokens data.limit
        optimizer.warmup_steps eval.subset states.anchors_per_row loss.top_k
        """
    ),
]
EXTREMES = [
    *words(
        """
        optimizer.betas=[2,3] optimizer.betas=[1,1] optimizer.betas=[-1,0.5] loss.top_k=1000000
        format.mask_token= format.mask_token=<|end|> data.system_prompt=x output_dir=a[/b] train.seed=-1
        optimizer.learning_rate=1e20 optimizer.learning_rate=1e-320 optimizer.max_grad_norm=1e-320
        rollout.decode.temperature=1e-320 optimizer.weight_decay=10 train.ema_decay=0.99999999999999999
        loss.jsd_beta=1e-320 masking.floor=0.9999999 lora.target_modules=* lora.target_modules=[
        """
    ),
    *(f"{key}={value}" for key in HUGE for value in (10**9, 10**24)),
]
"""Settings with which a small conversion is run."""
GOOD_REQUESTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "add 1 2"}], "max_tokens": 1},
    COMPLETION: {"prompt": "add 1 2", "max_tokens": 1},
    TOKENIZE: {"prompt": "add 1 2"},
}
REQUEST_VALUES = [
    *JSON_VALUES,
    1,
    2,
    97,
    1e-320,
    10**400,
    float("-inf"),
    [1, 10**9],
    "a" * 10**6,
    "gpt",
    True,
]
CONTENT_TYPES = ("application/json", "text/plain", "application/json; charset=x", "multipart/form-data", "")
VERBS = [
    *words(
        """
        convert train resume generate chat serve rollout eval runs report bench merge import export push
        verify study
        """
    ),
    *("recipes", "env", "x", ""),
]
FLAGS = [
    *words(
        """
        --help --list-keys --print-config --dry-run --trust-remote-code --dtype --seed --limit --out --mode
        --max-new-tokens --temperature --top-p --top-k --threshold --stop --json --stream --infill
        --prompts-file --port --host --api-key --max-rows --modes --text --metrics --tasks --batch-sizes
        --mode=ar --seed=x --top-k=0 --x -x -- -
        """
    ),
]


class Hang(BaseException):
    """An input took too long."""


def outcome(run: Callable[[], object], seconds: float) -> tuple[str, str]:
    """How an input ends, and what it said."""

    def give_up(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, give_up)
    buffers = [io.BytesIO(), io.BytesIO()]
    out = io.TextIOWrapper(buffers[0], encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(buffers[1], encoding="utf-8", errors="backslashreplace", write_through=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run()
    except SystemExit as end:
        code = end.code
    except OpdlmError as error:
        return "clear", str(error)
    except Hang:
        return "hangs", ""
    except BaseException as error:
        return "tracebacks", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    said = buffers[1].getvalue().decode()
    if code == 0:
        return "accepted", said
    is_sentence = code == 2 and "Traceback" not in said and said.split("\n")[-2].startswith("opdlm: ")
    return ("clear" if is_sentence else "tracebacks"), said


class Fuzz:
    """One method per kind of input."""

    rng: random.Random
    """Of the present input."""
    number: int

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "model"
        self.served: Iterator[Served] | None = None
        self.keys = {
            verb: [key for key, _, _ in describe_fields(tree)]
            for verb, tree in (("convert", Config), ("train", TextConfig))
        }
        self.recipes = {
            verb: [path.read_text() for path in bundled_recipes(name).values()]
            for verb, name in (("convert", ""), ("train", "train"))
        }
        self.tokenizer = AutoTokenizer.from_pretrained(resolve_path("bundled:teacher"))

    def command(self, *arguments: str) -> Input:
        return arguments, lambda: opdlm_main(arguments)

    def generate(self, model: str) -> Input:
        return self.command("generate", model, "hi", "--mode", "ar", "--max-new-tokens", "1")

    def mutated(self, text: str) -> str:
        """One piece of a text cut out, doubled, turned round, moved or replaced by something odd."""
        start, end = sorted(self.rng.randrange(len(text) + 1) for _ in range(2))
        end = min(end, start + self.rng.choice((1, 3, 80)))
        piece = text[start:end]
        choices = ("", piece * 2, piece[::-1], f"\n{piece}", f" {piece}", self.rng.choice(VALUES))
        return text[:start] + self.rng.choice(choices) + text[end:]

    def settings(self) -> Input:
        verb, target = self.rng.choice((("convert", "tiny"), ("train", "bundled:byte")))
        keys = [self.rng.choice(self.keys[verb]) for _ in range(self.rng.choice((1, 1, 2)))]
        keys = [self.mutated(key) if self.rng.random() < 0.1 else key for key in keys]
        overrides = [f"{key}={self.rng.choice(VALUES)}" for key in keys]
        return self.command(verb, target, *overrides, "--print-config")

    def recipe(self) -> Input:
        verb = self.rng.choice(("convert", "train"))
        lines = self.rng.choice(self.recipes[verb]).splitlines()
        for _ in range(self.rng.randint(1, 3)):
            at = self.rng.randrange(len(lines))
            odd = f"{lines[at].split(':')[0]}: {self.rng.choice(VALUES)}"
            changed = (odd, odd, f"  {lines[at]}", self.mutated(lines[at]), f"{lines[at]}\n{lines[at]}", "")
            lines[at] = self.rng.choice(changed)
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        if self.rng.random() < 0.1:
            data = data[: len(data) // 2] + self.rng.randbytes(3) + data[len(data) // 2 :]
        file = self.folder / "recipe.yaml"
        file.write_bytes(data)
        return data, self.command(verb, str(file), "--print-config")[1]

    def rows(self) -> Input:
        rows = [dict(self.rng.choice(GOOD_ROWS)) for _ in range(self.rng.randint(1, 2))]
        if self.rng.random() < 0.7:
            rows[-1][self.rng.choice(COLUMNS)] = self.rng.choice(JSON_VALUES)
        text = "\n".join(json.dumps(row, ensure_ascii=self.rng.random() < 0.5) for row in rows)
        if self.rng.random() < 0.3:
            text = self.mutated(text)
        file, tokenizer = self.folder / "rows.jsonl", self.tokenizer
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        readers: dict[str, Callable[[], object]] = {
            "prompts": lambda: load_prompts(DataSection(path=str(file)), tokenizer, mask_token_id=-1),
            "tasks": lambda: load_tasks(str(file), tokenizer, mask_token_id=-1),
            "documents": lambda: load_documents(TextSection(path=str(file)), tokenizer, mask_token_id=-1),
        }
        kind = self.rng.choice(list(readers))
        return (kind, text), lambda: 0 if readers[kind]() else 1

    def command_line(self) -> Input:
        """No target is a model but that of `generate`: nothing heavy is started."""
        if self.rng.random() < 0.2:
            flags = [self.rng.choice((*FLAGS, *VALUES)) for _ in range(self.rng.randint(1, 3))]
            return self.command("generate", "bundled:teacher", "hi", *flags, "--max-new-tokens", "1")
        verb = self.rng.choice(VERBS)
        pieces = [*FLAGS, *VALUES, *(f"--{key}" for key in self.keys["convert"])]
        arguments = [self.rng.choice(pieces) for _ in range(self.rng.randint(0, 5))]
        targets = ("none/such", str(self.folder), "m[/x]", SURROGATE, self.rng.choice(VALUES))
        only_shown = ["--print-config"] if verb in ("convert", "train") else []
        return self.command(verb, self.rng.choice(targets), *arguments, *only_shown)

    def copy_of_teacher(self) -> Path:
        shutil.rmtree(self.model, ignore_errors=True)
        return Path(shutil.copytree(resolve_path("bundled:teacher"), self.model))

    def template(self) -> Input:
        template = self.rng.choice(TEMPLATES)
        if self.rng.random() < 0.2:
            template = self.mutated(template)
        file = self.copy_of_teacher() / "chat_template.jinja"
        file.write_bytes(template.encode("utf-8", "surrogatepass"))
        model, out = str(self.model), str(self.folder / f"{self.rng.random()}.parquet")
        flags = ("--mode", "ar", "--limit", "1", "--max-new-tokens", "1", "--out", out)
        verb, (_, run) = self.rng.choice(
            (
                ("generate", self.generate(model)),
                ("rollout", self.command("rollout", model, "bundled:prompts.jsonl", *flags)),
                ("convert", self.command("convert", model, *SMALL_RUN, f"output_dir={self.folder / 'run'}")),
            )
        )
        return (verb, template), run

    def checkpoint(self) -> Input:
        file = self.rng.choice(sorted(self.copy_of_teacher().glob("*.json")))
        text = self.mutated(file.read_text())
        if self.rng.random() < 0.5:
            values = json.loads(file.read_text())
            values[self.rng.choice(list(values))] = self.rng.choice(JSON_VALUES)
            text = json.dumps(values)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        return (file.name, text), self.generate(str(self.model))[1]

    def training(self) -> Input:
        """Each of the extreme settings in turn."""
        settings = [f"output_dir={self.folder / 'run'}", EXTREMES[self.number % len(EXTREMES)]]
        return settings, self.command("convert", "tiny", *SMALL_RUN, *settings)[1]

    @cached_property
    def port(self) -> int:
        """That of a server in this process, with a small converted model."""
        folder = self.folder / "served"
        with contextlib.redirect_stdout(io.StringIO()):
            assert opdlm_main(["convert", "tiny", *SMALL_RUN, f"output_dir={folder}"]) == 0
        self.served = serve(folder / "model", DecodeConfig(mode="ar", max_new_tokens=1))
        return next(self.served).port

    def request(self) -> Input:
        path = self.rng.choice(list(GOOD_REQUESTS))
        body = dict(GOOD_REQUESTS[path])
        for _ in range(self.rng.randint(1, 2)):
            body[self.rng.choice([*BODIES[path].model_fields, *COLUMNS])] = self.rng.choice(REQUEST_VALUES)
        text = json.dumps(body, ensure_ascii=self.rng.random() < 0.5)
        if self.rng.random() < 0.4:
            text = self.mutated(text)
        data = text.encode("utf-8", "surrogatepass")
        if self.rng.random() < 0.1:
            data = data[: len(data) // 2] + self.rng.randbytes(3) + data[len(data) // 2 :]
        kind = self.rng.choice(CONTENT_TYPES) if self.rng.random() < 0.2 else CONTENT_TYPES[0]
        port = self.port
        return (path, kind, data), lambda: send(port, path, data, kind)


def send(port: int, path: str, data: bytes, content_type: str) -> int:
    """Post to the server; 0 for an answer, DataError for a refusal in OpenAI's shape."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", path, data, {"Content-Type": content_type})
    response = connection.getresponse()
    answer = response.read().decode()
    if 400 <= response.status < 500:
        raise DataError(json.loads(answer)["error"]["message"])
    assert response.status == 200 and "decoding failed" not in answer, f"{response.status} {answer}"
    return 0


KINDS: dict[str, tuple[Callable[[Fuzz], Input], float, str]] = {
    "settings": (Fuzz.settings, 0.23, "the value is one of the setting's type and within its bounds"),
    "recipes": (
        Fuzz.recipe,
        0.15,
        "the file is still a recipe: a comment changed, or a value that may be set",
    ),
    "rows": (Fuzz.rows, 0.18, "the columns that are read hold texts; columns that nothing reads are named"),
    "command lines": (Fuzz.command_line, 0.12, "--help, --version, or flags with values that they allow"),
    "templates": (Fuzz.template, 0.04, "the template ends and shows the message"),
    "checkpoints": (Fuzz.checkpoint, 0.03, "the entry is one that this model does not use, or may have"),
    "trainings": (Fuzz.training, 0.025, "an extreme value that can be trained with"),
    "requests": (Fuzz.request, 0.225, "the fields hold what they may, or text to continue, however odd"),
}
"""Makers of inputs, their shares, and why some of them are accepted."""
SHOWN = 200
"""Characters of an accepted input in the file."""
BAD = ("tracebacks", "hangs")
ENDS = {name: name for name in ("clear", "accepted", *BAD)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--only", choices=tuple(KINDS), default=tuple(KINDS), nargs="+", metavar="KIND")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    tally = Tally(options.only, options.seed, options.json and options.json.absolute())
    accepted = tally.measured.setdefault("accepted", {})
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        fuzz = Fuzz(Path(folder))
        for kind in options.only:
            make, share, why = KINDS[kind]
            listed = accepted.setdefault(kind, {"why": why, "inputs": []})["inputs"]
            wanted = max(1, round(share * options.inputs))
            for fuzz.number, fuzz.rng in tally.numbers(kind, wanted):
                (given, run), sys.stdin, started = make(fuzz), io.StringIO(), time.monotonic()
                end, said = outcome(run, options.seconds)
                if end in BAD:
                    text = f"{given!a:.500}\n  {said[-500:]!a}"
                    print(f"{end}: {kind}, {time.monotonic() - started:.1f} s: {text}", flush=True)
                elif end == "accepted":
                    listed.append(f"{given!a:.{SHOWN}}")
                tally.add(kind, end)
        if fuzz.served is not None:
            next(fuzz.served, None)  # ends the server
    print(tally.table(ENDS))
    return int(tally.has(*BAD))


if __name__ == "__main__":
    sys.exit(main())
