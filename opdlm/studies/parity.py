"""Study `parity`: when a k-parity is learnt by masked diffusion, and when by a baseline that masks only y.

The label y is the product of a secret set S of k out of n bits; a sequence is (x, y) with tokens -1, +1 and
[MASK]. N sequences are trained on, and y is predicted for other inputs. With t ~ U[t0, t1] exactly one token
of S and y is masked with probability P_S (`mask_theory.p_signal`); the other masks regularise. arXiv
2601.22450.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from opdlm.config.loader import build_section
from opdlm.config.sections import STRICT
from opdlm.errors import ConfigError
from opdlm.objectives.mask_theory import p_signal
from opdlm.objectives.masking import MaskRates, draw_masks
from opdlm.reporting.plots import DPI, new_figure
from opdlm.reporting.tables import NOTHING, Table
from opdlm.seeds import generator_for
from opdlm.studies.claims import (
    LIKELY_RULE,
    Claim,
    Findings,
    claim_by_regime,
    common_seeds,
    is_sooner,
    is_usual,
    kendall,
    over_seeds,
    quantile,
)
from opdlm.studies.grid import Cell, Values, chosen

MINUS, PLUS, MASK = 0, 1, 2
BASELINE = "y"
LEARNT = 0.99
MEMORISED = 0.99
NUM_TESTED = 1024
Task = tuple[int, int, int]
Window = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ParityGrid:
    tasks: tuple[Task, ...] = ((12, 3, 100), (12, 3, 200))
    """Number of bits n, of secret bits k, and of training sequences N."""
    windows: tuple[Window, ...] = ((0, 1), (0, 0.42), (0.2, 0.3), (0.5, 1))
    """Ranges of t. The baseline, which masks only y, is always added."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ParityRun:
    """Settings of one training."""

    layers: int = 2
    """Layers of a bidirectional GPT-2."""
    width: int = 64
    """Hidden size; a head has 16 dimensions."""
    learning_rate: float = 1e-3
    """Of AdamW; constant."""
    weight_decay: float = 0.1
    """Of AdamW."""
    batch_size: int = 100
    """Sequences per step; at most N."""
    num_steps: int = 2000
    """Upper limit; a run ends when it has learnt the parity."""
    eval_every: int = 50
    """Steps between tests, and the resolution of the measured steps."""


def check(grid: ParityGrid) -> None:
    for n, k, num_train in grid.tasks:
        if not 1 <= k <= n <= 60 or not 1 <= num_train < 2**n:
            raise ConfigError(f"grid.tasks ({n}, {k}, {num_train}) needs 1 <= k <= n <= 60 and 1 <= N < 2^n.")


def make_cells(grid: ParityGrid, base: Values, seeds: Sequence[int]) -> list[Cell]:
    check(grid)
    run = asdict(build_section(ParityRun, base, "run."))
    return [
        Cell(
            name=f"n{n}-k{k}-N{num_train}-{window_name(window)}-seed{seed}",
            settings={"task": [n, k, num_train], "window": window, "seed": seed, "run": run},
        )
        for (n, k, num_train), window, seed in itertools.product(grid.tasks, all_windows(grid), seeds)
    ]


def all_windows(grid: ParityGrid) -> list[Any]:
    return [BASELINE, *[list(window) for window in grid.windows]]


def window_name(window: Any) -> str:
    return "only_y" if window == BASELINE else f"t{window[0]:g}_{window[1]:g}"


@plain_dataclass(frozen=True, slots=True)
class ParityData:
    """Training and test sequences `[N, n + 1]` of MINUS and PLUS, y last."""

    train_NL: Tensor
    test_NL: Tensor


def make_data(task: Task, seed: int) -> ParityData:
    """The sequences of one seed; no sequence is in both parts."""
    n, k, num_train = task
    rng = generator_for(seed, 1)
    secret = torch.randperm(n, generator=rng)[:k]
    if n <= 16:
        number_N = torch.randperm(2**n, generator=rng)
    else:
        wanted = min(num_train + NUM_TESTED, 2**n)
        number_N = torch.empty(0, dtype=torch.long)
        while len(number_N) < wanted:  # some are drawn twice
            number_N = torch.cat([number_N, torch.randint(2**n, (wanted,), generator=rng)]).unique()
        number_N = number_N[torch.randperm(len(number_N), generator=rng)]
    x_NL = number_N[: num_train + NUM_TESTED, None] >> torch.arange(n) & 1
    y_N1 = (x_NL[:, secret] == MINUS).sum(1, keepdim=True) % 2 == 0  # a product of signs
    both_NL = torch.cat([x_NL, y_N1.long()], 1)
    return ParityData(both_NL[:num_train], both_NL[num_train:])


def make_model(run: ParityRun, length: int, seed: int) -> PreTrainedModel:
    """A stock GPT-2 without dropout, with random weights of this seed.

    Its learned position embeddings identify each bit from the start; with rotary positions even the training
    set was not learnt within thousands of steps.
    """
    config = GPT2Config(
        vocab_size=3,
        n_embd=run.width,
        n_layer=run.layers,
        n_head=run.width // 16,
        n_positions=length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function, in one operation instead of five
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def logits_of(model: nn.Module, ids_BL: Tensor) -> Tensor:
    """Every token sees every other one; `[B, L, 3]`."""
    length = ids_BL.shape[1]
    everything = torch.ones(1, 1, length, length, dtype=torch.bool)
    return model(input_ids=ids_BL, attention_mask=everything, use_cache=False).logits


def mask_rates(window: Any) -> MaskRates:
    if window == BASELINE:
        return MaskRates(windows=((0.0, 0.0),), always_mask=(-1,))
    return MaskRates(windows=((window[0], window[1]),))


def masked_loss(model: nn.Module, ids_BL: Tensor, rates: MaskRates, rng: torch.Generator) -> Tensor:
    """The bound per token with weights 1 / P(masked | t); a uniform predictor has log V in every window."""
    masks = draw_masks(torch.ones_like(ids_BL, dtype=torch.bool), rates, rng)
    logits_BLV = logits_of(model, ids_BL.masked_fill(masks.is_masked, MASK))
    loss_BL = F.cross_entropy(logits_BLV.transpose(1, 2), ids_BL, reduction="none")
    return (loss_BL * masks.weight).sum() / masks.is_counted.sum()


@torch.no_grad()
def accuracy(model: nn.Module, ids_BL: Tensor) -> float:
    """Share of sequences whose y is predicted when only y is masked."""
    hidden_BL = ids_BL.clone()
    hidden_BL[:, -1] = MASK
    signs_B = logits_of(model, hidden_BL)[:, -1, [MINUS, PLUS]].argmax(-1)
    return float((signs_B == ids_BL[:, -1]).double().mean())


def run_cell(settings: Values, _: Path) -> Values:
    """Train until the parity is learnt. Returns the steps, and the accuracy on training and test inputs."""
    run, seed = build_section(ParityRun, settings["run"], "run."), settings["seed"]
    data = make_data(tuple(settings["task"]), seed)
    model = make_model(run, data.train_NL.shape[1], seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), run.learning_rate, weight_decay=run.weight_decay, fused=True
    )
    rates, rng, curve = mask_rates(settings["window"]), generator_for(seed, 2), list[Values]()
    for step in range(1, run.num_steps + 1):
        chosen_B = torch.randperm(len(data.train_NL), generator=rng)[: run.batch_size]
        optimizer.zero_grad()
        masked_loss(model, data.train_NL[chosen_B], rates, rng).backward()
        optimizer.step()
        if step % run.eval_every == 0:
            shares = {"train": accuracy(model, data.train_NL), "test": accuracy(model, data.test_NL)}
            curve.append({"step": step} | shares)
            if shares["test"] >= LEARNT:
                return {"steps": step, "curve": curve}
    return {"steps": None, "curve": curve}


def steps_of(record: Values) -> float:
    """Steps to an accuracy of 0.99 on test inputs; infinite if it was not attained."""
    steps = record["result"]["steps"]
    return math.inf if steps is None else steps


def conclude(records: Sequence[Values], grid: ParityGrid, _: Path) -> Findings:
    return Findings(
        tables=[steps_table(records, grid)],
        claims=[
            higher_signal_sooner(records, grid),
            sooner_than_baseline(records, grid),
            memorises(records, grid),
        ],
    )


def runs_of(records: Sequence[Values], task: Task, window: Any) -> dict[int, Values]:
    return chosen(records, task=list(task), window=window)


def task_name(task: Task) -> str:
    return f"({task[0]}, {task[1]}), N = {task[2]}"


def window_title(window: Any) -> str:
    return "only y" if window == BASELINE else f"t ~ U[{window[0]:g}, {window[1]:g}]"


def steps_table(records: Sequence[Values], grid: ParityGrid) -> Table:
    rows = []
    for task, window in itertools.product(grid.tasks, all_windows(grid)):
        runs = runs_of(records, task, window).values()
        if not runs:
            continue
        steps = [steps_of(run) for run in runs]
        quarters = [quantile(steps, share) for share in (0.5, 0.25, 0.75)]
        median, low, high = ("never" if math.isinf(number) else f"{number:g}" for number in quarters)
        name = window_title(window)
        signal = NOTHING if window == BASELINE else f"{p_signal(task[1], *window):.3f}"
        ends = [run["result"]["curve"][-1]["test"] for run in runs if math.isinf(steps_of(run))]
        failed = f"{sum(map(math.isinf, steps))} of {len(steps)}"
        rows.append(
            [f"{task_name(task)}, {name}", signal, median, f"{low} – {high}", failed, str(over_seeds(ends))]
        )
    return Table(
        title="Steps to 99 % on inputs that were not trained on",
        head=["(n, k), N, mask", "P_S", "median", "quartiles", "failures", "accuracy of failures"],
        rows=rows,
        note="A failure has not reached it when the steps are over and counts as never.",
    )


def higher_signal_sooner(records: Sequence[Values], grid: ParityGrid) -> Claim:
    found = {}
    for task in grid.tasks:
        runs = [runs_of(records, task, list(window)) for window in grid.windows]
        signals = [p_signal(task[1], *window) for window in grid.windows]
        taus = [kendall(signals, [-steps_of(group[seed]) for group in runs]) for seed in common_seeds(*runs)]
        found[task_name(task)] = is_sooner([(-tau, 0) for tau in taus])
    return claim_by_regime(
        "Windows of higher P_S generalise sooner",
        "Kendall's τ between P_S and earliness over the windows of a seed is positive, in two of three seeds "
        f"that learnt with any: {LIKELY_RULE}",
        found,
        without="nothing was learnt",
    )


def sooner_than_baseline(records: Sequence[Values], grid: ParityGrid) -> Claim:
    found = {}
    for task in grid.tasks:
        best = max(grid.windows, key=lambda window: p_signal(task[1], *window))
        ours, theirs = runs_of(records, task, list(best)), runs_of(records, task, BASELINE)
        pairs = [(steps_of(ours[seed]), steps_of(theirs[seed])) for seed in common_seeds(ours, theirs)]
        found[task_name(task)] = is_sooner(pairs)
    return claim_by_regime(
        "Masked diffusion with the window of the highest P_S generalises before the baseline",
        f"in two of three seeds, both never left out: {LIKELY_RULE}",
        found,
    )


def memorises(records: Sequence[Values], grid: ParityGrid) -> Claim:
    found = {}
    for task in grid.tasks:
        stuck = [is_stuck(run) for run in runs_of(records, task, BASELINE).values()]
        verdict = is_usual(sum(stuck), len(stuck) - sum(stuck))
        found[task_name(task)] = verdict, f"{sum(stuck)} of {len(stuck)} seeds"
    return claim_by_regime(
        "The baseline memorises and does not generalise",
        f"training inputs right, others not, when the steps are over, in two of three seeds: {LIKELY_RULE}",
        found,
    )


def is_stuck(record: Mapping[str, Any]) -> bool:
    last = record["result"]["curve"][-1]
    return record["result"]["steps"] is None and last["train"] >= MEMORISED


def draw(records: Sequence[Values], grid: ParityGrid, _: Path, path: Path) -> None:
    """Accuracy on test inputs against steps (training inputs dotted), a row per task."""
    windows = all_windows(grid)
    figure, axes = new_figure(len(windows), 3 * len(windows), 2.6 * len(grid.tasks), len(grid.tasks))
    for (row, task), (column, window) in itertools.product(enumerate(grid.tasks), enumerate(windows)):
        axis = axes[row][column]
        for number, run in enumerate(runs_of(records, task, window).values()):
            curve = run["result"]["curve"]
            steps = [point["step"] for point in curve]
            axis.plot(steps, [point["test"] for point in curve], color=f"C{number % 10}", linewidth=1)
            axis.plot(steps, [point["train"] for point in curve], ":", color=f"C{number % 10}", linewidth=0.7)
        axis.set_title(f"{task_name(task)}\n{window_title(window)}", fontsize=9)
        axis.set_ylim(0.4, 1.03)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy of y")
    axes[-1][0].set_xlabel("steps (dotted: trained inputs)")
    figure.savefig(path, dpi=DPI)
