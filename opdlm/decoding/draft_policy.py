"""What a forward of lossless decoding verifies and drafts, from what forwards cost and how drafts fare.

A forward over N slots costs C(N), measured on this machine or given as a line. A measured cost follows what
the steps of decoding take, so that it comes right where the first measurement was disturbed or too short.
With T tokens per unit of cost as decoding goes so far, at least those of AR decoding, a forward is worth

    expected tokens now + expected tokens of the next draft - T * C(N).

At a price of m tokens per slot, a draft token is verified if it is accepted with a probability above m. The
draft after k accepted tokens is made if P(exactly k) * value > m * its slots; value is the expected number of
its accepted tokens minus m * the slots that verify them. C is not a line (a product of 16 rows may cost twice
that of 8), so no single price is right: the plan of every slope of C is made, and plain AR decoding, and the
one that is worth most is taken. The probabilities come from the confidences of the draft, or the length of
the match if it was copied (`prompt_lookup`), calibrated on what was accepted. A draft is worth less where a
copy may take its place.

Where no request waits, a token is worth less in a row that is ahead of the others (`token_values`).
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
from operator import mul

import torch
from torch import Tensor

from ..modeling.diffusion_lm import DiffusionLM, DiffusionSpec, PackedForward
from ..modeling.kv_cache import DecodeCache, Packed
from .decode_state import DecodeState
from .prompt_lookup import LONGEST_MATCH

NUM_BINS = 16
"""Bins of the log-odds of a confidence, one unit wide, from -8 to 8."""
MATCH_PRIORS = (0.2, 0.4, 0.55, 0.65, 0.7, 0.75, 0.8, 0.85)
"""A guess of how often a copied token is accepted, by the length of its match from 1 on."""
MEASURED_SLOTS = (1, 64, 16, 8, 32, 256, 4, 1024, 2, 12, 24, 48, 96, 128, 192, 384, 512, 768)
"""In the order in which they are measured."""
MEASURE_SECONDS, LEAST_MEASURED = 0.5, 3
"""No further size is measured after so long, once there are so many."""
SHORT_SECONDS = 0.1
"""A forward that takes less is timed twice."""
FOLLOW, LARGEST_CHANGE = 0.25, 2.0
"""Share of the difference by which a cost follows what a step took, and by which factor a step may differ."""
PROBE_FORWARDS = 256
"""Of so many forwards, one is plain AR decoding, whose cost the others are compared with."""
RETRY_FORWARDS, RETRY_SHARE = 16, 0.01
"""After so many forwards without any draft, one of one token finds out whether that has changed: after more
where it would cost more than this share of them."""
KEEP = 0.99
"""What a forward leaves of the weight of earlier observations."""
TRIAL_FORWARDS, LONGEST_PAUSE = 32, 1024
"""Forwards after which drafting must have paid. If not, it pauses for as many, the next time for twice as
many, and so on up to the longest pause."""

MOST_DRAFTS = 1e12
"""The `forward_overhead` of the fewest forwards: a slot costs nothing beside it."""


class ForwardCost:
    """Cost of a forward by its number of slots: linear between points, and on from the last two."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        """Pairs (number of slots, cost) of different numbers; at least two. A cost below that of fewer slots
        counts as equal.
        """
        self.points, self.followed = dict(points), set[float]()
        self.update()

    def update(self) -> None:
        """Costs and slopes between the points."""
        self.slots = sorted(self.points)
        self.costs = list(accumulate((self.points[slots] for slots in self.slots), max))
        self.slopes = [
            (after - before) / (last - first)
            for (first, last), (before, after) in zip(pairwise(self.slots), pairwise(self.costs), strict=True)
        ]

    def follow(self, num_slots: int, seconds: float, *, is_plain: bool) -> None:
        """Let the point of so many slots follow what a step took; the first step is believed. Where that was
        plain AR decoding, points that no step has tried go with it: they were measured under the same load.
        No fewer slots cost more than these, and no more slots less.
        """
        nearest, change = point_of(num_slots), seconds / self(num_slots)
        if self.has_followed(num_slots):
            change = 1 + FOLLOW * (min(max(change, 1 / LARGEST_CHANGE), LARGEST_CHANGE) - 1)
        here = self(nearest) * change
        self.followed.add(nearest)
        for slots, cost in [*self.points.items()]:
            cost = cost * change if is_plain and slots not in self.followed else cost
            self.points[slots] = min(cost, here) if slots < nearest else max(cost, here)
        self.points[nearest] = here
        self.update()

    def has_followed(self, num_slots: int) -> bool:
        """Whether a step over about so many slots has told what it took."""
        return point_of(num_slots) in self.followed

    @classmethod
    def linear(cls, overhead: float) -> ForwardCost:
        """`overhead` + the number of slots."""
        return cls([(0, overhead), (1, overhead + 1)])

    def __call__(self, num_slots: float) -> float:
        place = min(max(bisect_left(self.slots, num_slots), 1), len(self.slopes))
        return self.costs[place - 1] + self.slopes[place - 1] * (num_slots - self.slots[place - 1])


def point_of(num_slots: int) -> int:
    """The number of slots at which a cost is kept: from 16 on the nearest of six for each doubling."""
    return num_slots if num_slots <= 16 else round(2 ** (round(6 * math.log2(num_slots)) / 6))


@torch.inference_mode()
def measure_forward_cost(model: DiffusionLM) -> ForwardCost:
    """Seconds of a forward, and of the logits of half of its slots, by size. A compiled forward is not
    measured: every size would be compiled.
    """
    points: list[tuple[float, float]] = []
    width = 2 * model.spec.block_size
    num_rows = -(-max(MEASURED_SLOTS) // width)
    cache = DecodeCache(num_rows, 2 * width, model.device)
    started, run_packed = time.perf_counter(), model.run_packed
    model.run_packed = PackedForward.run
    try:
        for size in MEASURED_SLOTS:
            packed = rows_of_slots(size, model.spec)
            seconds = timed_forward(model, cache, packed)
            if not points or seconds < SHORT_SECONDS:  # the first call allocates, a short time is noisy
                seconds = min(seconds, timed_forward(model, cache, packed))
            points.append((size, seconds))
            is_late = time.perf_counter() - started > MEASURE_SECONDS
            if is_late and len(points) >= LEAST_MEASURED:
                break
    finally:
        model.run_packed = run_packed
    return ForwardCost(points)


def rows_of_slots(size: int, spec: DiffusionSpec) -> Packed:
    """Rows of `block_size` clean slots with a draft of as many after them, the last row cut to `size`."""
    row_N, position_N = (
        torch.arange(size) // (2 * spec.block_size),
        torch.arange(size) % (2 * spec.block_size),
    )
    is_noised_N = position_N >= spec.block_size
    order_N = is_noised_N.long().argsort(stable=True)
    ids_N = torch.where(is_noised_N, spec.mask_token_id, 0)
    visible_until_N = torch.where(is_noised_N, spec.block_size - 1, position_N)
    columns = (row_N, ids_N, position_N, visible_until_N, is_noised_N.long())
    return Packed(int((~is_noised_N).sum()), *(column_N[order_N] for column_N in columns))


def timed_forward(model: DiffusionLM, cache: DecodeCache, packed: Packed) -> float:
    """Seconds of one forward, with the logits of its clean slots."""
    started = clock(model.device)
    hidden_NH, _ = model.packed_hidden(packed, int(packed.row_N.max()) + 1, cache)
    model.logits(hidden_NH[: packed.num_clean]).argmax(-1).tolist()  # waits for the device
    return clock(model.device) - started


def clock(device: torch.device) -> float:
    """Seconds. On a CPU those of this thread, which does its share of every product: other processes, which
    make it wait, change them little.
    """
    return time.thread_time() if device.type == "cpu" else time.perf_counter()


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What one forward computes for one row."""

    num_verified: int
    """Number of draft tokens that are verified."""
    groups: tuple[int, ...]
    """Numbers of accepted tokens for which a next draft is computed."""
    length: int
    """Number of masks in each group."""

    @property
    def num_slots(self) -> int:
        return 1 + self.num_verified + len(self.groups) * self.length


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the policy expects of one row."""

    prefix: list[float]
    """Probability that the first 0, 1, 2, ... tokens of its draft are accepted."""
    is_copy: bool
    """Whether the draft was copied."""
    values: tuple[float, ...]
    """What its next tokens are worth, as shares of the mean token."""


class DraftPolicy:
    """Decides from running averages what a forward contains.

    The averages are Python numbers, because operations on tensors of a few elements are slower.
    """

    def __init__(self, draft_length: int, cost: ForwardCost, *, follows_clock: bool = False) -> None:
        """`draft_length`: the longest draft. `follows_clock`: costs are seconds, and `settle` is told what
        every step took; else a forward costs what `cost` says.
        """
        self.draft_length, self.cost, self.follows_clock = draft_length, cost, follows_clock
        self.last: tuple[int, int, int] | None = None
        """Rows, slots and tokens of a step that is not settled."""
        self.num_since_probe = 0
        self.pause, self.num_paused, self.num_tried = TRIAL_FORWARDS, 0, 0
        """Length of the next pause, forwards left of the present one, and forwards since the last."""
        self.earned = self.spent = cost(1)
        """Tokens times the cost of a token of AR decoding, and the cost of the forwards that gave them."""
        of_odds = (1 / (1 + math.exp(NUM_BINS / 2 - 0.5 - i)) for i in range(NUM_BINS))
        self.by_bin = [Frequency(4.0, prior) for prior in (*of_odds, *MATCH_PRIORS)]
        """How often a draft token of such a confidence or match is accepted if all before it are."""
        self.by_place = [Frequency(2.0, 0.7) for _ in range(draft_length)]
        """The same at each place of the student's draft, where a token that is not verified counts as not
        accepted.
        """
        self.copied = {goes_on: Frequency(4.0, 0.0) for goes_on in (False, True)}
        """How often the next draft is a copy, by whether all that was verified of a copy was accepted."""
        self.goes_on: list[bool] = []
        """Of each row in the last forward."""
        self.num_idle = 0
        """Forwards since the last draft."""

    def tokens_per_cost(self, num_rows: int) -> float:
        """Of decoding so far, at this number of rows, and at least that of AR decoding."""
        return max(1.0, self.earned / self.spent) * num_rows / self.cost(num_rows)

    def prefix(self, bins: Sequence[int]) -> list[float]:
        """Probability that the first 0, 1, 2, ... tokens of a draft are accepted."""
        return list(accumulate((self.by_bin[index].share for index in bins), mul, initial=1.0))

    def survival(self) -> list[float]:
        """Probability that the next draft is accepted up to and including each place."""
        for before, after in pairwise(self.by_place):
            after.prior = before.share  # until more is known
        return list(accumulate((place.share for place in self.by_place), mul))

    def plan(self, state: DecodeState, *, is_closed: bool = False) -> list[DraftPlan]:
        """What the next forward verifies and drafts. `is_closed`: no other row will join these."""
        self.num_since_probe += 1
        if self.num_paused or self.is_probe(state.num_steps_B.tolist()):
            self.num_since_probe = 0
            return [DraftPlan(0, (), self.draft_length)] * len(state)
        values = [(1.0,) * (state.draft_BD.shape[1] + 1)] * len(state)
        if is_closed and self.follows_clock:
            left_B = state.limit_B - (state.final_B - state.num_prompt_B).clamp(min=0)
            values = self.token_values(left_B.tolist(), len(values[0]))
        drafts = list(zip(map(tuple, draft_bins(state)), values, strict=True))
        number = Counter(drafts)  # rows with equal drafts have equal plans
        rows = {draft: Outlook(self.prefix(draft[0]), is_copy(draft[0]), draft[1]) for draft in number}
        rate, survival = self.tokens_per_cost(len(drafts)), self.survival()
        best, best_worth = [DraftPlan(0, (), self.draft_length)] * len(state), -math.inf
        for price in (math.inf, *sorted({slope * rate for slope in self.cost.slopes})):
            plans = {draft: self.plan_row(row, price, survival) for draft, row in rows.items()}
            num_slots = sum(number[draft] * plan.num_slots for draft, (plan, _) in plans.items())
            worth = sum(number[draft] * tokens for draft, (_, tokens) in plans.items())
            worth -= rate * self.cost(num_slots)
            if worth > best_worth:
                best, best_worth = [plans[draft][0] for draft in drafts], worth
        return self.with_retry(best)

    def token_values(self, left: Sequence[int], number: int) -> list[tuple[float, ...]]:
        """For each row what its next tokens, `number` of them, are worth, where a token in every row is worth
        1 each. `left`: tokens that the rows still need at most.

        A batch that no row joins ends with its slowest row. Any token saves what one row adds to a forward.
        The rest of a forward it saves only if its row is the slowest in the end, which is the less likely the
        further the row is ahead: by exp(-tokens ahead / spread), a spread of half the root of what is left.
        """
        num_rows, longest = len(left), max(left)
        if num_rows == 1:
            return [(1.0,) * number]
        added = min(1.0, num_rows * (1 - self.cost(num_rows - 1) / self.cost(num_rows)))
        spread = math.sqrt(longest) / 2
        ahead = [round(2 * (longest - one) / spread) / 2 for one in left]  # so that rows share plans
        rest = (1 - added) * num_rows / sum(math.exp(-one) for one in ahead)
        return [
            tuple(added + rest * math.exp(-one - place / spread) for place in range(number)) for one in ahead
        ]

    def is_probe(self, num_steps: list[int]) -> bool:
        """Whether the cost of plain AR decoding must be known better: that of so many rows, which no step has
        told yet, or again after long.
        """
        is_unknown = min(num_steps) > 0 and not self.cost.has_followed(len(num_steps))
        return self.follows_clock and (is_unknown or self.num_since_probe > PROBE_FORWARDS)

    def plan_row(self, row: Outlook, price: float, survival: list[float]) -> tuple[DraftPlan, float]:
        """The plan of a row at this price of a slot, and what its accepted tokens and those of the next draft
        are worth, less the price of verifying these.
        """
        worths = list(takewhile(lambda worth: worth > price, map(mul, row.prefix[1:], row.values)))
        num_verified = len(worths)
        value = row.values[num_verified // 2]  # of a token after about those that are accepted now
        next_worths = [chance * value for chance in survival]
        length = max(1, num_leading_above(next_worths, 2 * price))
        gain = sum(next_worths[:length]) - price * length
        if gain <= 0:
            return DraftPlan(num_verified, (), length), sum(worths)
        needed = self.needed(row.prefix, num_verified, row.is_copy)
        groups = tuple(k for k, chance in enumerate(needed) if chance * gain > price * length)
        return DraftPlan(num_verified, groups, length), sum(worths) + gain * sum(needed[k] for k in groups)

    def needed(self, prefix: list[float], num_verified: int, copies: bool) -> list[float]:
        """Probability of every number of accepted tokens, from none to `num_verified`, without a copy as the
        next draft.
        """
        exactly = [here - after for here, after in pairwise(prefix[: num_verified + 1])]
        no_copy = {goes_on: 1 - frequency.share for goes_on, frequency in self.copied.items()}
        last = no_copy[copies and num_verified > 0]
        return [*(chance * no_copy[False] for chance in exactly), prefix[num_verified] * last]

    def with_retry(self, plans: list[DraftPlan]) -> list[DraftPlan]:
        """The plans, or one draft of one token more if there was none for long."""
        self.num_idle = 0 if any(plan.groups for plan in plans) else self.num_idle + 1
        num_slots = sum(plan.num_slots for plan in plans)
        extra = self.cost(num_slots + 1) / self.cost(num_slots) - 1
        if self.num_idle < max(RETRY_FORWARDS, 2 * extra / RETRY_SHARE) or not self.draft_length:
            return plans
        self.num_idle = 0
        return [DraftPlan(plans[0].num_verified, (0,), 1), *plans[1:]]

    def learn(
        self, state: DecodeState, plans: list[DraftPlan], accepted: list[int], num_forwards: int
    ) -> None:
        """Update the averages with the outcome of one forward."""
        for frequency in (*self.by_bin, *self.by_place, *self.copied.values()):
            frequency.forget()
        self.goes_on = []
        for bins, plan, num_accepted in zip(draft_bins(state), plans, accepted, strict=True):
            self.goes_on.append(is_copy(bins) and num_accepted == plan.num_verified > 0)
            for place, index in enumerate(bins[: num_accepted + 1]):
                is_accepted = place < num_accepted
                if not is_copy(bins):
                    self.by_place[place].add(is_accepted)
                if place < plan.num_verified:
                    self.by_bin[index].add(is_accepted)
        num_rows, num_slots = len(plans), sum(plan.num_slots for plan in plans)
        self.last = (num_rows, num_slots, num_rows + sum(accepted))
        if not self.follows_clock:
            self.settle(self.cost(num_slots) + (num_forwards - 1) * self.cost(1))

    def prefers_copy(self, state: DecodeState, match_BD: Tensor) -> list[bool]:
        """For each row, whether more tokens of the copied draft than of the student's will be accepted.
        `match_BD`: the length of the match before each copied token; 0: there is no copy.
        """
        chosen = []
        copies = bins_of(state.draft_confidence_BD, match_BD, (match_BD > 0).sum(1))
        for drafted, copied, goes_on in zip(draft_bins(state), copies, self.goes_on, strict=True):
            chosen.append(sum(self.prefix(copied)) > sum(self.prefix(drafted)))
            self.copied[goes_on].add(chosen[-1])
        return chosen

    def settle(self, spent: float) -> None:
        """Account for what the last step cost."""
        if self.last is None:
            return
        num_rows, num_slots, num_tokens = self.last
        self.last = None
        self.earned = KEEP * self.earned + num_tokens * self.cost(num_rows) / num_rows
        self.spent = KEEP * self.spent + spent
        if self.follows_clock:
            self.cost.follow(num_slots, spent, is_plain=num_slots == num_rows)
        self.pause_if_it_loses()

    def pause_if_it_loses(self) -> None:
        """Estimates can be wrong; the balance of the last forwards is not."""
        if self.num_paused:
            self.num_paused -= 1
            return
        self.num_tried += 1
        if self.num_tried < TRIAL_FORWARDS:
            return
        if self.earned >= self.spent:
            self.pause = TRIAL_FORWARDS
            return
        self.num_paused, self.num_tried = self.pause, 0
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        self.earned = self.spent


@dataclass(slots=True)
class Frequency:
    """How often something happened, with a guess that counts as `weight` observations."""

    weight: float
    prior: float
    happened: float = 0.0
    tried: float = 0.0

    @property
    def share(self) -> float:
        return (self.weight * self.prior + self.happened) / (self.weight + self.tried)

    def add(self, happened: bool) -> None:
        self.happened += happened
        self.tried += 1

    def forget(self) -> None:
        self.happened *= KEEP
        self.tried *= KEEP


def num_leading_above(values: list[float], bound: float) -> int:
    """Number of values before the first that does not exceed `bound`."""
    return sum(1 for _ in takewhile(lambda value: value > bound, values))


def draft_bins(state: DecodeState) -> list[list[int]]:
    """The bin of every draft token, for each row."""
    return bins_of(state.draft_confidence_BD, state.draft_match_BD, state.num_draft_B)


def bins_of(confidence_BD: Tensor, match_BD: Tensor, num_draft_B: Tensor) -> list[list[int]]:
    """The bins of the first `num_draft` tokens of each row: of the match where there is one, else of the
    confidence.
    """
    rows = zip(confidence_BD.tolist(), match_BD.tolist(), num_draft_B.tolist(), strict=True)
    return [
        [
            NUM_BINS + min(match, LONGEST_MATCH) - 1 if match else confidence_bin(confidence)
            for confidence, match in zip(confidences[:num_draft], matches[:num_draft], strict=True)
        ]
        for confidences, matches, num_draft in rows
    ]


def is_copy(bins: Sequence[int]) -> bool:
    """Whether a draft was copied."""
    return bool(bins) and bins[0] >= NUM_BINS


def confidence_bin(confidence: float) -> int:
    """The bin of a confidence: its log-odds, rounded down and clamped. NaN falls into the first bin."""
    confidence = min(1 - 1e-6, max(1e-6, confidence))
    odds = math.log(confidence / (1 - confidence))
    return min(max(int(odds + NUM_BINS / 2), 0), NUM_BINS - 1)
