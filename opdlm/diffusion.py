"""The diffusion model: a stock causal LM asked about slots instead of sequences.

One object holds what both formats need: the student that computes noised slots, the frozen teacher that
computes clean ones (`preserve`) or the targets, the mask embedding, and the block grid. Where teacher and
student share weights (LoRA), the adapter is *gated*: a factor per slot, 1 on noised and 0 on clean,
multiplies its output, so one forward pass computes exact teacher states and drafts together. METHOD parts 2
and 8.

This room, `attention`, `blocks`, `unmasking` and `generate` import only torch and transformers: they travel
inside every converted checkpoint as its remote code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import (
    AttentionChoice,
    Backend,
    SlotCache,
    choose_backend,
    layer_windows,
    no_mask,
    start_forward,
    use_slot_attention,
)
from .blocks import Format, Grid, GridKind, Slots, clean_slots


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


class Gate:
    """Per-slot factor on the adapter's output; None lets it through everywhere."""

    def __init__(self) -> None:
        self.value_BS: Tensor | None = None

    def attach(self, adapter_outputs: list[nn.Module]) -> None:
        """Multiply the output of each module (the `lora_B` of every adapted layer)."""
        for module in adapter_outputs:
            module.register_forward_hook(self._apply)

    def _apply(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.value_BS is None:
            return output
        return output * self.value_BS.reshape(*output.shape[:-1], 1).to(output.dtype)

    @contextmanager
    def only(self, is_open_BS: Tensor) -> Iterator[None]:
        """Open the gate on some slots. Inference only: a checkpointed backward would find it open
        everywhere.
        """
        assert not torch.is_grad_enabled(), "the gate is for forwards without a backward"
        self.value_BS = is_open_BS
        try:
            yield
        finally:
            self.value_BS = None


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
        adapter_outputs: list[nn.Module] | None = None,
        adapter_off: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.spec = student, teacher, spec
        self.mask_embedding = nn.Parameter(mask_embedding) if mask_embedding is not None else None
        self.gate = Gate()
        self.gate.attach(adapter_outputs or [])
        self.adapter_off = adapter_off
        self.windows = layer_windows(student.config)
        self.attention: AttentionChoice = "auto"
        for model in (student, teacher):
            if model is not None:
                use_slot_attention(model)

    @property
    def device(self) -> torch.device:
        return self.student.device

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
    def decode_hidden(self, slots: Slots, cache: SlotCache) -> tuple[Tensor, int]:
        """States of one decoding step `[B, S, H]` and the number of forward passes it took (1 or 2)."""
        if self.spec.format == "sdar":
            return self.student_hidden(slots, cache), 1
        is_noised_BS = slots.is_noised_BS
        if not is_noised_BS.any():
            return self.teacher_hidden(slots, cache), 1
        if self.is_one_forward:
            with self.gate.only(is_noised_BS):
                return self.student_hidden(slots, cache), 1
        clean_BSH = self.teacher_hidden(slots.only(~is_noised_BS), cache)
        noised_BSH = self.student_hidden(slots.only(is_noised_BS), cache)
        return torch.where(is_noised_BS[..., None], noised_BSH, clean_BSH), 2

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
        scores = head_logits(self.student, hidden)
        if is_clean is not None and self.teacher is not None:
            scores = torch.where(is_clean[..., None], head_logits(self.teacher, hidden), scores)
        scores[..., list(self.spec.banned_token_ids)] = -torch.inf
        return scores

    def teacher_decoder(self, stop_token_ids: tuple[int, ...] | None = None) -> DiffusionLM:
        """The frozen original behind the decode loop: mode `ar` only. It may stop at other tokens."""
        stops = self.spec.stop_token_ids if stop_token_ids is None else stop_token_ids
        spec = replace(self.spec, format="preserve", stop_token_ids=stops)
        decoder = DiffusionLM(self.student, spec, teacher=self.teacher, adapter_off=self.adapter_off)
        decoder.attention = self.attention
        return decoder

    def embed(self, model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
        """Input embeddings; the student's [MASK] may have an embedding of its own."""
        embedded_BSH = model.get_input_embeddings()(ids_BS)
        if self.mask_embedding is None or model is not self.student:
            return embedded_BSH
        is_mask_BS1 = (ids_BS == self.spec.mask_token_id)[..., None]
        return torch.where(is_mask_BS1, self.mask_embedding.to(embedded_BSH.dtype), embedded_BSH)

    def clean_slots(self, ids_BL: Tensor, lengths_B: Tensor, num_prompt_B: Tensor) -> Slots:
        return clean_slots(ids_BL, lengths_B, num_prompt_B, self.spec.block_grid, self.spec.format)

    def _hidden(self, model: PreTrainedModel, slots: Slots, cache: SlotCache | None) -> Tensor:
        embedded_BSH = self.embed(model, slots.ids_BS)
        dtype = embedded_BSH.dtype
        return backbone(model)(
            inputs_embeds=embedded_BSH,
            position_ids=slots.positions_BS,
            attention_mask=no_mask(dtype, self.device),
            use_cache=False,
            slot_forward=start_forward(slots, self.windows, dtype, self.backend, cache),
        ).last_hidden_state


def backbone(model: PreTrainedModel) -> nn.Module:
    """The transformer under the LM head, whatever its family calls it."""
    return model.base_model


def head_constants(model: PreTrainedModel) -> tuple[float | None, float]:
    """(softcap, scale) that some families apply after the linear head."""
    values = model.config.get_text_config().to_dict()
    scale = values.get("logit_scale") or 1.0
    return values.get("final_logit_softcapping"), scale / (values.get("logits_scaling") or 1.0)


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Hidden states -> float32 logits, as the family's own forward computes them (`convert` checks that)."""
    softcap, scale = head_constants(model)
    scores = model.get_output_embeddings()(hidden).float() * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores
