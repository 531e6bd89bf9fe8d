"""Train the bundled tiny teacher: a 1.2M-parameter Qwen3 that answers the ten skills of `skills.py`.

    python examples/tiny_teacher/train.py --out opdlm/bundled --seed 0

One command writes everything under --out: `teacher/` (weights, character tokenizer, model card with measured
scores), `prompts.jsonl` (conversion prompts, train split, seen skills only), `noise.jsonl` (prompts that ask
no skill) and `eval.jsonl` (test split, every skill). Each step draws fresh train-split examples; the loss is
the cross-entropy of the answer and `<|end|>`, averaged within an example first, so that a long answer weighs
no more than a short one, plus a fifth of the same mean over the prompt: like any pretrained model, the
teacher can then also write prompts.

It trains in float32 on the CPU (`--threads`, two unless told).
"""

import argparse
import json
import logging
import math
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from skills import SKILLS, Example, draw_batch, draw_noise, draw_set
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# Shape suffixes: B batch, L row, V vocabulary.

logger = logging.getLogger("tiny_teacher")

ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
SPECIAL_TOKENS = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unk|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '<|user|>' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' + message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
VOCAB_SIZE = 128
IGNORED = -100
PROMPT_WEIGHT = 0.2
MAX_NEW_TOKENS = 80
PROMPTS_PER_SKILL = 800
NUM_NOISE_PROMPTS = 4000
EVALUATION_PER_SKILL = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    seed: int
    num_steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    exact_match: float
    mean_confidence: float
    """Mean probability of the greedy token, over response tokens."""
    mean_response_tokens: float
    """Including `<|end|>`."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; a character outside the alphabet becomes `<|unk|>`."""
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *ALPHABET))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def encode_row(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    """Row ids and the number of prompt tokens, `<|assistant|>` included."""
    prompt = f"<|user|>{example.prompt}<|assistant|>"
    ids = tokenizer.encode(f"{prompt}{example.answer}<|end|>", add_special_tokens=False)
    return ids, len(example.prompt) + 2


def collate(rows: list[tuple[list[int], int]], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right padding: a causal model needs no attention mask for it. Labels ignore `<|user|>` and padding; a
    row's weights sum to 1 over its answer and to PROMPT_WEIGHT over its prompt (`<|assistant|>` included).
    """
    length = max(len(ids) for ids, _ in rows)
    ids_BL = torch.full((len(rows), length), pad_token_id)
    labels_BL = torch.full((len(rows), length), IGNORED)
    weights_BL = torch.zeros(len(rows), length)
    for i, (ids, num_prompt) in enumerate(rows):
        ids_BL[i, : len(ids)] = torch.tensor(ids)
        labels_BL[i, 1 : len(ids)] = ids_BL[i, 1 : len(ids)]
        weights_BL[i, 1:num_prompt] = PROMPT_WEIGHT / (num_prompt - 1)
        weights_BL[i, num_prompt : len(ids)] = 1 / (len(ids) - num_prompt)
    return ids_BL, labels_BL, weights_BL


def micro_batches(
    config: TrainConfig, step: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A fresh batch for this step, sorted by length and cut up so that little of it is padding."""
    examples = draw_batch(config.batch_size, random.Random(f"train:{config.seed}:{step}"))
    rows = sorted((encode_row(example, tokenizer) for example in examples), key=lambda row: len(row[0]))
    for start in range(0, len(rows), config.micro_batch_size):
        yield collate(rows[start : start + config.micro_batch_size], tokenizer.pad_token_id)


def text_loss(model: Qwen3ForCausalLM, ids_BL: Tensor, labels_BL: Tensor, weights_BL: Tensor) -> Tensor:
    """Weighted sum of the cross-entropy of every labelled token."""
    logits_BLV = model(input_ids=ids_BL[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(
        logits_BLV.flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return (losses * weights_BL[:, 1:].flatten()).sum()


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: TrainConfig, scratch: Path
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.97), weight_decay=config.weight_decay)
    scratch.mkdir(parents=True, exist_ok=True)
    started, loss_sum = time.monotonic(), 0.0
    for step in range(config.num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, config)
        for batch in micro_batches(config, step, tokenizer):
            loss = text_loss(model, *batch) / config.batch_size
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            logger.info("step %d loss %.4f %.0f s", step + 1, loss_sum / 50, time.monotonic() - started)
            loss_sum = 0.0
        if (step + 1) % 250 == 0:
            torch.save(model.state_dict(), scratch / "latest.pt")
            scores = score_skills(model, tokenizer, draw_evaluation(16, seed=config.seed))
            logger.info(" ".join(f"{name} {score.exact_match:.2f}" for name, score in scores.items()))


@torch.no_grad()
def answer_greedily(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[tuple[str, list[float]]]:
    """Each prompt's greedy response and the probability of each of its tokens, `<|end|>` included."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    generator: Any = model  # transformers declares `self` of another type
    output = generator.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids_BL = output.sequences[:, inputs["input_ids"].shape[1] :]
    probs_BL = torch.stack([logits_BV.softmax(-1).amax(-1) for logits_BV in output.logits], 1)
    answers = []
    for ids, probs in zip(ids_BL.tolist(), probs_BL.tolist(), strict=True):
        num_tokens = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        text = str(tokenizer.decode(ids[:num_tokens], skip_special_tokens=True))
        answers.append((text, probs[:num_tokens]))
    return answers


def score_skills(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]
) -> dict[str, Score]:
    model.eval()
    scores = {}
    for skill in SKILLS:
        chosen = [example for example in examples if example.skill == skill.name]
        answers = answer_greedily(model, tokenizer, [example.prompt for example in chosen])
        matches = [text == example.answer for (text, _), example in zip(answers, chosen, strict=True)]
        probs = [prob for _, answer_probs in answers for prob in answer_probs]
        scores[skill.name] = Score(
            exact_match=sum(matches) / len(matches),
            mean_confidence=sum(probs) / len(probs),
            mean_response_tokens=len(probs) / len(answers),
        )
    model.train()
    return scores


def draw_evaluation(num_per_skill: int, seed: int) -> list[Example]:
    rng = random.Random(f"eval:{seed}")
    return [example for skill in SKILLS for example in draw_set(skill, "test", num_per_skill, rng)]


def draw_prompts(num_per_skill: int, seed: int) -> list[dict[str, str | bool]]:
    """Conversion prompts: train split, seen skills only, shuffled."""
    rng = random.Random(f"prompts:{seed}")
    seen = [skill for skill in SKILLS if not skill.held_out]
    examples = [example for skill in seen for example in draw_set(skill, "train", num_per_skill, rng)]
    rng.shuffle(examples)
    return [{"prompt": example.prompt, "skill": example.skill} for example in examples]


def draw_noise_prompts(num_prompts: int, seed: int) -> list[dict[str, str | bool]]:
    rng = random.Random(f"noise:{seed}")
    return [{"prompt": draw_noise(rng), "skill": "noise"} for _ in range(num_prompts)]


def write_jsonl(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_evaluation(path: Path, examples: list[Example]) -> None:
    held_out = {skill.name: skill.held_out for skill in SKILLS}
    records = [
        {
            "prompt": example.prompt,
            "answer": example.answer,
            "skill": example.skill,
            "held_out": held_out[example.skill],
        }
        for example in examples
    ]
    write_jsonl(path, records)


def format_score_row(name: str, held_out: str, scores: list[Score]) -> str:
    match = sum(score.exact_match for score in scores) / len(scores)
    confidence = sum(score.mean_confidence for score in scores) / len(scores)
    tokens = sum(score.mean_response_tokens for score in scores) / len(scores)
    return f"| {name} | {held_out} | {100 * match:.1f} % | {confidence:.4f} | {tokens:.1f} |"


def model_card(
    scores: dict[str, Score],
    config: TrainConfig,
    *,
    num_parameters: int,
    num_tokens: int,
    num_per_skill: int,
    seconds: float,
) -> str:
    rows = [
        format_score_row(skill.name, "held out" if skill.held_out else "seen", [scores[skill.name]])
        for skill in SKILLS
    ]
    rows.append(format_score_row("**mean**", "", list(scores.values())))
    table = "\n".join(rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# opdlm tiny teacher

A stock `Qwen3ForCausalLM` with {num_parameters:,} parameters and a character tokenizer. It answers ten small
text skills over an invented world and exists so that `opdlm` can be tried and tested on a CPU. It knows
nothing else and is of no other use.

One command made it, in {seconds / 60:.0f} minutes on {torch.get_num_threads()} CPU thread(s):

    python examples/tiny_teacher/train.py --out opdlm/bundled --seed {config.seed}

{config.num_steps} steps of {config.batch_size} fresh train-split examples, AdamW, peak learning rate
{config.learning_rate:g} with a cosine decay, float32.

## Greedy exact match on the test split

Measured on `../eval.jsonl`: {num_per_skill} prompts a skill that were never trained on. *Seen* skills supply
the conversion prompts in `../prompts.jsonl`; *held out* skills are only measured after conversion;
`../noise.jsonl` holds prompts of random words that ask nothing. Confidence is the mean probability of the
greedy token; tokens are the mean response length, `<|end|>` included.

| skill | in conversion | exact match | confidence | tokens |
|---|---|---|---|---|
{table}

## Format

`<|user|>PROMPT<|assistant|>ANSWER<|end|>`, one token per character, as the chat template writes it. A
character outside printable ASCII and newline becomes `<|unk|>`. Token ids from {num_tokens} to
{VOCAB_SIZE - 1} are unused rows of the embedding, free for a mask token.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled tiny teacher.")
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher/ and the two jsonl files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "opdlm_tiny_teacher")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config = TrainConfig(
        seed=args.seed,
        num_steps=args.num_steps,
        batch_size=128,
        micro_batch_size=32,
        learning_rate=args.learning_rate,
        warmup_steps=100,
        weight_decay=0.05,
    )
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)

    started = time.monotonic()
    train(model, tokenizer, config, args.scratch)
    seconds = time.monotonic() - started

    teacher = args.out / "teacher"
    model.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    write_jsonl(args.out / "prompts.jsonl", draw_prompts(PROMPTS_PER_SKILL, args.seed))
    write_jsonl(args.out / "noise.jsonl", draw_noise_prompts(NUM_NOISE_PROMPTS, args.seed))
    evaluation = draw_evaluation(EVALUATION_PER_SKILL, args.seed)
    write_evaluation(args.out / "eval.jsonl", evaluation)
    scores = score_skills(model, tokenizer, evaluation)
    card = model_card(
        scores,
        config,
        num_parameters=model.num_parameters(),
        num_tokens=len(tokenizer),
        num_per_skill=EVALUATION_PER_SKILL,
        seconds=seconds,
    )
    (teacher / "README.md").write_text(card)
    logger.info(card)


if __name__ == "__main__":
    main()
