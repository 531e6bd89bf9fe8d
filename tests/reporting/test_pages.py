"""The report's pages, seeds, trade-off curve and comparisons, against its numbers and raw generations."""

from __future__ import annotations

import io
import json
import shutil
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data, write_rows

from opdlm.checkpoints.load import load
from opdlm.cli.main import main
from opdlm.config.rules import load_config
from opdlm.data.prompts import load_tasks
from opdlm.evaluation.evaluate import decode_tasks
from opdlm.reporting.pages import Page
from opdlm.reporting.plots import divergence_grid, pareto_front
from opdlm.reporting.tables import Table, print_table
from opdlm.training.run_folder import owned

HOSTILE = "<script>alert('x')</script> & <b>|"
PROMPTS = {"add": [f"add {i} {7 * i}" for i in range(6)], HOSTILE: [f"copy <b{i}>" for i in range(6)]}


class Reader(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = {"src", "srcset", "href", "data", "action", "poster"}
        self.sources += [value or "" for name, value in attributes if name in loading]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("td", "th") and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data.strip("\n")
        self.texts.append(data)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`preserve/model` and `sdar/model`; of `tasks.jsonl` the teacher answers five of six per skill."""
    root = tmp_path_factory.mktemp("report")
    write_data(root)
    rows = [{"prompt": p, "skill": skill} for skill, prompts in PROMPTS.items() for p in prompts]
    open_tasks = write_rows(root / "open.jsonl", rows)
    settings = tiny_overrides(write_checkpoint(root / "teacher"), root, root / "none")[1:]
    settings += ["format.block_size=4"]
    for fmt in ("preserve", "sdar"):
        overrides = [f"output_dir={root / fmt}", f"format.name={fmt}", f"eval.path={root / 'tasks.jsonl'}"]
        if fmt == "preserve":  # its teacher says what the answers are
            assert main(["convert", str(root / "teacher"), *settings]) == 0
            command = ["eval", str(root / "none" / "model"), f"eval.path={open_tasks}"]
            assert main([*command, "--out", str(root / "open")]) == 0
            answered = [line for line in read_lines(root / "open") if line["mode"] == "teacher"]
            for i, (row, line) in enumerate(zip(rows, answered, strict=True)):
                row |= {"answer": line["response"] if i % 6 else "no", "held_out": row["skill"] == HOSTILE}
            write_rows(root / "tasks.jsonl", rows)
        assert (
            main(
                ["convert", str(root / "teacher"), *settings, *overrides, "eval.decode.ar_accept_threshold=0"]
            )
            == 0
        )
    return root


def eval_command(root: Path, out: Path, *arguments: str) -> list[str]:
    return ["eval", str(root / "preserve" / "model"), *arguments, "--out", str(out)]


def read_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def rows_of(reader: Reader, first_cell: str, index: int = 0) -> dict[str, dict[str, str]]:
    """The index-th table whose head starts so, as row name -> column -> cell (the first of equal columns)."""
    table = [t for t in reader.tables if t[0][0] == first_cell][index]
    return {row[0]: dict(reversed(list(zip(table[0], row, strict=True)))) for row in table[1:]}


def number(cell: str) -> float:
    """The first number of a cell, as `66.7 % [10.0, 90.0]`."""
    return float(cell.split()[0])


@pytest.fixture(scope="module")
def report(root: Path) -> Path:
    """One report with everything in it."""
    out = root / "whole"
    assert main(eval_command(root, out, "--thresholds", "0.0", "0.9", "1.0")) == 0
    return out


def test_the_page_loads_nothing_and_shows_hostile_text_as_text(report: Path) -> None:
    reader = Reader(report / "report.html")
    assert reader.sources and all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert not {"script", "link", "iframe", "b", "object"} & set(reader.tags)
    assert "url(" not in (report / "report.html").read_text()
    assert "viewport" in (report / "report.html").read_text()
    assert any(HOSTILE in row[0] for table in reader.tables for row in table)


def test_examples_are_escaped_and_read_back_as_they_were(tmp_path: Path) -> None:
    example = {"mode": "static", "skill": HOSTILE, "prompt": HOSTILE, "answer": None, "teacher": "</pre><i>"}
    example |= {"student": '"><img src=http://a.b>', "teacher_is_right": True, "student_is_right": False}
    Page(title=HOSTILE, examples=[example], settings={HOSTILE: "{{ 7 * 7 }}"}).write(tmp_path)
    reader = Reader(tmp_path / "report.html")
    assert not {"script", "i", "img", "b"} & set(reader.tags) and not reader.sources
    assert {HOSTILE, example["teacher"], example["student"], "{{ 7 * 7 }}"} <= set(reader.texts)


def test_every_number_of_the_page_is_that_of_the_json(report: Path) -> None:
    reader, values = Reader(report / "report.html"), read_json(report / "retention.json")
    modes = {mode["name"]: mode for mode in [values["teacher"], *values["student"]]}
    shown, responses = rows_of(reader, "mode"), rows_of(reader, "mode", 1)
    assert set(shown) == set(responses) == set(modes) == {"teacher", "static", "threshold", "lossless"}
    for name, mode in modes.items():
        shares = {"accuracy": "accuracy", "= teacher": "identical_to_teacher"}
        assert {column: number(shown[name][column]) for column in shares} == {
            column: round(100 * mode[key], 1) for column, key in shares.items()
        }
        assert number(shown[name]["seen"]) == round(100 * mode["accuracy_seen"], 1)
        assert number(shown[name]["held out"]) == round(100 * mode["accuracy_held_out"], 1)
        assert number(shown[name]["tok/fwd"]) == round(mode["tokens_per_forward"], 2)
        assert number(responses[name]["tok/step"]) == round(mode["tokens_per_step"], 2)
        assert number(responses[name]["tokens"]) == round(mode["mean_response_tokens"], 1)
        assert number(responses[name]["stopped"]) == round(100 * mode["stop_rate"], 1)
        assert number(responses[name]["repeated"]) == round(100 * mode["repetition"], 1)
    for mode in values["student"]:
        low, high = mode["against_teacher"]["all"]["retention_interval"]
        cell = f"{100 * mode['retention']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        assert shown[mode["name"]]["retention"] == cell
        paired = rows_of(reader, "mode, skills")[f"{mode['name']}, all"]
        compared = mode["against_teacher"]["all"]
        assert [paired["gained"], paired["lost"]] == [str(compared["num_gained"]), str(compared["num_lost"])]
        distance = rows_of(reader, "mode", 2)[mode["name"]]
        measured = values["agreement"][mode["name"]]
        assert number(distance["KL(teacher ‖ student), nats"]) == round(measured["teacher_kl"], 4)
    skills = rows_of(reader, "skill")
    assert number(skills["add"]["static"]) == round(100 * modes["static"]["by_skill"]["add"], 1)
    curve = rows_of(reader, "threshold")
    for point in values["trade_off"]:
        row = curve[f"{point['confidence_threshold']:g}"]
        assert number(row["accuracy"]) == round(100 * point["accuracy"], 1)
        assert number(row["tok/fwd"]) == round(point["tokens_per_forward"], 2)


def test_prompts_without_answers_get_a_report_of_agreement_with_the_teacher(root: Path) -> None:
    values, page = read_json(root / "open" / "retention.json"), (root / "open" / "report.md").read_text()
    assert values["num_answered"] == 0 and values["teacher"]["accuracy"] == 1.0
    assert "the student alone repeats" in page and "of their tokens up to the first difference" in page


def test_markdown_and_html_hold_the_same_tables(report: Path) -> None:
    reader = Reader(report / "report.html")
    lines = (report / "report.md").read_text().splitlines()
    cells = [cut_row(line) for line in lines if line.startswith("| ") and not line.startswith("| ---")]
    assert cells == [list(row) for table in reader.tables for row in table]


def cut_row(line: str) -> list[str]:
    marked = line.replace("\\|", "\0")
    return [cell.strip().replace("\0", "|") for cell in marked.strip("|").split(" | ")]


def test_two_evaluations_write_the_same_numbers_and_keep_times_apart(root: Path, tmp_path: Path) -> None:
    for out in ("first", "second"):
        assert main(eval_command(root, tmp_path / out, "--temperature", "1", "--seeds", "2")) == 0
    first, second = (tmp_path / out / "retention.json" for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert "second" not in first.read_text()  # no times
    assert set(read_json(tmp_path / "first" / "timing.json")) == {
        "teacher",
        "static",
        "threshold",
        "lossless",
        "speed",
    }
    settings = read_json(first)["settings"]
    assert settings["seeds"] == [0, 1] and settings["versions"]["torch"]
    assert (
        settings["config"]["eval"]["decode"]["temperature"] == 1.0
        and settings["config"]["train"]["num_steps"] == 2
    )


def test_seeds_are_independent_samples_and_their_spread_is_that_of_the_raw_responses(
    root: Path, tmp_path: Path
) -> None:
    command = eval_command(root, tmp_path, "--modes", "static,lossless", "--temperature", "1", "--seeds", "3")
    assert main(command) == 0
    values, lines = read_json(tmp_path / "retention.json"), read_lines(tmp_path)
    assert [mode["name"] for mode in values["student"]] == ["static", "lossless"]
    for name in ("teacher", "static", "lossless"):
        runs = [name, f"{name}, seed 1", f"{name}, seed 2"]
        responses = [[line["response_ids"] for line in lines if line["mode"] == run] for run in runs]
        assert len({json.dumps(r) for r in responses}) == 3
        found = values["over_seeds"][name]["tokens_per_forward"]
        per_seed = [
            sum(line["num_response"] for line in lines if line["mode"] == run)
            / sum(line["num_forwards"] for line in lines if line["mode"] == run)
            for run in runs
        ]
        assert found["by_seed"] == pytest.approx(per_seed)
        assert found["mean"] == pytest.approx(sum(per_seed) / 3)
        assert found["standard_deviation"] == pytest.approx(statistics.stdev(per_seed))
        shown = rows_of(Reader(tmp_path / "report.html"), "mode", 1)[name]["tok/fwd"]
        assert shown == f"{found['mean']:.2f} ± {found['standard_deviation']:.2f}"


def test_what_a_seed_draws_for_a_prompt_does_not_depend_on_the_others(root: Path) -> None:
    model, tokenizer = load(root / "preserve" / "model")
    config = load_config(
        root / "preserve" / "config.yaml", ["eval.decode.temperature=1", "eval.decode.batch_size=1"]
    )
    tasks = load_tasks(config.eval.path, tokenizer, model.spec.mask_token_id)
    forwards = decode_tasks(model, tasks, "threshold", config.eval, seed=5).rollouts
    backwards = decode_tasks(model, tasks[::-1], "threshold", config.eval, seed=5).rollouts
    assert [r.text_ids for r in forwards] == [r.text_ids for r in backwards[::-1]]


def test_the_trade_off_is_measured_at_each_threshold(report: Path) -> None:
    values, lines = read_json(report / "retention.json"), read_lines(report)
    points = {point["confidence_threshold"]: point for point in values["trade_off"]}
    assert set(points) == {0.0, 0.9, 1.0}
    for threshold, point in points.items():
        mine = [line for line in lines if line["mode"] == f"threshold {threshold:g}"]
        right = {
            skill: [x["response"] == x["answer"] for x in mine if x["skill"] == skill] for skill in PROMPTS
        }
        assert point["accuracy"] == pytest.approx(statistics.fmean(map(statistics.fmean, right.values())))
        forwards = sum(line["num_forwards"] for line in mine)
        assert point["tokens_per_forward"] == sum(line["num_response"] for line in mine) / forwards
    (same,) = (mode for mode in values["student"] if mode["name"] == "threshold")
    assert points[0.9]["by_skill"] == same["by_skill"]
    assert points[0.0]["tokens_per_forward"] > points[1.0]["tokens_per_forward"]


def test_several_students_stand_in_one_table(root: Path, tmp_path: Path) -> None:
    folders = [str(root / name / "model") for name in ("preserve", "sdar")]
    assert main(["eval", *folders, "--limit", "2", "--out", str(tmp_path)]) == 0
    table = rows_of(Reader(tmp_path / "report.html"), "student, mode")
    assert list(table) == [
        *("preserve, static", "preserve, threshold", "preserve, lossless", "sdar, static", "sdar, threshold")
    ]
    for student in read_json(tmp_path / "comparison.json"):
        name = student["name"]
        made = read_json(root / name / "model" / "all_results.json")
        values = read_json(tmp_path / name / "retention.json")
        assert values["teacher"]["num_prompts"] == 4
        for mode in values["student"]:
            row = table[f"{name}, {mode['name']}"]
            assert [row["format"], row["objective"]] == [f"{name} 4", "opd"]
            assert float(row["tokens seen"].replace(",", "")) == made["rollout_tokens"]
            assert number(row["accuracy"]) == round(100 * mode["accuracy"], 1)
            assert number(row["tok/fwd"]) == round(mode["tokens_per_forward"], 2)
    assert (tmp_path / "comparison.png").is_file() and (tmp_path / "sdar" / "report.html").is_file()


def test_a_run_is_drawn_while_it_runs_and_after(root: Path, tmp_path: Path) -> None:
    lines = (root / "preserve" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:30])  # the second is being written
    assert main(["report", str(tmp_path)]) == 0
    shown = rows_of(Reader(tmp_path / "report.html"), "measure")
    assert {name: number(row["value"]) for name, row in shown.items()} == {
        name.replace("_", " "): float(f"{value:.6g}") for name, value in json.loads(lines[0]).items()
    }
    assert (tmp_path / "training.png").is_file() and not (tmp_path / "retention.png").exists()
    assert main(["report", str(root / "preserve")]) == 0
    reader = Reader(root / "preserve" / "report.html")
    assert "lossless" in rows_of(reader, "mode") and len(reader.sources) == 3


def test_a_watched_page_reloads_until_the_run_ends(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "preserve" / "metrics.jsonl", tmp_path)
    page, reload = tmp_path / "report.html", '<meta http-equiv="refresh" content="1">'
    with owned(tmp_path):
        command = [sys.executable, "-m", "opdlm", "report", str(tmp_path), "--watch", "1"]
        watching = subprocess.Popen(command)
        for _ in range(600):
            if page.exists():
                break
            time.sleep(0.1)
        assert reload in page.read_text() and watching.poll() is None
    assert watching.wait(60) == 0 and reload not in page.read_text()


def test_several_runs_are_drawn_into_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drafted = {"a": [1.5, 1.25], "b": [1.0, 1.75]}
    for name, values in drafted.items():
        (tmp_path / name).mkdir()
        rows = [
            {"step": i, "seconds": 3.0, "rollout_tokens": 10 * i, "held_back_tokens_per_forward": value}
            for i, value in enumerate(values, 1)
        ]
        write_rows(tmp_path / name / "metrics.jsonl", [*rows, {"step": 3, "seconds": 1.0, name: 7.0}])
    runs = [str(tmp_path / name) for name in drafted]
    assert main(["report", *runs, "--out", str(tmp_path / "both")]) == 0
    reader = Reader(tmp_path / "both" / "report.html")
    shown = rows_of(reader, "measure")
    assert shown["b"] == {"measure": "b", runs[0]: "–", runs[1]: "7"}
    note = "Most tokens per forward on held-back prompts: "
    assert f"{note}1.50, step 1." in "".join(reader.texts) and f"{note}1.75, step 2." in "".join(reader.texts)
    assert len(reader.sources) == 1
    assert main(["report", *runs]) == 2 and "several RUNs into --out FOLDER" in capsys.readouterr().err


def test_a_pipe_in_a_name_does_not_end_its_cell() -> None:
    assert Table(title="", head=["a"], rows=[["x|y"]]).markdown().splitlines()[-1] == "| x\\|y |"


def test_a_table_is_drawn_in_a_terminal_and_is_markdown_in_a_pipe() -> None:
    cells = [["lossless", "66.7 % [10.0, 90.0]"], ["[bold]x", "1"]]
    table = Table(title="Title", head=["mode", "accuracy of a rather long name"], rows=cells, note="A note.")
    shown = {}
    for is_terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=60, no_color=True)
        for _ in range(2):
            print_table(table, console)
        shown[is_terminal] = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown[False] == f"Title\n\n{table.markdown()}\n\nA note.\n\n" * 2
    assert "| lossless" not in shown[True]
    for text in ("Title", "A note.", "lossless", "66.7 % [10.0, 90.0]", "[bold]x"):
        assert text in shown[True]


def test_the_pareto_front_is_what_no_other_point_beats() -> None:
    points = [(1.0, 100.0), (2.0, 90.0), (1.5, 90.0), (3.0, 95.0), (3.0, 95.0), (4.0, 20.0)]
    assert pareto_front(points) == [(1.0, 100.0), (3.0, 95.0), (4.0, 20.0)]


def test_the_heat_map_weights_cells_by_what_was_seen() -> None:
    profile = [
        {"masked": 0.25, "offset": 3, "kl": 1.0, "num": 1},
        {"masked": 0.333, "offset": 3, "kl": 4.0, "num": 2},  # one of the three that the block has left
        {"masked": 0.5, "offset": 3, "kl": 2.0, "num": 2},
        {"masked": 1.0, "offset": 0, "kl": 5.0, "num": 7},
    ]
    grid = divergence_grid(profile, 4)
    assert grid[0, 3] == 1.0 and grid[1, 3] == 3.0 and grid[3, 0] == 5.0
    assert (grid == grid).sum() == 3  # the others are NaN
    for size in (4, 8, 16, 32, 64):
        shares = [round(masked / size, 3) for masked in range(1, size + 1)]
        cells = [{"masked": share, "offset": 0, "kl": 1.0, "num": 1} for share in shares]
        assert (divergence_grid(cells, size)[:, 0] == 1).all()
