"""The diffusion model: a causal LM of transformers whose forward pass takes slots instead of sequences.

`DiffusionLM` holds the student, which computes noised slots, the frozen teacher, which computes clean slots
(`preserve`) or the targets, the mask embedding and the block grid. With LoRA, teacher and student share one
set of weights, and the adapter is *gated*: it applies to noised slots only, so one forward pass returns exact
AR predictions and drafts (docs/concepts.md, "The two formats" and "The gated adapter").

This file is part of the remote code of converted checkpoints (`export.REMOTE_FILES`): it imports only torch
and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import (
    AttentionChoice,
    Backend,
    SlotForward,
    choose_backend,
    layer_windows,
    no_mask,
    start_decode,
    start_forward,
    use_slot_attention,
)
from .draft_head import DraftHead
from .gate import Adapted, Gate
from .kv_cache import DecodeCache, Packed, SlotCache
from .slots import CAUSAL, CLEAN, DraftAttention, Format, Grid, GridKind, Slots


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionSpec:
    """What defines a converted checkpoint beside its weights; stored as `block_diffusion` in config.json.

    Raises ValueError where a value is outside its range.
    """

    format: Format
    block_size: int
    """Tokens per block."""
    grid: GridKind
    mask_token_id: int
    """Id of [MASK]. It may lie outside the vocabulary: with `preserve` its embedding is stored apart."""
    stop_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...] = ()
    """Ids that are never sampled: unused rows of the embedding, and always `mask_token_id`, which is added
    here. A proposal of [MASK] would leave its position unknown, and decoding could not end.
    """
    adapter: bool = False
    """True: the student is the teacher's weights and LoRA (gated in `preserve`). False: a full copy."""
    version: int = 1
    noise_vocab_size: int | None = None
    """Inputs of noised slots: ids drawn uniformly from [0, noise_vocab_size); None: [MASK]."""
    draft_attention: DraftAttention = "bidirectional"
    """causal: a noised slot sees only those of its group at or before its position."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size ({self.block_size}) must be at least 1.")
        for name, kind in (("format", Format), ("grid", GridKind), ("draft_attention", DraftAttention)):
            value: str = getattr(self, name)
            choices = get_args(kind)
            if value not in choices:
                raise ValueError(f"{name} ({value!r}) must be one of {', '.join(choices)}.")
        if self.mask_token_id < 0:
            raise ValueError(f"mask_token_id ({self.mask_token_id}) must be at least 0.")
        if self.noise_vocab_size is not None and self.noise_vocab_size < 1:
            raise ValueError(f"noise_vocab_size ({self.noise_vocab_size}) must be at least 1.")
        if self.format == "sdar" and not self.can_denoise:
            raise ValueError("format ('sdar') must have neither noise_vocab_size nor causal draft_attention.")
        for name in ("stop_token_ids", "banned_token_ids"):
            ids: tuple[int, ...] = getattr(self, name)
            if min(ids, default=0) < 0:
                raise ValueError(f"{name} {ids} must be at least 0.")
        if self.mask_token_id not in self.banned_token_ids:
            banned = (*self.banned_token_ids, self.mask_token_id)
            object.__setattr__(self, "banned_token_ids", banned)

    @property
    def block_grid(self) -> Grid:
        return Grid(block_size=self.block_size, kind=self.grid)

    @property
    def can_denoise(self) -> bool:
        """Whether the student can decode a block in part. If not, it computes whole drafts only, which the
        AR model verifies.
        """
        return self.noise_vocab_size is None and self.draft_attention == "bidirectional"

    @property
    def first_group(self) -> int:
        """The lowest group of noised slots."""
        return CAUSAL if self.draft_attention == "causal" else CLEAN + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without newer entries at their defaults: earlier versions refuse them."""
        newer = {"noise_vocab_size": None, "draft_attention": "bidirectional"}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if (key, value) not in newer.items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DiffusionSpec:
        """The inverse of `to_dict`. TypeError for an unknown or missing key, ValueError for a bad value."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class PackedForward:
    """The arguments of a packed forward pass through one backbone."""

    model: PreTrainedModel
    gate: Gate | None
    """None: every slot is computed by the same weights."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer."""
    embedded_NH: Tensor
    packed: Packed
    cache: DecodeCache
    """`begin` has been called for this forward."""

    def run(self) -> Tensor:
        """Hidden states `[N, H]`."""
        positions_1N = self.packed.positions_N[None].to(self.embedded_NH.device)
        gate = nullcontext() if self.gate is None else self.gate.after(self.packed.num_clean)
        with gate:
            slot_forward = start_decode(self.windows, self.embedded_NH.dtype, self.cache)
            return run_backbone(self.model, self.embedded_NH[None], positions_1N, slot_forward)[0]


class DiffusionLM(nn.Module):
    """Student, teacher and mask embedding, computed on slots.

    `teacher` is None where the teacher is the student with its adapter switched off by `adapter_off`.
    `adapted` lists the layers that the gate controls. `mask_embedding` `[H]` replaces the student's embedding
    of [MASK]; None: the row of the embedding matrix is used. `draft_head` is for drafts of lossless decoding.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        spec: DiffusionSpec,
        *,
        teacher: PreTrainedModel | None = None,
        mask_embedding: Tensor | None = None,
        draft_head: DraftHead | None = None,
        adapted: Iterable[Adapted] = (),
        adapter_off: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.spec = student, teacher, spec
        self.mask_embedding = nn.Parameter(mask_embedding) if mask_embedding is not None else None
        self.draft_head = draft_head
        self.gate = Gate()
        self.gate.attach(adapted)
        self.adapter_off = adapter_off
        self.windows = layer_windows(student.config)
        self.teacher_windows = self.windows if teacher is None else layer_windows(teacher.config)
        self._embedding: tuple[Any] = (student.get_input_embeddings(),)  # a tuple: not a second submodule
        self.attention: AttentionChoice = "auto"
        self.run_packed: Callable[[PackedForward], Tensor] = PackedForward.run
        """Computes a packed forward; `compiled.compiled_decoding` replaces it by a compiled one."""
        self.draft_policies: dict[bool, Any] = {}
        """`decoding.draft_policy.DraftPolicy` with the costs of this machine, once something was drafted: by
        whether text is copied.
        """
        self.head_constants = head_constants(student)  # reading a config in every step would be slow
        for model in (student, teacher):
            if model is not None:
                use_slot_attention(model)

    @property
    def device(self) -> torch.device:
        return self._embedding[0].weight.device  # `student.device` iterates over every module

    @property
    def backend(self) -> Backend:
        """The attention backend that `attention` selects on this device."""
        return choose_backend(self.attention, self.device, self.student.config)

    @property
    def is_one_forward(self) -> bool:
        """Whether clean and noised slots share one forward pass (the model is one set of weights)."""
        return self.spec.format == "sdar" or self.spec.adapter

    def student_hidden(self, slots: Slots, cache: SlotCache | None = None) -> Tensor:
        """The student's hidden states `[B, S, H]` with the adapter on for every slot. With a cache, the keys
        and values of clean slots are written to it.
        """
        return self._hidden(self.student, slots, cache)

    @torch.no_grad()
    def teacher_hidden(self, slots: Slots, cache: SlotCache | None = None) -> Tensor:
        """The teacher's hidden states `[B, S, H]` of clean slots. Fills the cache that a `preserve` student
        reads.
        """
        with self.teacher_weights() as model:
            return self._hidden(model, slots, cache)

    @torch.no_grad()
    def decode_hidden(self, slots: Slots, cache: DecodeCache) -> tuple[Tensor, int]:
        """Hidden states `[B, S, H]` of one decoding step, and the number of forward passes (1 or 2).

        `slots` are CPU tensors, so that preparing a forward needs no transfer from the device.
        """
        packed, column_N = Packed.of(slots)
        hidden_NH, num_forwards = self.packed_hidden(packed, slots.ids_BS.shape[0], cache)
        hidden_BSH = hidden_NH.new_zeros(*slots.ids_BS.shape, hidden_NH.shape[-1])
        hidden_BSH[packed.row_N.to(self.device), column_N.to(self.device)] = hidden_NH
        return hidden_BSH, num_forwards

    @torch.no_grad()
    def packed_hidden(self, packed: Packed, num_rows: int, cache: DecodeCache) -> tuple[Tensor, int]:
        """`decode_hidden` for slots that are packed already: hidden states `[N, H]`, number of forwards."""
        is_one = self.is_one_forward or packed.num_clean == len(packed)
        parts = [packed] if is_one else packed.split()
        length = max(int(packed.visible_until_N.max()), 0) + 1
        hidden = []
        for part in parts:
            cache.begin(part, num_rows, length)
            hidden.append(self._packed_hidden(part, cache))
        return hidden[0] if is_one else torch.cat(hidden), len(parts)

    def _packed_hidden(self, packed: Packed, cache: DecodeCache) -> Tensor:
        """One packed forward `[N, H]`, by the gated student or by the model that computes these slots."""
        model, gate = self.student, None
        if self.spec.format == "preserve" and self.teacher is not None:
            model = self.teacher if packed.num_clean else self.student
        elif self.spec.format == "preserve":
            gate = self.gate
        embedded_NH = self.embed(model, packed.ids_N.to(self.device))
        return self.run_packed(PackedForward(model, gate, self.windows, embedded_NH, packed, cache))

    @contextmanager
    def teacher_weights(self) -> Iterator[PreTrainedModel]:
        """The frozen AR model: a separate model, or the student with the adapter off."""
        if self.teacher is not None:
            yield self.teacher
        else:
            with self.adapter_off():
                yield self.student

    def logits(self, hidden: Tensor, is_clean: Tensor | None = None) -> Tensor:
        """Hidden states `[..., H]` to float32 logits `[..., V]`, -inf at the banned ids. Where `is_clean`
        `[...]` is true, the teacher's LM head is used.
        """
        scores = head_logits(self.student, hidden, self.head_constants)
        if is_clean is not None and self.teacher is not None:
            scores = torch.where(
                is_clean[..., None], head_logits(self.teacher, hidden, self.head_constants), scores
            )
        scores[..., [i for i in self.spec.banned_token_ids if i < scores.shape[-1]]] = -torch.inf
        return scores

    def candidate_logits(self, hidden_RH: Tensor, ids_RK: Tensor) -> Tensor:
        """The student's float32 logits `[R, K]` of these tokens only."""
        head: Any = self.student.get_output_embeddings()
        scores_RK = (head.weight[ids_RK] @ hidden_RH[..., None].to(head.weight.dtype))[..., 0].float()
        if getattr(head, "bias", None) is not None:
            scores_RK = scores_RK + head.bias[ids_RK]
        return scaled_logits(scores_RK, self.head_constants)

    def teacher_decoder(self, stop_token_ids: tuple[int, ...] | None = None) -> DiffusionLM:
        """The frozen AR model as a DiffusionLM that decodes in mode `ar` only. `stop_token_ids` replaces the
        student's.
        """
        stops = self.spec.stop_token_ids if stop_token_ids is None else stop_token_ids
        spec = replace(self.spec, format="preserve", stop_token_ids=stops)
        decoder = DiffusionLM(self.student, spec, teacher=self.teacher, adapter_off=self.adapter_off)
        decoder.gate, decoder.attention, decoder.run_packed = self.gate, self.attention, self.run_packed
        return decoder

    def embed(self, model: PreTrainedModel, ids_BS: Tensor) -> Tensor:
        """Input embeddings `[..., H]`, with the student's own embedding of [MASK] if it has one."""
        embedding: Any = model.get_input_embeddings()
        # an id of [MASK] outside the vocabulary has no row
        embedded_BSH = embedding(ids_BS.clamp_max(embedding.weight.shape[0] - 1))
        if self.mask_embedding is None or model is not self.student:
            return embedded_BSH
        is_mask_BS1 = (ids_BS == self.spec.mask_token_id)[..., None]
        return torch.where(is_mask_BS1, self.mask_embedding.to(embedded_BSH.dtype), embedded_BSH)

    def _hidden(self, model: PreTrainedModel, slots: Slots, cache: SlotCache | None) -> Tensor:
        embedded_BSH = self.embed(model, slots.ids_BS)
        windows = self.windows if model is self.student else self.teacher_windows
        slot_forward = start_forward(slots, windows, embedded_BSH.dtype, self.backend, cache)
        return run_backbone(model, embedded_BSH, slots.positions_BS, slot_forward)


def run_backbone(
    model: PreTrainedModel, embedded_BSH: Tensor, positions_BS: Tensor, slot_forward: SlotForward
) -> Tensor:
    """Hidden states `[B, S, H]` of the transformer below the LM head."""
    return model.get_decoder()(  # of a model that also reads images or sound, the text part
        inputs_embeds=embedded_BSH,
        position_ids=positions_BS,
        attention_mask=no_mask(embedded_BSH.dtype, embedded_BSH.device),
        use_cache=False,
        slot_forward=slot_forward,
    ).last_hidden_state


def head_constants(model: PreTrainedModel) -> tuple[float | None, float]:
    """(softcap, scale) of the logits: Gemma 2 caps them, Cohere and Granite scale them; else (None, 1.0)."""
    values = model.config.get_text_config().to_dict()
    scale = values.get("logit_scale") or 1.0
    return values.get("final_logit_softcapping"), scale / (values.get("logits_scaling") or 1.0)


def head_logits(
    model: PreTrainedModel, hidden: Tensor, constants: tuple[float | None, float] | None = None
) -> Tensor:
    """Hidden states `[..., H]` to float32 logits `[..., V]`, as the model's own forward computes them, which
    `convert` verifies.
    """
    scores = model.get_output_embeddings()(hidden).float()
    return scaled_logits(scores, constants or head_constants(model))


def scaled_logits(scores: Tensor, constants: tuple[float | None, float]) -> Tensor:
    """Logits from the product of hidden states and head, and `head_constants`."""
    softcap, scale = constants
    scores = scores * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores
