"""sdpa, flex and flash compute the same attention and the same gradient, on the layouts of the project.

The reference is a softmax over the visible keys, written out, in float64. Shapes: B rows, Q queries, K keys,
H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from families import NEEDS_SOFTCAP
from tiny_checkpoints import tiny_model
from tiny_models import CPU, KINDS, SLIDING, make_lm, make_prompts, make_rollout, qwen3
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.modeling import attention as attention
from opdlm.modeling.attention import (
    Backend,
    ChunkedAttention,
    QueryChunks,
    SlotForward,
    additive_mask,
    choose_backend,
    keys_with_cache,
    make_mask,
    slot_attention,
    use_slot_attention,
)
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.modeling.dot_product import Scoring
from opdlm.modeling.kv_cache import attend_rows
from opdlm.modeling.slots import Format, Grid, Slots, clean_slots, visible
from opdlm.objectives.states import StateBatch, pack_states, select_drafts, select_states
from opdlm.objectives.targets import score_rows

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
ROLLOUTS = [make_rollout(p, r, "absolute") for p, r in [(3, 22), (11, 30), (1, 9)]]
Layout = tuple[Slots, Slots]
CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows of some forty slots are many chunks, the last one incomplete."""
    monkeypatch.setattr(attention, "CHUNK", 8)


def make_spec(fmt: Format, block_size: int = 4) -> DiffusionSpec:
    return DiffusionSpec(
        format=fmt,
        block_size=block_size,
        grid="absolute",
        mask_token_id=23,
        stop_token_ids=(22,),
        banned_token_ids=(23,),
    )


def make_states(fmt: Format, block_size: int = 4) -> StateBatch:
    return select_states(ROLLOUTS, make_spec(fmt, block_size), "all", torch.Generator().manual_seed(0))


def preserve_row() -> Layout:
    """Noised slots that read the clean keys from the cache."""
    noised = make_states("preserve").slots
    return noised, keys_with_cache(noised, int(noised.visible_until_BS.max()) + 1)


def sdar_row() -> Layout:
    row = make_states("sdar").slots
    return row, row


def teacher_row() -> Layout:
    clean = make_states("preserve").text
    return clean, keys_with_cache(clean, clean.ids_BS.shape[1])


def padded_row() -> Layout:
    """A whole chunk of padding, which sees no key of the cache."""
    noised = make_states("preserve").slots
    kept = noised.only(torch.arange(noised.ids_BS.shape[1]) < 13)
    return kept, keys_with_cache(kept, int(kept.visible_until_BS.max()) + 1)


def pack_all(fmt: Format) -> StateBatch:
    spec = make_spec(fmt)
    rng = torch.Generator().manual_seed(0)
    return pack_states([select_states([rollout], spec, "all", rng) for rollout in ROLLOUTS])


def packed_preserve_row() -> Layout:
    """Three documents in one row, their clean keys side by side in the cache."""
    packed = pack_all("preserve")
    return packed.slots, keys_with_cache(packed.slots, packed.text.ids_BS.shape[1])


def packed_sdar_row() -> Layout:
    row = pack_all("sdar").slots
    return row, row


def causal_row() -> Layout:
    """Causal drafts of three documents."""
    spec = replace(make_spec("preserve"), draft_attention="causal")
    rng = torch.Generator().manual_seed(0)
    packed = pack_states([select_drafts([rollout], spec, 5, rng) for rollout in ROLLOUTS])
    return packed.slots, keys_with_cache(packed.slots, packed.text.ids_BS.shape[1])


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "preserve": preserve_row,
    "sdar": sdar_row,
    "teacher": teacher_row,
    "padded": padded_row,
    "packed_preserve": packed_preserve_row,
    "packed_sdar": packed_sdar_row,
    "causal": causal_row,
}


SCORINGS: dict[str, tuple[float | None, bool]] = {
    "plain": (None, False),
    "softcap": (0.7, False),
    "sinks": (None, True),
    "both": (0.7, True),
}
"""Softcap, and whether there are sinks."""


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks_H: Tensor | None = None,
    *,
    seen_BQK: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """`[B, Q, H, D]`: every query's softmax over the keys it sees, each head with its own copy of them."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = (query[:, :, :, None] * key[:, :, None]).sum(-1) / query.shape[-1] ** 0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.where(seen_BQK[:, None], scores.exp(), 0.0)
    sink_weights = 0.0 if sinks_H is None else sinks_H.exp()[:, None, None]
    weights = weights / (weights.sum(-1, keepdim=True) + sink_weights)
    return torch.einsum("bhqk,bhkd->bqhd", weights.nan_to_num(0.0), value)


def random_inputs(layout: Layout, dtype: torch.dtype, device: str, has_sinks: bool = False) -> list[Tensor]:
    """Queries, keys and values, and the sinks where there are any."""
    (rows, queries), keys = layout[0].ids_BS.shape, layout[1].ids_BS.shape[1]
    rng = torch.Generator().manual_seed(0)
    shapes = [(rows, h, n, HEAD_DIM) for h, n in [(HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys)]]
    # Stock models pass transposed views.
    made = [torch.randn(b, n, h, d, generator=rng).transpose(1, 2) for b, h, n, d in shapes]
    if has_sinks:
        made.append(torch.randn(HEADS, generator=rng) + 1)
    return [x.to(device, dtype) for x in made]


def run_backend(
    backend: Backend,
    layout: Layout,
    window: int | None,
    inputs: list[Tensor],
    compiled: bool,
    softcap: float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Output at the real slots, and (where inputs want it) gradients through a weighted sum of them.
    FlexAttention runs as plain operations if it is not `compiled`.
    """
    queries, keys = layout
    mask = make_mask(queries, keys, window, inputs[0].dtype, backend)
    assert (backend == "sdpa") == isinstance(mask, Tensor)
    module = nn.Module().eval()
    module.layer_idx, module.num_key_value_groups = 0, HEADS // KV_HEADS  # type: ignore[assignment]
    forward = SlotForward({window: mask}, (window,), None)
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        out, _ = slot_attention(
            module,
            *inputs[:3],
            None,
            slot_forward=forward,
            scaling=HEAD_DIM**-0.5,
            softcap=softcap,
            s_aux=inputs[3] if len(inputs) > 3 else None,
        )
    return with_gradients(out, visible(queries, keys, window), inputs)


def with_gradients(out: Tensor, seen_BQK: Tensor, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    out = out * seen_BQK.any(-1)[..., None, None]
    if not inputs[0].requires_grad:
        return out, []
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), inputs))


def assert_equals_reference(
    backend: Backend,
    layout: Layout,
    window: int | None,
    dtype: torch.dtype,
    device: str,
    *,
    grad: bool = True,
    compiled: bool = False,
    scoring: str = "plain",
) -> None:
    softcap, has_sinks = SCORINGS[scoring]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    inputs = [x.requires_grad_(grad) for x in random_inputs(layout, dtype, device, has_sinks)]
    exact = [x.detach().double().requires_grad_(grad) for x in inputs]
    seen_BQK = visible(*layout, window)
    out = reference(*exact, seen_BQK=seen_BQK, softcap=softcap)
    expected = with_gradients(out, seen_BQK, exact)
    found = run_backend(backend, layout, window, inputs, compiled, softcap)
    pairs = [(found[0], expected[0]), *zip(found[1], expected[1], strict=True)]
    assert len(pairs) == (len(inputs) + 1 if grad else 1)
    for left, right in pairs:
        assert (left.double() - right).abs().max() <= tolerance * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("kept_bytes", [0, 5000, attention.KEPT_BYTES])
def test_masks_are_kept_between_layers_up_to_a_limit_and_change_nothing(
    kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, made = LAYOUTS["packed_sdar"](), list[int]()
    monkeypatch.setattr(attention, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(attention, "additive_mask", lambda *args: made.append(1) or additive_mask(*args))
    mask, seen_BQK = make_mask(*layout, None, torch.float64, "flash"), visible(*layout)
    assert isinstance(mask, QueryChunks)
    inputs = [x.requires_grad_() for x in random_inputs(layout, torch.float64, "cpu")]
    expected = with_gradients(reference(*inputs, seen_BQK=seen_BQK), seen_BQK, inputs)
    for _layer in range(2):
        out = ChunkedAttention.apply(*inputs, mask, HEAD_DIM**-0.5)  # type: ignore[no-untyped-call]
        found = with_gradients(out, seen_BQK, inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    num_chunks, num_kept = len(mask.parts), len(mask.kept)
    assert sum(kept.nbytes for kept in mask.kept.values()) <= kept_bytes
    assert (num_kept > 0, num_kept == num_chunks) == (kept_bytes > 0, kept_bytes > 5000)
    assert len(made) == num_kept + 4 * (num_chunks - num_kept)  # two forwards and two backwards


def moved(slots: Slots, device: str) -> Slots:
    return Slots(*(getattr(slots, field.name).to(device) for field in fields(slots)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_output_and_gradient_equal_the_softmax_over_visible_keys(
    backend: Backend, name: str, window: int | None, dtype: torch.dtype
) -> None:
    assert_equals_reference(backend, LAYOUTS[name](), window, dtype, "cpu")


@pytest.mark.parametrize("scoring", ["softcap", "sinks", "both"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_softcaps_and_sinks_equal_the_softmax_written_out(
    backend: Backend, name: str, window: int | None, scoring: str
) -> None:
    assert_equals_reference(backend, LAYOUTS[name](), window, torch.float64, "cpu", scoring=scoring)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decoding_with_sinks_equals_the_softmax_over_random_masks(
    softcap: float | None, dtype: torch.dtype
) -> None:
    """Every head has its own sink, and a query that sees no key gives zero."""
    layout = packed_preserve_row()
    query, key, value, sinks_H = random_inputs(layout, dtype, "cpu", True)
    (num_rows, _, width, _), shared = query.shape, HEADS // KV_HEADS
    seen_BQK = torch.rand(num_rows, width, key.shape[2], generator=torch.Generator().manual_seed(1)) < 0.3
    seen_BQK[:, 2] = False
    mask = additive_mask(seen_BQK, dtype).repeat(1, 1, shared, 1)
    folded = query.transpose(1, 2).unflatten(2, (KV_HEADS, shared))
    found = attend_rows(folded, key, value, mask, Scoring(None, softcap, sinks_H)).view(
        num_rows, width, HEADS, -1
    )
    exact = [x.double() for x in (query, key, value, sinks_H)]
    expected = reference(*exact, seen_BQK=seen_BQK, softcap=softcap)
    assert not found[:, 2].any()
    assert (found - expected).abs().max() <= (1e-12 if dtype == torch.float64 else 0.02)


@pytest.mark.parametrize("family", [pytest.param("gemma2", marks=NEEDS_SOFTCAP), "gpt_oss"])
def test_a_forward_without_slots_is_the_family_s_own(family: str) -> None:
    model = tiny_model(family)
    ids_BL = torch.randint(3, 40, (2, 11), generator=torch.Generator().manual_seed(0))
    left_padded_BL = torch.ones_like(ids_BL)
    left_padded_BL[1, :4] = 0
    calls = [{"input_ids": ids_BL}, {"input_ids": ids_BL, "attention_mask": left_padded_BL}]
    calls.append({"input_ids": ids_BL[:, :4]})  # within the window, where transformers makes no mask
    with torch.no_grad():
        expected = [model(**call).logits for call in calls]
        use_slot_attention(model)
        for call, logits_BLV in zip(calls, expected, strict=True):
            real_BL = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
            found_BLV = model(**call).logits
            torch.testing.assert_close(found_BLV[real_BL], logits_BLV[real_BL], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", LAYOUTS)
def test_flash_without_a_flash_kernel_gives_the_same(
    name: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where torch's flash kernel takes no mask: the backward runs the chunk's forward again."""
    monkeypatch.setattr(attention, "has_flash_kernel", lambda *_: False)
    assert_equals_reference("flash", LAYOUTS[name](), window, torch.float64, "cpu")


@pytest.mark.parametrize("scoring", ["plain", "softcap"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_output_and_gradient_equal_the_softmax_over_visible_keys(
    name: str, window: int | None, scoring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As plain operations, which have a backward pass on a CPU too once torch's refusal is lifted."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    assert_equals_reference("flex", LAYOUTS[name](), window, torch.float64, "cpu", scoring=scoring)


def test_flex_compiled_by_inductor_equals_the_softmax_over_visible_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lowering of the mask is the one that CUDA uses."""
    monkeypatch.setattr(attention, "create_block_mask", attention.compiled_block_mask())
    torch._dynamo.reset()
    assert_equals_reference(
        "flex", LAYOUTS["packed_sdar"](), 7, torch.float32, "cpu", grad=False, compiled=True
    )


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", ["sdpa", "flex", "flash"])
def test_backends_agree_on_a_gpu(
    backend: Backend, name: str, window: int | None, scoring: str, device: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    queries, keys = LAYOUTS[name]()
    layout = moved(queries, device), moved(keys, device)
    assert_equals_reference(backend, layout, window, torch.float32, device, compiled=True, scoring=scoring)


def test_a_forward_with_few_queries_runs_sdpa() -> None:
    queries, keys = preserve_row()
    few = attention.slots_at(queries, ..., slice(0, 16))
    assert isinstance(make_mask(few, keys, None, torch.float32, "flash"), Tensor)


def test_auto_is_flex_where_it_can_train_and_flash_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    """Without a CUDA device the trial of FlexAttention fails as a broken compiler would."""
    attention.note_fallback.cache_clear()
    attention.flex_failure.cache_clear()
    config, cuda, works = qwen3(head_dim=32).config, torch.device("cuda"), torch.cuda.is_available()
    for _ in range(2):
        assert choose_backend("auto", cuda, config) == ("flex" if works else "flash")
    assert caplog.text.count("model.attention=auto is flash: FlexAttention does not work here") == 1 - works
    assert choose_backend("auto", CPU, config) == "flash"
    assert choose_backend("auto", cuda, qwen3(head_dim=8).config) == "flash"
    assert choose_backend("sdpa", cuda, config) == "sdpa"


def test_the_trial_of_flex_runs_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the backward fails, unless torch's refusal is lifted."""
    attention.flex_failure.cache_clear()
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        reason = attention.flex_failure(CPU, HEADS, KV_HEADS, HEAD_DIM, torch.float32)
        assert reason and "does not support backward on CPU" in reason
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
        assert attention.flex_failure(CPU, HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16) is None


def student_gradients(model: DiffusionLM, backend: Backend) -> tuple[Tensor, dict[str, Tensor]]:
    model.attention = backend
    model.zero_grad()
    states = select_states(ROLLOUTS, model.spec, "all", torch.Generator().manual_seed(0))
    scored = score_rows(model, states.text)
    hidden_NH = model.student_hidden(states.slots, scored.cache)[states.is_supervised_BS]
    hidden_NH.pow(3).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return hidden_NH.detach(), gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [None, *SLIDING])
@pytest.mark.parametrize("kind", KINDS)
def test_flash_trains_a_model_as_sdpa_does(kind: str, family: str | None, checkpointing: bool) -> None:
    base = SLIDING[family](6) if family else qwen3()
    model = make_lm(kind, base=base.double()).double()
    expected_NH, expected = student_gradients(model, "sdpa")
    if checkpointing:
        model.student.gradient_checkpointing_enable({"use_reentrant": False})
        model.student.train()
    found_NH, found = student_gradients(model, "flash")
    torch.testing.assert_close(found_NH, expected_NH)
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


@pytest.mark.parametrize("backend", ["flash", "flex"])
def test_backends_follow_autocast(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward in bfloat16, although a rotary embedding may leave queries in float32."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    model = make_lm("lora")
    with torch.autocast("cpu", torch.bfloat16), torch.compiler.set_stance("force_eager"):
        expected_NH, expected = student_gradients(model, "sdpa")
        found_NH, found = student_gradients(model, backend)
    assert (found_NH - expected_NH).norm() <= 0.02 * expected_NH.norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.1 * gradient.norm(), name


@pytest.mark.parametrize("mode", ["threshold", "lossless"])
@pytest.mark.parametrize("family", SLIDING)
def test_flash_decodes_the_same_tokens(family: str, mode: Any) -> None:
    model = make_lm("lora", base=SLIDING[family](6).double()).double()
    prompts, config = make_prompts([19, 12, 25]), DecodeConfig(mode=mode, max_new_tokens=12).repeatable()
    found = []
    for backend in ("sdpa", "flash"):
        model.attention = backend  # type: ignore[assignment]
        found.append(generate(model, prompts, config))
    assert found[0] == found[1]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.num_elements = max(self.num_elements, x.untyped_storage().nbytes())
        return out


def largest_tensor(backend: Backend, length: int) -> int:
    """Of a forward and a backward over a `preserve` row of `length` tokens."""
    fmt, grid = "preserve", Grid(block_size=4)
    ids_BL, lengths_B = torch.zeros((1, length), dtype=torch.long), torch.tensor([length])
    clean = clean_slots(ids_BL, lengths_B, lengths_B, grid, fmt)
    noised = Slots(
        clean.ids_BS,
        clean.positions_BS,
        clean.positions_BS // 4 * 4 - 1,
        clean.positions_BS // 4 + 1,
        clean.start_BS,
    )
    layout = noised, keys_with_cache(noised, length)
    inputs = [x.requires_grad_() for x in random_inputs(layout, torch.float32, "cpu")]
    with LargestTensor() as largest:
        mask = make_mask(*layout, None, torch.float32, backend)
        module = nn.Module().eval()
        module.layer_idx, module.num_key_value_groups = 0, HEADS // KV_HEADS  # type: ignore[assignment]
        forward = SlotForward({None: mask}, (None,), None)
        slot_attention(module, *inputs, None, slot_forward=forward)[0].sum().backward()
    return largest.num_elements


def test_no_tensor_of_flash_is_quadratic() -> None:
    assert largest_tensor("flash", 2048) <= 2.1 * largest_tensor("flash", 1024)
    assert largest_tensor("sdpa", 2048) >= 3.9 * largest_tensor("sdpa", 1024)
