"""The adapter of lm-evaluation-harness: parity with its own Hugging Face class, on local tasks only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import write_rows

os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from opdlm.checkpoints.load import max_total_tokens
from opdlm.cli.main import main
from opdlm.config.sections import resolve_path
from opdlm.data.rows import read_json
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.errors import ConfigError
from opdlm.evaluation import lm_eval as harness
from opdlm.evaluation.likelihood import ar_response_nll, nll_bound
from opdlm.objectives.states import text_to_rollout

TASKS = ("local_generation", "local_choice")
GENERATION = """task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 60, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICE = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: 1
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/model`, and `tasks/` with YAML over a local file; wrong choices look like right ones."""
    root = tmp_path_factory.mktemp("harness")
    rows = [row for _, row in read_json(Path(resolve_path("bundled:eval.jsonl")))][::13]
    answers = [row["answer"] for row in rows]
    for row, other in zip(rows, answers[1:] + answers[:1], strict=True):
        row["choices"] = [other, row["answer"], row["answer"][::-1]]
    path = write_rows(root / "rows.jsonl", rows)
    (root / "tasks").mkdir()
    (root / "tasks" / "generation.yaml").write_text(GENERATION.format(path=path))
    (root / "tasks" / "choice.yaml").write_text(CHOICE.format(path=path))
    small = ["train.num_steps=1", "rollout.prompts_per_step=8", "train.rows_per_update=8", "data.limit=8"]
    assert main(["convert", "tiny", f"output_dir={root / 'run'}", "eval.path=", *small]) == 0
    return root


def of_task(results: dict[str, Any], task: str) -> dict[str, float]:
    numbers = results[task].items()
    return {name: value for name, value in numbers if isinstance(value, float) and "stderr" not in name}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_teachers_scores_are_those_of_lm_eval_hf_to_the_last_digit(place: Path, batch_size: int) -> None:
    options: dict[str, Any] = {"apply_chat_template": True, "bootstrap_iters": 0}
    manager = TaskManager(include_path=str(place / "tasks"))
    reference = simple_evaluate(
        model="hf",
        model_args={"pretrained": resolve_path("bundled:teacher"), "dtype": "float32"},
        tasks=list(TASKS),
        task_manager=manager,
        batch_size=batch_size,
        device="cpu",
        **options,
    )
    ours = harness.run_tasks(
        str(place / "run" / "model"),
        TASKS,
        ["ar", "lossless"],
        include_path=str(place / "tasks"),
        model_options={"batch_size": batch_size},
        **options,
    )
    for task in TASKS:
        expected = of_task(reference["results"], task)
        assert of_task(ours["ar"], task) == expected == of_task(ours["lossless"], task)
        assert all(value > 0 for value in expected.values())


def test_likelihoods_are_the_ar_models_or_the_students_bound(place: Path) -> None:
    pairs = [([5, 6, 7, 8], [9, 10, 11]), ([5, 6], [9, 10, 11, 12, 9])]
    requests = [(("", ""), *pair) for pair in pairs]
    folder = str(place / "run" / "model")
    exact = harness.harness_class()(folder, mode="ar", batch_size=2)
    rows = [text_to_rollout(*pair, exact.diffusion.spec) for pair in pairs]
    scores = torch.tensor([score for score, _ in exact._loglikelihood_tokens(requests, disable_tqdm=True)])
    torch.testing.assert_close(scores, -ar_response_nll(exact.diffusion, rows), rtol=1e-5, atol=1e-4)
    bound = harness.harness_class()(folder, mode="static", batch_size=2, likelihood_samples=4)
    scores = torch.tensor([score for score, _ in bound._loglikelihood_tokens(requests)])
    torch.testing.assert_close(scores, -nll_bound(bound.diffusion, rows, 4).nats_B)


def test_a_continuation_is_greedy_where_the_mode_decodes_it(place: Path) -> None:
    model = harness.harness_class()(str(place / "run" / "model"), mode="static", batch_size=2)
    (rollout,) = generate(model.diffusion, [[5, 6, 7]], DecodeConfig(mode="static", max_new_tokens=6))
    decoded = list(rollout.text_ids)
    other = [*decoded[:-1], decoded[-1] - 1]
    scores = model._loglikelihood_tokens([(("", ""), [5, 6, 7], decoded), (("", ""), [5, 6, 7], other)])
    assert [greedy for _, greedy in scores] == [True, False]


def test_settings_that_cannot_act_are_refused(place: Path) -> None:
    folder = str(place / "run" / "model")
    with pytest.raises(ConfigError, match="ar_accept_threshold only acts in modes static and threshold"):
        harness.harness_class()(folder, mode="lossless", ar_accept_threshold=0.5)
    with pytest.raises(ConfigError, match="confidence_threshold only acts in mode threshold"):
        harness.harness_class()(folder, mode="static", confidence_threshold=0.5)
    with pytest.raises(ConfigError, match="must be one of"):
        harness.harness_class()(folder, mode="beam")
    with pytest.raises(ConfigError, match="num_beams"):
        harness.with_sampling(DecodeConfig(), {"num_beams": 2}, 8)
    with pytest.raises(ConfigError, match="no task is called nothing"):
        harness.run_tasks(folder, ["nothing"], ["ar"])


def test_decode_settings_act_in_every_mode_that_reads_them(place: Path) -> None:
    decode = DecodeConfig(confidence_threshold=0.5, ar_accept_threshold=0.3, temperature=1.0)
    model = harness.harness_class()(str(place / "run" / "model"), mode="threshold", decode=decode)
    assert (model.decoding.confidence_threshold, model.decoding.ar_accept_threshold) == (0.5, 0.3)
    assert harness.with_sampling(model.decoding, {}, 8).temperature == 0


def test_a_context_that_does_not_fit_is_cut_from_the_left(place: Path) -> None:
    model = harness.harness_class()(str(place / "run" / "model"), mode="static", batch_size=1)
    room = int(max_total_tokens(model.diffusion)) - 2
    long = [5 + i % 7 for i in range(room + 40)]
    scores = [model._loglikelihood_tokens([(("", ""), ids, [9, 10])]) for ids in (long, long[-room:])]
    assert scores[0] == scores[1]


def test_the_command_writes_the_harness_results(place: Path, tmp_path: Path) -> None:
    overrides = ["eval.modes=static", "eval.limit=3", "eval.decode.batch_size=4"]
    overrides += ["eval.decode.denoising_steps=2"]
    options = ["--tasks", ",".join(TASKS), "--include-path", str(place / "tasks"), "--out", str(tmp_path)]
    assert main(["eval", str(place / "run" / "model"), *overrides, *options]) == 0
    results = json.loads((tmp_path / "lm_eval.json").read_text())
    assert set(results["results"]) == {"static"}
    assert results["settings"]["decode"]["denoising_steps"] == 2
    assert "temperature" not in results["settings"]["decode"]
    assert set(results["results"]["static"]) == set(TASKS)
