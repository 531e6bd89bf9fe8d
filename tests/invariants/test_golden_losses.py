"""The nine loss variants of the published OPDLM implementation, from its own logits and teacher log-probs.

Its conventions (response grid, per-row mean, stop token excluded, row 2 with supervised padding) come in
through the recorded masks. Shapes: B rows, R response slots, M supervised positions, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opdlm.objectives.losses import (
    Divergence,
    Head,
    HiddenTargets,
    LossOutput,
    TokenTargets,
    chunked_divergence,
    top_k_targets,
)

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
if not (GOLDEN / "golden.json").exists():
    pytest.skip(f"no golden numbers in {GOLDEN}", allow_module_level=True)

LOSSES: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())["training"]["losses"]
NUM_PROMPT, NUM_RESPONSE, V = 7, 10, 128
VARIANTS: dict[str, dict[str, Any]] = {
    "fkl_full": {},
    "fkl_top16": {"top_k": 16},
    "fkl_top4": {"top_k": 4},
    "fkl_full_with_imend": {"mask": "loss_mask_with_imend"},
    "rkl50_full": {"reverse_weight": 0.5},
    "jsd_full": {"divergence": "jsd"},
    "jsd_top16": {"divergence": "jsd", "top_k": 16},
    "rkl50_top16": {"reverse_weight": 0.5, "top_k": 16},
    "nll": {"divergence": "cross_entropy"},
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    """Tensors of the recorded batch, cut to the response; `student_BRV` are the noised slots' logits."""
    tensors = {name.removeprefix("train."): x for name, x in load_file(GOLDEN / "train.safetensors").items()}
    response = slice(NUM_PROMPT, NUM_PROMPT + NUM_RESPONSE)
    cut = ("input_ids", "loss_mask", "loss_mask_with_imend")
    cut += tuple(name for name in tensors if name.startswith("kl_per_pos."))
    return {name: tensors[name][:, response] for name in cut} | {
        "student_BRV": tensors["student_full_logits"][:, NUM_PROMPT + NUM_RESPONSE :],
        "teacher_BRV": tensors["teacher_logprobs_resp"],
    }


def golden_loss(
    golden: dict[str, Tensor],
    mask_BR: Tensor,
    *,
    divergence: Divergence = "forward_kl",
    reverse_weight: float = 0.0,
    top_k: int | None = None,
) -> LossOutput:
    """Mean over rows of the per-row mean; the recorded logits are the hidden states of an identity head."""
    head = Head(weight=torch.eye(V))
    teacher_MV = golden["teacher_BRV"][mask_BR]
    targets: Any = HiddenTargets(hidden_MH=teacher_MV, head=head)
    if divergence == "cross_entropy":
        targets = TokenTargets(ids_M=golden["input_ids"][mask_BR])
    elif top_k is not None:
        targets = top_k_targets(teacher_MV, head, top_k, tail=False)
    weights_BR = (mask_BR / mask_BR.sum(1, keepdim=True) / len(mask_BR)).float()
    return chunked_divergence(
        golden["student_BRV"][mask_BR],
        head,
        targets,
        weights_BR[mask_BR],
        divergence=divergence,
        reverse_weight=reverse_weight,
    )


def test_every_published_variant_is_covered() -> None:
    assert set(VARIANTS) == {
        name for name, value in LOSSES.items() if isinstance(value, dict) and "per_row" in value
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_row_means_equal_the_published_numbers(name: str, golden: dict[str, Tensor]) -> None:
    options = dict(VARIANTS[name])
    mask_BR = golden[options.pop("mask", "loss_mask")]
    out = golden_loss(golden, mask_BR, **options)
    row_means = [row.mean().item() for row in out.per_position_M.split(mask_BR.sum(1).tolist())]
    assert row_means == pytest.approx(LOSSES[name]["per_row"], rel=1e-5)
    assert out.loss.item() == pytest.approx(LOSSES[name]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["fkl_full", "fkl_top16", "jsd_full"])
def test_divergence_at_every_response_position_equals_the_published_numbers(
    name: str, golden: dict[str, Tensor]
) -> None:
    every_BR = torch.ones_like(golden["loss_mask"])
    out = golden_loss(golden, every_BR, **VARIANTS[name])
    torch.testing.assert_close(
        out.per_position_M.view_as(every_BR), golden[f"kl_per_pos.{name}"], atol=1e-5, rtol=1e-5
    )
