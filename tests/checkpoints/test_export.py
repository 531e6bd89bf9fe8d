"""`opdlm export --to sdar`: the layout that the loaders of SGLang and LMDeploy read, by their sources."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data
from transformers import PretrainedConfig, Qwen3Config, Qwen3ForCausalLM

from opdlm.checkpoints import export as export
from opdlm.checkpoints.load import load, read_spec
from opdlm.cli.main import main
from opdlm.modeling.slots import make_slots

ROPE_THETA = 5000.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted folders: one that the engines accept, and others that they do not."""
    root = tmp_path_factory.mktemp("export")
    write_data(root)
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
    teachers = {
        "qwen3": write_checkpoint(root / "qwen3", "qwen3", rope_parameters=rope),
        "llama": write_checkpoint(root / "llama", "llama"),
    }
    for name, teacher, *changes in (
        ("sdar", "qwen3", "format.name=sdar", "lora.merge=false"),
        ("preserve", "qwen3", "format.name=preserve"),
        ("response", "qwen3", "format.name=sdar", "format.grid=response"),
        ("llama_sdar", "llama", "format.name=sdar"),
    ):
        settings = tiny_overrides(teachers[teacher], root, root / name)
        assert main(["convert", str(teachers[teacher]), *settings[1:], *changes]) == 0
    return {name: root / name / "model" for name in ("sdar", "preserve", "response", "llama_sdar")}


@pytest.fixture
def known_mask(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny vocabulary has its [MASK] elsewhere."""
    monkeypatch.setattr(export, "SDAR_MASK_ID", read_spec(folders["sdar"]).mask_token_id)


def remote_config(folder: Path) -> PretrainedConfig:
    """What `AutoConfig` makes of the folder, by the class that travels in it. (Its own way keeps the first
    cache of remote code in the process, which other tests have set elsewhere.)
    """
    file, name = json.loads((folder / "config.json").read_text())["auto_map"]["AutoConfig"].split(".")
    spec = importlib.util.spec_from_file_location(file, folder / f"{file}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config_class: type[PretrainedConfig] = getattr(module, name)
    return config_class.from_pretrained(folder)


@pytest.mark.usefixtures("known_mask")
def test_the_folder_holds_what_the_engines_read_and_computes_what_the_student_does(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(folders["sdar"]), str(out), "--to", "sdar"]) == 0
    printed = capsys.readouterr().out
    assert "lmdeploy serve" in printed and "sglang.launch_server" in printed

    spec = read_spec(folders["sdar"])
    config = remote_config(out)
    assert config.architectures == ["SDARForCausalLM"] and config.model_type == "sdar"
    assert config.rope_theta == ROPE_THETA and config.block_size == spec.block_size == 4
    assert config.mask_token_id == spec.mask_token_id and config.head_dim and not config.sliding_window
    values = json.loads((out / "config.json").read_text())
    assert values["rope_theta"] == ROPE_THETA and values["rope_scaling"] is None  # transformers 4
    assert values["torch_dtype"] == "float32" and "block_diffusion" not in values
    assert not list(out.glob("modeling*")) and not (out / "adapter").exists()

    plain = {key: values[key] for key in values if key not in ("model_type", "auto_map", "architectures")}
    engine = Qwen3ForCausalLM(Qwen3Config(**plain)).eval()
    missing, unexpected = engine.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    engine.tie_weights()
    model, _ = load(folders["sdar"])
    ids_BS = torch.tensor([[3, 9, 4, spec.mask_token_id, spec.mask_token_id]])
    positions_BS = torch.arange(5)[None]
    everything_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    slots = make_slots(
        ids_BS, positions_BS, torch.zeros_like(ids_BS) - 1, everything_BS.long(), everything_BS
    )
    with torch.no_grad():
        expected = model.logits(model.student_hidden(slots))
        mask = torch.zeros(1, 1, 5, 5)  # one block: every token sees every token
        found = engine(input_ids=ids_BS, attention_mask=mask, use_cache=False).logits
    allowed = torch.isfinite(expected)
    assert torch.allclose(found[allowed], expected[allowed], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("preserve", [], ("format.name is preserve", "sdar only")),
        ("llama_sdar", [], ("the family is llama", "qwen3 only")),
        ("response", [], ("format.grid is response", "absolute only")),
        ("sdar", ["--temperature", "1"], ("--temperature has no effect",)),
        ("sdar", ["--denoising-steps", "2"], ("--denoising-steps has no effect",)),
    ],
)
@pytest.mark.usefixtures("known_mask")
def test_what_the_engines_would_decode_otherwise_is_refused(
    folders: dict[str, Path],
    name: str,
    flags: list[str],
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", str(folders[name]), str(tmp_path / "out"), "--to", "sdar", *flags]) == 2
    printed = capsys.readouterr().err
    assert all(word in printed for word in words) and not (tmp_path / "out").exists(), printed


def test_another_mask_token_is_refused(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(folders["sdar"]), str(tmp_path / "out"), "--to", "sdar"]) == 2
    assert "the id of [MASK]" in capsys.readouterr().err
