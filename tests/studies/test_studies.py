"""Studies: their recipes are valid, their cells run, and their verdicts follow from planted results."""

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opdlm.cli.main import main
from opdlm.errors import ConfigError
from opdlm.objectives.masking import MaskRates
from opdlm.seeds import generator_for
from opdlm.studies import conversion as study_conversion
from opdlm.studies import crossover as study_crossover
from opdlm.studies import dual_repetition as study_dual
from opdlm.studies import mask_window as study_window
from opdlm.studies import parity as study_parity
from opdlm.studies import window_sft as study_sft
from opdlm.studies.dual_repetition import DualGrid
from opdlm.studies.parity import BASELINE, MASK, ParityGrid, ParityRun
from opdlm.studies.run import STUDIES, read_plan, run_study
from opdlm.studies.text_runs import AR, MD, prepare_text, run_text, text_cell

RECIPES = Path(__file__).parents[2] / "recipes" / "studies"
FILES = sorted(RECIPES.glob("*.yaml"))
SEEDS = range(5)
PNG = b"\x89PNG"
TINY = {
    "model": {"path": "bundled:byte", "from_scratch": True, "shape": {"num_hidden_layers": 1}},
    "data": {"sequence_length": 32, "document_mask": False},
    "train": {"num_steps": 2, "rows_per_update": 2},
    "eval": {"every": 1, "limit": 2, "num_rates": 2},
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_of_a_study_is_valid_down_to_its_last_cell(path: Path) -> None:
    plan = read_plan(path, [])
    names = [cell.name for cell in plan.cells]
    assert len(set(names)) == len(names) >= 5 and not any("/" in name for name in names)
    assert {cell.settings["seed"] for cell in plan.cells} == set(plan.seeds)
    assert json.loads(json.dumps([cell.settings for cell in plan.cells]))
    assert plan.title.startswith("Not run here") == path.stem.endswith("_paper")
    assert path.stem.startswith(plan.name) or path.stem in ("profile", "profile_real", "drafting")


def test_variants_of_conversion_are_compared_with_their_own_baseline() -> None:
    grid = study_conversion.ConversionGrid(
        variants={"plain": (), "better": (), "other": (), "worse": ()}, against={"worse": "other"}
    )
    accuracy = {"plain": 0.5, "better": 0.6, "other": 0.9, "worse": 0.8}
    records = [
        {
            "settings": {"variant": name, "seed": seed},
            "seconds": 60.0,
            "result": {
                "modes": {
                    "static": {"accuracy": accuracy[name] + 0.001 * seed, "tokens_per_forward": 1.0},
                    "threshold": {"accuracy": 0.5, "tokens_per_forward": 2.0 + 0.01 * seed},
                },
                "rollout_tokens": 1000,
            },
        }
        for name in grid.variants
        for seed in SEEDS
    ]
    found = {p.claim: p.verdict for p in study_conversion.conclude(records, grid, Path()).claims}
    assert found["better is better than plain in static accuracy"] == "holds"
    assert found["worse is better than other in static accuracy"] == "does not hold"
    assert found["better is better than plain in threshold tokens per forward"] == "does not hold"
    assert "worse is better than plain in static accuracy" not in found


def test_learning_curves_are_compared_at_equal_tokens_and_at_equal_time(tmp_path: Path) -> None:
    """`slow` needs twice the time of `fast` for the same tokens, from which it learns more."""
    grid = study_conversion.ConversionGrid(variants={"fast": (), "slow": ()})
    records = []
    for (name, gain, minutes), seed in itertools.product((("fast", 0.1, 1), ("slow", 0.15, 2)), SEEDS):
        metrics = [
            {"rollout_tokens": 1000.0 * step, "cpu_seconds": 60.0 * minutes}
            | ({} if step % 2 else {"tokens_per_forward_lossless": 1 + gain * step + 0.001 * seed * step})
            for step in range(1, 9)
        ]
        mode = {"accuracy": 0.5, "tokens_per_forward": 1.0}
        result = {
            "modes": {"threshold": mode, "lossless": mode},
            "rollout_tokens": 8000,
            "curve": study_conversion.learning_curve(metrics, lossless=True),
        }
        settings = {"variant": name, "seed": seed}
        records.append({"settings": settings, "seconds": 60.0, "result": json.loads(json.dumps(result))})
    found = {p.claim: p for p in study_conversion.conclude(records, grid, Path()).claims}
    by_tokens = found["slow drafts better than fast after 8.0 thousand tokens"]
    by_time = found["slow drafts better than fast after 8.0 minutes"]
    assert (by_tokens.verdict, by_time.verdict) == ("holds", "does not hold")
    assert by_tokens.evidence.startswith("-0.400") and by_time.evidence.startswith("0.20")
    study_conversion.draw(records, grid, Path(), tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(PNG)


def test_a_baseline_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"grid\.against names opdd"):
        read_plan(RECIPES / "conversion.yaml", ["grid.against.sdar_ar=opdd"])


def test_every_study_has_a_miniature_and_its_paper_scale() -> None:
    names = {f"{name}{end}" for name in STUDIES for end in ("", "_paper")}
    assert {path.stem for path in FILES} >= names


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["grid.alpha=0"], ("grid.alpha", "grid.alphas")),
        (["study=parities"], ("parities", "parity")),
        (["seeds=a"], ("seeds", "a")),
        (["steps=3"], ("steps", "grid")),
        (["run.train.num_stepz=3"], ("train.num_stepz", "train.num_steps")),
        (["run.eval.every=0"], ("run.eval.every", "0")),
        (["grid.alphas=0,2"], ("objective.ar_share", "2")),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_runs(
    overrides: list[str], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as error:
        read_plan(RECIPES / "dual_repetition.yaml", overrides)
    assert all(word in str(error.value) for word in words)


def test_a_cell_trains_on_the_standard_library_and_returns_its_losses(tmp_path: Path) -> None:
    prepare_text(tmp_path)
    changes = {"objective.name": "dual", "objective.prediction": "next_position", "data.unique_tokens": 500}
    cell = text_cell({"alpha": 0.5, "seed": 3}, TINY, changes)
    folder = tmp_path / "work" / cell.name
    folder.mkdir(parents=True)
    result = run_text(json.loads(json.dumps(cell.settings)), folder)
    assert [point["step"] for point in result["curve"]] == [1, 2]
    for loss in (AR, MD):
        assert result["curve"][-1][loss] == pytest.approx(result["final"][loss], rel=1e-6)
        assert abs(result["final"][loss] - math.log(259)) < 1
    assert cell.settings["config"]["train"]["seed"] == 3 and cell.settings["corpus"].startswith("standard")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mask_window", ["grid.windows=[[0.4,0.6]]"]),
        ("crossover", ["grid.unique_tokens=500", "grid.control_tokens=500", "grid.sizes=[[1,32]]"]),
        ("dual_repetition", ["grid.repetitions=2", "grid.alphas=0,0.5,1"]),
    ],
)
def test_a_study_of_text_runs_from_start_to_end(name: str, overrides: list[str], tmp_path: Path) -> None:
    if name == "dual_repetition":
        pytest.importorskip("sklearn", reason="needs the extra `study`")
    small = ["run.train.num_steps=4", "run.train.rows_per_update=2", "run.data.sequence_length=32"]
    small += ["run.eval.limit=2", "run.eval.num_rates=2", "run.eval.every=1"]
    check_outputs(name, [*small, *overrides], tmp_path)


@pytest.mark.slow
def test_a_study_of_conversions_runs_from_start_to_end(tmp_path: Path) -> None:
    overrides = ["run.train.num_steps=1", "run.train.rows_per_update=4", "run.rollout.prompts_per_step=4"]
    overrides += [
        "run.rollout.decode.max_new_tokens=16",
        "run.eval.decode.max_new_tokens=8",
        "run.eval.limit=1",
    ]
    overrides += ["grid.num_prompts=8", "grid.windows=[[0.45,0.55],[0.5,1]]", "run.eval.likelihood_samples=2"]
    check_outputs("window_sft", overrides, tmp_path)


@pytest.mark.slow
def test_the_parity_study_runs_from_start_to_end_and_is_not_repeated(tmp_path: Path) -> None:
    overrides = ["run.num_steps=20", "run.eval_every=10", "run.width=16", "grid.tasks=[[6,2,20]]"]
    overrides += ["grid.windows=[[0,0.5]]"]
    text = check_outputs("parity", overrides, tmp_path)
    assert "2 of 2 runs" in text and "t ~ U[0, 0.5]" in text


def check_outputs(name: str, overrides: list[str], out: Path) -> str:
    """Run with one seed, twice: the second call only writes the results again, and they are the same."""
    plan, console = read_plan(RECIPES / f"{name}.yaml", overrides, num_seeds=1), Console(file=io.StringIO())
    result = run_study(plan, out, console)
    assert not result.errors and len(result.records) == len(plan.cells)
    text = (out / "table.md").read_text()
    assert text.count("Rule:") == text.count("Data:") >= 3
    assert (out / "study.png").read_bytes().startswith(PNG)
    saved = json.loads((out / "results.json").read_text())
    assert (
        saved["versions"]["torch"] and saved["seeds"] == [0] and list(saved["cells"]) == list(result.records)
    )
    run_study(plan, out, console)
    assert (out / "table.md").read_text() == text
    return text


def test_every_run_has_a_name_of_its_own() -> None:
    plan = read_plan(RECIPES / "crossover.yaml", ["seeds=20240101,20240102"])
    assert len({cell.name for cell in plan.cells}) == len(plan.cells)
    with pytest.raises(ConfigError, match=r"2 runs are called .*: give each value once"):
        read_plan(RECIPES / "parity.yaml", ["seeds=0,0"])


def test_conversions_measured_in_different_modes_are_compared_by_those_they_share(tmp_path: Path) -> None:
    mode = {"accuracy": 0.5, "tokens_per_forward": 1.5}
    measured: list[tuple[str, dict[str, Any]]] = [
        ("a", {"lossless": mode, "static": mode}),
        ("b", {"lossless": mode}),
    ]
    records = [
        {
            "settings": {"variant": name, "seed": seed},
            "result": {"modes": modes, "rollout_tokens": 10, "curve": []},
            "seconds": 1.0,
        }
        for name, modes in measured
        for seed in (0, 1)
    ]
    grid = study_conversion.ConversionGrid(variants={"a": (), "b": ()})
    (claim,) = study_conversion.conclude(records, grid, tmp_path).claims
    assert "b is better than a in lossless tokens per forward" in claim.claim
    study_conversion.draw(records, grid, tmp_path, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(PNG)


def test_without_a_name_the_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FILES) and any(line.startswith("parity ") for line in lines)


# parity


def test_parity_sequences_hold_the_product_of_a_secret_set_and_tests_are_new() -> None:
    for seed in range(3):
        data = study_parity.make_data((10, 3, 60), seed)
        everything = torch.cat([data.train_NL, data.test_NL])
        signs = 2 * everything - 1
        fitting = [
            s for s in itertools.combinations(range(10), 3) if (signs[:, s].prod(1) == signs[:, -1]).all()
        ]
        assert len(fitting) == 1
        assert len(data.train_NL) == 60 and len(everything.unique(dim=0)) == len(everything) == 1024


def test_long_parity_sequences_are_drawn_without_listing_all() -> None:
    data = study_parity.make_data((40, 2, 50), 0)
    both = torch.cat([data.train_NL, data.test_NL])
    assert len(both.unique(dim=0)) == len(both) == 50 + 1024
    crowded = study_parity.make_data((17, 3, 80_000), 0)
    assert (len(crowded.train_NL), len(crowded.test_NL)) == (80_000, 1024)


def test_a_uniform_predictor_has_log_of_the_vocabulary_under_every_mask() -> None:
    model = study_parity.make_model(ParityRun(width=16), 7, 0)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    ids_BL = study_parity.make_data((6, 2, 40), 0).train_NL
    only_y = study_parity.masked_loss(model, ids_BL, study_parity.mask_rates(BASELINE), generator_for(0))
    assert only_y.item() == pytest.approx(math.log(3), rel=1e-5)
    for window in ([0.2, 0.3], [0.5, 1]):
        rates, rng = study_parity.mask_rates(window), generator_for(1)
        assert isinstance(rates, MaskRates)
        with torch.no_grad():
            losses = [study_parity.masked_loss(model, ids_BL, rates, rng).item() for _ in range(300)]
        assert sum(losses) / len(losses) == pytest.approx(math.log(3), rel=0.02)


def test_the_parity_model_sees_both_sides() -> None:
    model = study_parity.make_model(ParityRun(width=16), 5, 0).eval()
    ids = torch.tensor([[0, 1, MASK, 1, 0]])
    changed = ids.clone()
    changed[0, 4] = 1
    first, second = (study_parity.logits_of(model, x)[0, 0] for x in (ids, changed))
    assert not torch.allclose(first, second)


def test_a_parity_of_one_bit_is_learnt(tmp_path: Path) -> None:
    run = {"layers": 1, "width": 32, "num_steps": 400, "eval_every": 20, "batch_size": 40}
    settings = {"task": [6, 1, 32], "window": [0.2, 0.6], "seed": 0, "run": run}
    result = study_parity.run_cell(settings, tmp_path)
    assert result["steps"] is not None and result["curve"][-1]["test"] >= 0.99
    assert study_parity.run_cell(settings, tmp_path) == result


def parity_records(steps: dict[Any, list[int | None]], task: tuple[int, int, int]) -> list[dict[str, Any]]:
    return [
        {
            "settings": {"task": list(task), "window": window, "seed": seed},
            "result": {"steps": number, "curve": [{"step": 9, "train": 1.0, "test": 0.6}]},
        }
        for window, numbers in steps.items()
        for seed, number in enumerate(numbers)
    ]


def listed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tuples as lists, as JSON gives them back."""
    return json.loads(json.dumps(records))


def test_parity_verdicts_depend_on_the_number_of_sequences() -> None:
    small, large = (12, 3, 100), (12, 3, 200)
    grid = ParityGrid(tasks=(small, large), windows=((0, 1), (0.2, 0.3)))
    records = parity_records({"y": [None] * 5, (0, 1): [900] * 5, (0.2, 0.3): [500] * 5}, small)
    records += parity_records({"y": [100] * 5, (0, 1): [None] * 5, (0.2, 0.3): [500] * 5}, large)
    findings = study_parity.conclude(listed(records), grid, Path())
    verdicts = [claim.verdict for claim in findings.claims]
    assert verdicts == ["holds", "regime-dependent", "regime-dependent"]
    only_y = findings.tables[0].rows[0]
    assert only_y[2:5] == ["never", "never – never", "5 of 5"]


# mask windows


def test_the_vertex_of_a_parabola_is_found_between_its_points() -> None:
    points = [(t, (t - 0.463) ** 2) for t in (0.05, 0.2, 0.35, 0.6, 0.95)]
    assert study_window.lowest_midpoint(points) == pytest.approx(0.463)
    assert study_window.lowest_midpoint(points[:2]) == 0.2


def window_runs(bound: Any, windows: list[tuple[float, float]]) -> dict[Any, dict[int, Any]]:
    return {
        window: {seed: {"result": {"final": {MD: bound(sum(window) / 2) + 0.001 * seed}}} for seed in SEEDS}
        for window in windows
    }


def test_window_verdicts_follow_planted_bounds() -> None:
    windows = [(m - 0.05, m + 0.05) for m in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)]
    u_shaped = window_runs(lambda t: 3 + (t - 0.45) ** 2, windows)
    falling = window_runs(lambda t: 3 - t, windows)
    whole = {seed: {"result": {"final": {MD: 3.1 + 0.001 * seed + 1e-4 * (-1) ** seed}}} for seed in SEEDS}
    assert study_window.u_shape(u_shaped).verdict == "holds"
    assert study_window.u_shape(falling).verdict == "does not hold"
    assert study_window.near_t_star(u_shaped, 0.463).verdict == "holds"
    assert study_window.near_t_star(u_shaped, 0.1).verdict == "does not hold"
    assert study_window.better_than_everything(u_shaped, whole, 0.463).verdict == "holds"
    assert study_window.better_than_everything(u_shaped, whole, 0.9).verdict == "does not hold"


# dual repetition


def dual_records(loss: Any, grid: DualGrid) -> list[dict[str, Any]]:
    """Planted losses; seeds differ by a little noise."""
    return [
        {
            "settings": {"R": r, "alpha": alpha, "seed": seed},
            "result": {
                "final": {
                    name: loss(r, alpha, name) + 0.002 * math.sin(9 * seed + 5 * alpha + r)
                    for name in (AR, MD)
                },
                "curve": [{AR: 2.0, MD: 2.5}],
            },
        }
        for r, alpha, seed in itertools.product(grid.repetitions, grid.alphas, range(3))
    ]


def valley(alpha: float, best: float) -> float:
    """Lowest at `best`, quadratic in the coordinate of the Gaussian process."""
    place, center = study_dual.position([alpha, best])
    return 2 + 0.05 * (place - center) ** 2


def test_a_planted_optimum_at_sixteen_over_r_is_found_and_one_elsewhere_is_not() -> None:
    pytest.importorskip("sklearn", reason="needs the extra `study`")
    grid = DualGrid(repetitions=(8, 32, 128), alphas=(0, 0.0625, 0.125, 0.25, 0.5, 0.75, 0.984375, 1))
    as_published = dual_records(lambda r, a, _: valley(a, 63 / 64 if r <= 16 else 16 / r), grid)
    found = {p.claim: p.verdict for p in study_dual.conclude(as_published, grid, Path()).claims}
    assert [verdict for claim, verdict in found.items() if "early stopping" not in claim] == ["holds"] * 4
    elsewhere = dual_records(
        lambda r, a, name: valley(a, 0.9 if name == AR else 0.125), DualGrid(alphas=grid.alphas)
    )
    found = {p.claim: p.verdict for p in study_dual.conclude(elsewhere, grid, Path()).claims}
    assert found["α R ≈ 16 at the optimum for R ≥ 32"] == "regime-dependent"
    assert found["The optimum is nearly the same in AR and MD evaluation"] == "does not hold"


def test_no_share_between_the_ends_is_better_where_the_ends_are_best() -> None:
    grid = DualGrid(repetitions=(32,), alphas=(0, 0.5, 1))
    records = dual_records(lambda r, a, _: 2 + a, grid)
    assert study_dual.both_ends(records, grid).verdict == "does not hold"


# crossover


def crossover_records(cross_at: Any, grid: study_crossover.CrossoverGrid) -> list[dict[str, Any]]:
    """AR rises after its minimum at epoch 5; diffusion falls below it at the planted epoch."""
    records = []
    for unique, size, seed in itertools.product(grid.unique_tokens, grid.sizes, SEEDS):
        epochs = range(1, 61)
        ar = {epoch: 2 + 0.02 * abs(epoch - 5) for epoch in epochs}
        at = cross_at(unique, size)
        md = {epoch: (ar[at] if at else 4) + 0.05 * ((at or 60) - epoch - 0.5) for epoch in epochs}
        for objective, loss, curve in (("ar", AR, ar), ("md", MD, md)):
            points = [{"epoch": epoch, loss: curve[epoch] + 1e-3 * seed} for epoch in epochs]
            settings = {"objective": objective, "U": unique, "size": list(size), "seed": seed}
            records.append(
                {"settings": settings, "result": {"curve": points, "final": {loss: points[-1][loss]}}}
            )
    return records


def test_crossover_verdicts_follow_planted_epochs(tmp_path: Path) -> None:
    grid = study_crossover.CrossoverGrid(
        unique_tokens=(100, 200), sizes=((2, 64), (4, 128)), controls=(), control_tokens=100
    )
    records = crossover_records(lambda u, size: (20 if u == 100 else 40) - size[0], grid)
    found = study_crossover.crossings(records, 100, (2, 64))
    assert all(epoch == pytest.approx(18, abs=1) for epoch in found.values())
    findings = study_crossover.conclude(records, grid, Path())
    assert [p.verdict for p in findings.claims[:3]] == ["holds"] * 3
    study_crossover.draw(records, grid, Path(), tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(PNG)
    never = crossover_records(lambda u, size: 20 if u == 200 else None, grid)
    assert all(map(math.isinf, study_crossover.crossings(never, 100, (2, 64)).values()))
    findings = study_crossover.conclude(never, grid, Path())
    assert [p.verdict for p in findings.claims[:2]] == ["does not hold", "undecided"]
    assert findings.tables[0].rows[0][-1] == ", ".join(["–"] * len(SEEDS))


# fine-tuning


def sft_records(bounds: dict[Any, float], accuracies: dict[Any, float]) -> list[dict[str, Any]]:
    return [
        {
            "settings": {"window": list(window), "seed": seed},
            "result": {
                "bound": bound + 1e-3 * seed,
                "modes": {"static": {"accuracy": accuracies[window] + 1e-3 * seed}},
            },
        }
        for window, bound in bounds.items()
        for seed in SEEDS
    ]


def test_fine_tuning_verdicts_follow_planted_results(tmp_path: Path) -> None:
    grid = study_sft.SftGrid()
    everything, middle, upper, lower = grid.windows
    bounds = {everything: 0.5, middle: 0.4, upper: 0.7, lower: 0.6}
    accuracies = {everything: 0.5, middle: 0.4, upper: 0.7, lower: 0.45}
    findings = study_sft.conclude(sft_records(bounds, accuracies), grid, Path())
    assert [p.verdict for p in findings.claims] == ["holds"] * 7
    study_sft.draw(sft_records(bounds, accuracies), grid, Path(), tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(PNG)
    same = {window: 1 - bound for window, bound in bounds.items()}
    findings = study_sft.conclude(sft_records(bounds, same), grid, Path())
    assert [p.verdict for p in findings.claims] == ["holds"] * 3 + ["does not hold"] * 4
    pair = study_sft.SftGrid(windows=(middle, upper))
    findings = study_sft.conclude(sft_records(bounds, accuracies), pair, Path())
    assert [p.claim.split(" is ")[0] for p in findings.claims] == ["[0.45, 0.55]", "[0.5, 1]"]
