"""Every wrong input is one line that names the place and the fix, exit code 2, and no new folder."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data, write_rows

from opdlm.cli.main import main
from opdlm.decoding.rollout import NEVER
from opdlm.distill.rollout_file import RECORD

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """A good checkpoint (`model`), a converted one (`sdar/model`), good data, and room for broken copies."""

    root: Path
    made: list[str] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def output(self) -> Path:
        return self.root / "output"

    def convert(self, *overrides: str, model: Path | None = None) -> list[str]:
        """A conversion that would work, with these changes."""
        return ["convert", str(model or self.model), *good(self, model), *overrides]

    def train(self, *overrides: str, model: str | None = None) -> list[str]:
        """A training on text that would work, with these changes."""
        text = f"data.path={self.root / 'text.jsonl'}"
        target = str(self.model) if model is None else model
        return ["train", target, text, f"output_dir={self.output}", "data.sequence_length=16", *overrides]

    def broken_model(self, name: str) -> Path:
        return Path(shutil.copytree(self.model, self.root / name, dirs_exist_ok=True))

    def prompts(self, *rows: dict[str, Any]) -> str:
        return f"data.path={write_rows(self.root / 'bad.jsonl', rows)}"

    def file(self, name: str, text: str) -> Path:
        path = self.root / name
        path.write_text(text)
        return path


def good(place: Place, model: Path | None = None) -> list[str]:
    return tiny_overrides(model or place.model, place.root, place.output)[1:]


def make_place(root: Path) -> Place:
    place = Place(root)
    write_checkpoint(place.model)
    write_data(root)
    write_rows(root / "text.jsonl", [{"text": f"add {i} {i}"} for i in range(9)])
    write_rows(root / "long.jsonl", [{"prompt": "a", "response": "b" * 90}])
    write_rows(root / "few.jsonl", [{"text": "ab"}])
    write_rows(root / "pairs.jsonl", [{"prompt": f"add {i}", "response": f"{i} " * 9} for i in range(9)])
    sdar = [f"output_dir={root / 'sdar'}", "format.name=sdar", "train.num_steps=1"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(place.convert(*sdar)) == 0
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("bad"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nan_weights(place: Place) -> Path:
    folder = place.broken_model("nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def missing_weight(place: Place) -> Path:
    folder = place.broken_model("partial")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def cut_weights(place: Place) -> Path:
    folder = place.broken_model("cut")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    return folder


def pickled(place: Place) -> Path:
    folder = place.broken_model("pickled")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def without_template(place: Place) -> Path:
    folder = place.broken_model("plain")
    (folder / "chat_template.jinja").unlink()
    return folder


def small_embedding(place: Place) -> Path:
    folder = write_checkpoint(place.root / "small", vocab_size=40)
    return folder


def without_stop(place: Place) -> Path:
    folder = place.broken_model("endless")
    edit_json(folder / "config.json", eos_token_id=None)
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    return folder


def without_config(place: Place) -> Path:
    folder = place.broken_model("no_config")
    (folder / "config.json").unlink()
    return folder


def without_tokenizer(place: Place) -> Path:
    folder = place.broken_model("no_tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def broken_config(place: Place) -> Path:
    folder = place.broken_model("broken_config")
    (folder / "config.json").write_text("{")
    return folder


def deep_config(place: Place) -> Path:
    folder = place.broken_model("deep")
    (folder / "config.json").write_text("[" * 100_000)
    return folder


def with_template(place: Place, template: str) -> Path:
    folder = place.broken_model("template")
    (folder / "chat_template.jinja").write_text(template)
    return folder


def linear_attention(place: Place) -> Path:
    return write_checkpoint(place.root / "mamba", "mamba")


def other_run(place: Place) -> str:
    folder = place.root / "taken"
    (folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("train:\n  num_steps: 7\n")
    return f"output_dir={folder}"


def other_model_in_checkpoint(place: Place) -> list[str]:
    """A run whose model folder was replaced between two starts."""
    folder, output = place.root / "replaced", f"output_dir={place.root / 'resumed'}"
    write_checkpoint(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(place.convert(output, "train.save_every=1", model=folder)) == 0
    write_checkpoint(folder, hidden_size=16)
    return place.convert(output, "train.save_every=1", model=folder)


def recorded(place: Place, record: dict[str, Any] | None = None, **changes: Any) -> str:
    """`rollout.path` of a file with one good row (a random mask trains on it), but for these changes."""
    row: dict[str, Any] = {
        "prompt": "a",
        "prompt_ids": [4, 5],
        "response": "bc",
        "response_ids": [5, 6, 1],
        "unmask_step": [1, 2, 3],
        "num_response": 3,
        "finish_reason": "stop",
        "logprobs": [-1.0, -1.0, -1.0],
        "num_forwards": 3,
        "num_steps": 3,
    } | changes
    metadata = None if record is None else {RECORD: json.dumps(record)}
    columns = {name: [value] for name, value in row.items() if value is not None}
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table if row["prompt"] else table.slice(0, 0), place.root / "bad.parquet")
    return f"rollout.path={place.root / 'bad.parquet'}"


def offline(place: Place, *overrides: str, record: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    return place.convert(recorded(place, record, **changes), *(overrides or ["states.selection=random_mask"]))


def rollout(place: Place, *flags: str, model: str = "sdar/model", out: str = "new.parquet") -> list[str]:
    prompts = str(place.root / "prompts.jsonl")
    return ["rollout", str(place.root / model), prompts, "--out", str(place.root / out), *flags]


def other_rollouts(place: Place) -> list[str]:
    """The name of a file that other settings made."""
    recorded(place, {"mode": "static"})
    return rollout(place, "--max-new-tokens", "8", out="bad.parquet")


def fill(place: Place, text: str, *flags: str) -> list[str]:
    return ["generate", str(place.root / "sdar" / "model"), text, *flags]


def export(place: Place, name: str, format: str = "sdar", **changes: Any) -> list[str]:
    """`opdlm export` of a folder whose config.json says something else."""
    folder = Path(shutil.copytree(place.root / "sdar" / "model", place.root / name, dirs_exist_ok=True))
    spec = json.loads((folder / "config.json").read_text())["block_diffusion"]
    edit_json(folder / "config.json", block_diffusion=spec | {"format": format}, **changes)
    return ["export", str(folder), str(place.root / "out")]


def other_limit(place: Place) -> Path:
    """A second student whose record asks for fewer prompts."""
    folder = Path(shutil.copytree(place.root / "sdar" / "model", place.root / "other", dirs_exist_ok=True))
    record = yaml.safe_load((folder / "opdlm_config.yaml").read_text())
    record["eval"]["limit"] = 2
    (folder / "opdlm_config.yaml").write_text(yaml.safe_dump(record))
    return folder


def measured_long_ago(place: Place) -> Path:
    """A run whose numbers an earlier version wrote."""
    (place.root / "old" / "model").mkdir(parents=True, exist_ok=True)
    shutil.copy(place.root / "sdar" / "metrics.jsonl", place.root / "old")
    (place.root / "old" / "model" / "retention.json").write_text('{"settings": {}}')
    return place.root / "old"


def text_eval(place: Place, *arguments: str, row: dict[str, Any] | None = None) -> list[str]:
    """`eval --text` of the converted folder on a file of one row."""
    file = write_rows(place.root / "options.jsonl", [row or {"text": "one two"}])
    return ["eval", str(place.root / "sdar" / "model"), "--text", str(file), *arguments]


SDAR_LOSSLESS = ("format.name=sdar", "eval.modes=lossless")
DRAFTS_ONLY = ("format.noise=uniform", "loss.objective=draft")

Arguments = Callable[[Place], list[str]]
CASES: dict[str, tuple[Arguments, tuple[str, ...]]] = {
    "unknown key": (lambda p: p.convert("train.num_stepz=3"), ("train.num_stepz", "mean train.num_steps")),
    "misspelt section": (lambda p: p.convert("trian.num_steps=3"), ("trian", "Did you mean train?")),
    "key of another section": (lambda p: p.convert("train.r=3"), ("train.r", "Did you mean lora.r?")),
    "a section set to a value": (lambda p: p.convert("train=3"), ("train", "train.num_steps")),
    "wrong type": (lambda p: p.convert("train.num_steps=many"), ("train.num_steps", "'many'", "must be int")),
    "not one of the choices": (lambda p: p.convert("format.name=presrve"), ("format.name", "mean preserve?")),
    "number out of range": (
        lambda p: p.convert("train.num_steps=0"),
        ("train.num_steps (0)", "between 1 and 1000000"),
    ),
    "not a number": (lambda p: p.convert("optimizer.learning_rate=.nan"), ("learning_rate (nan)", "finite")),
    "infinite number": (
        lambda p: p.convert("optimizer.learning_rate=.inf"),
        ("learning_rate (inf)", "finite"),
    ),
    "momentum that grows": (
        lambda p: p.convert("optimizer.betas=[0.9,1]"),
        ("optimizer.betas (1)", "between 0"),
    ),
    "momentum below nothing": (
        lambda p: p.convert("optimizer.betas=[-1,0.5]"),
        ("optimizer.betas (-1)", "between 0"),
    ),
    "more likely tokens than tokens": (
        lambda p: p.convert("loss.top_k=1000000"),
        ("loss.top_k (1000000)", "vocabulary (64)", "lower it"),
    ),
    "an empty mask token": (
        lambda p: p.convert("format.mask_token="),
        ("format.mask_token ('')", "not be empty"),
    ),
    "an endless seed": (lambda p: p.convert(f"train.seed={10**24}"), ("train.seed (1000", "between -1000")),
    "an endless rank": (lambda p: p.convert(f"lora.r={10**11}"), ("lora.r (100000000000)", "between 1")),
    "endless prompts": (
        lambda p: p.convert(f"rollout.prompts_per_step={10**24}"),
        ("rollout.prompts_per_step (1000", "between 1 and 1000000"),
    ),
    "endless steps": (
        lambda p: p.convert(f"train.num_steps={10**26}"),
        ("train.num_steps (1000", "between 1 and 1000000"),
    ),
    "endless responses": (
        lambda p: p.convert(f"rollout.decode.max_new_tokens={10**24}"),
        ("rollout.decode.max_new_tokens (1000", "at most 1000000000"),
    ),
    "a learning rate without measure": (
        lambda p: p.convert("optimizer.learning_rate=1e20"),
        ("optimizer.learning_rate ('1e20')", "between 0 and 10"),
    ),
    "layers by a broken pattern": (
        lambda p: p.convert("lora.target_modules=*"),
        ("lora.target_modules", "nothing to repeat"),
    ),
    "a number of thousands of digits": (
        lambda p: p.convert("train.num_steps=" + "9" * 400),
        ("train.num_steps (9999", "must lie between"),
    ),
    "a control character": (
        lambda p: p.convert("output_dir=a\x1b[2J"),
        (r"output_dir ('a\x1b[2J')", "no text"),
    ),
    "a line feed in a key": (lambda p: p.convert("tra\nin.seed=1"), (r"unknown key tra\nin",)),
    "an undecodable folder": (lambda p: ["convert", "\udcff/m"], (r"model.path ('\udcff/m')", "no text")),
    "recipe with a section twice": (
        lambda p: [
            "convert",
            str(p.file("twice.yaml", "train:\n  seed: 1\nlora:\n  r: 4\ntrain:\n  seed: 2\n")),
        ],
        ("twice.yaml", "train stands twice, in line 1 and 5"),
    ),
    "recipe with a key twice": (
        lambda p: ["convert", str(p.file("twice.yaml", "train: {seed: 1, num_steps: 3, seed: 1}"))],
        ("twice.yaml", "seed stands twice, in line 1 and 1"),
    ),
    "recipe of two documents": (
        lambda p: ["convert", str(p.file("two.yaml", "train: {seed: 1}\n---\ntrain: {seed: 2}\n"))],
        ("two.yaml", "expected a single document", "line 2"),
    ),
    "recipe nested too deeply": (
        lambda p: ["convert", str(p.file("deep.yaml", "train: " + "[" * 3000))],
        ("deep.yaml", "nested too deeply"),
    ),
    "recipe with half a surrogate pair": (
        lambda p: ["convert", str(p.file("half.yaml", 'train: {seed: 1}\noutput_dir: "a\\ud800"\n'))],
        ("half.yaml", "line 2 has NUL or half a surrogate pair"),
    ),
    "recipe with a type that does not fit": (
        lambda p: ["convert", str(p.file("type.yaml", "train: {save_every: !!bool often}\n"))],
        ("type.yaml", "does not fit its type ('often')"),
    ),
    "recipe with a clock time for a number": (
        lambda p: ["convert", str(p.file("time.yaml", "train:\n  num_steps: 1:30\n"))],
        ("train.num_steps ('1:30')", "must be int"),
    ),
    "config.json nested too deeply": (
        lambda p: p.convert(model=deep_config(p)),
        ("deep/config.json", "not valid JSON"),
    ),
    "override without =": (lambda p: p.convert("train.num_steps"), ("train.num_steps", "section.key=value")),
    "unknown option": (lambda p: p.convert("--speed"), ("--speed", "--help")),
    "unknown verb": (lambda p: ["covert", "tiny"], ("covert", "convert", "--help")),
    "choices without answers": (
        lambda p: p.convert("eval.scoring=choice", f"eval.path={p.root}/prompts.jsonl"),
        ("eval.scoring (choice)", "`answer`", "eval.scoring=exact"),
    ),
    "code that may not run": (
        lambda p: p.convert("eval.scoring=code"),
        ("eval.scoring (code)", "eval.run_code=true"),
    ),
    "no target": (lambda p: ["convert"], ("TARGET", "opdlm convert --help")),
    "override as the target": (
        lambda p: ["convert", "train.num_steps=3"],
        ("TARGET", "looks like an override"),
    ),
    "unknown target": (lambda p: ["convert", "tinny"], ("TARGET (tinny)", "tiny")),
    "recipe missing": (
        lambda p: ["convert", str(p.root / "no.yaml")],
        ("no.yaml", "Give an existing YAML file"),
    ),
    "recipe is broken YAML": (
        lambda p: ["convert", str(p.file("broken.yaml", "train: [1\nmodel: {"))],
        ("broken.yaml", "not valid YAML", "line"),
    ),
    "recipe is no mapping": (
        lambda p: ["convert", str(p.file("list.yaml", "- train\n"))],
        ("list.yaml", "must be a mapping of sections"),
    ),
    "recipe is empty": (
        lambda p: ["convert", str(p.file("empty.yaml", ""))],
        ("empty.yaml", "must be a mapping of sections"),
    ),
    "recipe without a model": (
        lambda p: ["convert", str(p.file("bare.yaml", "train:\n  num_steps: 1\n"))],
        ("model.path", "is empty"),
    ),
    "model folder missing": (
        lambda p: p.convert(model=p.root / "nothing"),
        ("model.path", "does not exist", "Give a checkpoint folder"),
    ),
    "folder without config.json": (
        lambda p: p.convert(model=without_config(p)),
        ("no config.json", "not a Hugging Face checkpoint"),
    ),
    "broken config.json": (
        lambda p: p.convert(model=broken_config(p)),
        ("broken_config/config.json", "not valid JSON", "again"),
    ),
    "file instead of a folder": (
        lambda p: p.convert(model=p.file("weights.safetensors", "")),
        ("is a file", "Give the folder"),
    ),
    "no tokenizer": (
        lambda p: p.convert(model=without_tokenizer(p)),
        ("no tokenizer", "/no_tokenizer", "Copy"),
    ),
    "flex attention on a CPU": (
        lambda p: p.convert("model.attention=flex"),
        ("model.attention (flex)", "no backward pass on cpu", "choose flash or sdpa"),
    ),
    "unknown attention": (
        lambda p: p.convert("model.attention=eager"),
        ("model.attention", "eager", "flash"),
    ),
    "NaN weights": (lambda p: p.convert(model=nan_weights(p)), ("model.norm.weight", "NaN", "damaged")),
    "weights cut off": (lambda p: p.convert(model=cut_weights(p)), ("/cut", "damaged", "again")),
    "weight missing": (
        lambda p: p.convert(model=missing_weight(p)),
        ("layers.1.mlp.up_proj.weight", "missing"),
    ),
    "pickle instead of safetensors": (
        lambda p: p.convert(model=pickled(p)),
        ("/pickled)", "no .safetensors", "save_pretrained"),
    ),
    "tokenizer larger than the embedding": (
        lambda p: p.convert(model=small_embedding(p)),
        ("only 40 rows", "use the checkpoint's own tokenizer"),
    ),
    "no stop token": (lambda p: p.convert(model=without_stop(p)), ("no stop token", "eos_token_id", "Set")),
    "no attention to mask": (
        lambda p: p.convert(model=linear_attention(p)),
        ("mamba models cannot be converted", "recurrent layers"),
    ),
    "blocks that do not start at step 0": (
        lambda p: p.convert("format.block_growth=[[1,2]]", "format.block_size=2"),
        ("format.block_growth", "[1]", "start with 0"),
    ),
    "blocks that shrink": (
        lambda p: p.convert("format.block_growth=[[0,8],[1,4]]", "format.block_size=4"),
        ("format.block_growth", "[8, 4]", "grow"),
    ),
    "blocks that do not end as the checkpoint's": (
        lambda p: p.convert("format.block_growth=[[0,2],[1,4]]", "format.block_size=8"),
        ("format.block_growth ends with 4", "format.block_size is 8", "make them equal"),
    ),
    "a block size that is never trained": (
        lambda p: p.convert("format.block_growth=[[0,2],[2,4]]", "format.block_size=4"),
        ("format.block_growth reaches 4 at step 2", "train.num_steps is 2", "Start it earlier"),
    ),
    "more denoising steps than the first blocks have tokens": (
        lambda p: p.convert("format.block_growth=[[0,2],[1,4]]", "rollout.decode.denoising_steps=4"),
        ("rollout.decode.denoising_steps (4)", "block_size (2)"),
    ),
    "a pair that is none": (
        lambda p: p.convert("format.block_growth=[4,8]"),
        ("format.block_growth (4)", "needs 2 values"),
    ),
    "unknown selection in a schedule": (
        lambda p: p.convert("states.selection_schedule=[[0,random],[1,all]]"),
        ("states.selection_schedule ('random')", "mean random_mask?"),
    ),
    "a window of mask rates upside down": (
        lambda p: p.convert("masking.windows=[[0.5,0.4]]"),
        ("masking.windows ([[0.5, 0.4]])", "lower end <= upper end", "for example [[0.45, 0.55]]"),
    ),
    "a mask rate above 1": (
        lambda p: p.convert("masking.windows=[[0.5,1.4]]"),
        ("masking.windows ([[0.5, 1.4]])", "upper end <= 1"),
    ),
    "a window that is no pair": (
        lambda p: p.convert("masking.windows=[0.4,0.5]"),
        ("masking.windows (0.4)", "needs 2 values"),
    ),
    "an unknown word for windows": (
        lambda p: p.convert("masking.windows=automatic"),
        ("masking.windows ('automatic')", "must be one of auto"),
    ),
    "windows that mask nothing": (
        lambda p: p.convert("masking.windows=[[0,0]]"),
        ("masking.windows ([[0.0, 0.0]])", "masks nothing", "masking.always_mask"),
    ),
    "weights for other windows": (
        lambda p: p.convert("masking.window_weights=[1,2]"),
        ("masking.window_weights has 2 numbers for 1 windows", "give one for each"),
    ),
    "a window of no weight": (
        lambda p: p.convert("masking.windows=[[0,0.5],[0.5,1]]", "masking.window_weights=[1,0]"),
        ("masking.window_weights ([1.0, 0.0])", "must be positive"),
    ),
    "mask rates below 0": (
        lambda p: p.convert("masking.position_rates=[-1,1]"),
        ("masking.position_rates ([-1.0, 1.0])", "none negative", "[0.5, 1.5]"),
    ),
    "one mask rate for all positions": (
        lambda p: p.convert("masking.position_rates=[0.5]"),
        ("masking.position_rates ([0.5])", "at least two"),
    ),
    "an exact number of masks that depends on the position": (
        lambda p: p.convert("masking.sampler=exact", "masking.always_mask=[-1]"),
        ("masking.always_mask ([-1])", "masking.sampler (exact)", "use masking.sampler=bernoulli"),
    ),
    "a schedule of windows that ends elsewhere": (
        lambda p: p.convert("masking.schedule=[[0,[[0,1]]],[1,[[0.4,0.6]]]]"),
        ("masking.schedule ends with [[0.4, 0.6]]", "masking.windows is [[0.0, 1.0]]", "make them equal"),
    ),
    "a schedule with a broken window": (
        lambda p: p.convert("masking.schedule=[[0,[[0.4,0.2]]],[1,[[0,1]]]]"),
        ("masking.windows ([[0.4, 0.2]])", "lower end <= upper end"),
    ),
    "automatic windows without a text": (
        lambda p: p.convert("masking.windows=auto"),
        ("masking.windows (auto)", "only with rollout.path", "[[0.45, 0.55]]"),
    ),
    "automatic windows for too little text": (
        lambda p: offline(p, "masking.windows=auto", "states.selection=random_mask", record={"mode": "ar"}),
        ("hold no n-gram that occurs 5 times", "give more text"),
    ),
    "a decay of 1": (
        lambda p: p.convert("train.ema_decay=1"),
        ("train.ema_decay (1)", "between 0 and"),
    ),
    "noise without drafts": (
        lambda p: p.convert("format.noise=uniform"),
        ("format.noise (uniform)", "loss.objective=draft", "leave it out"),
    ),
    "causal blocks of sdar": (
        lambda p: p.convert("format.draft_attention=causal", "format.name=sdar"),
        ("format.draft_attention (causal)", "format.name=preserve"),
    ),
    "thresholds of a student of drafts": (
        lambda p: p.convert(*DRAFTS_ONLY, "eval.modes=[lossless,threshold]"),
        ("eval.modes and eval.thresholds", "format.noise=uniform cannot do", "eval.modes=[lossless]"),
    ),
    "a likelihood of drafts": (
        lambda p: p.convert(*DRAFTS_ONLY, "eval.likelihood_samples=2"),
        ("eval.likelihood_samples (2)", "masks in any order", "Leave it out"),
    ),
    "a mask without masks": (
        lambda p: p.convert(*DRAFTS_ONLY, "format.mask_init=noise"),
        ("format.mask_init (noise)", "no token is masked", "Leave it out"),
    ),
    "vLLM where it is not installed": (
        lambda p: p.convert("rollout.engine=vllm", "loss.objective=sft"),
        ("rollout.engine (vllm)", "vllm==0.32.0", "pip install 'opdlm[vllm]'"),
    ),
    "vLLM at a temperature it refuses": (
        lambda p: p.convert("rollout.engine=vllm", "loss.objective=sft", "rollout.decode.temperature=3"),
        ("rollout.decode.temperature (3.0)", "must not exceed 2", "Use rollout.engine=own"),
    ),
    "vLLM with a teacher in 4 bits": (
        lambda p: p.convert("rollout.engine=vllm", "loss.objective=sft", "model.load_in_4bit=true"),
        ("rollout.engine (vllm)", "model.load_in_4bit", "Use rollout.engine=own"),
    ),
    "asynchronous rollouts from a file": (
        lambda p: offline(p, "rollout.asynchronous=true"),
        ("rollout.asynchronous (true)", "rollout.path", "Set rollout.asynchronous=false"),
    ),
    "compiled rollouts from a file": (
        lambda p: offline(p, "rollout.compile=true"),
        ("rollout.compile (true)", "rollout.path", "set rollout.compile=false"),
    ),
    "compiled rollouts with DoRA": (
        lambda p: p.convert("rollout.compile=true", "lora.use_dora=true"),
        ("rollout.compile (true)", "lora.use_dora", "set rollout.compile=false"),
    ),
    "compiled rollouts of vLLM": (
        lambda p: p.convert("rollout.compile=true", "rollout.engine=vllm", "loss.objective=sft"),
        ("rollout.compile (true)", "rollout.engine (vllm)", "set rollout.compile=false"),
    ),
    "asynchronous rollouts of vLLM": (
        lambda p: p.convert("rollout.asynchronous=true", "rollout.engine=vllm", "loss.objective=sft"),
        ("rollout.asynchronous (true)", "rollout.engine (vllm)", "use rollout.engine=own"),
    ),
    "column that the rows do not have": (
        lambda p: p.convert("data.prompt_column=question"),
        ("prompts.jsonl:1", "no column question", "only prompt"),
    ),
    "plan of a model that is nowhere": (
        lambda p: p.convert("--dry-run", model=Path("nobody/has-this-model")),
        ("model.path (nobody/has-this-model)", "no folder with a config.json", "hf download"),
    ),
    "unknown key of a source of prompts": (
        lambda p: p.convert("data.path=[{path: a.jsonl, weigth: 3}, b.jsonl]"),
        ("unknown key data.path[0].weigth", "Did you mean data.path[0].weight?"),
    ),
    "a source of prompts without weight": (
        lambda p: p.convert("data.path=[b.jsonl, {path: a.jsonl, weight: 0}]"),
        ("data.path[1].weight (0)", "must lie between 0 and 1000000000"),
    ),
    "an endless weight": (
        lambda p: p.convert("data.path=[{path: a.jsonl, weight: .inf}]"),
        ("data.path[0].weight (inf)", "must lie between 0 and 1000000000"),
    ),
    "one source of prompts without a list": (
        lambda p: p.convert("data.path={path: a.jsonl, weight: 3}"),
        ("data.path", "a.jsonl", "must be a list of such mappings"),
    ),
    "an unquoted slice": (
        lambda p: p.convert("data.path=[{path: a, split: train[:3]}]"),
        ("data.path ([{path: a, split: train[:3]}])", "not valid YAML: quote texts with brackets"),
    ),
    "a source of prompts without a path": (
        lambda p: p.convert("data.path=[{weight: 3}]"),
        ("data.path is empty", "Give a .jsonl"),
    ),
    "no prompts given": (lambda p: p.convert("data.path="), ("data.path is empty", "Give a .jsonl")),
    "self prompts without a chat template": (
        lambda p: p.convert("data.self_prompts=4", model=without_template(p)),
        ("data.self_prompts needs a chat template", "set data.path"),
    ),
    "self prompts in a turn without an end": (
        lambda p: p.convert("data.self_prompts=4"),
        ("data.self_prompts needs", "special token", "set data.path"),
    ),
    "fewer than no self prompts": (
        lambda p: p.convert("data.self_prompts=-1"),
        ("data.self_prompts (-1)", "must lie between 0"),
    ),
    "prompts missing": (
        lambda p: p.convert("data.path=/no/such.jsonl"),
        ("/no/such.jsonl", "does not exist"),
    ),
    "broken JSON line": (
        lambda p: p.convert(
            f"data.path={p.file('line.jsonl', json.dumps({'prompt': 'a'}) + chr(10) + '{oh')}"
        ),
        ("line.jsonl:2", "not valid JSON", "Fix or remove the line"),
    ),
    "line is no object": (
        lambda p: p.convert(f"data.path={p.file('list.jsonl', '[1]')}"),
        ("list.jsonl row 0 must be a JSON object, not int",),
    ),
    "columns missing": (
        lambda p: p.convert(p.prompts({"prompt": "a"}, {"question": "b"})),
        ("bad.jsonl:2", "neither `prompt` nor `messages`", "found: question"),
    ),
    "empty prompt": (lambda p: p.convert(p.prompts({"prompt": " "})), ("bad.jsonl:1", "empty", "Remove")),
    "prompt is no text": (
        lambda p: p.convert(p.prompts({"prompt": 5})),
        ("bad.jsonl:1", "must be text, not int"),
    ),
    "messages are no list": (
        lambda p: p.convert(p.prompts({"messages": "hello"})),
        ("bad.jsonl:1: `messages` is not valid JSON", "Fix"),
    ),
    "message content is no text": (
        lambda p: p.convert(p.prompts({"messages": [{"role": "user", "content": 3}]})),
        ("bad.jsonl:1", "`messages`", "text"),
    ),
    "message without a role": (
        lambda p: p.convert(p.prompts({"messages": [{"content": "a"}]})),
        ("bad.jsonl:1", "`messages`", "`role`"),
    ),
    "prompt longer than allowed": (
        lambda p: p.convert(p.prompts({"prompt": "a" * 30}), "data.max_prompt_tokens=20"),
        ("bad.jsonl:1", "data.max_prompt_tokens (20)", "Raise the limit"),
    ),
    "prompt and response exceed the context": (
        lambda p: p.convert("rollout.decode.max_new_tokens=500"),
        ("rollout.decode.max_new_tokens (500)", "context (128)", "Lower"),
    ),
    "evaluation exceeds the context": (
        lambda p: p.convert(f"eval.path={p.root / 'eval.jsonl'}", "eval.decode.max_new_tokens=500"),
        ("eval.decode.max_new_tokens (500)", "context (128)", "Lower"),
    ),
    "prompt contains the mask token": (
        lambda p: p.convert(p.prompts({"prompt": "a <|mask|> b"}), "format.name=sdar"),
        ("bad.jsonl:1", "mask token", "format.mask_token"),
    ),
    "empty file": (
        lambda p: p.convert(f"data.path={p.file('empty.jsonl', '')}"),
        ("empty.jsonl", "no rows", "Give"),
    ),
    "unsupported suffix": (
        lambda p: p.convert("data.path=prompts.csv"),
        ("prompts.csv", ".parquet file", "convert it"),
    ),
    "broken Parquet": (
        lambda p: p.convert(f"data.path={p.file('broken.parquet', 'PAR')}"),
        ("broken.parquet", "cannot be read as Parquet"),
    ),
    "unknown dataset": (
        lambda p: p.convert("data.path=no-such-dataset"),
        ("no-such-dataset", "cannot be loaded"),
    ),
    "evaluation file missing": (
        lambda p: p.convert("eval.path=/no/e.jsonl"),
        ("/no/e.jsonl", "does not exist"),
    ),
    "more steps than tokens in a block": (
        lambda p: p.convert("rollout.decode.denoising_steps=9"),
        ("rollout.decode.denoising_steps (9)", "format.block_size (4)", "at most"),
    ),
    "lossless with sdar": (lambda p: p.convert(*SDAR_LOSSLESS), ("lossless", "sdar", "format.name=preserve")),
    "reverse KL on a top-k without tail": (
        lambda p: p.convert("loss.divergence=reverse_kl", "loss.top_k=8", "loss.tail=false"),
        ("loss.divergence (reverse_kl)", "set loss.tail=true"),
    ),
    "rollouts that no update uses": (
        lambda p: p.convert("rollout.prompts_per_step=5"),
        ("rollout.prompts_per_step (5)", "not a multiple", "train.rows_per_update (2)"),
    ),
    "preserve with blocks of one": (
        lambda p: p.convert("format.block_size=1"),
        ("format.block_size (1)", "use at least 2"),
    ),
    "lora targets that do not exist": (
        lambda p: p.convert("lora.target_modules=[nothing]"),
        ("lora.target_modules", "nothing"),
    ),
    "adapter that rewrites the teacher": (
        lambda p: p.convert("lora.init=pissa"),
        ("lora.init ('pissa')", "default, gaussian, orthogonal", "teacher"),
    ),
    "orthogonal with an odd rank": (
        lambda p: p.convert("lora.init=orthogonal", "lora.r=5"),
        ("lora.init (orthogonal)", "even lora.r (5)"),
    ),
    "adapter on the LM head": (
        lambda p: p.convert("lora.target_modules=[lm_head]"),
        ("lora.target_modules", "LM head", "Name layers"),
    ),
    "four bits without an adapter": (
        lambda p: p.convert("model.load_in_4bit=true", "lora.enabled=false"),
        ("model.load_in_4bit (true)", "set lora.enabled=true"),
    ),
    "four bits with DoRA": (
        lambda p: p.convert("model.load_in_4bit=true", "lora.use_dora=true"),
        ("lora.use_dora (true)", "model.load_in_4bit"),
    ),
    "merge of a merged checkpoint": (
        lambda p: ["merge", str(p.root / "sdar" / "model"), str(p.root / "merged")],
        ("/sdar/model", "holds no adapter"),
    ),
    "merge of a plain model": (
        lambda p: ["merge", str(p.model), str(p.root / "merged")],
        ("/model is not a folder written by opdlm", "Give the folder"),
    ),
    "output_dir is a file": (
        lambda p: p.convert(f"output_dir={p.file('file', '')}"),
        ("output_dir", "/file)", "cannot be written"),
    ),
    "output_dir cannot be made": (
        lambda p: p.convert("output_dir=/proc/opdlm"),
        ("output_dir (/proc/opdlm)", "cannot be written", "Choose"),
    ),
    "output_dir of another run": (lambda p: p.convert(other_run(p)), ("other settings (", "Choose another")),
    "checkpoint of another model": (
        other_model_in_checkpoint,
        ("different model", "choose another output_dir"),
    ),
    "generate from a plain model": (
        lambda p: ["generate", str(p.model), "hello"],
        ("/model is not a folder written by opdlm", "use --mode ar"),
    ),
    "generate from nothing": (
        lambda p: ["generate", "/no/folder", "hi"],
        ("/no/folder does not exist", "Give a checkpoint folder"),
    ),
    "generate with a setting of a run": (
        lambda p: ["generate", str(p.root / "sdar" / "model"), "hi", "decode.max_new_tokens=20"],
        ("decode.max_new_tokens=20", "--max-new-tokens 20", "--prompts-file"),
    ),
    "generate without a prompt": (lambda p: ["generate", str(p.model)], ("PROMPT", "--help")),
    "generate with the mask token": (
        lambda p: ["generate", str(p.root / "sdar" / "model"), "a <|mask|> b"],
        ("PROMPT", "mask token"),
    ),
    "generate past the context": (
        lambda p: ["generate", str(p.root / "sdar" / "model"), "a", "--max-new-tokens", "500"],
        ("--max-new-tokens (500)", "context (128)"),
    ),
    "export of preserve to vLLM with a temperature": (
        lambda p: [*export(p, "preserve", format="preserve"), "--temperature", "0.5"],
        ("preserve student", "losslessly", "each request chooses", "Leave out"),
    ),
    "export of preserve to vLLM without an adapter": (
        lambda p: export(p, "preserve", format="preserve"),
        ("preserve students without an adapter", "lora.enabled=true"),
    ),
    "export of a family that vLLM's plugin does not know": (
        lambda p: export(p, "gemma", model_type="gemma3_text"),
        ("gemma3_text students do not run in vLLM", "qwen3 and llama"),
    ),
    "export over a folder": (
        lambda p: ["export", str(p.root / "sdar" / "model"), str(p.root)],
        ("OUT (", "exists already"),
    ),
    "export with more steps than tokens": (
        lambda p: ["export", str(p.root / "sdar" / "model"), str(p.root / "out"), "--denoising-steps", "9"],
        ("--denoising-steps (9)", "block size (4)"),
    ),
    "bench lossless on sdar": (
        lambda p: ["bench", str(p.root / "sdar" / "model"), "--modes", "lossless"],
        ("--modes", "preserve"),
    ),
    "bench vLLM where it is not installed": (
        lambda p: ["bench", str(p.root / "sdar" / "model"), "--vllm", "always"],
        ("--vllm always", "vllm==0.32.0", "pip install 'opdlm[vllm]'"),
    ),
    "bench with an assistant of another family": (
        lambda p: [
            *("bench", str(p.root / "sdar" / "model"), "--prompts", str(p.root / "prompts.jsonl")),
            *("--assistant", "bundled:teacher", "--max-new-tokens", "8"),
        ],
        ("--assistant (bundled:teacher)", "another tokenizer"),
    ),
    "verify a folder that is not there": (
        lambda p: ["verify", str(p.root / "nowhere")],
        ("nowhere does not exist", "Give a run"),
    ),
    "bench without a batch": (
        lambda p: ["bench", str(p.root / "sdar" / "model"), "--batch-sizes", "0"],
        ("--batch-sizes", "at least 1"),
    ),
    "generate lossless from sdar": (
        lambda p: ["generate", str(p.root / "sdar" / "model"), "a", "--mode", "lossless"],
        ("--mode lossless", "Use static or threshold"),
    ),
    "generate by rejection without drafts": (
        lambda p: fill(p, "a", "--draft-sampling", "rejection"),
        ("--draft-sampling (rejection) has no effect with --mode threshold", "leave it out"),
    ),
    "generate by another sampling of drafts": (
        lambda p: fill(p, "a", "--draft-sampling", "noise"),
        ("--draft-sampling", "'noise'", "'shared_noise', 'rejection'"),
    ),
    "rollouts by rejection": (
        lambda p: p.convert("rollout.decode.draft_sampling=rejection"),
        ("rollout.decode.draft_sampling ('rejection')", "shared_noise"),
    ),
    "eval by rejection with nothing to draw": (
        lambda p: p.convert("eval.decode.draft_sampling=rejection"),
        ("eval.decode.draft_sampling (rejection) has no effect", "temperature above 0", "Leave it out"),
    ),
    "eval by rejection without drafts": (
        lambda p: p.convert(
            *("eval.decode.draft_sampling=rejection", "eval.decode.temperature=1", "eval.modes=[static]")
        ),
        ("eval.decode.draft_sampling (rejection) has no effect", "mode lossless", "Leave it out"),
    ),
    "eval lossless on sdar": (
        lambda p: ["eval", str(p.root / "sdar" / "model"), "eval.path=x.jsonl", "eval.modes=lossless"],
        ("lossless", "sdar"),
    ),
    "eval without a set": (
        lambda p: ["eval", str(p.root / "sdar" / "model")],
        ("eval.path is empty", "Give"),
    ),
    "eval with several seeds and nothing to draw": (
        lambda p: ["eval", str(p.root / "sdar" / "model"), "--seeds", "3"],
        ("eval.seeds (3)", "eval.decode.temperature is 0", "temperature above 0"),
    ),
    "eval with samples and no answers": (
        lambda p: [
            *("eval", str(p.root / "sdar" / "model"), "--temperature", "1"),
            *(f"eval.path={p.root / 'eval.jsonl'}", "eval.decode.max_new_tokens=10"),
        ],
        ("eval.jsonl", "without `answer`", "temperature 0"),
    ),
    "eval of a threshold above 1": (
        lambda p: ["eval", str(p.root / "sdar" / "model"), "--thresholds", "0.5", "1.5"],
        ("eval.thresholds", "1.5", "between 0 and 1"),
    ),
    "eval in an unknown mode": (
        lambda p: ["eval", str(p.root / "sdar" / "model"), "--modes", "staticc"],
        ("eval.modes ('staticc')", "mean static?"),
    ),
    "eval of text by an unknown metric": (
        lambda p: text_eval(p, "--metrics", "ar_nll,perplexity"),
        ("--metrics", "perplexity", "ar_nll, prefix_nll"),
    ),
    "eval of text by what a folder cannot have": (
        lambda p: text_eval(p, "--metrics", "pll"),
        ("--metrics pll", "sdar/model", "no later block"),
    ),
    "eval of text by masks of an autoregressive checkpoint": (
        lambda p: ["eval", str(p.model), *text_eval(p, "--metrics", "md_bound")[2:]],
        ("--metrics md_bound", "no mask token", "--prediction"),
    ),
    "eval of text with an odd number of rates": (
        lambda p: text_eval(p, "--num-rates", "5"),
        ("--num-rates (5)", "even"),
    ),
    "eval of text with a decoding mode": (
        lambda p: text_eval(p, "--modes", "static"),
        ("--modes", "--text", "leave it out"),
    ),
    "eval of text with a setting of decoding": (
        lambda p: text_eval(p, "eval.decode.max_new_tokens=3"),
        ("eval.decode.max_new_tokens=3", "only data.* keys", "data.sequence_length"),
    ),
    "eval of text that is shorter than a row": (
        lambda p: text_eval(p),
        ("--text", "fewer than one row", "shorten the rows"),
    ),
    "eval of options without options": (
        lambda p: text_eval(p, "--metrics", "options"),
        ("--metrics options", "`options`", "has none"),
    ),
    "eval of options without the right one": (
        lambda p: text_eval(p, row={"prompt": "a", "options": ["b", "c"], "answer": 2}),
        ("options.jsonl:1", "`answer` (2)", "0 to 1"),
    ),
    "eval of a single option": (
        lambda p: text_eval(p, row={"prompt": "a", "options": ["b"], "answer": 0}),
        ("options.jsonl:1", "`options`", "at least two"),
    ),
    "eval by metrics without text": (
        lambda p: ["eval", str(p.root / "sdar" / "model"), "--metrics", "ar_nll"],
        ("--metrics", "belong to --text", "give the file"),
    ),
    "eval of text with a prediction that is known": (
        lambda p: text_eval(p, "--prediction", "same_position"),
        ("--prediction", "sdar/model", "leave it out"),
    ),
    "eval without a folder": (
        lambda p: ["eval", "eval.limit=3"],
        ("DIR", "before any eval.key=value"),
    ),
    "several students and nowhere to write": (
        lambda p: ["eval", *[str(p.root / "sdar" / "model")] * 2, f"eval.path={p.root / 'eval.jsonl'}"],
        ("several DIRs", "--out FOLDER"),
    ),
    "one student twice": (
        lambda p: [
            *("eval", *[str(p.root / "sdar" / "model")] * 2, f"eval.path={p.root / 'eval.jsonl'}"),
            *("--out", str(p.root / "twice")),
        ],
        ("/sdar/model is named twice", "once"),
    ),
    "students that were measured on different prompts": (
        lambda p: [
            *("eval", str(p.root / "sdar" / "model"), str(other_limit(p)), "--out", str(p.root / "two")),
            f"eval.path={p.root / 'eval.jsonl'}",
        ],
        ("eval.limit is None for", "2 for", "give one eval.limit for all"),
    ),
    "report of a run that an earlier version measured": (
        lambda p: ["report", str(measured_long_ago(p))],
        ("/old/model/retention.json", "earlier version", "opdlm eval"),
    ),
    "report of no run": (
        lambda p: ["report", str(p.model)],
        ("/model holds no finished step", "runs/tiny"),
    ),
    "evaluation during training without a set": (
        lambda p: p.convert("eval.every=10"),
        ("eval.every (10)", "eval.path is empty", "eval.every=0"),
    ),
    "patience without measurements": (
        lambda p: p.convert("eval.patience=3"),
        ("eval.patience (3)", "eval.every is 0"),
    ),
    "the best of no measurements": (
        lambda p: p.convert("eval.load_best_model_at_end=true", "eval.held_back=0"),
        ("eval.load_best_model_at_end (true)", "set eval.every"),
    ),
    "a page drawn again every 0 seconds": (
        lambda p: ["report", str(p.model), "--watch", "0"],
        ("--watch (0)", "give 1 or more"),
    ),
    "eval with one likelihood sample": (
        lambda p: ["eval", str(p.root / "sdar" / "model"), "eval.likelihood_samples=1"],
        ("eval.likelihood_samples (1)", "at least 2"),
    ),
    "eval with a folder of tasks but no task": (
        lambda p: ["eval", str(p.root / "sdar" / "model"), "--include-path", "tasks"],
        ("--include-path", "--tasks"),
    ),
    "GSM8K scoring of another file": (
        lambda p: p.convert(f"eval.path={p.root / 'eval.jsonl'}", "eval.scoring=gsm8k"),
        ("eval.jsonl:1", "#### number", "eval.scoring=exact"),
    ),
    "eval of a training key": (
        lambda p: ["eval", str(p.root / "sdar" / "model"), "train.seed=1"],
        ("train.seed=1", "only eval.*"),
    ),
    "generate from a file that is missing": (
        lambda p: ["generate", str(p.root / "sdar" / "model"), "--prompts-file", "/no/p.jsonl"],
        ("/no/p.jsonl", "does not exist"),
    ),
    "infill without a gap": (lambda p: fill(p, "abc", "--infill"), ("PROMPT has no gap", "<gap:12>")),
    "infill that starts with a gap": (
        lambda p: fill(p, "<gap> a", "--infill"),
        ("PROMPT starts with a gap", "put text first"),
    ),
    "a gap of no tokens": (lambda p: fill(p, "a <gap:0>", "--infill"), ("gap of 0 tokens", "at least 1")),
    "infill from left to right": (
        lambda p: fill(p, "a <gap>", "--infill", "--mode", "ar"),
        ("--infill with --mode ar", "use threshold"),
    ),
    "infill with a veto": (
        lambda p: fill(p, "a <gap>", "--infill", "--ar-accept-threshold", "0.1"),
        ("--ar-accept-threshold 0.1", "Leave --ar-accept-threshold out"),
    ),
    "infill with a stop string": (
        lambda p: fill(p, "a <gap>", "--infill", "--stop", "b"),
        ("--stop", "--infill", "choose one"),
    ),
    "an empty stop string": (lambda p: fill(p, "a", "--stop", ""), ("--stop is empty", "give the text")),
    "streamed JSON": (lambda p: fill(p, "a", "--stream", "--json"), ("--stream", "--json", "choose one")),
    "no denoising step": (
        lambda p: fill(p, "a", "--denoising-steps", "0"),
        ("--denoising-steps (0)", "at least 1"),
    ),
    "rollout of a plain model by denoising": (
        lambda p: rollout(p, model="model"),
        ("--mode threshold", "use --mode ar"),
    ),
    "rollout of no model": (
        lambda p: rollout(p, "--mode", "ar", model="nothing"),
        ("/nothing does not exist", "Give a checkpoint folder"),
    ),
    "rollout to another kind of file": (
        lambda p: rollout(p, "--max-new-tokens", "8", out="new.jsonl"),
        ("--out", "new.jsonl", ".parquet"),
    ),
    "rollout to a file of other settings": (
        other_rollouts,
        ("bad.parquet holds rollouts of other settings", "choose another --out"),
    ),
    "rollout past the context": (lambda p: rollout(p), ("--max-new-tokens (256)", "context (128)")),
    "rollout of no prompts": (lambda p: rollout(p, "--limit", "0"), ("--limit (0)", "at least 1")),
    "rollout with a training key": (
        lambda p: rollout(p, "train.seed=1"),
        ("train.seed=1", "only data.* keys"),
    ),
    "rollout with a column that is missing": (
        lambda p: rollout(p, "data.prompt_column=question"),
        ("prompts.jsonl:1", "no column question"),
    ),
    "recorded rollouts missing": (
        lambda p: p.convert("rollout.path=/no/r.parquet"),
        ("rollout.path (/no/r.parquet)", "does not exist", "opdlm rollout"),
    ),
    "recorded rollouts of another format": (
        lambda p: p.convert(f"rollout.path={p.root / 'prompts.jsonl'}"),
        ("rollout.path", "prompts.jsonl) cannot be read as a file of rollouts"),
    ),
    "recorded rollouts without a column": (
        lambda p: offline(p, unmask_step=None),
        ("no column unmask_step", "opdlm rollout"),
    ),
    "recorded rollouts of the wrong type": (
        lambda p: offline(p, response_ids="abc"),
        ("rollout.path", "cannot be read as a file of rollouts"),
    ),
    "recorded rollouts, none": (lambda p: offline(p, prompt=""), ("rollout.path", "holds no rollouts")),
    "recorded rollouts that do not add up": (
        lambda p: offline(p, num_response=9),
        ("bad.parquet row 0", "different lengths"),
    ),
    "recorded rollouts with masks": (
        lambda p: offline(p, response_ids=[5, 46, 1]),
        ("row 0 contains the mask token (id 46)", "format.mask_token"),
    ),
    "recorded rollouts of another vocabulary": (
        lambda p: offline(p, response_ids=[5, 70, 1]),
        ("row 0 has the token id 70", "another model's"),
    ),
    "recorded rollouts of another tokenizer": (
        lambda p: offline(p, response="cd"),
        ("row 0", "reads as another text"),
    ),
    "recorded rollouts of another mask token": (
        lambda p: offline(p, response_ids=[5, 6, 1, 7], unmask_step=[1, 2, 3, NEVER]),
        ("row 0", "another mask token"),
    ),
    "recorded rollouts longer than the context": (
        lambda p: offline(p, prompt_ids=[5] * 130),
        ("row 0 has 133 tokens", "context (128)"),
    ),
    "recorded rollouts without a trajectory": (
        lambda p: offline(p, "states.selection=all", record={"mode": "ar"}),
        ("states.selection (all)", "mode ar", "set states.selection=random_mask"),
    ),
    "recorded rollouts of another program": (
        lambda p: offline(p, "states.selection=one_per_block"),
        ("states.selection (one_per_block)", "another program", "random_mask"),
    ),
    "recorded rollouts of another block size": (
        lambda p: offline(
            p, "states.selection=all", record={"mode": "static", "block_size": 8, "grid": "absolute"}
        ),
        ("format.block_size (4)", "(8, absolute)", "random_mask"),
    ),
    "recorded rollouts and a warm start": (
        lambda p: offline(p, "rollout.warm_start_steps=1"),
        ("rollout.warm_start_steps (1)", "set rollout.warm_start_steps=0"),
    ),
    "recorded rollouts and self prompts": (
        lambda p: offline(p, "data.self_prompts=9"),
        ("data.self_prompts (9)", "set data.self_prompts=0"),
    ),
    "unknown study": (lambda p: ["study", "paritty"], ("paritty", "parity,")),
    "study without a folder": (lambda p: ["study", "parity"], ("--out", "runs/parity")),
    "study without seeds": (
        lambda p: ["study", "parity", "--out", str(p.output), "--seeds", "0"],
        ("--seeds (0)", "at least 1"),
    ),
    "unknown key of a study": (
        lambda p: ["study", "parity", "--out", str(p.output), "grid.task=1"],
        ("grid.task", "grid.tasks"),
    ),
    "impossible parity": (
        lambda p: ["study", "parity", "--out", str(p.output), "grid.tasks=[[3,4,2]]"],
        ("grid.tasks (3, 4, 2)", "1 <= k <= n"),
    ),
    "study without curves": (
        lambda p: ["study", "crossover", "--out", str(p.output), "run.eval.every=0"],
        ("run.eval.every (0)", "at least 1"),
    ),
    "unknown recipe": (lambda p: ["recipes", "tinny"], ("tinny", "Did you mean tiny")),
}
ENDLESS = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
CASES |= {
    f"{name} with a template that {what}": (
        lambda p, make=make, template=template: make(p, with_template(p, template)),
        ("the chat template", reason),
    )
    for name, make in (
        ("convert", lambda p, model: p.convert(model=model)),
        ("generate", lambda p, model: ["generate", str(model), "a", "--mode", "ar"]),
        ("rollout", lambda p, model: rollout(p, "--mode", "ar", model=model.name)),
    )
    for what, template, reason in (
        ("never ends", ENDLESS, "EndlessError (stopped after 1,000,000 lines"),
        ("breaks off", "{% break %}", "SyntaxError"),
        ("divides by zero", "{{ 1 / 0 }}", "ZeroDivisionError"),
        ("asks for another", "{% include 'x' %}", "fails, "),
    )
}
FROM_SCRATCH = "model.from_scratch=true"
DUAL, AR, BLOCKS = (f"objective.name={name}" for name in ("dual", "autoregressive", "block_diffusion"))
NEXT = "objective.prediction=next_position"
TRAIN_CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "an unknown key": (("train.num_stepz=3",), ("mean train.num_steps", "`opdlm train --list-keys`")),
    "a key of conversion": (("rollout.decode.temperature=1",), ("unknown key rollout", "opdlm train")),
    "a section set to a value": (("format=3",), ("format is a section", "format.name")),
    "a row of one token": (("data.sequence_length=1",), ("data.sequence_length (1)", "between 2")),
    "no unique token": (("data.unique_tokens=0",), ("data.unique_tokens (0)", "between 1")),
    "endless epochs": (("data.epochs=.inf",), ("data.epochs (inf)", "finite")),
    "no mask rates": (("eval.num_rates=0",), ("eval.num_rates (0)", "between 1")),
    "a share above 1": (
        (DUAL, "objective.ar_share=1.5"),
        ("objective.ar_share (1.5)", "between 0 and 1"),
    ),
    "an unknown share": ((DUAL, "objective.ar_share=most"), ("objective.ar_share", "most", "float")),
    "no weight": ((DUAL, "objective.ar_weight=0"), ("objective.ar_weight (0)", "greater than 0")),
    "everything dropped": (("objective.dropout=1",), ("objective.dropout (1)", "between 0 and 0.99")),
    "a distillation above 1": (
        ("objective.distill_weight=2",),
        ("objective.distill_weight (2)", "between"),
    ),
    "a shared range": (("optimizer.weight_decay=11",), ("optimizer.weight_decay (11)", "between")),
    "a warm-up of less than nothing": (("optimizer.warmup_steps=-1",), ("optimizer.warmup_steps (-1)",)),
    "a shared positive number": (("lora.alpha=0",), ("lora.alpha (0)", "between 1")),
    "a decay of 1": (("train.ema_decay=1",), ("train.ema_decay (1)", "between")),
    "masks upside down": (("masking.windows=[[0.5,0.4]]",), ("masking.windows", "lower end <= upper end")),
    "masks without masks": ((AR, "masking.floor=0.1"), ("masking has no effect", "objective.input_masking")),
    "an adapter on nothing": (
        (FROM_SCRATCH, "lora.enabled=true"),
        ("model.from_scratch", "lora.enabled=false"),
    ),
    "4 bits without an adapter": (
        ("model.load_in_4bit=true",),
        ("model.load_in_4bit (true)", "lora.enabled=true"),
    ),
    "an unknown start of an adapter": (("lora.enabled=true", "lora.init=pissa"), ("lora.init ('pissa')",)),
    "noise": (("format.noise=uniform",), ("format.noise (uniform)", "leave them out")),
    "drafts": (("format.name=preserve",), ("format.name (preserve)", "opdlm convert")),
    "blocks that grow": (
        ("format.block_growth=[[0,2],[1,4]]",),
        ("format.block_growth", "has no effect", "Leave it out"),
    ),
    "another shape of given weights": (
        ("model.shape.hidden_size=8",),
        ("model.shape", "hidden_size", "model.from_scratch=true"),
    ),
    "a shape that is none": (
        (FROM_SCRATCH, "model.shape.width=8"),
        ("model.shape.width", "Correct its name"),
    ),
    "a shape that makes no model": (
        (FROM_SCRATCH, "model.shape.head_dim=0"),
        ("model.shape", "makes no model"),
    ),
    "a random order of documents": (
        (AR, "objective.token_order=random"),
        ("objective.token_order (random)", "data.document_mask=false", "data.packing=chunks"),
    ),
    "a teacher of scrambled text": (
        (AR, "objective.token_order=random", "data.document_mask=false", "objective.distill_weight=0.5"),
        ("objective.distill_weight (0.5)", "objective.token_order (random)"),
    ),
    "random weights as their own teacher": (
        (FROM_SCRATCH, "objective.distill_weight=0.5"),
        ("objective.distill_weight (0.5)", "set objective.teacher"),
    ),
    "a teacher that is not asked": (("objective.teacher=x",), ("objective.teacher (x)", "set a weight")),
    "a teacher beside an adapter": (
        ("objective.teacher=x", "objective.distill_weight=0.5", "lora.enabled=true"),
        ("objective.teacher (x)", "Leave objective.teacher out"),
    ),
    "a teacher of another vocabulary": (
        ("objective.teacher=bundled:teacher", "objective.distill_weight=0.5"),
        ("objective.teacher (bundled:teacher)", "must share a tokenizer"),
    ),
    "blocks longer than rows": (
        (BLOCKS, "format.block_size=32"),
        ("data.sequence_length (16)", "format.block_size (32)", "use longer rows"),
    ),
    "blocks past the context": (
        (BLOCKS, "data.sequence_length=126"),
        ("data.sequence_length (126)", "context (128) less a block (4)"),
    ),
    "rows past the context": (("data.sequence_length=129",), ("data.sequence_length (129)", "context (128)")),
    "blocks of a row as one text": (
        (BLOCKS, "data.document_mask=false", "data.path={root}/pairs.jsonl"),
        ("data.document_mask (false)", "set data.document_mask=true"),
    ),
    "blocks that predict the next token": ((BLOCKS, NEXT), ("objective.prediction", "use same_position")),
    "what autoregression always does": ((AR, NEXT), ("objective.prediction", "leave it out")),
    "both sides of the last token": (
        (NEXT, "objective.complementary=true"),
        ("objective.complementary (true)", "use same_position"),
    ),
    "complementary causal rows": (
        (AR, "objective.complementary=true"),
        ("objective.complementary (True)", "block_diffusion or masked_diffusion"),
    ),
    "a share of one objective": (("objective.ar_share=0.1",), ("objective.ar_share (0.1)", "or use dual")),
    "a weight of one objective": (("objective.ar_weight=2",), ("objective.ar_weight (2.0)", "or use dual")),
    "masked inputs of masked rows": (
        ("objective.input_masking=[0.1,0.2]",),
        ("objective.input_masking", "or use autoregressive"),
    ),
    "a random order of masked rows": (
        ("objective.token_order=random",),
        ("objective.token_order (random)", "or use autoregressive"),
    ),
    "inputs masked upside down": (
        (AR, "objective.input_masking=[0.2,0.1]"),
        ("objective.input_masking ((0.2, 0.1))", "lower end < upper end"),
    ),
    "a length given twice": (
        ("data.epochs=2", "train.num_steps=3"),
        ("data.epochs (2.0)", "train.num_steps (3)", "leave one out"),
    ),
    "a schedule of unknown length": (
        ("data.epochs=2", "masking.schedule=[[0,[[0,1]]]]"),
        ("masking.schedule", "data.epochs (2.0)", "set train.num_steps"),
    ),
    "measuring on nothing": (("eval.every=1",), ("eval.every (1)", "eval.path is empty")),
    "patience without measuring": (
        ("eval.patience=2", "eval.path={root}/text.jsonl"),
        ("eval.patience (2)", "eval.every is 0"),
    ),
    "the best text model of no measurements": (
        ("eval.load_best_model_at_end=true", "eval.path={root}/text.jsonl"),
        ("eval.load_best_model_at_end (true)", "eval.every is 0"),
    ),
    "no text": (("data.path=",), ("data.path is empty", "give a .jsonl")),
    "too little text": (("data.sequence_length=100",), ("data.path holds 72 tokens", "shorten the rows")),
    "too little held-out text": (
        ("data.sequence_length=60", "eval.path={root}/few.jsonl"),
        ("eval.path holds 3 tokens", "shorten the rows"),
    ),
    "a document that fits no row": (
        ("data.packing=whole", "data.path={root}/long.jsonl"),
        ("a document of data.path has 95 tokens", "at least 94", "data.packing=chunks"),
    ),
    "more unique tokens than there are": (
        ("data.unique_tokens=500",),
        ("data.unique_tokens (500)", "72 tokens", "lower it"),
    ),
    "a best window of too little text": (
        ("masking.windows=auto", "data.path={root}/few.jsonl", "data.sequence_length=2"),
        ("masking.windows", "instead of auto"),
    ),
    "text of other rows": (
        ("data.path={root}/prompts.jsonl",),
        ("prompts.jsonl:1 has neither `text`", "data.text_column"),
    ),
}


def train_case(overrides: tuple[str, ...]) -> Arguments:
    return lambda place: place.train(*(override.replace("{root}", str(place.root)) for override in overrides))


CASES |= {f"train: {name}": (train_case(keys), expected) for name, (keys, expected) in TRAIN_CASES.items()}
CASES |= {
    "train without a target": (lambda p: ["train"], ("TARGET", "opdlm train --help")),
    "train weights that are not there": (
        lambda p: p.train(model="bundled:byte"),
        ("byte) holds no .safetensors weights", "model.from_scratch=true"),
    ),
    "train on the mask token": (
        lambda p: p.train(p.prompts({"text": "a<|mask|>b"})),
        ("bad.jsonl:1 contains the mask token", "format.mask_token"),
    ),
}


def run(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def listing(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_is_one_line_with_the_fix(
    name: str, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    make_arguments, expected = CASES[name]
    arguments = make_arguments(place)
    before = listing(place.root)
    capfd.readouterr()
    assert run(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("opdlm: ")
    assert not [words for words in expected if words not in lines[0]], lines[0]
    assert len(lines[0]) < 600
    assert listing(place.root) == before


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
from opdlm.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(place: Place) -> None:
    output = place.root / "full"
    arguments = place.convert(f"output_dir={output}", "train.save_every=1", "train.save_total_limit=9")
    assert main(arguments) == 0
    shutil.rmtree(output / "checkpoint-2")
    before = {path: path.read_bytes() for path in (output / "checkpoint-1").iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "checkpoint-2" in line and "cannot be written" in line and "File too large" in line
    assert {path: path.read_bytes() for path in (output / "checkpoint-1").iterdir()} == before
    assert not [path for path in output.iterdir() if "partial" in path.name or path.name == "checkpoint-2"]


@pytest.mark.parametrize("arguments", [["recipes"], ["convert", "--list-keys"]])
def test_a_reader_that_has_enough_is_no_mistake(arguments: list[str]) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()  # as `| head` does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors, errors
