"""The command line itself: help, version, flags of decoding, settings, and paths that are checked first."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from opdlm import __version__
from opdlm.cli.flags import MODES, decode_config, one_mode_config, with_flag_names
from opdlm.cli.main import build_parser, main, parse
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.errors import ConfigError

ROOT = Path(__file__).parents[2]
VERBS = (
    *("convert", "train", "resume", "generate", "chat", "serve", "rollout", "eval", "runs", "report"),
    *("bench", "merge", "import", "export", "push", "verify", "study"),
    *("demo", "recipes", "env"),
)
REQUIRED = {
    "generate": ["DIR", "PROMPT"],
    "chat": ["DIR"],
    "serve": ["DIR"],
    "rollout": ["MODEL", "PROMPTS", "--out", "FILE.parquet"],
    "bench": ["DIR"],
    "export": ["DIR", "OUT"],
}
"""Arguments of the verbs that decode; `eval` changes settings of a run instead."""


def help_of(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def timed(program: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A program run by a new Python, and the seconds of processor time that it took."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    return done, sum(after[2:4]) - sum(before[2:4])


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"opdlm {__version__}\n"


def test_without_a_verb_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert not [verb for verb in VERBS if f"\n    {verb} " not in shown]


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_ends_with_commands_that_parse(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(verb, capsys)
    examples = shown[shown.index("\nexamples:\n") :].replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in examples.splitlines() if "  opdlm " in line]
    assert any(command[1] == verb for command in commands)
    for command in commands:
        parse(command[1:])


def test_help_is_fast_and_does_without_torch_and_pydantic() -> None:
    program = "import sys; from opdlm.cli.main import main; main([]); print(*sys.modules, file=sys.stderr)"
    done, seconds = timed(program)
    assert not {"torch", "transformers", "pydantic", "rich"} & set(done.stderr.split())
    assert seconds < 0.3


@pytest.mark.parametrize("verb", REQUIRED)
def test_a_verb_has_the_flags_and_defaults_of_the_decoding_settings(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = " ".join(help_of(verb, capsys).split())
    options = parse([verb, *REQUIRED[verb]])
    config = decode_config(options)
    left_out = {
        "chat": {"batch_size", "logprobs"},
        "serve": {"batch_size", "logprobs"},
        "rollout": {"ar_accept_threshold", "logprobs", "draft_sampling"},
        "bench": {"mode", "batch_size", "temperature", "top_k", "top_p", "logprobs", "draft_sampling"},
        "export": {
            *("max_new_tokens", "batch_size", "logprobs"),
            *("entropy_bound", "ar_accept_threshold", "forward_overhead", "draft_sampling"),
            "prompt_lookup_num_tokens",
        },
    }.get(verb, set())
    for field in fields(DecodeConfig):
        if field.name not in left_out:
            assert f"--{field.name.replace('_', '-')} " in shown
            assert field.name in vars(options)
            assert f"(default: {asdict(config)[field.name]})" in shown


def test_decoding_flags_become_the_settings() -> None:
    flags = ["--mode", "static", "--max-new-tokens", "7", "--batch-size", "3", "--temperature", "0.5"]
    flags += ["--top-k", "9", "--top-p", "0.8", "--denoising-steps", "2", "--confidence-threshold", "0.7"]
    flags += [
        "--entropy-bound",
        "0.3",
        "--ar-accept-threshold",
        "0.2",
        "--logprobs",
        "--forward-overhead",
        "5",
        "--draft-sampling",
        "rejection",
    ]
    assert decode_config(parse(["generate", "DIR", "PROMPT", *flags])) == DecodeConfig(
        mode="static",
        max_new_tokens=7,
        batch_size=3,
        temperature=0.5,
        top_k=9,
        top_p=0.8,
        denoising_steps=2,
        confidence_threshold=0.7,
        entropy_bound=0.3,
        ar_accept_threshold=0.2,
        logprobs=True,
        forward_overhead=5,
        draft_sampling="rejection",
    )
    assert decode_config(parse(["generate", "DIR", "PROMPT"])) == DecodeConfig()
    assert set(MODES) >= {"lossless", "entropy"}


@pytest.mark.parametrize("verb", ["generate", "chat", "serve"])
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--forward-overhead 8", "forward_overhead (8) has no effect with `mode=threshold`"),
        (
            "--prompt-lookup-num-tokens 9 --mode static",
            "prompt_lookup_num_tokens (9) has no effect with `mode=",
        ),
        ("--confidence-threshold 0.5 --mode lossless", "has no effect with `mode=lossless`"),
        ("--denoising-steps 2 --mode lossless", "leave it out, or use `mode=static`"),
        ("--denoising-steps 2 --mode entropy", "denoising_steps (2) has no effect"),
        ("--entropy-bound 0.2 --mode ar", "use `mode=entropy`"),
        ("--ar-accept-threshold 0.2 --mode lossless", "ar_accept_threshold (0.2) has no effect"),
        ("--draft-sampling rejection --temperature 1", "has no effect with `mode=threshold`"),
        ("--draft-sampling rejection --mode lossless", "has no effect with `temperature=0`"),
        ("--draft-sampling rejection --mode lossless --temperature 1", None),
        ("--forward-overhead 8 --prompt-lookup-num-tokens 9 --mode lossless", None),
        ("--confidence-threshold 0.5 --denoising-steps 2", None),
        ("--confidence-threshold 0.9 --entropy-bound 0.1 --draft-sampling shared_noise --mode ar", None),
        ("--ar-accept-threshold 0 --mode lossless", None),
        ("--prompt-lookup-num-tokens 0", None),
    ],
)
def test_a_flag_that_the_mode_does_not_read_is_refused(verb: str, flags: str, told: str | None) -> None:
    """A default, and what is off in any case, is none. Requests to a server have their own temperatures."""
    options = parse([verb, *REQUIRED[verb], *flags.split()])
    is_sampled = True if verb == "serve" else None
    if told is None or (is_sampled and "temperature=0" in told):
        assert one_mode_config(options, is_sampled=is_sampled) == decode_config(options)
        return
    with pytest.raises(ConfigError, match=re.escape(told)):
        one_mode_config(options, is_sampled=is_sampled)


@pytest.mark.parametrize(
    ("old", "new"), [("--threshold", "confidence_threshold"), ("--veto-below", "ar_accept_threshold")]
)
def test_earlier_flags_work_and_say_how_they_are_called_now(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = decode_config(parse(["generate", "DIR", "PROMPT", old, "0.4"]))
    assert config == DecodeConfig(**{new: 0.4})
    assert capsys.readouterr().err == f"opdlm: {old} is now --{new.replace('_', '-')}.\n"


def test_a_setting_out_of_range_names_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value in (
        ("--max-new-tokens", "0"),
        ("--top-p", "1.5"),
        ("--temperature", "-1"),
        ("--top-k", "0"),
    ):
        assert main(["generate", "DIR", "PROMPT", flag, value]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"opdlm: {flag} ({value}) must ")


def test_messages_of_the_api_name_the_flags_of_the_verb() -> None:
    options = parse(["generate", "DIR", "PROMPT"])
    pairs = {
        "`infill` with `mode=ar`: use threshold.": "--infill with --mode ar: use threshold.",
        "top_k (0) must be at least 1.": "--top-k (0) must be at least 1.",
        "5 plus max_new_tokens (9) is much.": "5 plus --max-new-tokens (9) is much.",
        "eval.max_new_tokens (9) and `text` stay.": "eval.max_new_tokens (9) and `text` stay.",
        "the mode of a prompt": "the mode of a prompt",
        "use max_rows=3": "use max_rows=3",
    }
    assert {message: with_flag_names(message, options) for message in pairs} == pairs


OVERRIDES = ["train.num_steps=3", "format.name=sdar", "output_dir=runs/x", "lora.r=4"]


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "tiny", *OVERRIDES],
        [
            "convert",
            "tiny",
            "--train.num_steps=3",
            "--format.name",
            "sdar",
            "--output_dir=runs/x",
            "--lora.r=4",
        ],
        [
            "convert",
            "tiny",
            "--train.num-steps",
            "3",
            "format.name=sdar",
            "--output-dir",
            "runs/x",
            "--lora.r",
            "4",
        ],
    ],
)
@pytest.mark.parametrize("flags", [[], ["--print-config"]])
def test_settings_are_written_with_or_without_dashes(command: list[str], flags: list[str]) -> None:
    options = parse([*command, *flags])
    assert options.target == "tiny" and sorted(options.overrides) == sorted(OVERRIDES)
    assert options.print_config == bool(flags)


def test_every_verb_with_settings_takes_them_with_dashes() -> None:
    assert parse(["train", "byte", "--data.path", "a.jsonl"]).overrides == ["data.path=a.jsonl"]
    assert parse(["study", "parity", "--run.train.num_steps", "3"]).overrides == ["run.train.num_steps=3"]
    options = parse(["eval", "DIR", "--modes", "static", "--eval.limit", "3", "--seeds", "2"])
    assert (
        options.overrides == ["eval.limit=3"] and options.modes == ["static"] and options.folders == ["DIR"]
    )
    options = parse(["rollout", "DIR", "FILE", "--out", "a.parquet", "--data.split=test", "data.config=b"])
    assert options.overrides == ["data.config=b", "data.split=test"]


def test_a_setting_without_a_value_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["convert", "tiny", "--train.num_steps"])
    assert stop.value.code == 2
    assert "--train.num_steps needs a value" in capsys.readouterr().err


def test_settings_with_dashes_mean_the_same_as_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "tiny", "--train.num_steps", "7", "--print-config"]) == 0
    with_dashes = capsys.readouterr().out
    assert main(["convert", "tiny", "train.num_steps=7", "--print-config"]) == 0
    assert with_dashes == capsys.readouterr().out and "num_steps: 7" in with_dashes


MISTYPED = {
    "generate": ["runs/tinny/model", "hello"],
    "chat": ["./tinny"],
    "serve": ["../tinny/model"],
    "eval": ["runs/tinny/model"],
    "bench": ["/no/model"],
    "rollout": ["docs/tinny", "prompts.jsonl", "--out", "a.parquet", "--mode", "ar"],
    "merge": ["~/tinny", "OUT"],
    "import": ["./tinny", "ADAPTER", "OUT"],
    "export": ["runs/tinny/model", "OUT"],
    "convert": ["./tinny", "data.path=prompts.jsonl"],
    "train": ["runs/tinny/model", "data.path=text.jsonl"],
}


@pytest.mark.parametrize("verb", MISTYPED)
def test_a_mistyped_folder_is_reported_before_torch_is_imported(verb: str) -> None:
    """And without asking the hub, which would retry for half a minute where there is no network."""
    program = (
        "import sys\n"
        "from opdlm.cli.main import main\n"
        f"status = main({[verb, *MISTYPED[verb]]!r})\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    done, seconds = timed(program)
    assert done.returncode == 2, done.stderr
    assert "does not exist" in done.stderr and len(done.stderr.splitlines()) == 1
    assert seconds < 2


def test_a_name_of_the_hub_is_left_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opdlm.checkpoints.folders import check_can_decode, check_is_checkpoint, looks_like_path

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("./a", "/a", "~/a", "a/b/c", "runs/a"):
        assert looks_like_path(name)
    for name in ("gpt2", "Qwen/Qwen3-0.6B"):
        assert not looks_like_path(name)
        check_is_checkpoint(name)
        check_can_decode(name, "ar")
        with pytest.raises(ConfigError, match="`mode=static` needs a diffusion model"):
            check_can_decode(name, "static")


UNUSED = ("peft", "datasets", "pyarrow", "matplotlib", "opdlm.distill", "opdlm.vllm", "opdlm.training")


def test_answering_imports_neither_datasets_nor_other_verbs(teacher_folder: Path) -> None:
    command = ["generate", str(teacher_folder), "add 47 38", "--mode", "ar", "--max-new-tokens", "2"]
    program = (
        "import sys\n"
        "from opdlm.cli.main import main\n"
        f"assert main({command!r}) == 0\n"
        f"print(*(name for name in {UNUSED!r} if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_env_names_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    found = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    wanted = {
        "opdlm",
        "python",
        "os",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "safetensors",
    }
    wanted |= {"cpu", "cores", "memory", "cuda"}
    assert wanted <= set(found) and all(found.values())
    assert found["opdlm"] == __version__ and any(name.startswith("gpu") for name in found)


def test_env_names_extras_only_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from opdlm import environment

    installed = {"torch": "1", "vllm": "0.32.0"}
    monkeypatch.setattr(environment, "version_of", installed.get)
    found = environment.describe_environment()
    assert found["vllm"] == "0.32.0" and found["peft"] == "not installed"
    assert "deepspeed" not in found


def test_every_verb_is_in_the_file_that_the_package_names() -> None:
    parser = build_parser()
    (verbs,) = [action.choices for action in parser._actions if action.dest == "verb"]
    assert verbs is not None and tuple(verbs) == VERBS
    files = {name: verb.get_default("run").__module__.rpartition(".")[2] for name, verb in verbs.items()}
    elsewhere = {"chat": "generate", "eval": "evaluate", "report": "evaluate", "merge": "export"}
    elsewhere |= {
        "import": "export",
        "verify": "export",
        "push": "export",
        "demo": "main",
        "resume": "convert",
    }
    elsewhere |= {"recipes": "main", "env": "main", "runs": "evaluate"}
    assert files == {name: elsewhere.get(name, name) for name in VERBS}


def test_printed_settings_are_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "tiny", "--lora.r", "4", "--print-config"]) == 0
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert main(["convert", str(recipe), "--print-config"]) == 0
    assert capsys.readouterr().out == recipe.read_text()
