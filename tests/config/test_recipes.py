"""Every recipe loads, is planned at its real size, and runs two steps; plans are held against real steps."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from tiny_checkpoints import write_checkpoint, write_data
from tiny_models import make_lm, make_rollout, qwen3
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from opdlm.api import convert_settings
from opdlm.checkpoints.load import with_known_dtype
from opdlm.cli.main import main
from opdlm.config.loader import read_recipe
from opdlm.config.recipes import FORMER_RECIPES, bundled_recipes
from opdlm.config.rules import check_config, load_config
from opdlm.config.schedules import num_updates_of
from opdlm.decoding import generate as engine
from opdlm.decoding.rollout import Prompt, Rollout
from opdlm.distill import costs as costs
from opdlm.distill import trainer as trainer
from opdlm.distill.plan import GIB, ConversionPlan, file_lines, make_plan
from opdlm.modeling import cpu_linear as cpu_linear

RECIPES = {name: path for name, path in bundled_recipes().items() if not name.startswith("tiny")}
QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960}


def qwen3_sizes(hidden: int, inner: int, layers: int, heads: int, *, tied: bool = True) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return QWEN3 | sizes | {"num_attention_heads": heads, "tie_word_embeddings": tied}


REAL: dict[str, tuple[str, float, dict[str, Any]]] = {
    "Qwen/Qwen3-0.6B": ("qwen3", 596.0, qwen3_sizes(1024, 3072, 28, 16)),
    "Qwen/Qwen3-1.7B": ("qwen3", 1720.6, qwen3_sizes(2048, 6144, 28, 16)),
    "Qwen/Qwen3-4B": ("qwen3", 4022.5, qwen3_sizes(2560, 9728, 36, 32)),
    "Qwen/Qwen3-8B": ("qwen3", 8190.7, qwen3_sizes(4096, 12288, 36, 32, tied=False)),
    "meta-llama/Llama-3.2-1B-Instruct": (
        "llama",
        1235.8,
        {
            **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
            **{"max_position_embeddings": 131072},
        },
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        "smollm3",
        3075.1,
        {
            **{
                "vocab_size": 128256,
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
            },
            **{"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 65536},
        },
    ),
    "google/gemma-3-1b-it": (
        "gemma3_text",
        999.9,
        {
            **{"vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
            **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512},
        },
    ),
}
"""Family, millions of parameters and shape, as the checkpoints' config.json and cards have them."""


HARDWARE = {
    "preserve_lora": dict.fromkeys(REAL, "24 GB"),
    "sdar_full": {
        **{"Qwen/Qwen3-0.6B": "40 GB", "Qwen/Qwen3-1.7B": "80 GB", "Qwen/Qwen3-4B": "141 GB"},
        **{"Qwen/Qwen3-8B": "two or more GPUs", "meta-llama/Llama-3.2-1B-Instruct": "40 GB"},
        **{"HuggingFaceTB/SmolLM3-3B": "80 GB", "google/gemma-3-1b-it": "40 GB"},
    },
}
"""What the header of a recipe says about each model."""
VARIANTS = {
    "sdar_full": ("loss.top_k=16", "loss.tail=false"),
    "preserve_lora": ("rollout.decode.batch_size=32",),
}
"""What the header of a recipe says may be changed."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`NAME/config.json` for every model of a recipe, tiny checkpoints of their families, and prompts."""
    root = tmp_path_factory.mktemp("recipes")
    for model, (family, _, sizes) in REAL.items():
        AutoConfig.for_model(family, **sizes).save_pretrained(root / model)
        if not (root / family).exists():
            write_checkpoint(root / family, family, max_position_embeddings=256)
    write_data(root)
    return root


def header_of(name: str) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), RECIPES[name].read_text().splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


@pytest.mark.parametrize("model", REAL)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned_at_its_real_size_without_weights(name: str, model: str, place: Path) -> None:
    plan = make_plan(load_config(RECIPES[name], [f"model.path={place / model}"]))
    family, millions, _ = REAL[model]
    assert plan.sizes.family == family
    assert plan.sizes.total / 1e6 == pytest.approx(millions, abs=0.1)
    hardware = HARDWARE[name][model]
    assert hardware in header_of(name)
    if hardware.endswith("GB"):
        assert plan.peak < 0.95e9 * int(hardware.removesuffix(" GB"))
    else:
        assert plan.peak > 141e9


@pytest.mark.parametrize("model", [model for model in REAL if not model.endswith("8B")])
def test_the_larger_rollout_batch_of_a_header_fits(model: str, place: Path) -> None:
    overrides = [f"model.path={place / model}", *VARIANTS["preserve_lora"]]
    assert make_plan(load_config(RECIPES["preserve_lora"], overrides)).peak < 0.95 * 24e9


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_the_command_the_hardware_and_that_nobody_has_run_it(name: str) -> None:
    header = header_of(name)
    for text in (
        f"Command: opdlm convert {name} model.path=",
        "Hardware",
        "Untested at size",
        *VARIANTS[name],
    ):
        assert text in header
    assert "hours and scores are not known" in header


@pytest.mark.parametrize("family", sorted({family for family, *_ in REAL.values()}))
@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, ()) for name in RECIPES), *((name, VARIANTS[name]) for name in ["sdar_full"])],
)
def test_a_recipe_runs_two_steps_on_a_tiny_model_of_each_family(
    name: str, changes: tuple[str, ...], family: str, place: Path, tmp_path: Path
) -> None:
    """Everything stays as the recipe has it but the paths and the sizes."""
    overrides = [
        *(f"model.path={place / family}", f"data.path={place / 'prompts.jsonl'}", f"output_dir={tmp_path}"),
        *(
            "data.config=",
            "data.prompt_column=prompt",
            "rollout.prompts_per_step=4",
            "rollout.decode.batch_size=4",
        ),
        *("rollout.decode.max_new_tokens=8", "train.rows_per_update=2", "train.num_steps=2"),
        *("rollout.start_new_tokens=4", "rollout.ramp_steps=2"),
    ]
    assert main(["convert", str(RECIPES[name]), *overrides, *changes]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss_tokens"] > 0 for row in rows)
    assert (tmp_path / "model" / "config.json").is_file()


def test_recipes_differ_by_method_and_not_by_model() -> None:
    """Copies drift apart: another model or another text is an override, not another file."""
    flat = [load_config(path).flat() for path in RECIPES.values()]
    for one, other in itertools.combinations(flat, 2):
        different = {key for key in one if one[key] != other[key]}
        assert "format.name" in different or "lora.enabled" in different


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete_and_its_output_is_named_after_it(name: str) -> None:
    values = read_recipe(RECIPES[name])
    assert values["output_dir"] == f"runs/{name}"
    assert values["model"]["path"] in REAL
    check_config(load_config(RECIPES[name]))


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("qwen3_4b_lora_24gb", "preserve_lora model.path=Qwen/Qwen3-4B"),
        ("qwen3_0.6b_math_thinking", "sdar_full model.path=Qwen/Qwen3-0.6B"),
        ("gemma3_1b", "preserve_lora model.path=google/gemma-3-1b-it"),
    ],
)
def test_the_name_of_a_recipe_that_held_one_model_leads_to_the_present_one(
    former: str, present: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["convert", former], ["recipes", former]):
        assert main(command) == 2
        assert f"Did you mean {present}?" in capsys.readouterr().err


def test_every_former_name_leads_to_a_recipe_and_a_model() -> None:
    for present in FORMER_RECIPES.values():
        name, *overrides = present.split()
        assert name in bundled_recipes() or name in bundled_recipes("train")
        assert all(override.removeprefix("model.path=") in REAL for override in overrides)


def test_a_launch_file_is_listed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "launch  fsdp2 " in capsys.readouterr().out
    assert main(["recipes", "fsdp2", str(tmp_path / "mine.yaml")]) == 0
    assert (tmp_path / "mine.yaml").read_text() == bundled_recipes("accelerate")["fsdp2"].read_text()


PROMPT, RESPONSE, ROWS = 24, 40, 4


def one_step(folder: Path, kind: str, *overrides: str) -> tuple[trainer.Run, list[Rollout], ConversionPlan]:
    """A run over a random model, full-length rollouts for one update, and the plan of that step."""
    base = qwen3(512, hidden_size=64, intermediate_size=192, num_hidden_layers=4, head_dim=16)
    base = base.to(torch.bfloat16 if "model.dtype=bfloat16" in overrides else torch.float32)
    base.config.save_pretrained(folder / "model")
    options = [
        *(f"model.path={folder / 'model'}", f"output_dir={folder / 'run'}", "lora.r=4", "lora.alpha=8"),
        *(
            f"rollout.prompts_per_step={ROWS}",
            f"rollout.decode.max_new_tokens={RESPONSE}",
            "train.num_steps=1",
        ),
        *(
            f"train.rows_per_update={ROWS}",
            f"train.micro_batch_rows={ROWS // 2}",
            "states.selection=one_per_block",
        ),
        *(f"data.max_prompt_tokens={PROMPT}", f"lora.enabled={kind == 'lora'}".lower()),
        f"format.name={'sdar' if kind == 'sdar' else 'preserve'}",
    ]
    config = load_config(None, [*options, *overrides])
    rollouts = [make_rollout(PROMPT, RESPONSE, "absolute", seed) for seed in range(ROWS)]
    run = trainer.start_run(make_lm(kind, base=base), [Prompt(ids=(1,), index=0)], config)
    return run, rollouts, make_plan(config)


MEMORY_FACTOR, FLOP_FACTOR = 1.25, 1.2


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in ("lora", "copy", "sdar") for dtype in ("float32", "bfloat16")],
)
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_the_memory_estimate_of_training_holds_for_a_real_update(
    kind: str, dtype: str, checkpointing: str, tmp_path: Path
) -> None:
    """Gradients, teacher's states, loss and activations, against the tensors that one update makes."""
    options = [f"train.gradient_checkpointing={checkpointing}", f"model.dtype={dtype}"]
    run, rollouts, plan = one_step(tmp_path, kind, *options)
    chosen = list(range(ROWS))
    trainer.update(run, rollouts, chosen, "one_per_block")  # makes the moments
    with LiveBytes() as live:
        trainer.update(run, rollouts, chosen, "one_per_block")
    planned = sum(
        costs.training_memory(plan.config, plan.sizes, costs.longest_row(plan.config, plan.sizes, 0)).values()
    )
    print(kind, checkpointing, live.peak, planned / live.peak)
    assert live.peak / MEMORY_FACTOR < planned < live.peak * MEMORY_FACTOR


@pytest.mark.parametrize("pairs", [2**25, PROMPT * 16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["lora", "sdar"])
def test_the_memory_estimate_of_rollouts_holds_for_real_decoding(
    kind: str, temperature: float, pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in one forward and in parts; every row at its cap."""
    for module in (engine, costs):
        monkeypatch.setattr(module, "PREFILL_PAIRS", pairs)
    options = [f"rollout.decode.temperature={temperature}", "rollout.decode.batch_size=16"]
    run, _, plan = one_step(tmp_path, kind, *options, "rollout.prompts_per_step=16")
    run.model.spec = replace(run.model.spec, stop_token_ids=())
    with LiveBytes() as live:
        engine.generate(run.model, [(1,) * PROMPT] * 16, run.config.rollout.decode)
    planned = sum(size for part, size in plan.memory.items() if part.startswith("rollout:"))
    print(kind, temperature, pairs, live.peak, planned / live.peak, plan.memory)
    assert live.peak / MEMORY_FACTOR < planned < live.peak * MEMORY_FACTOR


@pytest.mark.parametrize(
    ("kind", "objective"), [("lora", "opd"), ("copy", "opd"), ("sdar", "opd"), ("sdar", "sft")]
)
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_the_flops_of_training_hold_for_a_real_update(
    kind: str, objective: str, checkpointing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear, "ONEDNN", False)  # the counter does not know oneDNN's kernel
    options = (f"train.gradient_checkpointing={checkpointing}", "train.micro_batch_rows=1")
    options += (f"loss.objective={objective}",)
    run, rollouts, plan = one_step(tmp_path, kind, *options)  # short packed rows read each other's keys
    math_kernel = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused kernel
    with math_kernel, FlopCounterMode(display=False) as counter:
        trainer.update(run, rollouts, list(range(ROWS)), "one_per_block")
    measured = counter.get_total_flops()
    planned = sum(plan.step_flops[part] for part in ("teacher", "student", "heads"))
    print(kind, objective, checkpointing, measured, planned / measured)
    assert measured / FLOP_FACTOR < planned < measured * FLOP_FACTOR


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["lora", "copy", "sdar"])
def test_weights_and_the_state_of_the_optimiser_are_counted_exactly(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    run, rollouts, plan = one_step(tmp_path, kind, f"model.dtype={dtype}")
    trainer.update(run, rollouts, [0, 1, 2, 3], "one_per_block")
    mask, weights = run.model.mask_embedding, list(run.model.parameters())
    in_memory = sum(p.nbytes for p in weights) - (0 if mask is None else mask.nbytes)
    assert plan.memory["weights"] == in_memory
    assert plan.sizes.trained == sum(p.numel() for p in weights if p.requires_grad)
    state = [t for s in run.optimizer.state_dict()["state"].values() for t in s.values() if t.dim() > 0]
    of_weights = {p.untyped_storage().data_ptr() for p in weights}  # float32 weights are not copied
    expected = sum(t.nbytes for t in state if t.untyped_storage().data_ptr() not in of_weights)
    assert sum(costs.optimizer_memory(run.config, plan.sizes).values()) == expected


def test_tokens_and_updates_follow_the_schedule_by_hand(place: Path) -> None:
    config = load_config(
        RECIPES["sdar_full"],
        [
            *(f"model.path={place / 'Qwen/Qwen3-0.6B'}", "train.num_steps=3", "rollout.prompts_per_step=8"),
            *("rollout.start_new_tokens=8", "rollout.decode.max_new_tokens=24", "rollout.ramp_steps=2"),
            "rollout.ramp=linear",
        ],
    )
    plan = make_plan(config)
    assert plan.response_tokens == 8 * (16 + 24 + 24)
    assert num_updates_of(config) == 3
    assert [costs.response_cap(config, step) for step in range(3)] == [16, 24, 24]


def test_asynchronous_rollouts_take_a_copy_of_what_is_trained_and_their_cache_stays(place: Path) -> None:
    options = [f"model.path={place / 'qwen3'}", "train.rows_per_update=4"]
    one, two = (
        make_plan(load_config(None, [*options, f"rollout.asynchronous={x}"])) for x in ("false", "true")
    )
    assert dict(two.memory.items() - one.memory.items()) == {"asynchronous student": one.sizes.trained_bytes}
    assert two.peak == pytest.approx(sum(two.memory.values()))
    assert one.peak < sum(one.memory.values())


def test_vllm_keeps_a_second_copy_of_the_weights_and_its_cache(place: Path) -> None:
    options = [f"model.path={place / 'qwen3'}", "train.rows_per_update=4"]
    own, vllm = (make_plan(load_config(None, [*options, f"rollout.engine={x}"])) for x in ("own", "vllm"))
    assert dict(vllm.memory.items() - own.memory.items()) == {"weights in vLLM": 4.0 * own.sizes.total}
    assert vllm.peak == pytest.approx(sum(vllm.memory.values()))


def test_a_dry_run_prints_everything_and_writes_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = str(RECIPES["sdar_full"])
    growth = [
        "format.block_size=8",
        "format.block_growth=[[0,4],[50,8]]",
        "rollout.decode.denoising_steps=null",
    ]
    model = shutil.copytree(place / "Qwen/Qwen3-8B", tmp_path / "model")  # its real shape, a tiny tokenizer
    for file in (place / "qwen3").glob("tokenizer*"):
        shutil.copy(file, model)
    overrides = [f"model.path={model}", f"data.path={place / 'prompts.jsonl'}", "data.config=", "data.split="]
    overrides += [*growth, "rollout.warm_start_steps=10", "data.prompt_column="]
    assert main(["convert", recipe, "--dry-run", *overrides]) == 0
    printed = capsys.readouterr().out
    for text in (
        *("8,190.7 M parameters", "8,190.7 M trained (full copy)", "weights ", "AdamW moments", "gradients"),
        *("activations are", "FLOPs", "response tokens", "steps 0-9: the teacher's responses, block size 4"),
        *("steps 10-49: the student's", "steps 50-199: the student's responses, block size 8"),
        *("runs/sdar_full/checkpoint-N", "runs/sdar_full/model", "not trained on"),
        *("fits: no, ", "GiB free", "hours here: about ", "GFLOP/s decoding"),
    ):
        assert text in printed, text
    assert list(tmp_path.iterdir()) == [model]
    missing = f"data.path={tmp_path / 'missing.jsonl'}"
    assert main(["convert", recipe, "--dry-run", *overrides, missing]) == 2
    assert "missing.jsonl does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nobody/has-this-model", "is no folder with a config.json, and neither cache nor hub has one"),
        ("./nowhere", "does not exist. Give a checkpoint folder or a hub id."),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(
    target: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", target, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"opdlm: model.path ({target}) {reason}")


def test_what_a_run_writes_was_planned(place: Path, tmp_path: Path) -> None:
    """The planned sizes of checkpoint and result, against the files of a real run."""
    options = [
        *(f"model.path={place / 'qwen3'}", f"data.path={place / 'prompts.jsonl'}", f"output_dir={tmp_path}"),
        *("rollout.prompts_per_step=4", "rollout.decode.max_new_tokens=8", "train.rows_per_update=4"),
        *("train.num_steps=1", "train.ema_decay=0.9", "data.max_prompt_tokens=64"),
    ]
    config = with_known_dtype(convert_settings(str(place / "qwen3"), options[1:]))
    lines = file_lines(config, costs.measure_sizes(config))
    assert main(["convert", str(place / "qwen3"), *options[1:]]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"config.yaml", "metrics.jsonl", "checkpoint-1", "model"}
    assert all(any(name.replace("-1", "-N") in line for line in lines) for name in written)
    sizes = costs.measure_sizes(config)
    tensors = sum(f.stat().st_size for f in (tmp_path / "checkpoint-1").glob("*.safetensors"))
    assert tensors == pytest.approx(3 * sizes.trained_bytes + 4 * sizes.trained, rel=0.25)
    assert GIB == 1024**3
