"""Draws lossless decoding as an animated SVG: what is drafted and what is verified in each forward pass.

python benchmarks/drafting_picture.py runs/tiny/model --out docs/drafting.svg

Every frame is one forward pass of `Decoder`: the tokens are those of the run, nothing is made up.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from html import escape
from pathlib import Path

import opdlm
from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import Request
from opdlm.decoding.generate import Decoder
from opdlm.modeling.diffusion_lm import DiffusionLM

SECONDS_PER_FRAME = 0.9
CHARACTER, LINE, MARGIN, COLUMNS = 10.2, 30, 24, 72
"""Width of a character, height of a line, margin in pixels; characters of a line."""
COLOURS = {"prompt": "#8b949e", "verified": "#1f2328", "draft": "#d9730d"}


@dataclass(frozen=True, slots=True)
class Frame:
    """After one forward pass: the tokens that are verified, and the draft that the pass proposes next."""

    verified: list[int]
    draft: list[int]


def record_frames(model: DiffusionLM, prompt_ids: list[int], max_new_tokens: int) -> list[Frame]:
    """One frame per forward pass of greedy lossless decoding."""
    config = DecodeConfig(mode="lossless", max_new_tokens=max_new_tokens)
    decoder = Decoder(model, config, num_rows=1, max_length=len(prompt_ids) + max_new_tokens)
    decoder.waiting.append(Request(0, prompt_ids, 0, config))
    frames = []
    while decoder.is_busy:
        finished = decoder.step()
        if finished:
            frames.append(Frame(list(finished[0].text_ids), []))
            break
        state = decoder.state
        known = int(state.frontier(model.spec.mask_token_id)[0])
        draft = state.draft_BD[0, : int(state.num_draft_B[0])].tolist()
        frames.append(Frame(state.tokens_BL[0, len(prompt_ids) : known].tolist(), draft))
    return frames


def words(tokenizer: object, ids: list[int]) -> list[str]:
    """The text of each token."""
    return [tokenizer.decode([token]) for token in ids]  # type: ignore[attr-defined]


def draw_frame(number: int, parts: list[tuple[str, str]], caption: str) -> str:
    """One group of the SVG: words with their kind, wrapped, and a line about the pass."""
    drawn, column, line = [], 0, 1
    for text, kind in parts:
        if column + len(text) > COLUMNS:
            column, line = 0, line + 1
        x, y = MARGIN + column * CHARACTER, MARGIN + line * LINE
        width = len(text) * CHARACTER
        if kind == "draft":
            drawn.append(
                f'<rect x="{x:.1f}" y="{y - 19:.1f}" width="{width:.1f}" height="26" rx="4" fill="#fff1e5"/>'
            )
        drawn.append(f'<text x="{x:.1f}" y="{y}" fill="{COLOURS[kind]}">{escape(text)}</text>')
        column += len(text)
    drawn.append(f'<text x="{MARGIN}" y="{MARGIN + 3.6 * LINE:.0f}" class="note">{escape(caption)}</text>')
    return f'<g class="frame" style="animation-delay:{number * SECONDS_PER_FRAME:.1f}s">{"".join(drawn)}</g>'


def draw(prompt: str, frames: list[tuple[list[str], list[str]]]) -> str:
    """The whole picture; each frame holds the words that are verified and those of the draft."""
    total, hold = len(frames) * SECONDS_PER_FRAME, 100 / len(frames)
    groups = []
    for i, (verified, draft) in enumerate(frames):
        parts = [(f"{prompt} → ", "prompt"), *((word, "verified") for word in verified)]
        parts += [(word, "draft") for word in draft]
        caption = (
            f"after {i + 1} forward passes: {len(verified)} tokens, {len(verified) / (i + 1):.2f} per pass"
        )
        groups.append(draw_frame(i, parts, caption))
    width, height = 2 * MARGIN + COLUMNS * CHARACTER, MARGIN + 4.2 * LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="Lossless decoding, one forward pass per frame"><style>'
        "text{font:17px ui-monospace,Menlo,Consolas,monospace;white-space:pre}"
        ".note{font-size:14px;fill:#57606a}"
        f".frame{{opacity:0;animation:show {total:.1f}s steps(1) infinite}}"
        f"@keyframes show{{0%{{opacity:1}}{hold:.3f}%{{opacity:0}}}}"
        "@media(prefers-reduced-motion:reduce){.frame{animation:none}.frame:last-child{opacity:1}}"
        f'</style><rect width="100%" height="100%" rx="8" fill="#ffffff" stroke="#d0d7de"/>'
        + "".join(groups)
        + "</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw lossless decoding as an animated SVG.")
    parser.add_argument("folder", nargs="?", default="runs/tiny/model")
    parser.add_argument("--prompt", default="story Tusel owl hill")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("docs/drafting.svg"))
    options = parser.parse_args()
    model, tokenizer = opdlm.load(options.folder)
    ids = encode_prompt(tokenizer, Conversation(prompt=options.prompt))
    recorded = record_frames(model, list(ids), options.max_new_tokens)
    frames = [(words(tokenizer, f.verified), words(tokenizer, f.draft)) for f in recorded]
    options.out.write_text(draw(options.prompt, frames), encoding="utf-8")


if __name__ == "__main__":
    main()
