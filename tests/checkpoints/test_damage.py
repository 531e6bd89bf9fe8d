"""A result folder that is not as it was written is not used, and the message names the file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_checkpoints import convert_both
from transformers import AutoModelForCausalLM

import opdlm
from opdlm.cli.main import main
from opdlm.errors import ConfigError, DataError
from opdlm.files import atomic_folder

pytestmark = pytest.mark.usefixtures("own_module_cache")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    convert_both(folder)
    return folder


@pytest.fixture
def model(root: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a preserve run, whose base weights are no longer linked to the source's."""
    return Path(shutil.copytree(root / "preserve" / "model", tmp_path / "model"))


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_every_file_is_in_the_manifest_also_after_the_evaluation(root: Path) -> None:
    for name in ("preserve", "sdar"):
        folder = root / name / "model"
        described = json.loads((folder / "manifest.json").read_text())
        names = {path.relative_to(folder).as_posix() for path in files(folder)}
        assert described.keys() == names - {"manifest.json"}
        assert all(entry["size"] == (folder / name).stat().st_size for name, entry in described.items())
        assert main(["verify", str(root / name)]) == 0


def test_verify_finds_every_flipped_bit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, paths = random.Random(0), files(model)
    for number in range(100):
        path = paths[number % len(paths)]
        before = path.read_bytes()
        flip_a_bit(path, rng)
        capsys.readouterr()
        assert main(["verify", str(model)]) == 2, path
        said = capsys.readouterr()
        assert said.out.startswith(f"{model}: ") and said.out.count("\n") == 1 and not said.err
        path.write_bytes(before)
    assert main(["verify", str(model)]) == 0


HARMS: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: flip_a_bit(path, random.Random(1)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_file_is_named_in_one_line_and_nothing_is_decoded(
    harm: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = (".md", ".png", ".html", ".jsonl", "retention.json", "timing.json", "all_results.json")
    for path in files(model):
        before = path.read_bytes()
        HARMS[harm](path)
        is_same = str(path).endswith(records) or (path.name, harm) == ("manifest.json", "deleted")
        code = main(["generate", str(model), "add 1 2", "--max-new-tokens", "2"])
        assert code == (0 if is_same else 2), path
        said = capsys.readouterr().err
        assert is_same or (said.startswith("opdlm: ") and said.count("\n") == 1), said
        path.write_bytes(before)


def test_the_check_can_be_switched_off_and_a_folder_without_manifest_loads(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_a_bit(model / "decode_state.py", random.Random(0))
    with pytest.raises(DataError, match=r"decode_state.py has other content.*OPDLM_VERIFY=0"):
        opdlm.load(model)
    monkeypatch.setenv("OPDLM_VERIFY", "off")
    with pytest.raises(ConfigError, match=r"OPDLM_VERIFY \(off\) must be 1"):
        opdlm.load(model)
    monkeypatch.setenv("OPDLM_VERIFY", "0")
    opdlm.load(model)
    monkeypatch.delenv("OPDLM_VERIFY")
    (model / "manifest.json").unlink()
    opdlm.load(model)
    assert list(opdlm.verify(model.parent).values()) == [
        ["manifest.json is missing, so nothing was compared"]
    ]


def test_a_folder_without_manifest_must_hold_what_its_format_needs(model: Path) -> None:
    (model / "manifest.json").unlink()
    for name in ("mask_embedding.safetensors", "adapter/adapter_config.json"):
        for harm in ("deleted", "cut", "zeroed"):
            before = (model / name).read_bytes()
            HARMS[harm](model / name)
            with pytest.raises(DataError, match="is damaged or incomplete"):
                opdlm.load(model)
            (model / name).write_bytes(before)


def test_an_adapter_whose_keys_do_not_match_is_an_error_in_both_ways_of_loading(model: Path) -> None:
    (model / "manifest.json").unlink()
    file = model / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = min(weights)
    save_file(
        {key.replace("lora_A", "lora_C") if key == name else key: w for key, w in weights.items()}, file
    )
    with pytest.raises(DataError, match="2 keys do not match"):
        opdlm.load(model)
    with pytest.raises(ValueError, match="belong to no layer"):
        AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)


def test_a_folder_that_transformers_has_written_again_loads(model: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True).save_pretrained(model)
    assert not (model / "manifest.json").exists()
    opdlm.load(model)


def test_verify_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no manifest.json, no checkpoint-N and no model" in capsys.readouterr().err


def test_a_folder_stays_where_it_was_if_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the two renames."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("old")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == ".model.partial":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as partial:
        (partial / "a").write_text("new")
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
