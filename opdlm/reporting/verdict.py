"""One sentence that says what a conversion is worth, from the numbers of its report.

In `preserve` it begins with the speed of lossless decoding, which is the AR model's text whatever the student
learnt, and goes on with the student alone. An untrained student gets a bad verdict.
"""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]

MIN_GAIN = 1.1
"""Smallest ratio of speeds that counts as a gain; repeats of one measurement differ by less than the rest."""
MIN_TOKENS_PER_FORWARD = 1.5
"""Tokens per forward from which forwards are saved that a faster device may turn into time."""


def verdict(report: Values) -> str:
    """The sentence; `report` as in `retention.json`, with `speed` of `timing.json` if it was measured."""
    parts = [*lossless_part(report), student_part(report)]
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def is_preserve(report: Values) -> bool:
    return bool(report["settings"]["block_diffusion"]["format"] == "preserve")


def has_answers(report: Values) -> bool:
    """Whether any prompt has one; earlier versions did not count them."""
    return report.get("num_answered") != 0


def lossless_part(report: Values) -> list[str]:
    """Tokens per forward and speed of lossless decoding; nothing if it was not measured."""
    if timed := timed_lossless(report):
        per_forward, ratio = timed["tokens_per_forward"], timed["over_fastest_ar"]
        return [
            f"lossless decoding writes {per_forward:.2f} tokens per forward, {ratio:.2f} × the fastest AR "
            f"decoding here: {gain(per_forward, ratio)}"
        ]
    rows = [mode for mode in report["student"] if mode["name"] == "lossless"]
    return [
        f"lossless decoding writes {mode['tokens_per_forward']:.2f} tokens per forward (not timed)"
        for mode in rows
    ]


def timed_lossless(report: Values) -> Values | None:
    """The row of lossless decoding in the measurement of speed, if there is one."""
    rows: list[Values] = report.get("speed", {}).get("rows", [])
    return next((row for row in rows if row["name"] == "lossless"), None)


def gain(tokens_per_forward: float, ratio: float) -> str:
    """What lossless decoding gained at so many times the speed of AR decoding. A ratio above the tokens per
    forward is noise: no forward is cheaper than one of AR decoding.
    """
    if min(ratio, tokens_per_forward) >= MIN_GAIN:
        return "it is faster"
    if tokens_per_forward >= MIN_TOKENS_PER_FORWARD:
        return "forwards were saved, but no time"
    return "nothing was gained"


def own_decodings(report: Values) -> list[Values]:
    """The decodings in which every token that the AR model did not predict is the student's own."""
    names = ("static", "threshold")
    return [
        mode
        for mode in report["student"]
        if mode["name"].split(",")[0] in names and "replaced" in mode and mode["replaced"] is None
    ]


def student_part(report: Values) -> str:
    """What the student keeps without the AR model's help, in the decoding that writes the most at once."""
    who = "the student alone" if is_preserve(report) else "the student"
    decodings = own_decodings(report)
    if not decodings:
        return f"{who} was not measured"
    mode = max(decodings, key=lambda mode: float(mode["tokens_per_forward"]))
    how = f"{mode['name'].split(',')[0]}, {mode['tokens_per_forward']:.2f} tokens per forward"
    if from_ar := mode.get("from_ar"):
        how += f", {whole_percent(from_ar)} of the tokens the AR model's"
    return f"{who} {kept(report, mode)} ({how})"


def kept(report: Values, mode: Values) -> str:
    """Accuracy beside the teacher's; agreement with the teacher where accuracy says nothing."""
    if has_answers(report) and report["teacher"]["accuracy"]:
        return f"keeps {whole_percent(mode['retention'])} of the teacher's accuracy"
    return (
        f"repeats {whole_percent(mode['identical_to_teacher'])} of the teacher's responses and "
        f"{whole_percent(mode['common_prefix'])} of their tokens up to the first difference"
    )


def whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"
