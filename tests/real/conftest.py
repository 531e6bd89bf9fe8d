"""One conversion per pretrained checkpoint, and commands typed in its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pretrained import MODELS, QUESTIONS

SHORT = (
    "rollout.prompts_per_step=4",
    "train.rows_per_update=4",
    "rollout.decode.max_new_tokens=16",
    "eval.held_back=2",
    "eval.timed_prompts=0",
    "eval.decode.max_new_tokens=16",
)


@dataclass(frozen=True)
class Desk:
    """An empty folder, a checkpoint, and what a user types there."""

    source: Path
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """What `opdlm convert` made with default settings."""
        return self.folder / "runs" / "opdlm" / "model"

    @property
    def has_template(self) -> bool:
        return (self.source / "chat_template.jinja").is_file()

    def opdlm(
        self, *command: Any, text: str | None = None, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """The finished command; `text` is typed into it."""
        done = subprocess.run(
            [sys.executable, "-m", "opdlm", *map(str, command)],
            input=text,
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=os.environ | self.environment,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def answers(self, model: Path | str, *options: Any, prompt: str = QUESTIONS[0]) -> list[dict[str, Any]]:
        """What `opdlm generate` says in float32, in which no rounding decides."""
        common = ("--json", "--dtype", "float32", "--max-new-tokens", 16)
        done = self.opdlm("generate", model, prompt, *common, *options)
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="session", params=MODELS, ids=lambda path: path.name)
def desk(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A checkpoint converted with the defaults of the command, but for a small budget."""
    found = Desk(request.param, tmp_path_factory.mktemp(request.param.name))
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS)
    (found.folder / "prompts.jsonl").write_text(prompts)
    documents = "".join(json.dumps({"text": f"{text} The sum is given above."}) + "\n" for text in QUESTIONS)
    (found.folder / "texts.jsonl").write_text(documents)
    found.opdlm("convert", found.source, "data.path=prompts.jsonl", "train.num_steps=2", *SHORT)
    return found
