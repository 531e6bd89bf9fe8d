"""The chunked divergence against dense autograd references.

Shapes: H hidden, K top-k, M supervised positions, V vocabulary.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opdlm.objectives.losses import (
    CHUNK_BYTES,
    CHUNK_BYTES_ELSEWHERE,
    Divergence,
    Head,
    HiddenTargets,
    LossOutput,
    TokenTargets,
    TopKTargets,
    chunked_divergence,
    default_chunk_size,
    num_temporaries,
    top_k_targets,
)

Targets = HiddenTargets | TopKTargets | TokenTargets
Options = dict[str, Any]
M, H, V, K = 11, 6, 23, 5
SOFT_DIVERGENCES: list[Options] = [
    {"divergence": "forward_kl"},
    {"divergence": "forward_kl", "reverse_weight": 0.3},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd"},
    {"divergence": "jsd", "beta": 0.2},
    {"divergence": "total_variation"},
    {"divergence": "forward_kl", "reverse_weight": 0.3, "variation_weight": 0.6},
]


def make_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def hidden_MH() -> Tensor:
    return make_tensor(M, H, seed=0).requires_grad_()


@pytest.fixture
def weight_VH() -> Tensor:
    return make_tensor(V, H, seed=1).requires_grad_()


@pytest.fixture
def bias_V() -> Tensor:
    return make_tensor(V, seed=2).requires_grad_()


@pytest.fixture
def teacher() -> HiddenTargets:
    return HiddenTargets(hidden_MH=make_tensor(M, H, seed=3), head=Head(weight=make_tensor(V, H, seed=4)))


@pytest.fixture
def weights_M() -> Tensor:
    return make_tensor(M, seed=5).abs()


def dense_divergence(
    logp: Tensor,
    logq: Tensor,
    *,
    divergence: Divergence,
    beta: float = 0.5,
    reverse_weight: float = 0.0,
    variation_weight: float = 0.0,
) -> Tensor:
    """Per position, from dense log-probabilities, by torch's own kl_div, which takes KL(a || b) as (b, a)."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if divergence == "jsd":
        logm = (beta * logp.exp() + (1 - beta) * logq.exp()).log()
        return beta * kl(logp, logm) + (1 - beta) * kl(logq, logm)
    if divergence == "reverse_kl":
        return kl(logq, logp)
    variation = (logp.exp() - logq.exp()).abs().sum(-1) / 2
    if divergence == "total_variation":
        return variation
    mixed = (1 - reverse_weight) * kl(logp, logq) + reverse_weight * kl(logq, logp)
    return (1 - variation_weight) * mixed + variation_weight * variation


def make_targets(kind: str, hidden_MH: Tensor, head: Head) -> Targets:
    match kind:
        case "full":
            return HiddenTargets(hidden_MH=hidden_MH.detach(), head=head)
        case "tail" | "no_tail":
            return top_k_targets(hidden_MH, head, K, tail=kind == "tail", chunk=4)
        case _:
            return TokenTargets(ids_M=torch.zeros(len(hidden_MH), dtype=torch.long))


def with_tail(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Outcomes of the top-K targets with tail, the plain way."""
    top = logprobs.gather(-1, ids)
    return torch.cat([top, (1 - top.exp().sum(-1, keepdim=True)).log()], -1)


def assert_same_value_and_gradients(
    out: LossOutput, expected_M: Tensor, weights_M: Tensor, *leaves: Tensor
) -> None:
    """Against a dense per-position divergence that is differentiable in the same leaves."""
    torch.testing.assert_close(out.per_position_M, expected_M.detach())
    expected = (weights_M * expected_M).sum()
    torch.testing.assert_close(out.loss, expected)
    expected_grads = torch.autograd.grad(3.0 * expected, leaves)
    assert all(grad.abs().max() > 1e-3 for grad in expected_grads)
    torch.testing.assert_close(torch.autograd.grad(3.0 * out.loss, leaves), expected_grads)


@pytest.mark.parametrize("options", SOFT_DIVERGENCES, ids=str)
def test_full_vocabulary_divergence_equals_dense_kl_div(
    options: Options,
    hidden_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    teacher: HiddenTargets,
    weights_M: Tensor,
) -> None:
    head = Head(weight=weight_VH, bias=bias_V)
    out = chunked_divergence(hidden_MH, head, teacher, weights_M, chunk_size=4, **options)
    logq = F.linear(hidden_MH, weight_VH, bias_V).log_softmax(-1)
    logp = (teacher.hidden_MH @ teacher.head.weight.T).log_softmax(-1)
    expected_M = dense_divergence(logp, logq, **options)
    assert_same_value_and_gradients(out, expected_M, weights_M, hidden_MH, weight_VH, bias_V)


@pytest.mark.parametrize("options", SOFT_DIVERGENCES, ids=str)
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_divergence_equals_dense_kl_div_over_its_outcomes(
    options: Options,
    tail: bool,
    hidden_MH: Tensor,
    weight_VH: Tensor,
    teacher: HiddenTargets,
    weights_M: Tensor,
) -> None:
    targets = top_k_targets(teacher.hidden_MH, teacher.head, K, tail=tail, chunk=3)
    out = chunked_divergence(hidden_MH, Head(weight=weight_VH), targets, weights_M, chunk_size=4, **options)
    logp = (teacher.hidden_MH @ teacher.head.weight.T).log_softmax(-1)
    logq = (hidden_MH @ weight_VH.T).log_softmax(-1)
    ids = logp.topk(K).indices
    logp, logq = (with_tail(x, ids) if tail else x.gather(-1, ids) for x in (logp, logq))
    expected_M = dense_divergence(logp, logq, **options)
    assert_same_value_and_gradients(out, expected_M, weights_M, hidden_MH, weight_VH)


def test_cross_entropy_equals_torch_cross_entropy(
    hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor, weights_M: Tensor
) -> None:
    ids_M = torch.arange(M) * 2
    head = Head(weight=weight_VH, bias=bias_V)
    out = chunked_divergence(
        hidden_MH, head, TokenTargets(ids_M=ids_M), weights_M, divergence="cross_entropy", chunk_size=4
    )
    expected_M = F.cross_entropy(F.linear(hidden_MH, weight_VH, bias_V), ids_M, reduction="none")
    assert_same_value_and_gradients(out, expected_M, weights_M, hidden_MH, weight_VH, bias_V)


@pytest.mark.parametrize("options", SOFT_DIVERGENCES, ids=str)
@pytest.mark.parametrize("targets_kind", ["full", "tail", "no_tail"])
def test_gradcheck_passes(
    options: Options,
    targets_kind: str,
    hidden_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    teacher: HiddenTargets,
    weights_M: Tensor,
) -> None:
    num_rows, num_vocabulary = 3, K + 3  # small: it costs two evaluations per entry
    banned = torch.tensor([num_vocabulary - 1])
    teacher_head = Head(weight=teacher.head.weight[:num_vocabulary], banned=banned)
    targets = make_targets(targets_kind, teacher.hidden_MH[:num_rows], teacher_head)
    inputs = (hidden_MH[:num_rows], weight_VH[:num_vocabulary], bias_V[:num_vocabulary])

    def loss(hidden_MH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
        head = Head(weight=weight_VH, bias=bias_V, softcap=3.0, scale=0.7, banned=banned)
        out = chunked_divergence(hidden_MH, head, targets, weights_M[:num_rows], chunk_size=2, **options)
        return out.loss

    assert torch.autograd.gradcheck(loss, tuple(x.detach().requires_grad_() for x in inputs))


@pytest.mark.parametrize("options", SOFT_DIVERGENCES, ids=str)
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_of_the_whole_vocabulary_equals_the_full_divergence(
    options: Options,
    tail: bool,
    hidden_MH: Tensor,
    weight_VH: Tensor,
    teacher: HiddenTargets,
    weights_M: Tensor,
) -> None:
    head = Head(weight=weight_VH)
    top = top_k_targets(teacher.hidden_MH, teacher.head, V, tail=tail)
    full_out = chunked_divergence(hidden_MH, head, teacher, weights_M, **options)
    top_out = chunked_divergence(hidden_MH, head, top, weights_M, **options)
    torch.testing.assert_close(top_out.per_position_M, full_out.per_position_M)
    torch.testing.assert_close(
        torch.autograd.grad(top_out.loss, (hidden_MH, weight_VH)),
        torch.autograd.grad(full_out.loss, (hidden_MH, weight_VH)),
    )


def test_a_top_k_of_the_whole_vocabulary_leaves_no_tail_to_round() -> None:
    teacher_MV, student_MV = (make_tensor(M, V, seed=seed, dtype=torch.float32) for seed in (10, 11))
    head = Head(weight=torch.eye(V))
    losses = [
        chunked_divergence(
            student_MV, head, top_k_targets(teacher_MV, head, V, tail=tail), torch.ones(M)
        ).loss
        for tail in (True, False)
    ]
    assert losses[0].item() == losses[1].item()


def test_the_tail_keeps_the_kl_non_negative_where_the_sparse_variant_is_negative() -> None:
    student_MV = make_tensor(200, V, seed=6, dtype=torch.float32)
    teacher_MV = student_MV + 0.3 * make_tensor(200, V, seed=7, dtype=torch.float32)
    head = Head(weight=torch.eye(V))
    smallest = {}
    for tail in (True, False):
        targets = top_k_targets(teacher_MV, head, 2, tail=tail)
        smallest[tail] = chunked_divergence(student_MV, head, targets, torch.ones(200)).per_position_M.min()
    assert smallest[False] < -0.05
    assert smallest[True] > -1e-6


@pytest.mark.parametrize("options", SOFT_DIVERGENCES, ids=str)
@pytest.mark.parametrize("top_k", [None, K])
def test_loss_and_gradient_are_zero_when_student_equals_teacher(
    options: Options, top_k: int | None, hidden_MH: Tensor, weight_VH: Tensor, weights_M: Tensor
) -> None:
    head = Head(weight=weight_VH, softcap=2.0)
    frozen = hidden_MH.detach()
    targets: Targets = HiddenTargets(hidden_MH=frozen, head=head)
    if top_k is not None:
        targets = top_k_targets(frozen, head, top_k)
    out = chunked_divergence(hidden_MH, head, targets, weights_M, **options)
    torch.testing.assert_close(out.per_position_M, torch.zeros_like(out.per_position_M), atol=1e-13, rtol=0)
    if "variation" in str(options):
        return  # |q - p| has a kink at p = q: rounding decides its sign
    for grad in torch.autograd.grad(out.loss, (hidden_MH, weight_VH)):
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk_size", [1, 3, M, 1000])
@pytest.mark.parametrize("kind", ["full", "tail"])
def test_chunk_size_changes_no_loss_and_no_gradient(
    chunk_size: int,
    kind: str,
    hidden_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    teacher: HiddenTargets,
    weights_M: Tensor,
) -> None:
    targets = make_targets(kind, teacher.hidden_MH, teacher.head)
    head = Head(weight=weight_VH, bias=bias_V)
    outs = [
        chunked_divergence(hidden_MH, head, targets, weights_M, chunk_size=size) for size in (5, chunk_size)
    ]
    torch.testing.assert_close(outs[0].per_position_M, outs[1].per_position_M)
    grads = [torch.autograd.grad(out.loss, (hidden_MH, weight_VH, bias_V)) for out in outs]
    torch.testing.assert_close(grads[0], grads[1])


def test_a_position_of_weight_zero_changes_no_loss_and_gets_no_gradient(
    hidden_MH: Tensor, weight_VH: Tensor, teacher: HiddenTargets
) -> None:
    weights_M = torch.ones(M, dtype=torch.float64)
    weights_M[4] = 0.0
    out = chunked_divergence(hidden_MH, Head(weight=weight_VH), teacher, weights_M)
    kept = torch.arange(M) != 4
    torch.testing.assert_close(out.loss.detach(), out.per_position_M[kept].sum())
    (grad_MH,) = torch.autograd.grad(out.loss, hidden_MH)
    assert out.per_position_M[4] > 0
    assert (grad_MH.abs().sum(-1) > 0).tolist() == kept.tolist()


def test_bfloat16_stays_close_to_float64_and_returns_float32_loss(
    teacher: HiddenTargets, weights_M: Tensor
) -> None:
    hidden_MH, weight_VH = make_tensor(M, H, seed=0).bfloat16(), make_tensor(V, H, seed=1).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden_MH, weight_VH)]
        targets = HiddenTargets(
            hidden_MH=teacher.hidden_MH.bfloat16().to(dtype),
            head=Head(weight=teacher.head.weight.bfloat16().to(dtype)),
        )
        out = chunked_divergence(leaves[0], Head(weight=leaves[1]), targets, weights_M, chunk_size=2)
        results.append((out, torch.autograd.grad(out.loss, leaves)))
    (low, low_grads), (high, high_grads) = results
    assert low.loss.dtype == low.per_position_M.dtype == torch.float32
    torch.testing.assert_close(low.per_position_M.double(), high.per_position_M, atol=0.02, rtol=0.02)
    for low_grad, high_grad in zip(low_grads, high_grads, strict=True):
        assert low_grad.dtype == torch.bfloat16
        assert (low_grad.double() - high_grad).norm() < 0.02 * high_grad.norm()


def test_the_weight_gradient_of_many_chunks_is_not_summed_in_bfloat16() -> None:
    num_rows = 2048
    hidden_MH = torch.ones(num_rows, 1, dtype=torch.bfloat16)
    weight_VH = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = TokenTargets(ids_M=torch.zeros(num_rows, dtype=torch.long))
    out = chunked_divergence(
        hidden_MH,
        Head(weight=weight_VH),
        targets,
        torch.ones(num_rows),
        divergence="cross_entropy",
        chunk_size=1,
    )
    (grad_VH,) = torch.autograd.grad(out.loss, weight_VH)
    assert grad_VH.flatten().tolist() == [-num_rows / 2, num_rows / 2]


@pytest.mark.parametrize("options", SOFT_DIVERGENCES, ids=str)
@pytest.mark.parametrize("top_k", [None, K, V - 1])
def test_banned_ids_act_as_if_the_head_had_no_such_rows(
    options: Options,
    top_k: int | None,
    hidden_MH: Tensor,
    weight_VH: Tensor,
    teacher: HiddenTargets,
    weights_M: Tensor,
) -> None:
    banned = torch.tensor([7, V - 1])
    allowed = torch.tensor([v for v in range(V) if v not in (7, V - 1)])

    def run(student_head: Head, teacher_head: Head, k: int | None) -> tuple[LossOutput, tuple[Tensor, ...]]:
        targets: Targets = HiddenTargets(hidden_MH=teacher.hidden_MH, head=teacher_head)
        if k is not None:
            targets = top_k_targets(teacher.hidden_MH, teacher_head, k)
        out = chunked_divergence(hidden_MH, student_head, targets, weights_M, chunk_size=4, **options)
        return out, torch.autograd.grad(out.loss, (hidden_MH, weight_VH))

    out, grads = run(
        Head(weight=weight_VH, banned=banned), Head(weight=teacher.head.weight, banned=banned), top_k
    )
    small, small_grads = run(
        Head(weight=weight_VH[allowed]),
        Head(weight=teacher.head.weight[allowed]),
        None if top_k is None else min(top_k, V - 2),
    )
    torch.testing.assert_close(out.per_position_M, small.per_position_M)
    torch.testing.assert_close(grads, small_grads)
    assert grads[1][banned].abs().max() == 0


def test_a_token_that_only_the_teacher_can_produce_makes_forward_kl_infinite(
    hidden_MH: Tensor, teacher: HiddenTargets, weights_M: Tensor
) -> None:
    head = Head(weight=make_tensor(V, H, seed=1), banned=torch.tensor([3]))
    out = chunked_divergence(hidden_MH, head, teacher, weights_M)
    assert torch.isposinf(out.per_position_M).all()


def test_a_teacher_certain_within_its_top_k_gives_finite_loss_and_gradient() -> None:
    head = Head(weight=torch.eye(V))
    teacher_MV, student_MV = torch.zeros(2, V), torch.zeros(2, V)
    teacher_MV[:, 0] = 200.0
    student_MV[0, 1], student_MV[1, 0] = 200.0, 200.0
    student_MV.requires_grad_()
    targets = top_k_targets(teacher_MV, head, 2)
    for options in SOFT_DIVERGENCES:
        out = chunked_divergence(student_MV, head, targets, torch.ones(2), **options)
        (grad_MV,) = torch.autograd.grad(out.loss, student_MV)
        assert grad_MV.isfinite().all(), options
        assert out.per_position_M[0] > 0.3, options
        assert abs(out.per_position_M[1]) < 1e-4, options


@pytest.mark.parametrize(
    "settings", [{"softcap": 2.0}, {"scale": 0.25}, {"softcap": 2.0, "scale": 3.0}], ids=str
)
def test_softcap_and_scale_are_differentiated(
    settings: Options,
    hidden_MH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor,
    teacher: HiddenTargets,
    weights_M: Tensor,
) -> None:
    head = Head(weight=weight_VH, bias=bias_V, **settings)
    out = chunked_divergence(hidden_MH, head, teacher, weights_M, chunk_size=4)
    logits = F.linear(hidden_MH, weight_VH, bias_V) * settings.get("scale", 1.0)
    if "softcap" in settings:
        logits = settings["softcap"] * torch.tanh(logits / settings["softcap"])
    torch.testing.assert_close(head.logits(hidden_MH), logits)
    logp = (teacher.hidden_MH @ teacher.head.weight.T).log_softmax(-1)
    expected_M = dense_divergence(logp, logits.log_softmax(-1), divergence="forward_kl")
    assert_same_value_and_gradients(out, expected_M, weights_M, hidden_MH, weight_VH, bias_V)


def test_head_logits_are_differentiable_with_banned_ids(hidden_MH: Tensor, weight_VH: Tensor) -> None:
    banned = torch.tensor([2])
    head = Head(weight=weight_VH, softcap=2.0, banned=banned)
    probabilities = head.logits(hidden_MH).softmax(-1)
    assert probabilities[:, 2].abs().max() == 0
    (grad_VH,) = torch.autograd.grad(probabilities[:, 0].sum(), weight_VH)
    assert grad_VH.isfinite().all()
    assert grad_VH[0].abs().max() > 0


@pytest.mark.parametrize("kind", ["full", "tail", "no_tail", "token"])
def test_no_positions_give_zero_loss_that_backpropagates_zeros(
    kind: str, weight_VH: Tensor, teacher: HiddenTargets
) -> None:
    hidden_MH = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    targets = make_targets(kind, hidden_MH, teacher.head)
    out = chunked_divergence(
        hidden_MH,
        Head(weight=weight_VH),
        targets,
        torch.zeros(0, dtype=torch.float64),
        divergence="cross_entropy" if kind == "token" else "forward_kl",
    )
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert hidden_MH.grad is not None and hidden_MH.grad.shape == (0, H)
    assert weight_VH.grad is not None and weight_VH.grad.tolist() == torch.zeros(V, H).tolist()


def test_a_tied_weight_receives_the_gradients_of_both_uses(
    weight_VH: Tensor, teacher: HiddenTargets, weights_M: Tensor
) -> None:
    ids_M = torch.arange(M)
    loss = chunked_divergence(weight_VH[ids_M].tanh(), Head(weight=weight_VH), teacher, weights_M).loss
    logp = (teacher.hidden_MH @ teacher.head.weight.T).log_softmax(-1)
    logq = (weight_VH[ids_M].tanh() @ weight_VH.T).log_softmax(-1)
    expected = (weights_M * dense_divergence(logp, logq, divergence="forward_kl")).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, weight_VH), torch.autograd.grad(expected, weight_VH))


def test_a_frozen_head_gets_no_gradient_and_leaves_the_hidden_gradient_unchanged(
    hidden_MH: Tensor, weight_VH: Tensor, teacher: HiddenTargets, weights_M: Tensor
) -> None:
    def hidden_grad(weight_VH: Tensor) -> Tensor:
        loss = chunked_divergence(hidden_MH, Head(weight=weight_VH), teacher, weights_M).loss
        return torch.autograd.grad(loss, hidden_MH)[0]

    frozen_VH = weight_VH.detach().clone()
    torch.testing.assert_close(hidden_grad(frozen_VH), hidden_grad(weight_VH))
    chunked_divergence(hidden_MH, Head(weight=frozen_VH), teacher, weights_M).loss.backward()
    assert frozen_VH.grad is None


def test_under_no_grad_the_loss_is_the_same_and_no_gradient_is_computed(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    teacher: HiddenTargets,
    weights_M: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = Head(weight=weight_VH)
    expected = chunked_divergence(hidden_MH, head, teacher, weights_M)
    monkeypatch.setattr(Head, "backpropagate_", lambda *_: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        out = chunked_divergence(hidden_MH, head, teacher, weights_M)
    assert not out.loss.requires_grad
    assert out.loss.item() == expected.loss.item()
    assert out.per_position_M.tolist() == expected.per_position_M.tolist()


def test_two_backward_passes_through_one_loss_give_the_same_gradient(
    hidden_MH: Tensor, weight_VH: Tensor, teacher: HiddenTargets, weights_M: Tensor
) -> None:
    loss = chunked_divergence(hidden_MH, Head(weight=weight_VH), teacher, weights_M).loss
    first = torch.autograd.grad(loss, (hidden_MH, weight_VH), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden_MH, weight_VH))
    torch.testing.assert_close(second, tuple(2 * grad for grad in first))


def test_top_k_targets_are_the_largest_log_probabilities(teacher: HiddenTargets) -> None:
    targets = top_k_targets(teacher.hidden_MH, teacher.head, K, chunk=2)
    logp = (teacher.hidden_MH @ teacher.head.weight.T).log_softmax(-1)
    assert targets.ids_MK.tolist() == logp.topk(K).indices.tolist()
    torch.testing.assert_close(targets.logprobs_MK, logp.topk(K).values)
    assert targets.tail and not targets.logprobs_MK.requires_grad


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    num_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.num_elements = max(self.num_elements, x.numel())
        return out


@pytest.mark.parametrize("kind", ["full", "tail", "no_tail", "token"])
def test_no_tensor_is_larger_than_one_chunk_of_logits_or_the_head(
    kind: str, weight_VH: Tensor, teacher: HiddenTargets
) -> None:
    num_rows, chunk_size = 200, 8
    hidden_MH = make_tensor(num_rows, H, seed=0).requires_grad_()
    with LargestTensor() as largest:
        targets = make_targets(kind, hidden_MH, teacher.head)
        loss = chunked_divergence(
            hidden_MH,
            Head(weight=weight_VH),
            targets,
            torch.ones(num_rows),
            divergence="cross_entropy" if kind == "token" else "forward_kl",
            chunk_size=chunk_size,
        ).loss
        loss.backward()
    assert largest.num_elements == max(num_rows * H, chunk_size * V, V * H) < num_rows * V


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_chunks_shrink_with_the_vocabulary_down_to_16_rows(device: str) -> None:
    rows = [
        default_chunk_size(vocabulary, 1024, 4, trains_head=False, device=device)
        for vocabulary in (32_000, 151_936, 10_000_000)
    ]
    assert rows[0] > rows[1] > rows[2] == 16
    budget = CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE)
    assert budget / 2 < rows[1] * 151_936 * 4 * 4 <= budget


def test_default_chunks_use_as_much_memory_as_the_gradient_of_a_trained_head() -> None:
    rows = default_chunk_size(151_936, 1024, 4, trains_head=True)
    assert rows == 1024 // 4


@pytest.mark.parametrize("options", SOFT_DIVERGENCES)
def test_no_more_tensors_of_a_chunk_are_alive_than_its_size_allows_for(options: Options) -> None:
    num_rows, vocabulary = 32, 5000
    hidden_MH, weight_VH = (
        make_tensor(num_rows, H, seed=0).requires_grad_(),
        make_tensor(vocabulary, H, seed=1),
    )
    targets = HiddenTargets(hidden_MH=make_tensor(num_rows, H, seed=2), head=Head(weight=weight_VH.clone()))
    with LiveBytes() as live:
        chunked_divergence(hidden_MH, Head(weight=weight_VH), targets, torch.ones(num_rows), **options)
    allowed = num_temporaries(*(v for k, v in options.items() if k != "beta"))
    found = live.peak / (num_rows * vocabulary * 8)
    assert 0.6 * allowed < found <= allowed


def test_a_second_backward_without_its_graph_is_refused(hidden_MH: Tensor, teacher: HiddenTargets) -> None:
    loss = chunked_divergence(hidden_MH, Head(weight=make_tensor(V, H, seed=5)), teacher, torch.ones(M)).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


def test_autocast_to_bfloat16_stays_close_and_returns_gradients_in_the_dtype_of_the_inputs(
    teacher: HiddenTargets,
) -> None:
    leaves = [make_tensor(*shape, seed=9, dtype=torch.float32) for shape in ((M, H), (V, H), (V,))]
    targets = HiddenTargets(
        hidden_MH=teacher.hidden_MH.float(), head=Head(weight=teacher.head.weight.float())
    )
    results = []
    for enabled in (False, True):
        inputs = [x.clone().requires_grad_() for x in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            head = Head(weight=inputs[1], bias=inputs[2])
            loss = chunked_divergence(inputs[0], head, targets, torch.ones(M), chunk_size=4).loss
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in inputs)])
    for exact, low in zip(*results, strict=True):
        assert low.dtype == torch.float32
        assert (low - exact).norm() < 0.03 * exact.norm()


def test_sparse_reverse_kl_is_degenerate_which_is_why_it_is_refused() -> None:
    """Equality with the teacher is not its optimum: moving all mass off the top-K scores lower."""
    head = Head(weight=torch.eye(V))
    teacher_MV = make_tensor(1, V, seed=8, dtype=torch.float32)
    targets = top_k_targets(teacher_MV, head, 4, tail=False)
    start_MV = teacher_MV.clone().requires_grad_()
    out = chunked_divergence(start_MV, head, targets, torch.ones(1), divergence="reverse_kl")
    (grad_MV,) = torch.autograd.grad(out.loss, start_MV)
    assert math.isclose(out.loss.item(), 0.0, abs_tol=1e-6)
    assert grad_MV[0, targets.ids_MK[0]].min() > 0.01


@pytest.mark.parametrize("kind", ["full", "tail"])
@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation"])
def test_acceptance_is_one_minus_the_total_variation(
    hidden_MH: Tensor, weight_VH: Tensor, teacher: HiddenTargets, kind: str, divergence: Divergence
) -> None:
    targets = make_targets(kind, teacher.hidden_MH, teacher.head)
    found = chunked_divergence(
        hidden_MH,
        Head(weight=weight_VH),
        targets,
        torch.ones(M),
        divergence=divergence,
        with_acceptance=True,
        chunk_size=4,
    )
    plain = chunked_divergence(
        hidden_MH, Head(weight=weight_VH), targets, torch.ones(M), divergence="total_variation"
    )
    assert found.acceptance_M is not None and plain.acceptance_M is None
    torch.testing.assert_close(found.acceptance_M, 1 - plain.per_position_M)
