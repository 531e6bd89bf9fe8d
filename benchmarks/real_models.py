"""What the conversion of a real model keeps, and how fast it is: docs/results/real/NAME.json.

    python benchmarks/real_models.py qwen_coder --models MODELS --data DATA --out runs/real

MODELS holds checkpoint folders of these names, DATA the public files humaneval/HumanEval.jsonl,
mbpp/mbpp.jsonl, gsm8k/{train,test}.jsonl and mt_bench/question.jsonl. The questions were not trained on.
HumanEval and MBPP run code that the model writes, in a limited process. The same command continues what was
interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import opdlm
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.draft_policy import MOST_DRAFTS
from opdlm.evaluation.retention import versions
from opdlm.evaluation.speed import LOOKUP_NAME, LOOKUP_TOKENS, NO_COPIES
from opdlm.files import write_atomic
from opdlm.training.metrics import read_metrics

Rows = list[dict[str, Any]]

ONE_BLOCK = "Answer with one Python code block that holds the whole program, with imports, and nothing else."
MBPP_TEST, MBPP_REST = range(11, 511), range(511, 975)
MBPP_STEP = 5
"""Of the test tasks, every fifth is a question."""
CAP, CAP_UNSCORED = 256, 128
"""Tokens of a response: to questions with tests, and to those that are only compared with the original."""
NUM_UNSCORED = 24
"""Of each file; and of questions with tests, those that are decoded in the fewest forwards as well."""
BENCH_BATCHES, BENCH_TOKENS = (1, 8), 64


TITLES = {"humaneval": "HumanEval", "mbpp": "MBPP", "gsm8k": "GSM8K", "mt_bench": "MT-bench"}


@dataclass(frozen=True, slots=True)
class Plan:
    """Which prompts a model is converted on, and what it is asked then."""

    prompts: str
    questions: tuple[str, ...]


PLANS = {
    "qwen_coder": Plan("mbpp_rest", ("humaneval", "mbpp")),
    "smollm2": Plan("gsm8k_train", ("gsm8k", "mt_bench")),
    "gemma3": Plan("gsm8k_train", ("gsm8k",)),
}


def read(data: Path, name: str) -> Rows:
    return [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]


def mbpp(data: Path, tasks: range) -> Iterator[dict[str, Any]]:
    """Tasks with these numbers; the tests are part of the prompt, as in the paper (arXiv 2108.07732)."""
    for row in read(data, "mbpp/mbpp.jsonl"):
        if row["task_id"] in tasks:
            tests = "\n".join(row["test_list"])
            prompt = f"{row['text']}\nYour code should pass these tests:\n{tests}"
            yield {"prompt": prompt, "answer": f"{row['test_setup_code']}\n{tests}"}


def make(data: Path, name: str) -> Rows:
    """The rows of one prompt or question file. ValueError for a name that is none of them."""
    match name:
        case "mbpp_rest":
            return [{"prompt": row["prompt"]} for row in mbpp(data, MBPP_REST)]
        case "mbpp":
            rows = list(mbpp(data, MBPP_TEST))[::MBPP_STEP]
            return [row | {"prompt": f"{row['prompt']}\n{ONE_BLOCK}"} for row in rows]
        case "humaneval":
            return [
                {
                    "prompt": f"Complete this function. {ONE_BLOCK}\n```python\n{row['prompt']}```",
                    "answer": f"{row['test']}\ncheck({row['entry_point']})",
                }
                for row in read(data, "humaneval/HumanEval.jsonl")
            ]
        case "gsm8k_train":
            return [{"prompt": row["question"]} for row in read(data, "gsm8k/train.jsonl")]
        case "gsm8k":
            return [{"prompt": row["question"]} for row in read(data, "gsm8k/test.jsonl")[:NUM_UNSCORED]]
        case "mt_bench":
            return [
                {"prompt": row["turns"][0]}
                for row in read(data, "mt_bench/question.jsonl")[::3][:NUM_UNSCORED]
            ]
    raise ValueError(name)


def write_rows(path: Path, rows: Rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def evaluate(folder: Path, questions: Rows, path: Path, out: Path, batch_size: int) -> dict[str, Any]:
    """The report on the questions: nothing replaced by the AR model in static and threshold. Where a response
    is scored, and long, only some are decoded losslessly in the fewest forwards.
    """
    has_tests = "answer" in questions[0]
    common = [
        *(["eval.scoring=code", "eval.run_code=true"] if has_tests else []),
        "eval.agreement=false",
        "eval.timed_prompts=0",
        "eval.decode.ar_accept_threshold=0",
        f"eval.decode.max_new_tokens={CAP if has_tests else CAP_UNSCORED}",
        f"eval.decode.batch_size={batch_size}",
    ]
    fewest = f"eval.decode.forward_overhead={MOST_DRAFTS}"
    all_modes: tuple[Mode, ...] = ("static", "threshold", "lossless")
    if not has_tests:
        modes = report_of(folder, questions, path, out, all_modes, [*common, fewest])
        return {"scored": False, "modes": modes}
    modes = report_of(folder, questions, path, out, all_modes, common)
    some, place = questions[:: len(questions) // NUM_UNSCORED][:NUM_UNSCORED], path.with_suffix(".some.jsonl")
    lossless = report_of(folder, some, place, out / "fewest_forwards", ("lossless",), [*common, fewest])[-1]
    return {"scored": True, "modes": modes, "fewest_forwards": lossless}


def report_of(
    folder: Path, questions: Rows, path: Path, out: Path, modes: tuple[Mode, ...], overrides: list[str]
) -> Rows:
    """The decodings of a report, the teacher's first."""
    if not (out / "retention.json").exists():
        opdlm.evaluate(folder, data=write_rows(path, questions), modes=modes, out=out, overrides=overrides)
    report: dict[str, Any] = json.loads((out / "retention.json").read_text())
    return [report["teacher"], *report["student"]]


def curve(metrics: Rows) -> Rows:
    """What lossless decoding of the held-back prompts gave while the run trained."""
    keys = ("step", "rollout_tokens", "held_back_tokens_per_forward")
    return [{key: row[key] for key in keys} for row in metrics if keys[-1] in row]


def table(result: dict[str, Any]) -> str:
    """The result as README shows it: of each decoding what it kept, and its speed."""
    names = list(result["questions"])
    speed = {(row["name"], row["batch_size"]): row for row in result["speed"]["rows"]}
    kept = [
        f"{TITLES[name]}, {'pass@1' if result['questions'][name]['scored'] else 'prefix'}" for name in names
    ]
    head = ["decoding", *kept, *(f"{TITLES[name]}, tokens per forward" for name in names)]
    head += [f"× AR, batch {size} (tokens per forward)" for size in BENCH_BATCHES]
    lines = [row_of(head), row_of(["---", *["---:"] * (len(head) - 1)])]
    for number, mode in enumerate(next(iter(result["questions"].values()))["modes"]):
        asked = [result["questions"][name] for name in names]
        modes = [one["modes"][number] for one in asked]
        cells = [score(mode, one["scored"]) for mode, one in zip(modes, asked, strict=True)]
        is_lossless = modes[0]["name"] == "lossless"
        cells += [
            tokens_of(one.get("fewest_forwards", mode) if is_lossless else mode)
            for mode, one in zip(modes, asked, strict=True)
        ]
        name = "ar" if number == 0 else mode["name"].partition(",")[0]
        timed = "lossless" + NO_COPIES if name == "lossless" else name
        cells += [speed_of(speed.get((timed, size))) for size in BENCH_BATCHES]
        label = {"ar": "the original", "lossless": "lossless, student's drafts"}.get(name, name)
        lines.append(row_of([label, *cells]))
    others = {"lossless": "lossless, also copied drafts"}
    others |= {
        f"{LOOKUP_NAME}, {n} tokens": f"{LOOKUP_NAME} of transformers, {n} tokens" for n in LOOKUP_TOKENS
    }
    for name, label in others.items():
        cells = [speed_of(speed.get((name, size))) for size in BENCH_BATCHES]
        lines.append(row_of([label, *["–"] * 2 * len(names), *cells]))
    return "\n".join(lines)


def speed_of(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['over_fastest_ar']:.2f} ({row['tokens_per_forward']:.2f})"


def tokens_of(mode: dict[str, Any]) -> str:
    """Tokens per forward, and where a report counted them the share of all tokens that the AR model wrote."""
    share = mode.get("from_ar")
    return f"{mode['tokens_per_forward']:.2f}" + ("" if share is None else f" ({100 * share:.0f} % by AR)")


def row_of(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def score(mode: dict[str, Any], is_scored: bool) -> str:
    """pass@1 with its 95 % interval, else the share of the teacher's tokens before the first difference."""
    if not is_scored:
        return f"{100 * mode['common_prefix']:.0f} %"
    low, high = mode["accuracy_interval"]
    return f"{100 * mode['accuracy']:.1f} % ({100 * low:.0f}–{100 * high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(PLANS))
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--results", type=Path, default=Path("docs/results/real"))
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    plan, run = PLANS[options.name], options.out / options.name
    prompts = write_rows(run.with_suffix(".prompts.jsonl"), make(options.data, plan.prompts))
    folder = opdlm.convert(options.models / options.name, data=prompts, output_dir=run)
    asked = {}
    for name in plan.questions:
        path, out = run.with_suffix(f".{name}.jsonl"), run.with_suffix(f".{name}")
        asked[name] = evaluate(folder, make(options.data, name), path, out, options.batch_size)
    speed = run.with_suffix(".bench")
    if not (speed / "bench.json").exists():
        opdlm.bench(
            folder,
            prompts=run.with_suffix(f".{plan.questions[0]}.jsonl"),
            config=DecodeConfig(max_new_tokens=BENCH_TOKENS, ar_accept_threshold=0.0),
            batch_sizes=BENCH_BATCHES,
            limit=max(BENCH_BATCHES),
            repeats=2,
            vllm="never",
            out=speed,
        )
    result = {
        "model": options.name,
        "trained_on": plan.prompts,
        "run": json.loads((run / "model" / "all_results.json").read_text()),
        "curve": curve(read_metrics(run / "metrics.jsonl")),
        "questions": asked,
        "speed": json.loads((speed / "bench.json").read_text()),
        "versions": versions(),
    }
    write_atomic(options.results / f"{options.name}.json", json.dumps(result, indent=1))
    print(table(result))


if __name__ == "__main__":
    main()
