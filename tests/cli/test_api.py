"""`opdlm.NAME`: every name resolves, `import opdlm` is light, and the functions do what their verbs do."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_checkpoints import convert_both, tiny_overrides, write_rows

import opdlm
from opdlm.cli.main import main
from opdlm.decoding.generate import generate as generate_ids
from opdlm.distill.rollout_file import RolloutFile
from opdlm.seeds import seed_of

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted tiny checkpoints of both formats, their teacher and their data."""
    folder = tmp_path_factory.mktemp("api")
    with contextlib.redirect_stdout(io.StringIO()):
        convert_both(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(root: Path) -> tuple[Any, Any]:
    return opdlm.load(root / "preserve" / "model")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


@pytest.mark.parametrize("name", opdlm.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = {name: getattr(opdlm, name)}[name]
    assert name in dir(opdlm)
    assert name == "__version__" or (value.__doc__ and value.__module__.startswith("opdlm"))


@pytest.mark.parametrize("name", ["bench", "convert", "evaluate", "export", "generate", "load"])
def test_the_docstring_of_a_function_has_an_example_and_its_errors(name: str) -> None:
    text = str({name: getattr(opdlm, name)}[name].__doc__)
    assert ">>> " in text and "Raises:" in text and "Returns:" in text


def test_a_star_import_brings_all_names() -> None:
    names: dict[str, Any] = {}
    exec("from opdlm import *", names)
    assert set(opdlm.__all__) <= set(names)
    with pytest.raises(AttributeError, match="no attribute"):
        exec("import opdlm; opdlm.nothing")


def test_importing_the_package_imports_neither_torch_nor_a_function() -> None:
    program = "import sys, opdlm; opdlm.ConfigError; opdlm.DecodeConfig; opdlm.convert; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert not {"torch", "transformers", "peft"} & set(done.stdout.split()), done.stderr


def test_text_and_its_token_ids_give_the_same_rollout(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    config = opdlm.DecodeConfig(mode="static", max_new_tokens=9, temperature=1.0)
    messages = [{"role": "user", "content": "add 1 2"}]
    by_text, by_turns, by_ids = (
        opdlm.generate(model, [prompt], config, tokenizer=tokenizer, seed=3)[0]
        for prompt in ("add 1 2", messages, ids_of(tokenizer, "add 1 2"))
    )
    assert by_text == by_turns == by_ids
    assert by_text.text == tokenizer.decode(list(by_text.text_ids), skip_special_tokens=True)
    (without,) = opdlm.generate(model, [ids_of(tokenizer, "add 1 2")], config, seed=3)
    assert without == replace(by_text, text="")
    (expected,) = generate_ids(model, [ids_of(tokenizer, "add 1 2")], config, [seed_of(3, 0)])
    assert without == expected


def test_keywords_replace_fields_of_the_settings(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    config = opdlm.DecodeConfig(mode="static", max_new_tokens=9, forward_overhead=32.0)
    changed = opdlm.generate(
        model, ["copy ab"], config, tokenizer=tokenizer, mode="lossless", max_new_tokens=4, logprobs=True
    )
    direct = opdlm.DecodeConfig(mode="lossless", max_new_tokens=4, logprobs=True, forward_overhead=32.0)
    assert changed == opdlm.generate(model, ["copy ab"], direct, tokenizer=tokenizer)
    assert changed[0].num_response <= 4 and len(changed[0].logprobs) == changed[0].num_response


def test_a_stop_string_ends_the_text(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    (whole,) = opdlm.generate(model, ["add 1 2"], tokenizer=tokenizer, max_new_tokens=12, mode="ar")
    stop = whole.text[3]
    (cut,) = opdlm.generate(
        model, ["add 1 2"], tokenizer=tokenizer, max_new_tokens=12, mode="ar", stop=[stop]
    )
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"


def test_gaps_are_filled_in_text_and_in_ids(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    spec = model.spec
    (by_text,) = opdlm.generate(model, ["add <gap:3> 4"], tokenizer=tokenizer, infill=True, mode="static")
    assert by_text.text.startswith("add ") and by_text.text.endswith(" 4")
    ids = [*tokenizer("add ")["input_ids"], *[spec.mask_token_id] * 3, *tokenizer(" 4")["input_ids"]]
    (by_ids,) = opdlm.generate(model, [ids], infill=True, mode="static")
    assert by_ids == replace(by_text, text="")
    assert model.spec == spec


@pytest.mark.parametrize("streams", [False, True])
def test_a_stop_token_of_a_template_does_not_cut_it_off(loaded: tuple[Any, Any], streams: bool) -> None:
    model, tokenizer = loaded
    screen = io.StringIO()
    (rollout,) = opdlm.generate(
        model,
        ["add 4<gap:2><eos>then 7<gap:3> end"],
        tokenizer=tokenizer,
        infill=True,
        mode="static",
        stream=Console(file=screen, width=200) if streams else None,
    )
    assert rollout.text.startswith("add 4") and rollout.text.endswith(" end") and "then 7" in rollout.text
    assert len(rollout.text) == len("add 4") + 2 + len("then 7") + 3 + len(" end")
    assert rollout.text_ids.count(tokenizer.eos_token_id) == 1  # the template's own
    assert not streams or screen.getvalue() == rollout.text + "\n"


def test_a_stream_shows_what_is_returned(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    screen = io.StringIO()
    (rollout,) = opdlm.generate(
        model, ["add 1 2"], tokenizer=tokenizer, max_new_tokens=8, stream=Console(file=screen)
    )
    assert screen.getvalue() == rollout.text + "\n"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a setting out of range": ({"temperature": -1.0}, r"temperature \(-1\) must lie between"),
    "more steps than tokens": ({"denoising_steps": 99}, r"denoising_steps \(99\) must lie between 1 and"),
    "a setting of another mode": (
        {"mode": "lossless", "confidence_threshold": 0.5},
        r"confidence_threshold \(0.5\) has no effect with `mode=lossless`",
    ),
    "text without a tokenizer": ({"tokenizer": None}, "tokenizer is missing"),
    "no prompt": ({"prompts": [" "]}, "PROMPT has an empty prompt"),
    "one text instead of a list": ({"prompts": "add 1 2"}, "give a list"),
    "a mask in the ids": ({"prompts": [[5, 46]]}, "`infill=True`"),
    "no id": ({"prompts": [[]]}, "no token"),
    "an empty stop string": ({"stop": [""]}, "`stop` is empty"),
    "infill from left to right": ({"infill": True, "mode": "ar"}, "`infill` with `mode=ar`"),
    "infill of ids without a gap": ({"infill": True, "prompts": [[5, 6]]}, r"no gap .* mask token \(46\)"),
    "infill of ids that start with a gap": ({"infill": True, "prompts": [[46, 5]]}, "starts with a gap"),
    "infill and a stop string": ({"infill": True, "stop": ["a"]}, "choose one"),
    "infill and acceptance": ({"infill": True, "ar_accept_threshold": 0.2}, "`ar_accept_threshold=0.2`"),
    "a response past the context": ({"max_new_tokens": 500}, r"max_new_tokens \(500\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_generated_is_explained(name: str, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    arguments, message = REFUSED[name]
    with pytest.raises(opdlm.OpdlmError, match=message):
        opdlm.generate(model, **{"prompts": ["add 1 2"], "tokenizer": tokenizer, **arguments})


def test_a_plain_checkpoint_decodes_autoregressively_only(root: Path) -> None:
    with pytest.raises(opdlm.ConfigError, match="not a folder written"):
        opdlm.load(root / "teacher", mode="lossless")
    model, tokenizer = opdlm.load(root / "teacher")
    with pytest.raises(opdlm.ConfigError, match="plain autoregressive checkpoint"):
        opdlm.generate(model, ["add 1 2"], tokenizer=tokenizer)
    (rollout,) = opdlm.generate(model, ["add 1 2"], tokenizer=tokenizer, mode="ar", max_new_tokens=5)
    student, _ = opdlm.load(root / "preserve" / "model")
    (same,) = opdlm.generate(student, ["add 1 2"], tokenizer=tokenizer, mode="ar", max_new_tokens=5)
    assert rollout.text_ids == same.text_ids


def test_lossless_needs_the_weights_of_the_ar_model(root: Path) -> None:
    model, tokenizer = opdlm.load(root / "sdar" / "model")
    with pytest.raises(opdlm.ConfigError, match="`mode=lossless` needs a preserve checkpoint"):
        opdlm.generate(model, ["add 1 2"], tokenizer=tokenizer, mode="lossless")


def test_converting_by_name_by_keywords_or_by_settings_is_the_same_run(root: Path, tmp_path: Path) -> None:
    settings = tiny_overrides(root / "teacher", root, tmp_path / "a")
    by_settings = opdlm.convert(opdlm.load_config(None, settings), console=QUIET)
    others = [text for text in settings[1:] if not text.startswith(("data.path=", "output_dir="))]
    by_keywords = opdlm.convert(
        str(root / "teacher"),
        data=root / "prompts.jsonl",
        output_dir=tmp_path / "b",
        overrides=others,
        console=QUIET,
    )
    assert by_settings == tmp_path / "a" / "model" and by_keywords == tmp_path / "b" / "model"
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (by_settings / file).read_bytes() == (by_keywords / file).read_bytes()


def test_settings_can_be_changed_by_overrides_and_are_checked(root: Path) -> None:
    from opdlm.api import convert_settings, train_settings

    config = opdlm.load_config(None, [f"model.path={root / 'teacher'}"])
    changed = convert_settings(config, ["train.num_steps=7", "lora.r=3"])
    assert isinstance(changed, opdlm.Config)
    assert (changed.train.num_steps, changed.lora.r) == (7, 3)
    assert convert_settings(changed) == changed
    assert convert_settings("tiny", ["train.num_steps=7"]).train.num_steps == 7
    with pytest.raises(opdlm.ConfigError, match=r"Did you mean train.num_steps"):
        opdlm.convert(config, overrides=["train.num_stepz=7"])
    text = opdlm.load_text_config(None, ["train.num_steps=5"])
    assert train_settings(text, ["data.path=a.jsonl"]).data.path == "a.jsonl"
    with pytest.raises(opdlm.ConfigError, match=r"model\.path is empty"):
        opdlm.train(text)


@pytest.mark.parametrize(
    "name",
    [
        "runs/exp #2",
        "1.10",
        "a: b",
        "yes",
        "{x}",
        "'q'",
        'a\\b"c',
        "~",
        " two  words ",
        "é\N{GRINNING FACE}",
        "-",
    ],
)
def test_a_path_is_taken_as_it_is_and_not_as_yaml(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opdlm.distill import pipeline
    from opdlm.text import pipeline as text_pipeline

    monkeypatch.setattr(pipeline, "convert_checkpoint", lambda config, console: config)
    monkeypatch.setattr(text_pipeline, "train_text", lambda config, console: config)
    teacher = root / name
    if not teacher.exists():
        teacher.parent.mkdir(exist_ok=True)
        shutil.copytree(root / "teacher", teacher)
    data = f"{name}.jsonl"
    for verb in (opdlm.convert, opdlm.train):
        found: Any = verb(str(teacher), data=data, output_dir=name, console=QUIET)
        assert (found.model.path, found.data.path, found.output_dir) == (str(teacher), data, name)
        if verb is opdlm.convert:
            found = opdlm.convert(found, output_dir=Path(name, "b"), console=QUIET)
            assert found.output_dir == str(Path(name, "b"))


def test_a_run_in_a_folder_of_an_odd_name_is_resumed(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opdlm.distill import pipeline

    monkeypatch.setattr(pipeline, "convert_checkpoint", lambda config, console: config)
    folder = tmp_path / "exp #2"
    folder.mkdir()
    config = opdlm.load_config(None, [*tiny_overrides(root / "teacher", root, tmp_path)])
    (folder / "config.yaml").write_text(replace(config, output_dir=str(folder)).to_yaml())
    found: Any = opdlm.resume(folder, console=QUIET)
    assert found.output_dir == str(folder)


def test_a_path_with_a_character_that_is_no_text_is_refused(root: Path) -> None:
    for name in ("a\0b", "a\udc80"):
        with pytest.raises(opdlm.ConfigError, match=r"output_dir .* has a character that is no text"):
            opdlm.convert(str(root / "teacher"), output_dir=name, console=QUIET)


def test_training_on_text_gives_a_folder_that_loads(root: Path, tmp_path: Path) -> None:
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"add {i} {i}"} for i in range(9)])
    folder = opdlm.train(
        str(root / "teacher"),
        data=text,
        output_dir=tmp_path / "run",
        overrides=["data.sequence_length=16", "train.num_steps=1"],
        console=QUIET,
    )
    model, tokenizer = opdlm.load(folder)
    assert opdlm.generate(model, ["add"], tokenizer=tokenizer, max_new_tokens=4)[0].num_response <= 4


def test_an_evaluation_is_what_the_verb_writes(root: Path, tmp_path: Path) -> None:
    folder, data = root / "preserve" / "model", root / "eval.jsonl"
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        report = opdlm.evaluate(folder, data=data, modes=["lossless"], limit=1)
    assert "evaluate lossless" in told.getvalue()
    assert [mode["name"] for mode in report["student"]] == ["lossless"]
    command = ["eval", str(folder), f"eval.path={data}", "--modes", "lossless", "--limit", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*command, "--out", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "retention.json").read_text())
    assert json.loads(json.dumps(report["student"])) == written["student"]
    with pytest.raises(opdlm.ConfigError, match=r"eval\.path is empty"):
        opdlm.evaluate(folder)


def test_rollouts_are_recorded_with_their_trajectories(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.parquet"
    config = opdlm.DecodeConfig(mode="static", max_new_tokens=8, ar_accept_threshold=0.0)
    found = opdlm.rollout(
        root / "sdar" / "model", root / "prompts.jsonl", out, config, limit=3, seed=2, console=QUIET
    )
    assert found == out
    model, tokenizer = opdlm.load(root / "sdar" / "model")
    texts = [json.loads(line)["prompt"] for line in (root / "prompts.jsonl").read_text().splitlines()][:3]
    expected = opdlm.generate(model, texts, config, tokenizer=tokenizer, seed=2, logprobs=True)
    file = RolloutFile(out)
    assert [one.text_ids for one in file] == [one.text_ids for one in expected]
    assert [one.unmask_step for one in file] == [one.unmask_step for one in expected]
    assert list(file.texts()) == [one.text for one in expected]
    with pytest.raises(opdlm.ConfigError, match=r"limit \(0\)"):
        opdlm.rollout(root / "sdar" / "model", root / "prompts.jsonl", out, config, limit=0)
    config = opdlm.DecodeConfig(mode="lossless", draft_sampling="rejection", temperature=1.0)
    with pytest.raises(opdlm.ConfigError, match=r"draft_sampling \(rejection\)"):
        opdlm.rollout(root / "preserve" / "model", root / "prompts.jsonl", tmp_path / "new.parquet", config)


def test_speed_is_measured_in_the_modes_asked_for(root: Path) -> None:
    rows = opdlm.bench(
        root / "preserve" / "model",
        opdlm.DecodeConfig(max_new_tokens=4),
        prompts=root / "prompts.jsonl",
        modes=["lossless"],
        batch_sizes=[2],
        limit=2,
        repeats=1,
        vllm="never",
        console=QUIET,
    )
    assert [row.name for row in rows] == ["transformers.generate", "lossless", "lossless, no copies"]
    assert rows[1].identical == rows[2].identical == 1.0


def test_speed_is_measured_against_the_speculative_decoding_of_transformers(
    root: Path, tmp_path: Path
) -> None:
    rows = opdlm.bench(
        root / "preserve" / "model",
        opdlm.DecodeConfig(max_new_tokens=12),
        prompts=root / "prompts.jsonl",
        modes=["lossless"],
        batch_sizes=[1, 2],
        limit=2,
        repeats=1,
        vllm="never",
        assistant=root / "teacher",
        out=tmp_path,
        console=QUIET,
    )
    found = {(row.batch_size, row.name): row for row in rows}
    ours = ["transformers.generate", "lossless", "lossless, no copies"]
    assert [row.name for row in rows if row.batch_size == 2] == ours
    lookup, assisted = found[1, "prompt lookup, 10 tokens"], found[1, "assisted generation"]
    assert lookup.identical == assisted.identical == 1.0
    # the assistant is the model itself, so that no draft is refused
    assert 1 <= lookup.tokens_per_forward < assisted.tokens_per_forward
    acceptance = json.loads((tmp_path / "bench.json").read_text())["acceptance"]
    assert len(acceptance) > 1 and all(0 <= share <= 1 for share in acceptance)


def test_folders_are_exported_and_merged(root: Path, tmp_path: Path) -> None:
    assert opdlm.merge(root / "preserve" / "model", tmp_path / "copy", full_copy=True) == tmp_path / "copy"
    before, tokenizer = opdlm.load(root / "preserve" / "model")
    after, _ = opdlm.load(tmp_path / "copy")
    first, second = (
        opdlm.generate(model, ["add 1 2"], tokenizer=tokenizer, mode="ar", max_new_tokens=6)[0]
        for model in (before, after)
    )
    assert first.text_ids == second.text_ids
    with pytest.raises(opdlm.ConfigError, match="each request chooses"):
        opdlm.export(root / "preserve" / "model", tmp_path / "out", config=opdlm.DecodeConfig())
    with pytest.raises(opdlm.ConfigError, match="config has no effect"):
        opdlm.export(root / "sdar" / "model", tmp_path / "out", to="sdar", config=opdlm.DecodeConfig())
    with pytest.raises(opdlm.DataError, match="does not exist"):
        opdlm.merge(tmp_path / "nothing", tmp_path / "out")


def test_a_server_gets_the_settings_of_the_call(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opdlm.serving import server

    calls: list[Any] = []
    monkeypatch.setattr(server, "serve_folder", lambda folder, **keywords: calls.append((folder, keywords)))
    config = opdlm.DecodeConfig(mode="lossless")
    opdlm.serve(root / "preserve" / "model", config, port=0)
    flags = ["--mode", "lossless", "--port", "0"]
    assert main(["serve", str(root / "preserve" / "model"), *flags]) == 0
    assert calls[0] == calls[1] and calls[0][1]["decode"] == config
    with pytest.raises(opdlm.DataError, match="does not exist"):
        opdlm.serve("./nothing")


def test_a_rollout_keeps_its_text_through_a_dictionary() -> None:
    rollout = opdlm.Rollout(
        prompt_ids=(1,), response_ids=(2, 3), unmask_step=(1, 1), num_response=2, finish_reason="length"
    )
    assert "text" not in rollout.to_dict()
    for one in (rollout, replace(rollout, text="ab")):
        assert opdlm.Rollout.from_dict(json.loads(json.dumps(one.to_dict()))) == one
