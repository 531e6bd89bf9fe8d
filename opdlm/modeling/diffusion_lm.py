"""The diffusion model: a stock causal LM asked about slots instead of sequences.

One object holds what both formats need: the student that computes noised slots, the frozen teacher that
computes clean ones (`preserve`) or the targets, the mask embedding, and the block grid. Where teacher and
student share weights (LoRA), the adapter is *gated*: it is computed for noised slots only, so one forward
pass gives exact teacher states and drafts together. METHOD parts 2 and 8.

This room and those that decode (`export.REMOTE_ROOMS`) import only torch and transformers: they travel inside
every converted checkpoint as its remote code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import (
    AttentionChoice,
    Backend,
    choose_backend,
    layer_windows,
    no_mask,
    start_decode,
    start_forward,
    use_slot_attention,
)
from .kv_cache import DecodeCache, Packed, SlotCache
from .slots import Format, Grid, GridKind, Slots


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionSpec:
    """What a converted checkpoint must remember: `block_diffusion` in its config.json."""

    format: Format
    block_size: int
    grid: GridKind
    mask_token_id: int
    stop_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    """Never sampled: [MASK] and the unused rows of the embedding."""
    adapter: bool = False
    """Student = teacher weights + LoRA (gated in `preserve`); else a full copy."""
    version: int = 1

    @property
    def block_grid(self) -> Grid:
        return Grid(block_size=self.block_size, kind=self.grid)

    def to_dict(self) -> dict[str, Any]:
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DiffusionSpec:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)


class Adapted(NamedTuple):
    """A linear layer with an adapter: host(x) is y = base(x) after add_change(x, y), which adds in place to
    `[N, out]`.
    """

    host: nn.Module
    base: Callable[[Tensor], Tensor]
    add_change: Callable[[Tensor, Tensor], object]


class Gate:
    """Keeps the adapter off the clean slots of a packed forward, which come first; computes it for no
    others.
    """

    def __init__(self) -> None:
        self.num_clean: int | None = None
        self.is_open_N1: Tensor | None = None
        """Which slots it is open for, in a compiled forward: there no shape depends on it."""

    def attach(self, layers: Iterable[Adapted]) -> None:
        """Replace each layer's forward by one that obeys the gate while it is set."""
        for layer in layers:
            layer.host.forward = self._gated(layer, layer.host.forward)

    def _gated(self, layer: Adapted, ungated: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            first, is_open_N1 = self.num_clean, self.is_open_N1
            if first is None and is_open_N1 is None:
                return ungated(inputs, *args, **kwargs)
            output = layer.base(inputs)
            if is_open_N1 is not None:
                changed = output.clone()
                layer.add_change(inputs.flatten(0, -2), changed.flatten(0, -2))
                return torch.where(is_open_N1, changed, output)
            if first is not None and first < inputs.shape[-2]:
                inputs_NI = inputs.reshape(-1, inputs.shape[-1])
                layer.add_change(inputs_NI[first:], output.view(-1, output.shape[-1])[first:])
            return output

        return forward

    @contextmanager
    def after(self, num_clean: int) -> Iterator[None]:
        """Open the gate from slot `num_clean` on. Inference only: a checkpointed backward would find it open
        everywhere.
        """
        assert not torch.is_grad_enabled(), "the gate is for forwards without a backward"
        self.num_clean = num_clean
        try:
            yield
        finally:
            self.num_clean = None


@dataclass(frozen=True, slots=True)
class PackedForward:
    """What a packed forward through one backbone reads; `run` returns its states `[N, H]`."""

    model: PreTrainedModel
    gate: Gate | None
    """Where an adapter is to be computed for the noised slots only."""
    windows: tuple[int | None, ...]
    embedded_NH: Tensor
    packed: Packed
    cache: DecodeCache
    """It has begun this forward."""

    def run(self) -> Tensor:
        dtype, device = self.embedded_NH.dtype, self.embedded_NH.device
        gate = nullcontext() if self.gate is None else self.gate.after(self.packed.num_clean)
        with gate:
            return backbone(self.model)(
                inputs_embeds=self.embedded_NH[None],
                position_ids=self.packed.positions_N[None].to(device),
                attention_mask=no_mask(dtype, device),
                use_cache=False,
                slot_forward=start_decode(self.windows, dtype, self.cache),
            ).last_hidden_state[0]


class DiffusionLM(nn.Module):
    """Student, teacher and mask embedding behind one call on slots.

    `teacher` is None where the student's base with the adapter off is the teacher (`adapter_off` then
    switches it).
    """

    def __init__(
        self,
        student: PreTrainedModel,
        spec: DiffusionSpec,
        *,
        teacher: PreTrainedModel | None = None,
        mask_embedding: Tensor | None = None,
        adapted: Iterable[Adapted] = (),
        adapter_off: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.spec = student, teacher, spec
        self.mask_embedding = nn.Parameter(mask_embedding) if mask_embedding is not None else None
        self.gate = Gate()
        self.gate.attach(adapted)
        self.adapter_off = adapter_off
        self.windows = layer_windows(student.config)
        self.teacher_windows = self.windows if teacher is None else layer_windows(teacher.config)
        self._embedding: tuple[Any] = (student.get_input_embeddings(),)  # searched once; not a submodule
        self.attention: AttentionChoice = "auto"
        self.run_packed: Callable[[PackedForward], Tensor] = PackedForward.run
        """`compiled.compiled_decoding` puts a compiled one here."""
        self.head_constants = head_constants(student)  # reading a config is slow: not once a step
        for model in (student, teacher):
            if model is not None:
                use_slot_attention(model)

    @property
    def device(self) -> torch.device:
        return self._embedding[0].weight.device  # `student.device` searches every module

    @property
    def backend(self) -> Backend:
        """The attention backend that runs."""
        return choose_backend(self.attention, self.device, self.student.config)

    @property
    def is_one_forward(self) -> bool:
        """Whether clean and noised slots share one forward pass (the model is one set of weights)."""
        return self.spec.format == "sdar" or self.spec.adapter

    def student_hidden(self, slots: Slots, cache: SlotCache | None = None) -> Tensor:
        """Student states `[B, S, H]`, adapter open everywhere. With a cache, clean slots are written to
        it.
        """
        return self._hidden(self.student, slots, cache)

    @torch.no_grad()
    def teacher_hidden(self, slots: Slots, cache: SlotCache | None = None) -> Tensor:
        """Teacher states `[B, S, H]` of clean slots. Fills the cache that `preserve` students read."""
        with self.teacher_weights() as model:
            return self._hidden(model, slots, cache)

    @torch.no_grad()
    def decode_hidden(self, slots: Slots, cache: DecodeCache) -> tuple[Tensor, int]:
        """States of one decoding step `[B, S, H]` and the number of forward passes it took (1 or 2).

        `slots` lie on the CPU: laying out a forward needs no round trip to the device.
        """
        packed, column_N = Packed.of(slots)
        hidden_NH, num_forwards = self.packed_hidden(packed, slots.ids_BS.shape[0], cache)
        hidden_BSH = hidden_NH.new_zeros(*slots.ids_BS.shape, hidden_NH.shape[-1])
        hidden_BSH[packed.row_N.to(self.device), column_N.to(self.device)] = hidden_NH
        return hidden_BSH, num_forwards

    @torch.no_grad()
    def packed_hidden(self, packed: Packed, num_rows: int, cache: DecodeCache) -> tuple[Tensor, int]:
        """The same for slots that are packed already: `[N, H]`."""
        is_one = self.is_one_forward or packed.num_clean == len(packed)
        parts = [packed] if is_one else packed.split()
        length = max(int(packed.visible_until_N.max()), 0) + 1
        hidden = []
        for part in parts:
            cache.begin(part, num_rows, length)
            hidden.append(self._packed_hidden(part, cache))
        return hidden[0] if is_one else torch.cat(hidden), len(parts)

    def _packed_hidden(self, packed: Packed, cache: DecodeCache) -> Tensor:
        """One packed forward `[N, H]`: gated student, or the one model that computes these slots."""
        model, gate = self.student, None
        if self.spec.format == "preserve" and self.teacher is not None:
            model = self.teacher if packed.num_clean else self.student
        elif self.spec.format == "preserve":
            gate = self.gate
        embedded_NH = self.embed(model, packed.ids_N.to(self.device))
        return self.run_packed(PackedForward(model, gate, self.windows, embedded_NH, packed, cache))

    @contextmanager
    def teacher_weights(self) -> Iterator[PreTrainedModel]:
        """The frozen original: a model of its own, or the student with the adapter off."""
        if self.teacher is not None:
            yield self.teacher
        else:
            with self.adapter_off():
                yield self.student

    def logits(self, hidden: Tensor, is_clean: Tensor | None = None) -> Tensor:
        """Float32 logits `[..., V]` with the banned ids at -inf. States of clean slots go through the
        teacher's head.
        """
        scores = head_logits(self.student, hidden, self.head_constants)
        if is_clean is not None and self.teacher is not None:
            scores = torch.where(
                is_clean[..., None], head_logits(self.teacher, hidden, self.head_constants), scores
            )
        scores[..., list(self.spec.banned_token_ids)] = -torch.inf
        return scores

    def teacher_decoder(self, stop_token_ids: tuple[int, ...] | None = None) -> DiffusionLM:
        """The frozen original behind the decode loop: mode `ar` only. It may stop at other tokens."""
        stops = self.spec.stop_token_ids if stop_token_ids is None else stop_token_ids
        spec = replace(self.spec, format="preserve", stop_token_ids=stops)
        decoder = DiffusionLM(self.student, spec, teacher=self.teacher, adapter_off=self.adapter_off)
        decoder.gate, decoder.attention, decoder.run_packed = self.gate, self.attention, self.run_packed
        return decoder

    def embed(self, model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
        """Input embeddings; the student's [MASK] may have an embedding of its own."""
        embedded_BSH = model.get_input_embeddings()(ids_BS)
        if self.mask_embedding is None or model is not self.student:
            return embedded_BSH
        is_mask_BS1 = (ids_BS == self.spec.mask_token_id)[..., None]
        return torch.where(is_mask_BS1, self.mask_embedding.to(embedded_BSH.dtype), embedded_BSH)

    def _hidden(self, model: PreTrainedModel, slots: Slots, cache: SlotCache | None) -> Tensor:
        embedded_BSH = self.embed(model, slots.ids_BS)
        dtype = embedded_BSH.dtype
        windows = self.windows if model is self.student else self.teacher_windows
        return backbone(model)(
            inputs_embeds=embedded_BSH,
            position_ids=slots.positions_BS,
            attention_mask=no_mask(dtype, self.device),
            use_cache=False,
            slot_forward=start_forward(slots, windows, dtype, self.backend, cache),
        ).last_hidden_state


def backbone(model: PreTrainedModel) -> nn.Module:
    """The transformer under the LM head, whatever its family calls it."""
    return model.base_model


def head_constants(model: PreTrainedModel) -> tuple[float | None, float]:
    """(softcap, scale) that some families apply after the linear head."""
    values = model.config.get_text_config().to_dict()
    scale = values.get("logit_scale") or 1.0
    return values.get("final_logit_softcapping"), scale / (values.get("logits_scaling") or 1.0)


def head_logits(
    model: PreTrainedModel, hidden: Tensor, constants: tuple[float | None, float] | None = None
) -> Tensor:
    """Hidden states -> float32 logits, as the family's own forward computes them (`convert` checks that)."""
    softcap, scale = constants or head_constants(model)
    scores = model.get_output_embeddings()(hidden).float() * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores
