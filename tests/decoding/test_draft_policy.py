"""The policy of lossless decoding on simulated machines and drafts: it takes the gain and pays for none.

A simulated draft token is accepted with the probability of its place, and its confidence is that probability.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import takewhile
from statistics import mean

import pytest
import torch
from tiny_models import make_lm

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeState, Request
from opdlm.decoding.draft_policy import DraftPlan, DraftPolicy, ForwardCost, measure_forward_cost
from opdlm.modeling.kv_cache import DecodeCache

LENGTH = 7
FLAT = ForwardCost([(1, 1.0), (1000, 1.01)])
STEEP = ForwardCost([(1, 1.0), (2, 2.0)])
STEP_AT_NINE = ForwardCost([(1, 1.0), (9, 1.1), (10, 2.0), (16, 2.1), (64, 7.0)])
MACHINES = {"flat": FLAT, "steep": STEEP, "step": STEP_AT_NINE, "line": ForwardCost.linear(32.0)}
DRAFTS = {
    "never": [0.0] * LENGTH,
    "sometimes": [0.5 * 0.6**place for place in range(LENGTH)],
    "often": [0.9] * LENGTH,
}


class Simulation:
    """Rows whose drafts are accepted by chance; counts tokens and what the forwards cost."""

    def __init__(
        self, policy: DraftPolicy, chances: list[float], num_rows: int, machine: ForwardCost | None = None
    ) -> None:
        """`machine`: what forwards cost in truth, where the policy must find it out."""
        self.policy, self.chances, self.dice = policy, chances, random.Random(0)
        self.machine = machine or policy.cost
        requests = [Request(i, [1], 0, DecodeConfig(max_new_tokens=10**6)) for i in range(num_rows)]
        self.state = DecodeState.start(requests, 8, 0, LENGTH)
        self.state.num_steps_B += 1
        self.tokens, self.cost = 0, 0.0

    def step(self) -> list[DraftPlan]:
        plans, state = self.policy.plan(self.state), self.state
        accepted = [
            len(
                list(takewhile(lambda chance: self.dice.random() < chance, self.chances[: plan.num_verified]))
            )
            for plan in plans
        ]
        self.policy.learn(state, plans, accepted, 1)
        spent = self.machine(sum(plan.num_slots for plan in plans))
        if self.policy.follows_clock:
            self.policy.settle(spent * self.dice.uniform(0.9, 1.1))
        self.tokens += len(plans) + sum(accepted)
        self.cost += spent
        drafted = [plan.length * (a in plan.groups) for plan, a in zip(plans, accepted, strict=True)]
        state.num_draft_B = torch.tensor(drafted)
        state.draft_confidence_BD[:] = torch.tensor(self.chances)
        return plans

    def gain(self, forwards: int = 200) -> float:
        """Tokens per cost over those of AR decoding, after as many forwards to learn."""
        for _ in range(forwards):
            self.step()
        self.tokens, self.cost = 0, 0.0
        for _ in range(forwards):
            self.step()
        num_rows = len(self.state)
        return (self.tokens / self.cost) / (num_rows / self.machine(num_rows))


class FixedPolicy(DraftPolicy):
    """The same plan in every forward."""

    fixed: DraftPlan

    def plan(self, state: DecodeState, *, is_closed: bool = False) -> list[DraftPlan]:
        return [
            DraftPlan(min(self.fixed.num_verified, n), self.fixed.groups, self.fixed.length)
            for n in state.num_draft_B.tolist()
        ]


@cache
def best_fixed_gain(machine: str, drafts: str) -> float:
    """Of one row."""
    gains = [1.0]
    for length in range(1, LENGTH + 1):
        for num_verified in range(1, length + 1):
            for num_groups in range(1, num_verified + 2):
                policy = FixedPolicy(LENGTH, MACHINES[machine])
                policy.fixed = DraftPlan(num_verified, tuple(range(num_groups)), length)
                gains.append(Simulation(policy, DRAFTS[drafts], 1).gain(100))
    return max(gains)


@pytest.mark.parametrize("num_rows", [1, 16])
@pytest.mark.parametrize("machine", MACHINES)
def test_drafts_that_are_never_accepted_cost_next_to_nothing(machine: str, num_rows: int) -> None:
    policy = DraftPolicy(LENGTH, MACHINES[machine])
    assert Simulation(policy, DRAFTS["never"], num_rows).gain() > 0.98


@pytest.mark.parametrize("num_rows", [2, 4, 8, 64])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("drafts", ["sometimes", "often"])
def test_a_batch_is_never_slower_than_ar_decoding(drafts: str, machine: str, num_rows: int) -> None:
    policy = DraftPolicy(LENGTH, MACHINES[machine])
    assert Simulation(policy, DRAFTS[drafts], num_rows).gain(400) > 0.97


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("drafts", ["sometimes", "often"])
def test_the_policy_gains_nearly_what_the_best_fixed_plan_gains(machine: str, drafts: str) -> None:
    found = Simulation(DraftPolicy(LENGTH, MACHINES[machine]), DRAFTS[drafts], 1).gain()
    assert found > 0.9 * best_fixed_gain(machine, drafts)


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("believed", ["flat", "steep", "under load"])
@pytest.mark.parametrize("num_rows", [1, 8])
def test_a_wrong_measurement_of_the_machine_comes_right(
    num_rows: int, believed: str, machine: str, drafts: str
) -> None:
    """The costs of the machine as the clock of the steps tells them, with a tenth of noise."""
    truth, chances = MACHINES[machine], DRAFTS[drafts]
    loaded = [(slots, 4 * truth(slots)) for slots in (1, 16, 64)]
    guess = {"flat": [(1, 1.0), (64, 1.01)], "steep": [(1, 1.0), (2, 2.0)], "under load": loaded}
    policy = DraftPolicy(LENGTH, ForwardCost(guess[believed]), follows_clock=True)
    found = Simulation(policy, chances, num_rows, truth).gain(1500)
    assert found > 0.95
    if num_rows == 1:
        assert found > 0.75 * best_fixed_gain(machine, drafts)


@pytest.mark.parametrize("drafts", ["never", "sometimes"])
@pytest.mark.parametrize("machine", ["steep", "step", "line"])
@pytest.mark.parametrize("believed", [[(1, 1.0), (64, 1.01)], [(1, 9.0), (16, 10.0), (64, 11.0)]])
def test_the_first_responses_pay_little_for_a_wrong_measurement(
    believed: list[tuple[float, float]], machine: str, drafts: str
) -> None:
    """Sixteen rows: what 64 forwards cost from the first on, over the same tokens by AR decoding."""
    truth, num_rows = MACHINES[machine], 16
    run = Simulation(
        DraftPolicy(LENGTH, ForwardCost(believed), follows_clock=True), DRAFTS[drafts], num_rows, truth
    )
    for _ in range(64):
        run.step()
    assert run.cost < 1.25 * truth(num_rows) * run.tokens / num_rows


class Copies(Simulation):
    """There is always a copy, with a match of two tokens."""

    def step(self) -> list[DraftPlan]:
        plans = super().step()
        match_BD = torch.full((len(plans), LENGTH), 2)
        is_copy_B = torch.tensor(self.policy.prefers_copy(self.state, match_BD))
        self.state.draft_match_BD = torch.where(is_copy_B[:, None], match_BD, 0)
        self.state.num_draft_B[is_copy_B] = LENGTH
        return plans


@pytest.mark.parametrize("num_rows", [1, 16])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("chances", "least"), [([0.0] * LENGTH, 0.98), ([0.95] * LENGTH, 1.0)])
def test_copies_pay_or_cost_nothing(chances: list[float], least: float, machine: str, num_rows: int) -> None:
    gain = Copies(DraftPolicy(LENGTH, MACHINES[machine]), chances, num_rows).gain()
    assert gain > least - 0.02
    if machine == "flat" and chances[0]:
        assert gain > 4


ONE_CORE = ForwardCost([(1, 67.0), (4, 82.0), (8, 98.0), (16, 152.0), (32, 265.0), (64, 493.0)])
"""Milliseconds of a forward of SmolLM2-135M in float32."""
CLOSED_TOKENS, LONGEST_COPY = 64, 20


def cost_of_a_closed_batch(policy: DraftPolicy, num_rows: int, dice: random.Random) -> float:
    """Rows that start together and end after as many tokens. The text of some repeats itself for a while:
    there copies have long matches and are mostly accepted. Other copies and drafts hardly ever are.
    """
    requests = [Request(i, [1], 0, DecodeConfig(max_new_tokens=CLOSED_TOKENS)) for i in range(num_rows)]
    state = DecodeState.start(requests, 2, 0, LONGEST_COPY)
    state.final_B += 1
    cache = DecodeCache(num_rows, 1, torch.device("cpu"))
    repeats, is_good, cost = [False] * num_rows, dict.fromkeys(range(num_rows), False), 0.0
    while len(state):
        plans, rows = policy.plan(state, is_closed=True), state.index_B.tolist()
        accepted = []
        for row, plan in zip(rows, plans, strict=True):
            tries = (dice.random() < (0.93 if is_good[row] else 0.3) for _ in range(plan.num_verified))
            accepted.append(len(list(takewhile(bool, tries))))
        policy.learn(state, plans, accepted, 1)
        spent = ONE_CORE(sum(plan.num_slots for plan in plans))
        policy.settle(spent * dice.uniform(0.95, 1.05))
        cost += spent
        for row in rows:
            repeats[row] = dice.random() < (0.85 if repeats[row] else 0.03)
        match_B = torch.tensor(
            [dice.randint(3, 8) if repeats[row] else dice.choice([0, 0, 1, 2]) for row in rows]
        )
        match_BD = torch.where(match_B[:, None] > 0, match_B[:, None] + torch.arange(LONGEST_COPY), 0)
        drafted = [plan.length * (a in plan.groups) for plan, a in zip(plans, accepted, strict=True)]
        state.num_draft_B = torch.tensor(drafted)
        state.draft_confidence_BD[:], state.draft_match_BD[:] = 0.3, 0
        is_copy_B = torch.tensor(policy.prefers_copy(state, match_BD))
        state.draft_match_BD[is_copy_B] = match_BD[is_copy_B]
        state.num_draft_B[is_copy_B] = LONGEST_COPY
        is_good |= {
            row: repeats[row] and copies for row, copies in zip(rows, is_copy_B.tolist(), strict=True)
        }
        state.num_steps_B += 1
        state.final_B += torch.tensor(accepted) + 1
        state.keep(state.final_B <= CLOSED_TOKENS, cache)
    return cost


@pytest.mark.parametrize("num_rows", [8, 16])
def test_a_batch_that_nothing_joins_is_not_slower_than_ar_decoding(num_rows: int) -> None:
    """A row that copies ends early, and then the others alone pay for their forwards."""
    policy = DraftPolicy(LENGTH, ForwardCost([(1, 67.0), (16, 152.0), (64, 493.0)]), follows_clock=True)
    costs = [cost_of_a_closed_batch(policy, num_rows, random.Random(seed)) for seed in range(28)]
    assert CLOSED_TOKENS * ONE_CORE(num_rows) / mean(costs[4:]) > 0.97


def test_drafting_starts_again_when_drafts_become_good() -> None:
    simulation = Simulation(DraftPolicy(LENGTH, STEP_AT_NINE), DRAFTS["never"], 1)
    assert simulation.gain() < 1.02
    simulation.chances = DRAFTS["often"]
    for _ in range(600):
        simulation.step()
    assert simulation.gain() > 0.9 * best_fixed_gain("step", "often") > 1.5


def test_forward_cost_is_linear_between_points_beyond_them_and_never_falls() -> None:
    cost = ForwardCost([(1, 3.0), (3, 2.0), (5, 6.0)])
    assert [cost(n) for n in (1, 2, 3, 4, 5, 7)] == [3.0, 3.0, 3.0, 4.5, 6.0, 9.0]
    line = ForwardCost.linear(32.0)
    assert [line(n) for n in (1, 2, 100)] == [33.0, 34.0, 132.0]


@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_the_cost_of_this_machine_is_measured_and_rises(kind: str) -> None:
    cost = measure_forward_cost(make_lm(kind, block_size=4))
    assert len(cost.slots) > 2 and cost.costs == sorted(cost.costs) and cost.costs[0] > 0
