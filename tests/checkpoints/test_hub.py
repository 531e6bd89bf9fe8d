"""Folders published on a stand-in of the Hub and loaded from it again, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import StandIn, hub
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data, write_rows

from opdlm.cli.main import main

NAME = "ada/tiny-diffusion"
BASE_CARD = b"---\nlicense: apache-2.0\n---\nA base.\n"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preserve folder, as if its base were `org/base` on the Hub."""
    root = tmp_path_factory.mktemp("runs")
    write_data(root)
    teacher = write_checkpoint(root / "teacher")
    assert main(["convert", str(teacher), *tiny_overrides(teacher, root, root / "run")[1:]]) == 0
    folder = root / "run" / "model"
    card = folder / "README.md"
    card.write_text(
        card.read_text().replace("license: unknown\n", "license: unknown\nbase_model: org/base\n")
    )
    return folder


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def server() -> Iterator[StandIn]:
    with hub() as state:
        yield state


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_pushed_folder_comes_back_byte_for_byte_and_answers(
    server: StandIn, folder: Path, tmp_path: Path
) -> None:
    server.repositories["org/base"] = {"README.md": BASE_CARD}
    server.repositories[NAME] = {"model-00001-of-00002.safetensors": b"of an earlier model"}
    pushed = server.command(tmp_path, "-m", "opdlm", "push", str(folder), NAME)
    assert pushed.stdout == f"published: {server.url}/{NAME}\n", pushed.stderr
    files = dict(server.repositories[NAME])
    files.pop(".gitattributes", None)
    assert files == contents(folder)
    card = files["README.md"].decode()
    assert "license: apache-2.0" in card and f'FOLDER = "{NAME}"' in card and f"opdlm chat {NAME} --" in card
    fetch = (
        "import opdlm, sys; from opdlm.api import on_this_machine; print(on_this_machine(sys.argv[1]));"
        "model, tokenizer = opdlm.load(sys.argv[1], mode='lossless');"
        "(r,) = opdlm.generate(model, ['add 1 2'], tokenizer=tokenizer, max_new_tokens=8);"
        "print(list(r.text_ids))"
    )
    fetched = server.command(tmp_path, "-c", fetch, NAME)
    place, answer = fetched.stdout.splitlines()
    own = contents(Path(place))
    own.pop(".gitattributes", None)
    assert own == contents(folder)
    assert server.command(tmp_path, "-c", fetch, str(folder)).stdout.splitlines()[1] == answer
    shown = server.command(
        tmp_path, "-m", "opdlm", "generate", NAME, "add 1 2", "--json", "--max-new-tokens", "8"
    )
    assert json.loads(shown.stdout)["token_ids"] and not shown.returncode


def test_a_file_that_the_hub_changed_is_refused(server: StandIn, folder: Path, tmp_path: Path) -> None:
    assert server.command(tmp_path, "-m", "opdlm", "push", str(folder), NAME).returncode == 0
    weights = server.repositories[NAME]["model.safetensors"]
    server.repositories[NAME]["model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    loaded = server.command(tmp_path, "-m", "opdlm", "generate", NAME, "add 1 2")
    assert loaded.returncode == 2 and "model.safetensors has other content" in loaded.stderr


@pytest.mark.parametrize(
    ("name", "token", "refuses", "told"),
    [
        ("tiny", "hf_test", None, "the repository (tiny) must be USER/NAME"),
        ("a b/c", "hf_test", None, "the repository (a b/c) must be USER/NAME"),
        (NAME, None, None, "without a token of the Hub: log in with `hf auth login`"),
        (NAME, "hf_other", None, "the Hub answers 401, it does not know the token"),
        (NAME, "hf_test", 403, "the Hub answers 403, the token may not do this"),
        (NAME, "hf_test", 418, "the Hub answers 418, refused"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(
    server: StandIn,
    folder: Path,
    tmp_path: Path,
    name: str,
    token: str | None,
    refuses: int | None,
    told: str,
) -> None:
    server.refuses = refuses
    before = contents(folder)
    pushed = server.command(tmp_path, "-m", "opdlm", "push", str(folder), name, token=token)
    assert pushed.returncode == 2 and told in pushed.stderr, pushed.stderr
    assert len(pushed.stderr.splitlines()) == 1
    assert contents(folder) == before


def test_private_is_refused_where_the_repository_is_public(
    server: StandIn, folder: Path, tmp_path: Path
) -> None:
    server.repositories[NAME] = {"README.md": b"public"}
    before = contents(folder)
    pushed = server.command(tmp_path, "-m", "opdlm", "push", str(folder), NAME, "--private")
    assert pushed.returncode == 2 and f"{NAME} exists and is public" in pushed.stderr, pushed.stderr
    assert server.repositories[NAME] == {"README.md": b"public"} and contents(folder) == before
    for _ in range(2):  # it is created, and then it exists
        pushed = server.command(tmp_path, "-m", "opdlm", "push", str(folder), "ada/own", "--private")
        assert pushed.returncode == 0 and "ada/own" in server.private, pushed.stderr


def test_a_damaged_folder_and_a_hub_out_of_reach_are_told(
    server: StandIn, folder: Path, tmp_path: Path
) -> None:
    away = StandIn(url="http://127.0.0.1:9")
    pushed = away.command(tmp_path, "-m", "opdlm", "push", str(folder), NAME)
    assert pushed.returncode == 2 and f"{NAME} cannot be written: the Hub cannot be reached" in pushed.stderr
    missing = server.command(tmp_path, "-m", "opdlm", "chat", NAME)
    assert "the Hub answers 404, there is no such repository" in missing.stderr
    (folder / "config.json").write_text("{}")
    pushed = server.command(tmp_path, "-m", "opdlm", "push", str(folder), NAME)
    assert "is not as it was written: config.json has other content" in pushed.stderr
    assert not server.repositories


@pytest.mark.slow  # the Hub's client tries for 20 seconds
def test_a_model_of_a_hub_out_of_reach_is_told(tmp_path: Path) -> None:
    away = StandIn(url="http://127.0.0.1:9")
    for name in (NAME, "tiny"):
        loaded = away.command(tmp_path, "-m", "opdlm", "generate", name, "add 1 2")
        assert f"{name} is no folder here and cannot be fetched: the Hub cannot be reached" in loaded.stderr


@pytest.mark.slow
def test_push_to_hub_is_checked_before_the_run_and_publishes_its_result(
    server: StandIn, tmp_path: Path
) -> None:
    text = write_rows(tmp_path / "text.jsonl", [{"text": "a few words"}] * 20)
    run = ("-m", "opdlm", "train", "byte", f"data.path={text}", "train.num_steps=1")
    settings = (f"output_dir={tmp_path / 'run'}", "model.from_scratch=true")
    early = server.command(tmp_path, *run, *settings, "--push-to-hub", "tiny")
    assert early.returncode == 2 and "must be USER/NAME" in early.stderr and not (tmp_path / "run").exists()
    done = server.command(tmp_path, *run, *settings, "--push-to-hub", NAME)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"published: {server.url}/{NAME}\n")
    assert set(contents(tmp_path / "run" / "model")) == set(server.repositories[NAME]) - {".gitattributes"}
