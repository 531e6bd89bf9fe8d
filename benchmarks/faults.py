"""Do runs and files survive faults? Injects them into small conversions and prints one table.

    python benchmarks/faults.py --minutes 5            # make test-faults
    python benchmarks/faults.py --small --seed 1       # a handful, as in the everyday tests

Every command runs in a fork of one process that has imported everything, 4 steps with a checkpoint each.
`lost` counts runs that the same command does not bring to its end, `silent` those that end with other weights
or metrics, or decode another text, without a word, `traceback` those that print one. All three should be 0.
Pictures are left out, and there is no evaluation at the end. A power cut is not injected. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import opdlm.serving.text_generation  # noqa: F401  (imported before the forks)
from opdlm.cli.main import main as opdlm_main
from opdlm.distill import pipeline
from opdlm.training.metrics import read_metrics

SETTINGS = (
    *("data.path=bundled:prompts.jsonl", "data.limit=24", "eval.path=", "eval.held_back=0", "lora.r=4"),
    *("rollout.prompts_per_step=4", "rollout.decode.max_new_tokens=8", "train.rows_per_update=2"),
    *("train.micro_batch_rows=2", "train.num_steps=4", "train.save_every=1", "train.save_total_limit=4"),
    *("train.ema_decay=0.9", "train.epochs_per_rollout=1", "optimizer.warmup_steps=2"),
    "optimizer.learning_rate=0.05",
)
OF_CLOCKS = ("seconds", "per_second", "share_of_time")
WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate")
"""Audit events of Python's file operations."""
Harm = Callable[[Path, Path, random.Random], object]


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative: by a signal), standard output, and standard error."""

    code: int
    out: str
    err: str

    @property
    def is_refusal(self) -> bool:
        return self.code == 2 and self.err.startswith("opdlm: ") and self.err.count("\n") == 1


class Child:
    """An `opdlm` command in a fork. `before` runs in it first."""

    def __init__(self, folder: Path, arguments: Sequence[str], before: Callable[[], None] | None = None):
        self.files = [folder / f".out-{time.monotonic_ns()}", folder / f".err-{time.monotonic_ns()}"]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            for number, file in enumerate(self.files, 1):
                os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
            if before is not None:
                before()
            code = opdlm_main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait(self) -> Ended:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        out, err = (file.read_text() if file.is_file() else "" for file in self.files)
        for file in self.files:
            file.unlink(missing_ok=True)
        return Ended(code, out, err)


class Faults:
    """The reference run, and one method per kind of fault that yields an outcome per fault."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.number = folder, rng, 0
        self.whole, self.other = folder / "whole", folder / "other"
        for run, seed in ((self.other, 1), (self.whole, 0)):
            started = time.monotonic()
            ended = self.convert(run, seed=seed).wait()
            assert ended.code == 0, ended.err
            self.seconds = time.monotonic() - started
        self.expected = state_of(self.whole)
        self.decoded = self.decode(self.whole / "model")
        assert self.decoded.code == 0 and self.decoded.out, self.decoded.err
        assert self.decoded.out != self.decode(self.other / "model").out, self.decoded.out

    def convert(self, run: Path, before: Callable[[], None] | None = None, seed: int = 0) -> Child:
        settings = [*SETTINGS, f"train.seed={seed}", f"output_dir={run}"]
        return Child(self.folder, ["convert", "tiny", *settings], before)

    def decode(self, model: Path) -> Ended:
        """Text that depends on base, adapter, mask embedding, tokenizer and template."""
        flags = [
            "--mode",
            "static",
            "--max-new-tokens",
            "12",
            "--denoising-steps",
            "1",
            "--ar-accept-threshold",
            "0",
        ]
        return Child(self.folder, ["generate", str(model), "add 47 38", "copy abc", *flags]).wait()

    def new_run(self) -> Path:
        self.number += 1
        return self.folder / f"run-{self.number}"

    def to_the_end(self, run: Path, compare_metrics: bool = True) -> str:
        """Give the command again, undisturbed, and compare the run with the reference."""
        outcome = self.judge(self.convert(run).wait(), run, compare_metrics)
        shutil.rmtree(run, ignore_errors=True)
        return outcome

    def judge(self, ended: Ended, run: Path, compare_metrics: bool = True) -> str:
        if "Traceback" in ended.err:
            return "traceback"
        if ended.code != 0:
            return "lost"
        found, expected = state_of(run), self.expected
        if not compare_metrics:
            found, expected = found | {"metrics": ""}, expected | {"metrics": ""}
        return "same" if found == expected else "silent"

    def kills(self) -> Iterator[str]:
        """SIGKILL one to three times at random moments."""
        while True:
            run = self.new_run()
            for _ in range(self.rng.randint(1, 3)):
                child = self.convert(run)
                time.sleep(self.rng.uniform(0, self.seconds))
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
            yield self.to_the_end(run)

    def exits(self) -> Iterator[str]:
        """The process is gone at the Nth file operation in the run folder, for every N in random order."""
        run = self.new_run()
        count = self.folder / "count"
        count.write_bytes(b"")
        descriptor = os.open(count, os.O_WRONLY | os.O_APPEND)
        self.convert(run, lambda: on_write(run, lambda _: os.write(descriptor, b"."))).wait()
        total = count.stat().st_size
        shutil.rmtree(run)
        for number in self.rng.sample(range(1, total + 1), total):
            run = self.new_run()
            assert self.convert(run, partial(on_write, run, partial(exit_at, number))).wait().code == 9
            yield self.to_the_end(run)

    def checkpoints(self) -> Iterator[str]:
        """Every file of the newest checkpoint, and of the run folder, damaged in every way."""
        names = [file.relative_to(self.whole) for file in files_in(self.whole / "checkpoint-3")]
        for name, harm in self.shuffled([*names, Path("config.yaml"), Path("metrics.jsonl")]):
            run = self.new_run()
            shutil.copytree(self.whole, run, ignore=shutil.ignore_patterns("model", "checkpoint-4"))
            text = (run / "config.yaml").read_text()
            (run / "config.yaml").write_text(text.replace(str(self.whole), str(run)))
            other = run / "checkpoint-2" / name.name if len(name.parts) > 1 else self.other / name
            HARMS[harm](run / name, other, self.rng)
            ended = self.convert(run).wait()
            if ended.is_refusal and name.name == "config.yaml":  # the message names it, and it can be deleted
                (run / name).unlink()
                ended = self.convert(run).wait()
            yield self.judge(ended, run, name.name != "metrics.jsonl")
            shutil.rmtree(run)

    def results(self) -> Iterator[str]:
        """Every file of a result folder damaged in every way; swapped with that of another run."""
        model = self.whole / "model"
        for name, harm in self.shuffled([file.relative_to(model) for file in files_in(model)]):
            copy = self.new_run()
            shutil.copytree(model, copy)
            HARMS[harm](copy / name, self.other / "model" / name, self.rng)
            ended = self.decode(copy)
            if "Traceback" in ended.err:
                yield "traceback"
            elif ended.code == 0:
                yield "same" if ended.out == self.decoded.out else "silent"
            else:
                yield "refused" if ended.is_refusal else "lost"
            shutil.rmtree(copy)

    def terminations(self) -> Iterator[str]:
        """SIGTERM at random moments until the run has ended."""
        while True:
            run = self.new_run()
            for _ in range(20):
                child = self.convert(run)
                time.sleep(self.rng.uniform(0.5, 1.1) * self.seconds)
                os.kill(child.pid, signal.SIGTERM)
                ended = child.wait()
                if ended.code not in (143, -signal.SIGTERM):
                    break
            yield self.to_the_end(run) if ended.code in (0, 143, -signal.SIGTERM) else "lost"

    def doubles(self) -> Iterator[str]:
        """A second command in the folder at a random moment: one of the two refuses in one line."""
        while True:
            run = self.new_run()
            first = self.convert(run)
            time.sleep(self.rng.uniform(0, 0.7) * self.seconds)
            second = self.convert(run, seed=self.rng.randint(0, 1)).wait()
            ended = first.wait()
            if second.code == 0 and ended.is_refusal:  # the second came first, maybe with the other seed
                yield "refused"
            elif ended.code == 0 and (second.is_refusal or second.code == 0):  # 0: after the first had ended
                yield self.judge(ended, run)
            else:
                yield "traceback" if "Traceback" in ended.err + second.err else "lost"
            shutil.rmtree(run)

    def shuffled(self, names: Sequence[Path]) -> list[tuple[Path, str]]:
        pairs = [(name, harm) for name in names for harm in HARMS]
        return self.rng.sample(pairs, len(pairs))


def flip(path: Path, _: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.unlink()  # weights are linked to the source's
    path.write_bytes(content)


def cut(path: Path, _: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: rng.randrange(len(content))])


def zero(path: Path, _: Path, __: random.Random) -> None:
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(bytes(size))


def delete(path: Path, _: Path, __: random.Random) -> None:
    path.unlink()


def swap(path: Path, other: Path, _: random.Random) -> None:
    content = other.read_bytes()
    path.unlink()
    path.write_bytes(content)


HARMS: dict[str, Harm] = {"flip": flip, "cut": cut, "zero": zero, "delete": delete, "swap": swap}


def exit_at(number: int, seen: int) -> None:
    if seen == number:
        os._exit(9)


def on_write(folder: Path, act: Callable[[int], object]) -> None:
    """Call `act` with the number of each operation of this process that changes files in a folder."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in WRITES or not str(arguments[0]).startswith(str(folder)):
            return
        if event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen += 1
            act(seen)

    sys.addaudithook(hook)


def write_no_picture(_: object, path: Path) -> None:
    path.write_bytes(b"picture")


def files_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def state_of(run: Path) -> dict[str, str]:
    """Digests of everything that a run must come to: weights, the last checkpoint, metrics, no leftovers."""
    kept = [*(run / "model").rglob("*.safetensors"), *files_in(run / "checkpoint-4")]
    kept = [path for path in kept if path.name != "manifest.json"]
    found = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
    rows = [
        {key: value for key, value in row.items() if not key.endswith(OF_CLOCKS)}
        for row in read_metrics(run / "metrics.jsonl")
    ]
    hidden = sorted(path.name for path in run.iterdir() if path.name.startswith("."))
    return found | {"metrics": repr(rows), "hidden": repr(hidden)}


def table(counts: dict[str, Counter[str]]) -> str:
    bad = ("lost", "silent", "traceback")
    lines = ["| fault | faults | as undisturbed | refused in one line | runs lost | silent | tracebacks |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    counts = counts | {"together": sum(counts.values(), Counter())}
    for kind, found in counts.items():
        cells = [kind, found.total(), found["same"], found["refused"], *(found[name] for name in bad)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few faults of each kind")
    parser.add_argument("--minutes", type=float, default=5, help="for all kinds together")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pipeline.plot_metrics = write_no_picture
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), random.Random(options.seed))
        kinds = {
            "killed at a random moment (1 to 3 times)": (faults.kills, 1),
            "gone at a file operation": (faults.exits, 1),
            "file of a checkpoint or run damaged": (faults.checkpoints, 2),
            "file of a result folder damaged": (faults.results, 4),
            "SIGTERM again and again": (faults.terminations, 1),
            "two commands in one folder": (faults.doubles, 1),
        }
        counts: dict[str, Counter[str]] = {}
        for kind, (outcomes, few) in kinds.items():
            counts[kind], end = Counter(), time.monotonic() + 60 * options.minutes / len(kinds)
            for outcome in outcomes():
                counts[kind][outcome] += 1
                if time.monotonic() > end or (options.small and counts[kind].total() >= few):
                    break
    print(table(counts))
    return int(any(found[name] for found in counts.values() for name in ("lost", "silent", "traceback")))


if __name__ == "__main__":
    sys.exit(main())
