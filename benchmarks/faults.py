"""Do runs and files survive faults? Injects them into small conversions, and prints and writes one table.

    python benchmarks/faults.py --faults 1000 --json docs/results/faults.json      # make test-faults
    python benchmarks/faults.py --faults 20 --seed 1                               # as in the everyday tests

Every command runs in a fork of one process that has imported and run everything: 3 steps with a checkpoint
each. `lost` counts runs that the same command does not bring to its end, `silent` those that end with other
weights or metrics, decode another text or pass as intact, without a word, `tracebacks` those that print one
or meet an error that opdlm does not expect. All three should be 0; what was said is printed. With --json a
command that was killed goes on. Pictures are left out, there is no evaluation at the end, and the forks of
most kinds find model and data loaded. A power cut is not injected. Linux only.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tally import Tally
from transformers import AutoModelForCausalLM

import opdlm
from opdlm.cli.main import main as opdlm_main
from opdlm.config.sections import Config, resolve_path
from opdlm.distill import pipeline
from opdlm.environment import quiet_libraries
from opdlm.files import write_manifest
from opdlm.training.metrics import read_metrics

NUM_STEPS = 3
SETTINGS = (
    *("data.path=bundled:prompts.jsonl", "data.limit=24", "eval.path=", "eval.held_back=0", "lora.r=4"),
    *("rollout.prompts_per_step=2", "rollout.decode.max_new_tokens=8", "train.rows_per_update=2"),
    *("train.micro_batch_rows=2", f"train.num_steps={NUM_STEPS}", "train.save_every=1"),
    *("train.save_total_limit=4", "train.ema_decay=0.9", "train.epochs_per_rollout=1"),
    *("optimizer.warmup_steps=2", "optimizer.learning_rate=0.05"),
)
DECODE = (
    *("add 47 38", "copy abc", "--mode", "static", "--max-new-tokens", "12", "--denoising-steps", "1"),
    *("--ar-accept-threshold", "0"),
)
"""Text that depends on base, adapter, mask embedding, tokenizer and template."""
OF_CLOCKS = ("seconds", "per_second", "share_of_time")
WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate")
"""Audit events of Python's file operations."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LEAST_BYTES = 8 * 2**10
"""What a command prints fits into a file of this size."""
GIGABYTE = 10**9
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

    @property
    def is_traceback(self) -> bool:
        return self.code == 1 or "Traceback" in self.err

    def is_stop(self, number: int) -> bool:
        """Whether the signal ended it, in one sentence unless it came before `main`."""
        said = self.err.startswith("opdlm: interrupted.") and self.err.count("\n") == 1
        return (self.code == 128 + number and said) or self.code == -number


class Child:
    """An `opdlm` command in a fork. `before` runs in it first."""

    def __init__(self, folder: Path, arguments: Sequence[str], before: Callable[[], object] | None = None):
        self.files = [folder / f".out-{time.monotonic_ns()}", folder / f".err-{time.monotonic_ns()}"]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the command sets it; ignored in the background
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
    """The reference run, and a method per kind of fault: its number and random numbers -> the outcome."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole, self.other = folder / "whole", folder / "other"
        self.teacher = write_teacher(folder / "teacher")
        with redirect_stdout(io.StringIO()):  # the forks find everything imported
            assert opdlm_main(self.convert_arguments(self.other, seed=1)) == 0
            assert opdlm_main(["generate", str(self.other / "model"), *DECODE]) == 0
        load_inputs, self.loaded = pipeline.load_inputs, self.load()
        pipeline.load_inputs = lambda config: (
            self.loaded if config.train.seed == 0 and self.is_loaded else load_inputs(config)
        )
        self.is_loaded, self.num_faults = False, 1
        started = time.monotonic()
        self.said = self.convert(self.whole).wait().err
        self.seconds = time.monotonic() - started
        """Of an undisturbed run."""
        self.expected = state_of(self.whole)
        self.decoded = self.decode(self.whole / "model")
        assert self.decoded.code == 0 and self.decoded.out, self.decoded.err
        assert self.decoded.out != self.decode(self.other / "model").out, self.decoded.out

    def load(self) -> pipeline.Inputs:
        """What a conversion with seed 0 loads; the command is interrupted there."""
        loaded, load_inputs = list[pipeline.Inputs](), pipeline.load_inputs

        def stop(config: Config) -> pipeline.Inputs:
            loaded.append(load_inputs(config))
            raise KeyboardInterrupt

        with patch.object(pipeline, "load_inputs", stop), redirect_stderr(io.StringIO()):
            opdlm_main(self.convert_arguments(self.whole, seed=0))
        return loaded[0]

    def convert_arguments(self, run: Path, seed: int) -> list[str]:
        model = f"model.path={self.teacher}"
        return ["convert", "tiny", model, *SETTINGS, f"train.seed={seed}", f"output_dir={run}"]

    def convert(self, run: Path, before: Callable[[], object] | None = None, seed: int = 0) -> Child:
        return Child(self.folder, self.convert_arguments(run, seed), before)

    def decode(self, model: Path) -> Ended:
        return Child(self.folder, ["generate", str(model), *DECODE]).wait()

    def new_run(self) -> Path:
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        return self.folder / "run"

    def to_the_end(self, run: Path) -> str:
        """Give the command again, undisturbed, and compare the run with the reference."""
        return self.judge(self.convert(run).wait(), run)

    def judge(self, ended: Ended, run: Path, compare_metrics: bool = True) -> str:
        self.said = ended.err
        if ended.is_traceback:
            return "traceback"
        if ended.code != 0:
            return "lost"
        found, expected = state_of(run), self.expected
        if not compare_metrics:
            found, expected = found | {"metrics": ""}, expected | {"metrics": ""}
        return "same" if found == expected else "silent"

    def kill(self, _: int, rng: random.Random) -> str:
        """SIGKILL at random moments, one to five times in a run."""
        run, self.num_faults = self.new_run(), rng.randint(1, 5)
        for _ in range(self.num_faults):
            child = self.convert(run)
            time.sleep(rng.uniform(0, self.seconds))
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        return self.to_the_end(run)

    @cached_property
    def num_operations(self) -> int:
        """File operations of a run in its folder."""
        run, count = self.new_run(), self.folder / "count"
        count.write_bytes(b"")
        descriptor = os.open(count, os.O_WRONLY | os.O_APPEND)
        self.convert(run, lambda: on_write(run, lambda _: os.write(descriptor, b"."))).wait()
        os.close(descriptor)
        return count.stat().st_size

    def exit(self, number: int, _: random.Random) -> str:
        """The process is gone at each file operation in the run folder, in turn."""
        operation, run = number % self.num_operations + 1, self.new_run()
        ended = self.convert(run, lambda: on_write(run, partial(exit_at, operation))).wait()
        assert ended.code == 9, ended
        return self.to_the_end(run)

    def full_disk(self, number: int, rng: random.Random) -> str:
        """No space at each file operation in the run folder in turn, or no file may exceed some size."""
        run, most = self.new_run(), max(path.stat().st_size for path in files_in(self.whole / "checkpoint-3"))
        if number % 3:
            operation = (number - number // 3 - 1) % self.num_operations + 1
            ended = self.convert(run, lambda: on_write(run, partial(fail_at, operation))).wait()
        else:
            size = int(LEAST_BYTES * (most / LEAST_BYTES) ** rng.random())
            ended = self.convert(run, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))).wait()
        self.said = ended.err
        if not (ended.code == 0 or ended.is_refusal):
            return "traceback" if ended.is_traceback else "lost"
        return self.to_the_end(run)

    def checkpoint(self, number: int, rng: random.Random) -> str:
        """Every file of the newest checkpoint, and of the run folder, damaged in every way; run on."""
        newest, before = f"checkpoint-{NUM_STEPS - 1}", f"checkpoint-{NUM_STEPS - 2}"
        names = [file.relative_to(self.whole) for file in files_in(self.whole / newest)]
        name, harm = chosen([*names, Path("config.yaml"), Path("metrics.jsonl")], number)
        run, unfinished = self.new_run(), shutil.ignore_patterns("model", f"checkpoint-{NUM_STEPS}")
        shutil.copytree(self.whole, run, ignore=unfinished)
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace(str(self.whole), str(run)))
        other = run / before / name.name if len(name.parts) > 1 else self.other / name
        HARMS[harm](run / name, other, rng)
        ended = self.convert(run).wait()
        if ended.is_refusal and name.name == "config.yaml":  # the message names it, and it can be deleted
            (run / name).unlink()
            ended = self.convert(run).wait()
        return self.judge(ended, run, name.name != "metrics.jsonl")

    def result(self, number: int, rng: random.Random) -> str:
        """Every file of a result folder damaged in every way, or swapped with another run's; decode."""
        model, copy = self.whole / "model", self.new_run()
        name, harm = chosen([file.relative_to(model) for file in files_in(model)], number)
        shutil.copytree(model, copy)
        HARMS[harm](copy / name, self.other / "model" / name, rng)
        ended = self.decode(copy)
        self.said = ended.err
        if ended.is_traceback:
            return "traceback"
        if ended.code == 0:
            return "same" if ended.out == self.decoded.out else "silent"
        return "refused" if ended.is_refusal else "lost"

    def verify(self, number: int, rng: random.Random) -> str:
        """One bit of a file of a result folder or checkpoint flipped; `opdlm verify`."""
        copy = self.new_run()
        shutil.copytree(self.whole / ("model" if number % 2 else f"checkpoint-{NUM_STEPS}"), copy)
        flip(rng.choice(files_in(copy)), copy, rng)
        ended = Child(self.folder, ["verify", str(copy)]).wait()
        self.said = ended.err
        if ended.is_traceback:
            return "traceback"
        return {0: "silent", 2: "refused"}.get(ended.code, "lost")

    def stop(self, number: int, rng: random.Random) -> str:
        """SIGTERM, SIGINT or SIGUSR1 at random moments, from the start on, until the run has ended."""
        run, asked = self.new_run(), STOPS[number % len(STOPS)]
        for _ in range(20):
            child = self.convert(run)
            time.sleep(rng.uniform(0, 1.1) * self.seconds)
            os.kill(child.pid, asked)
            ended = child.wait()
            if ended.code == 0:
                return self.judge(ended, run)
            if not ended.is_stop(asked):
                self.said = ended.err
                return "traceback" if ended.is_traceback else "lost"
        return self.to_the_end(run)

    def double(self, _: int, rng: random.Random) -> str:
        """A second command in the folder at a random moment: one of the two refuses in one line."""
        run = self.new_run()
        first = self.convert(run)
        time.sleep(rng.uniform(0, 0.7) * self.seconds)
        seed = rng.randint(0, 1)
        second = self.convert(run, seed=seed).wait()
        ended = first.wait()
        self.said = ended.err + second.err
        if second.code == 0 and ended.is_refusal:  # the second came first, maybe with the other seed
            return self.judge(second, run) if seed == 0 else "refused"
        if ended.code == 0 and (second.is_refusal or second.code == 0):  # 0: after the first had ended
            return self.judge(ended, run)
        return "traceback" if ended.is_traceback or second.is_traceback else "lost"

    def verify_seconds_per_gb(self) -> float:
        """CPU time of `opdlm verify` for a folder with one large file, which is in the file cache."""
        folder, size = self.new_run(), 2**28
        folder.mkdir()
        (folder / "weights").write_bytes(bytes(size))
        write_manifest(folder)
        started = time.process_time()
        assert opdlm.verify(folder) == {folder: []}
        return round((time.process_time() - started) * GIGABYTE / size, 2)


def write_teacher(folder: Path) -> Path:
    """The first two layers of the bundled model, which take a third of its time."""
    path = resolve_path("bundled:teacher")
    shutil.copytree(path, folder)
    layers: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    AutoModelForCausalLM.from_pretrained(path, **layers).save_pretrained(folder)
    return folder


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


def fail_at(number: int, seen: int) -> None:
    if seen == number:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def chosen(names: Sequence[Path], number: int) -> tuple[Path, str]:
    """A file and a harm: all pairs in turn."""
    return names[number // len(HARMS) % len(names)], list(HARMS)[number % len(HARMS)]


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


def write_no_picture(runs: Mapping[str, Sequence[dict[str, float]]], path: Path) -> None:
    path.write_bytes(b"picture")


def files_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def state_of(run: Path) -> dict[str, str]:
    """Digests of everything that a run must come to: weights, the last checkpoint, metrics, no leftovers."""
    kept = [*(run / "model").rglob("*.safetensors"), *files_in(run / f"checkpoint-{NUM_STEPS}")]
    kept = [path for path in kept if path.name != "manifest.json"]
    found = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
    rows = [
        {key: value for key, value in row.items() if not key.endswith(OF_CLOCKS)}
        for row in read_metrics(run / "metrics.jsonl")
    ]
    hidden = sorted(path.name for path in run.iterdir() if path.name.startswith("."))
    return found | {"metrics": repr(rows), "hidden": repr(hidden)}


KINDS: dict[str, tuple[Callable[[Faults, int, random.Random], str], float]] = {
    "killed at random moments": (Faults.kill, 0.12),
    "gone at a file operation": (Faults.exit, 0.08),
    "disk full": (Faults.full_disk, 0.08),
    "file of a checkpoint or run damaged": (Faults.checkpoint, 0.16),
    "file of a result folder damaged": (Faults.result, 0.32),
    "bit flipped, opdlm verify": (Faults.verify, 0.2),
    "stopped by a signal again and again": (Faults.stop, 0.02),
    "two commands in one folder": (Faults.double, 0.02),
}
"""Kinds of faults, and their shares."""
LOADING = ("stopped by a signal again and again",)
"""Kinds whose commands load model and data themselves."""
COLUMNS = {"same": "as undisturbed", "refused": "refused in one line"}
BAD = {"lost": "lost", "silent": "silent", "traceback": "tracebacks"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(KINDS), default=tuple(KINDS), nargs="+", metavar="KIND")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quiet_libraries()
    pipeline.plot_metrics = write_no_picture
    tally = Tally(options.only, options.seed, options.json)
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder))
        tally.measured["verify_seconds_per_gb"] = faults.verify_seconds_per_gb()
        for kind in options.only:
            inject, share = KINDS[kind]
            for number, rng in tally.numbers(kind, max(1, round(share * options.faults))):
                faults.is_loaded, faults.num_faults = kind not in LOADING, 1
                outcome = inject(faults, number, rng)
                if outcome in BAD:
                    print(f"{outcome}: {kind}, number {number}: {faults.said[-2000:]}", flush=True)
                tally.add(kind, outcome, faults.num_faults)
    print(tally.table(COLUMNS | BAD))
    return int(tally.has(*BAD))


if __name__ == "__main__":
    sys.exit(main())
