"""Likelihoods of text against enumeration on tiny models, and `opdlm eval --text` end to end."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import NUM_TOKENS, tiny_overrides, write_checkpoint, write_data, write_rows
from tiny_models import MASK, STOP, V, qwen3
from torch import Tensor
from transformers import PreTrainedModel

from opdlm.cli.main import main
from opdlm.data.documents import PADDING, RowBatch, TextRow
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.objectives.masking import Masks
from opdlm.text.batches import Prediction, can_mask, mixed_rows
from opdlm.text.likelihood import block_bound, causal_nll, md_bound, prefix_nll, pseudo_nll
from opdlm.text.options import Question, rank_options, share_of_best

BOTH: tuple[Prediction, ...] = ("same_position", "next_position")
SPEC = DiffusionSpec(
    format="sdar",
    block_size=3,
    grid="absolute",
    mask_token_id=MASK,
    stop_token_ids=(STOP,),
    banned_token_ids=(MASK,),
)


def make_lm(base: PreTrainedModel | None = None, spec: DiffusionSpec = SPEC) -> DiffusionLM:
    return DiffusionLM(base or qwen3(), spec).eval()


def make_row_batch(*pieces: int, padding: int = 0, given: int = 0, rows: int = 1, seed: int = 0) -> RowBatch:
    """Rows of pieces of these lengths; the first `given` tokens of each are a prompt."""
    rng = torch.Generator().manual_seed(seed)
    start = [first for size, first in zip(pieces, itertools.accumulate((0, *pieces)), strict=False)]
    starts = [s for size, s in zip(pieces, start, strict=True) for _ in range(size)] + [PADDING] * padding
    is_given = [i < given for size in pieces for i in range(size)] + [False] * padding
    ids_BR = torch.randint(MASK - 1, (rows, len(starts)), generator=rng)
    return RowBatch(ids_BR, torch.tensor(starts).expand(rows, -1), torch.tensor(is_given).expand(rows, -1))


def as_rows(row_batch: RowBatch) -> list[TextRow]:
    return [
        TextRow(*parts)
        for parts in zip(row_batch.ids_BR, row_batch.start_BR, row_batch.is_given_BR, strict=True)
    ]


@torch.no_grad()
def log_probabilities(model: DiffusionLM, ids: list[int], sees_LL: Tensor) -> Tensor:
    """[L, V] of the stock model in float64 with this mask; nothing of the package takes part."""
    base = qwen3()
    base.load_state_dict(model.student.state_dict())
    base = base.double()
    base.config._attn_implementation = "eager"
    hidden_LL = torch.zeros(sees_LL.shape, dtype=torch.float64).masked_fill(~sees_LL, -torch.inf)
    logits_LV = base(input_ids=torch.tensor([ids]), attention_mask=hidden_LL[None, None]).logits[0]
    logits_LV[:, MASK] = -torch.inf
    return logits_LV.log_softmax(-1)


def everything(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool)


def masked_terms(
    model: DiffusionLM, ids: list[int], inputs: int, hidden: tuple[int, ...], prediction: Prediction
) -> dict[int, float]:
    """-log p of each masked token, and with next_position of a last token that is no input."""
    shown = [MASK if i in hidden else token for i, token in enumerate(ids[:inputs])]
    logp_LV = log_probabilities(model, shown, everything(inputs))
    shift = prediction == "next_position"
    scored = [*hidden, *([inputs] if shift and len(ids) > inputs else [])]
    return {i: -float(logp_LV[i - shift, ids[i]]) for i in scored}


def exact_bound(
    model: DiffusionLM, ids: list[int], inputs: int, can: list[int], prediction: Prediction
) -> float:
    """The mean over |M| = 1..n, and over all M of that size, of n times the mean over M."""
    total, n = 0.0, len(can)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(can, k))
        for hidden in subsets:
            terms = masked_terms(model, ids, inputs, hidden, prediction)
            value = sum(terms[i] for i in hidden) * n / k + terms.get(inputs, 0.0)
            total += value / len(subsets) / n
    return total


def test_causal_nll_is_the_loss_of_transformers() -> None:
    base = qwen3()
    model = make_lm(base, replace(SPEC, mask_token_id=V, banned_token_ids=()))  # as without a mask token
    row_batch = make_row_batch(12, rows=40)
    found = causal_nll(model, row_batch)
    with torch.no_grad():
        expected = base(input_ids=row_batch.ids_BR, labels=row_batch.ids_BR, use_cache=False).loss
    assert found.per_token == pytest.approx(float(expected), abs=1e-5)
    assert int(found.tokens_B.sum()) == 40 * 11


def test_documents_of_a_row_are_scored_alone_and_padding_is_not() -> None:
    model, row_batch = make_lm(), make_row_batch(4, 5, padding=3)
    alone = [
        RowBatch(row_batch.ids_BR[:, a:b], torch.zeros(1, b - a).long(), torch.zeros(1, b - a).bool())
        for a, b in ((0, 4), (4, 9))
    ]
    for measure in (causal_nll, lambda *a: prefix_nll(*a, 0.5)):
        together, parts = measure(model, row_batch), [measure(model, part) for part in alone]
        assert float(together.nats_B[0]) == pytest.approx(sum(float(p.nats_B[0]) for p in parts), abs=1e-4)
        assert int(together.tokens_B[0]) == sum(int(p.tokens_B[0]) for p in parts)


@pytest.mark.parametrize(("given", "prefix"), [(0, 4), (3, 3), (1, 1)])
def test_prefix_nll_is_brute_force_with_a_prefix_seen_both_ways(given: int, prefix: int) -> None:
    model, row_batch = make_lm(), make_row_batch(9, given=given)
    ids = row_batch.ids_BR[0].tolist()
    sees_LL = everything(8).tril()
    sees_LL[:prefix, :prefix] = True
    logp_LV = log_probabilities(model, ids[:-1], sees_LL)
    found = prefix_nll(model, row_batch)
    expected = -sum(float(logp_LV[i - 1, ids[i]]) for i in range(prefix, 9))
    assert float(found.nats_B[0]) == pytest.approx(expected, abs=1e-4)
    assert int(found.tokens_B[0]) == 9 - prefix


def test_prefix_of_one_token_is_autoregressive() -> None:
    model, row_batch = make_lm(), make_row_batch(6, 7, padding=2, rows=2)
    assert torch.equal(prefix_nll(model, row_batch, share=0.0).nats_B, causal_nll(model, row_batch).nats_B)
    assert not torch.allclose(prefix_nll(model, row_batch).nats_B, causal_nll(model, row_batch).nats_B)


@pytest.mark.parametrize("prediction", BOTH)
@pytest.mark.parametrize("padding", [0, 1])
def test_md_bound_is_the_enumeration_over_masks(prediction: Prediction, padding: int) -> None:
    model, row_batch = make_lm(), make_row_batch(5, padding=padding, given=1)
    ids, inputs = row_batch.ids_BR[0, :5].tolist(), 4 + padding
    can = list(range(1, inputs))
    expected = exact_bound(model, ids, inputs, can, prediction)
    found = md_bound(model, row_batch, prediction, num_rates=3000)
    assert found.standard_error * float(found.tokens_B[0]) < 0.02 * expected
    assert abs(float(found.nats_B[0]) - expected) < 4 * float(found.error_B[0]) + 1e-3
    assert int(found.tokens_B[0]) == len(can) + (prediction == "next_position" and padding == 0)


def test_the_standard_error_is_not_smaller_than_the_spread_over_seeds() -> None:
    model, row_batch = make_lm(), make_row_batch(7, rows=3)
    results = [md_bound(model, row_batch, "next_position", 4, seed) for seed in range(60)]
    spread = torch.tensor([r.per_token for r in results]).std()
    told = torch.tensor([r.standard_error for r in results]).square().mean().sqrt()
    assert 0.85 * spread < told < 2 * spread


def test_md_bound_is_the_same_twice_and_another_with_another_seed() -> None:
    model, row_batch = make_lm(), make_row_batch(7, rows=2)
    first, again, other = (md_bound(model, row_batch, "same_position", 4, seed) for seed in (0, 0, 1))
    assert torch.equal(first.nats_B, again.nats_B)
    assert not torch.equal(first.nats_B, other.nats_B)


def test_block_bound_is_the_enumeration_over_each_block() -> None:
    model, row_batch = make_lm(), make_row_batch(7)
    ids = row_batch.ids_BR[0].tolist()
    expected = 0.0
    for first in (0, 3, 6):
        block = [i for i in range(first, min(first + 3, 7)) if i > 0]  # the first token is given
        for k in range(1, len(block) + 1):
            subsets = list(itertools.combinations(block, k))
            for hidden in subsets:
                shown = [MASK if i in hidden or i > 6 else t for i, t in enumerate([*ids, 0, 0][: first + 3])]
                length = len(shown)
                sees_LL = torch.arange(length)[:, None] // 3 >= torch.arange(length) // 3
                logp_LV = log_probabilities(model, shown, sees_LL)
                value = -sum(float(logp_LV[i, ids[i]]) for i in hidden)
                expected += value / k / len(subsets)
    found = block_bound(model, as_rows(row_batch), num_rates=1200)
    assert abs(float(found.nats_B[0]) - expected) < 4 * float(found.error_B[0]) + 1e-3
    assert float(found.error_B[0]) < 0.03 * expected
    assert int(found.tokens_B[0]) == 6


@pytest.mark.parametrize("prediction", BOTH)
@pytest.mark.parametrize("num_right", [0, 2])
def test_pseudo_nll_is_brute_force(prediction: Prediction, num_right: int) -> None:
    model, row_batch = make_lm(), make_row_batch(7, given=2)
    ids, inputs, expected = row_batch.ids_BR[0].tolist(), 6, 0.0
    scored = range(2, 7 if prediction == "next_position" else 6)
    for i in scored:
        hidden = tuple(j for j in range(i, i + num_right + 1) if j < inputs)
        expected += masked_terms(model, ids, inputs, hidden, prediction)[i]
    found = pseudo_nll(model, row_batch, prediction, num_right)
    assert float(found.nats_B[0]) == pytest.approx(expected, abs=1e-4)
    assert int(found.tokens_B[0]) == len(scored)


def test_pseudo_nll_masks_nothing_of_the_next_document() -> None:
    model, row_batch = make_lm(), make_row_batch(3, 4, padding=1)
    other = row_batch.ids_BR.clone()
    other[0, 3:7] = (other[0, 3:7] + 1) % (MASK - 1)
    alone = RowBatch(row_batch.ids_BR[:, :4], torch.tensor([[0, 0, 0, PADDING]]), torch.zeros(1, 4).bool())
    second = RowBatch(
        row_batch.ids_BR[:, 3:], row_batch.start_BR[:, 3:].sub(3).clamp_min(PADDING), torch.zeros(1, 5).bool()
    )
    both = pseudo_nll(model, row_batch, "same_position", 2).nats_B
    parts = [pseudo_nll(model, part, "same_position", 2).nats_B for part in (alone, second)]
    assert float(both[0]) == pytest.approx(float(sum(parts)[0]), abs=1e-4)


def test_a_uniform_predictor_has_log_v_everywhere() -> None:
    base = qwen3()
    torch.nn.init.zeros_(base.get_output_embeddings().weight)
    model, row_batch = make_lm(base), make_row_batch(6, 5, padding=1, given=1, rows=2)
    found = [causal_nll(model, row_batch), prefix_nll(model, row_batch)]
    for prediction in BOTH:
        found.append(md_bound(model, row_batch, prediction, 32))
        found += [pseudo_nll(model, row_batch, prediction, right) for right in (0, 1, 2)]
    assert [f.per_token for f in found] == pytest.approx([math.log(V - 1)] * len(found), abs=1e-4)
    block = block_bound(model, as_rows(row_batch), 32)
    assert block.per_token == pytest.approx(math.log(V - 1), abs=1e-4)


QUESTIONS = [
    Question((a, b), ((a, a), (b, b), (STOP, STOP, a)), answer)
    for a, b, answer in [(1, 2, 0), (3, 4, 0), (5, 6, 0), (7, 8, 0)]
]


def trained_to_answer(prediction: Prediction, *, causal: bool) -> DiffusionLM:
    """A model that saw the right options, read causally or all masked, for a few steps."""
    model = make_lm()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-2)
    row_batch = RowBatch.of([question.row(question.answer) for question in QUESTIONS])
    can_BL = can_mask(row_batch, prediction)
    masks = Masks(can_BL, can_BL.float(), can_BL)
    batch = mixed_rows(row_batch, len(QUESTIONS) if causal else 0, masks, prediction, MASK)
    for _ in range(40):
        hidden_MH = model.student_hidden(batch.slots)[batch.row_M, batch.column_M]
        loss = torch.nn.functional.cross_entropy(model.logits(hidden_MH), batch.target_M)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("prediction", BOTH)
def test_a_model_trained_on_the_right_options_ranks_them_first(prediction: Prediction) -> None:
    model = trained_to_answer(prediction, causal=False)
    report = rank_options(
        lambda rows, seed: md_bound(model, RowBatch.of(rows), prediction, 32, seed), QUESTIONS
    )
    assert report.accuracy == report.accuracy_per_token == 1.0
    assert report.delta_nll > 1 and report.delta_nll_per_token > 0.5
    assert report.right_per_token < 0.5
    assert report.accuracy_interval[0] < 1.0


def test_autoregressive_ranking_and_its_figures() -> None:
    model = trained_to_answer("next_position", causal=True)
    report = rank_options(lambda rows, _: causal_nll(model, RowBatch.of(rows)), QUESTIONS)
    assert report.accuracy == 1.0
    deltas, right = [], 0.0
    for question in QUESTIONS:
        nats = []
        for option in question.options:
            ids = [*question.prompt_ids, *option]
            logp_LV = log_probabilities(model, ids, everything(len(ids)).tril())
            nats.append(-sum(float(logp_LV[i - 1, ids[i]]) for i in range(2, len(ids))))
        deltas.append((nats[1] + nats[2]) / 2 - nats[0])
        right += nats[0] / 8
    assert report.delta_nll == pytest.approx(sum(deltas) / 4, abs=1e-3)
    assert report.right_per_token == pytest.approx(right, abs=1e-4)
    wrong = [replace(question, answer=1) for question in QUESTIONS]
    assert rank_options(lambda rows, _: causal_nll(model, RowBatch.of(rows)), wrong).accuracy == 0.0


def test_a_tie_is_shared() -> None:
    assert share_of_best([1.0, 1.0, 2.0], 0) == 0.5
    assert share_of_best([1.0, 1.0, 2.0], 2) == 0.0


TEXT = "the cat sat on the mat and the dog sat on the cat "


def train_text(root: Path, *overrides: str) -> Path:
    """A tiny model trained on text, with its held-out loss measured."""
    text = write_rows(root / "text.jsonl", [{"text": TEXT * 3}] * 4)
    out = root / "run"
    arguments = [f"data.path={text}", f"eval.path={text}", f"output_dir={out}", "data.sequence_length=24"]
    small = ["train.num_steps=2", "train.rows_per_update=4", "eval.num_rates=8", "eval.limit=5"]
    assert main(["train", str(write_checkpoint(root / "base")), *arguments, *small, *overrides]) == 0
    return out / "model"


def evaluate(*arguments: str | Path, out: Path) -> list[dict]:
    assert main(["eval", *map(str, arguments), "--out", str(out)]) == 0
    return json.loads((out / "text_likelihood.json").read_text())["models"]


@pytest.mark.parametrize(
    ("objective", "expected", "refused"),
    [
        (["name=autoregressive"], {"ar_nll"}, "md_bound"),
        (["name=masked_diffusion"], {"md_bound"}, "ar_nll"),
        (["name=masked_diffusion", "prediction=next_position"], {"md_bound"}, None),
        (["name=dual", "prediction=next_position"], {"ar_nll", "prefix_nll", "md_bound"}, None),
        (["name=dual"], {"ar_nll", "md_bound"}, None),
        (["name=block_diffusion"], {"md_bound"}, "pll"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_eval_gives_the_held_out_loss_of_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: list[str], expected: set[str], refused: str
) -> None:
    folder = train_text(tmp_path, *(f"objective.{setting}" for setting in objective))
    told = json.loads((folder / "all_results.json").read_text())
    arguments = [folder, "--text", tmp_path / "text.jsonl", "--num-rates", "8", "--limit", "5"]
    [model] = evaluate(*arguments, out=tmp_path / "out")
    assert set(model["metrics"]) == expected
    for name, found in model["metrics"].items():
        if name != "prefix_nll":
            assert found["per_token"] == pytest.approx(told[f"heldout_{name}"], abs=1e-5)
            assert found["total"] == pytest.approx(found["per_token"] * found["num_tokens"])
    assert (model["metrics"].get("md_bound", {"standard_error": 1})["standard_error"]) > 0
    capsys.readouterr()
    if refused:
        assert main(["eval", *map(str, arguments), "--metrics", refused]) == 2
        assert f"--metrics {refused} cannot be measured" in capsys.readouterr().err
    elif objective[0] == "name=dual":
        [model] = evaluate(*arguments, "--metrics", "pll,pll_right2", out=tmp_path / "named")
        assert set(model["metrics"]) == {"pll", "pll_right2"}


def test_eval_puts_several_folders_and_questions_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = train_text(tmp_path, "objective.name=dual"), tmp_path / "base"
    rows = [{"prompt": "the cat", "options": [" sat", " zz"], "answer": 0}] * 3
    questions = write_rows(tmp_path / "questions.jsonl", rows)
    capsys.readouterr()
    models = evaluate(folder, base, "--text", questions, "--metrics", "ar_nll,options", out=tmp_path / "out")
    assert [model["metrics"]["ar_nll"]["num_questions"] for model in models] == [3, 3]
    table = capsys.readouterr().out
    assert "| run | ar_nll |" in table and "| base | ar_nll |" in table
    [again] = evaluate(folder, "--text", questions, "--limit", "2", out=tmp_path / "again")
    assert set(again["metrics"]) == {"ar_nll", "md_bound"}
    assert again["metrics"]["md_bound"]["num_questions"] == 2


def test_a_plain_checkpoint_is_masked_only_if_the_user_names_its_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_text(tmp_path, "objective.name=dual", "objective.prediction=next_position")
    trained = ["--text", tmp_path / "text.jsonl", "--limit", "5"]
    [told] = evaluate(folder, *trained, out=tmp_path / "told")
    for name in ("opdlm_train.yaml", "manifest.json"):
        (folder / name).unlink()
    plain = [*trained, "data.sequence_length=24"]
    assert main(["eval", str(folder), *map(str, plain), "--metrics", "md_bound"]) == 2
    assert "--prediction" in capsys.readouterr().err
    [found] = evaluate(folder, *plain, "--prediction", "next_position", out=tmp_path / "plain")
    assert set(found["metrics"]) == {"ar_nll", "md_bound"}
    for name, values in found["metrics"].items():
        unused = told["metrics"][name]["per_token"]  # trained folders never predict ids without a token
        assert unused < values["per_token"] < unused + 1.0
    assert NUM_TOKENS < 64


@pytest.mark.parametrize("fmt", ["preserve", "sdar"])
def test_eval_text_of_converted_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], fmt: str) -> None:
    base = write_checkpoint(tmp_path / "base")
    write_data(tmp_path)
    overrides = tiny_overrides(base, tmp_path, tmp_path / "run")[1:]
    assert main(["convert", str(base), *overrides, f"format.name={fmt}", "train.num_steps=1"]) == 0
    text = write_rows(tmp_path / "text.jsonl", [{"text": TEXT}] * 4)
    arguments = ["--text", text, "data.sequence_length=24", "--limit", "3"]
    converted, plain = evaluate(tmp_path / "run/model", base, *arguments, out=tmp_path / "out")
    assert set(converted["metrics"]) == ({"ar_nll", "md_bound"} if fmt == "preserve" else {"md_bound"})
    turns = [{"role": "user", "content": "add 1 2 " * 20}, {"role": "assistant", "content": "3 4 " * 20}]
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}])  # its first rows are prompt only
    command = [tmp_path / "run/model", "--text", chat, "data.sequence_length=24"]
    (of_chat,) = evaluate(*command, out=tmp_path / "chat")
    assert of_chat["metrics"]["md_bound"]["num_tokens"] > 0
    assert main(["eval", *map(str, command), "--limit", "1"]) == 2
    assert "hold prompts and no responses. Give a larger --limit" in capsys.readouterr().err
    if fmt == "preserve":
        ours, theirs = converted["metrics"]["ar_nll"], plain["metrics"]["ar_nll"]
        assert ours["num_tokens"] == theirs["num_tokens"]
        assert ours["per_token"] < theirs["per_token"]  # the same model; ids without a token are banned
