"""No command opens a connection that nobody asked for, and the wheel is a function of its sources."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENDS_AT_SOCKETS = """
import json, os, sys

def forbid(event, arguments):
    if event.startswith("socket.") and event.split(".")[1] in ("connect", "bind", "getaddrinfo", "sendto"):
        os.write(2, f"{event} {arguments[1:]}".encode())
        os._exit(77)

sys.addaudithook(forbid)
from opdlm.cli.main import main
for command in json.loads(sys.argv[1]):
    assert main(command) == 0, command
"""
RUN = (
    *("data.path=bundled:prompts.jsonl", "data.limit=8", "eval.held_back=0", "lora.r=2", "train.num_steps=1"),
    *("eval.path=bundled:eval.jsonl", "eval.limit=2", "eval.decode.max_new_tokens=4", "output_dir=run"),
    *("rollout.prompts_per_step=2", "rollout.decode.max_new_tokens=4", "train.rows_per_update=2"),
)
SHORT = ("--max-new-tokens", "4")
COMMANDS = [
    ["recipes"],
    ["convert", "tiny", *RUN],
    ["generate", "run/model", "add 1 2", *SHORT],
    ["eval", "run/model", "eval.limit=2", "eval.decode.max_new_tokens=4"],
    ["bench", "run/model", "--prompts", "prompts.jsonl", *SHORT],
    ["rollout", "run/model", "bundled:prompts.jsonl", "--limit", "2", "--out", "a.parquet", *SHORT],
    ["report", "run"],
    ["verify", "run"],
    ["env"],
]


def run_python(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def test_no_command_opens_a_connection(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE and the like are not set; other processes that a command starts are not watched."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "add 1 2"}\n')
    unset = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache")}
    done = run_python("-c", ENDS_AT_SOCKETS, json.dumps(COMMANDS), cwd=tmp_path, **unset)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_watch_for_connections_sees_one(tmp_path: Path) -> None:
    done = run_python(
        "-c", ENDS_AT_SOCKETS, '[["serve", "bundled:teacher", "--mode", "ar", "--port", "0"]]', cwd=tmp_path
    )
    assert done.returncode == 77 and done.stderr.endswith("socket.bind (('127.0.0.1', 0),)")


@pytest.mark.slow
def test_two_builds_of_the_wheel_are_equal(tmp_path: Path) -> None:
    """`build` fetches hatchling, so this needs a package index."""
    digests = []
    for name in ("first", "second"):
        build = ("-m", "build", "--wheel", "--outdir", tmp_path / name, ROOT)
        done = run_python(*build, cwd=tmp_path, SOURCE_DATE_EPOCH="1700000000")
        if "No matching distribution" in done.stdout + done.stderr:
            pytest.skip("no package index")
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = (tmp_path / name).glob("*.whl")
        digests.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
