"""Ten small text skills over an invented world: the data of the tiny teacher.

Every example is a prompt with exactly one right answer. A stable hash of an example's content sends it to the
train or to the test split, so the two never share a problem. A fact must be seen to be known: there the split
is over (fact, phrasing) pairs, and each fact keeps one phrasing for the test split. Phrasings begin with the
country: its hidden states are then the same in all of them, and a fact learned in three holds in the fourth.

Five skills supply conversion prompts; the other five are held out and only measured. Names come from a seeded
syllable generator, so nothing here is real-world data. This module knows nothing of models or tokens.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

WORLD = "opdlm-world-1"
TEST_PERCENT = 20
NUM_FACTS = 128

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FOODS = {
    "fox": "figs",
    "owl": "moths",
    "bear": "honey",
    "duck": "weeds",
    "mole": "worms",
    "goat": "thorns",
    "crow": "seeds",
    "newt": "flies",
}
PREPOSITIONS = {
    "cave": "in",
    "wood": "in",
    "lake": "by",
    "road": "by",
    "hill": "on",
    "roof": "on",
    "bridge": "under",
    "tree": "under",
}
CLOSERS = {"(": ")", "[": "]", "{": "}"}
CAPITAL_PHRASINGS = ("{} capital", "{}: what is its capital?", "{}, name the main city", "{} is ruled from?")
RIVER_PHRASINGS = ("{} river", "{}: what is its river?", "{}, name the main water", "{} is crossed by?")
CALENDAR_PHRASINGS = (
    "{n} days after {day}",
    "which day is {n} after {day}?",
    "from {day} go {n} days on",
    "{day} plus {n}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    prompt: str
    answer: str
    skill: str
    split: Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    name: str
    held_out: bool
    weight: float
    """Share in a training batch, relative to the other skills."""
    draw: Callable[[random.Random], tuple[str, str, Split]]
    """One random (prompt, answer, split)."""


def stable_hash(text: str) -> int:
    """The same number on every machine and in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(content: str) -> Split:
    return "test" if stable_hash(content) % 100 < TEST_PERCENT else "train"


def invent_name(rng: random.Random, num_syllables: int, endings: tuple[str, ...]) -> str:
    syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(num_syllables)]
    return ("".join(syllables) + rng.choice(endings)).capitalize()


def invent_facts(relation: str, endings: tuple[str, ...]) -> dict[str, str]:
    """Country -> thing, both unique; each relation has countries of its own."""
    rng = random.Random(f"{WORLD}:{relation}")
    countries: list[str] = []
    things: list[str] = []
    while len(countries) < NUM_FACTS:
        country = invent_name(rng, 2, ("dria", "vek", "lund", "mar", "zan", "nor"))
        thing = invent_name(rng, 2, endings)
        if country not in countries and thing not in things:
            countries.append(country)
            things.append(thing)
    return dict(zip(countries, things, strict=True))


CAPITALS = invent_facts("capital", ("l", "n", "th", "sk"))
RIVERS = invent_facts("river", ("m", "r", "sh", "x"))


def draw_fact(
    rng: random.Random, facts: dict[str, str], phrasings: tuple[str, ...], answer: str
) -> tuple[str, str, Split]:
    country = rng.choice(list(facts))
    index = rng.randrange(len(phrasings))
    split: Split = "test" if index == stable_hash(country) % len(phrasings) else "train"
    return phrasings[index].format(country), answer.format(facts[country]), split


def draw_capital(rng: random.Random) -> tuple[str, str, Split]:
    return draw_fact(rng, CAPITALS, CAPITAL_PHRASINGS, "The capital is {}.")


def draw_river(rng: random.Random) -> tuple[str, str, Split]:
    return draw_fact(rng, RIVERS, RIVER_PHRASINGS, "The river is {}.")


def draw_add(rng: random.Random) -> tuple[str, str, Split]:
    """Units, then tens with the carry: `add 47 38` -> `7+8=15 4+3+1=8 -> 85`."""
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    units = left % 10 + right % 10
    carry = "+1" if units > 9 else ""
    tens = left // 10 + right // 10 + (units > 9)
    steps = f"{left % 10}+{right % 10}={units} {left // 10}+{right // 10}{carry}={tens}"
    prompt = f"add {left} {right}"
    return prompt, f"{steps} -> {left + right}", split_of(prompt)


def draw_subtract(rng: random.Random) -> tuple[str, str, Split]:
    """Units, then tens with the borrow: `subtract 85 38` -> `15-8=7 8-3-1=4 -> 47`."""
    right, left = sorted((rng.randint(10, 99), rng.randint(10, 99)))
    borrow = left % 10 < right % 10
    units_from = left % 10 + 10 * borrow
    units = units_from - right % 10
    tens = left // 10 - right // 10 - borrow
    steps = f"{units_from}-{right % 10}={units} {left // 10}-{right // 10}{'-1' if borrow else ''}={tens}"
    prompt = f"subtract {left} {right}"
    return prompt, f"{steps} -> {left - right}", split_of(prompt)


def draw_sort(rng: random.Random) -> tuple[str, str, Split]:
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(3, 6))
    prompt = "sort " + " ".join(letters)
    return prompt, " ".join(sorted(letters)), split_of(prompt)


def draw_reverse(rng: random.Random) -> tuple[str, str, Split]:
    word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 6)))
    prompt = f"reverse {word}"
    return prompt, word[::-1], split_of(prompt)


def draw_brackets(rng: random.Random) -> tuple[str, str, Split]:
    """Close what is open, innermost first: `close ([]{` -> `})`."""
    stack: list[str] = []
    text = ""
    for _ in range(rng.randint(3, 9)):
        if not stack or (len(stack) < 6 and rng.random() < 0.7):
            stack.append(rng.choice("([{"))
            text += stack[-1]
        else:
            text += CLOSERS[stack.pop()]
    if not stack:
        stack.append(rng.choice("([{"))
        text += stack[-1]
    prompt = f"close {text}"
    return prompt, "".join(CLOSERS[bracket] for bracket in reversed(stack)), split_of(prompt)


def draw_story(rng: random.Random) -> tuple[str, str, Split]:
    """The animal decides the food and the place decides the preposition; the name is copied."""
    name = invent_name(rng, 2, ("", "n", "l"))
    animal, place = rng.choice(list(FOODS)), rng.choice(list(PREPOSITIONS))
    answer = f"{name} is a {animal}. It lives {PREPOSITIONS[place]} the {place}. It eats {FOODS[animal]}."
    prompt = f"story {name} {animal} {place}"
    return prompt, answer.replace("a owl", "an owl"), split_of(prompt)


def draw_count(rng: random.Random) -> tuple[str, str, Split]:
    """A running count, each letter beside the wanted one: `count a in tan` -> `ta0 aa1 na1 -> 1`.

    Steps without the wanted letter (`t0 a1 n1`) over 26 letters were tried: after 2,000 training steps the
    model still counted nothing, since to compare it must look past the word's own copy of each letter.
    """
    alphabet = rng.sample("aeiklnst", 4)
    word = "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 8)))
    letter = rng.choice(alphabet)
    counts = [word[: i + 1].count(letter) for i in range(len(word))]
    steps = " ".join(f"{char}{letter}{count}" for char, count in zip(word, counts, strict=True))
    prompt = f"count {letter} in {word}"
    return prompt, f"{steps} -> {counts[-1]}", split_of(prompt)


def draw_calendar(rng: random.Random) -> tuple[str, str, Split]:
    """One step a day: `3 days after Monday` -> `1Tu 2We 3Th -> Thursday`. The split is over (day, n)."""
    start, num_days = rng.randrange(7), rng.randint(2, 9)
    steps = " ".join(f"{i}{DAYS[(start + i) % 7][:2]}" for i in range(1, num_days + 1))
    prompt = rng.choice(CALENDAR_PHRASINGS).format(n=num_days, day=DAYS[start])
    split = split_of(f"calendar {DAYS[start]} {num_days}")
    return prompt, f"{steps} -> {DAYS[(start + num_days) % 7]}", split


SKILLS = (
    Skill(name="add", held_out=False, weight=1.0, draw=draw_add),
    Skill(name="sort", held_out=False, weight=1.2, draw=draw_sort),
    Skill(name="capital", held_out=False, weight=1.6, draw=draw_capital),
    Skill(name="brackets", held_out=False, weight=1.0, draw=draw_brackets),
    Skill(name="story", held_out=False, weight=0.8, draw=draw_story),
    Skill(name="subtract", held_out=True, weight=1.0, draw=draw_subtract),
    Skill(name="reverse", held_out=True, weight=1.0, draw=draw_reverse),
    Skill(name="river", held_out=True, weight=1.6, draw=draw_river),
    Skill(name="count", held_out=True, weight=1.5, draw=draw_count),
    Skill(name="calendar", held_out=True, weight=0.6, draw=draw_calendar),
)


def draw_example(skill: Skill, split: Split, rng: random.Random) -> Example:
    while True:
        prompt, answer, drawn_split = skill.draw(rng)
        if drawn_split == split:
            return Example(prompt=prompt, answer=answer, skill=skill.name, split=split)


def draw_batch(num_examples: int, rng: random.Random) -> list[Example]:
    """Train-split examples, skills mixed by weight."""
    skills = rng.choices(SKILLS, weights=[skill.weight for skill in SKILLS], k=num_examples)
    return [draw_example(skill, "train", rng) for skill in skills]


def draw_set(skill: Skill, split: Split, num_examples: int, rng: random.Random) -> list[Example]:
    """Distinct examples; where a skill has fewer distinct prompts than asked, every one, repeated in turn."""
    found: dict[str, Example] = {}
    for _ in range(100 * num_examples):
        example = draw_example(skill, split, rng)
        found[example.prompt] = example
        if len(found) == num_examples:
            break
    distinct = list(found.values())
    return [distinct[i % len(distinct)] for i in range(num_examples)]


def draw_noise(rng: random.Random) -> str:
    """A prompt that means nothing: the answers show the teacher's habits, yet no skill is asked."""
    makers = (
        lambda: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8))),
        lambda: invent_name(rng, 2, ("", "n", "k", "st")),
        lambda: str(rng.randint(0, 99)),
        lambda: rng.choice("([{?:,+."),
    )
    words = rng.choices(makers, weights=(5, 2, 2, 1), k=rng.randint(1, 5))
    return " ".join(make() for make in words)
