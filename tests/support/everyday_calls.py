"""Everyday calls of transformers on a converted folder, in a process that cannot import opdlm.

`python everyday_calls.py FOLDER ORIGINAL` prints one JSON object: name of the call -> empty, or a traceback.
FOLDER is what `opdlm convert` made of the checkpoint ORIGINAL. The process that starts this one imports only
`CALLS` and `run`.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Call = Callable[["Everyday"], None]
CALLS: dict[str, Call] = {}
TEXTS = ["add 1 2", "what is 12 + 7"]
NEW = 12


def call(function: Call) -> Call:
    CALLS[function.__name__] = function
    return function


def run(folder: Path, original: Path, modules: Path) -> dict[str, str]:
    """The outcome of every call, from a process of its own. `modules`: its cache of remote code."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(folder), str(original)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=modules.parent)
    assert process.returncode == 0, process.stderr
    outcomes: dict[str, str] = json.loads(process.stdout.splitlines()[-1])
    return outcomes


@dataclass(frozen=True)
class Everyday:
    """What the calls share. `texts` are encoded as they are, without a chat template."""

    folder: str
    original: str

    @property
    def preserve(self) -> bool:
        return bool(self.model.config.block_diffusion["format"] == "preserve")

    @property
    def model(self) -> Any:
        return load(self.folder)

    @property
    def plain(self) -> Any:
        """What the folder is without remote code; with `preserve` the original."""
        return load(self.original if self.preserve else self.folder, trust_remote_code=False)

    @property
    def autoregressive(self) -> Any:
        """The model whose next tokens `forward` and mode `ar` compute: an `sdar` adapter belongs to it."""
        if self.preserve or not self.model.config.block_diffusion["adapter"]:
            return self.plain
        from peft import PeftModel

        base = load.__wrapped__(self.folder, trust_remote_code=False)
        return PeftModel.from_pretrained(base, f"{self.folder}/adapter").get_base_model()

    @property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def inputs(self, *texts: str, side: str = "left") -> dict[str, Any]:
        tokenizer = self.tokenizer
        tokenizer.padding_side = side
        encoded = tokenizer([*texts] or TEXTS[:1], return_tensors="pt", padding=True)
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def generate(self, *texts: str, side: str = "left", **options: Any) -> Any:
        return self.model.generate(**self.inputs(*texts, side=side), **{"max_new_tokens": NEW} | options)

    def new_ids(self, *texts: str, **options: Any) -> list[list[int]]:
        """The responses."""
        inputs, output = self.inputs(*texts), self.generate(*texts, **options)
        return [row.tolist() for row in output[:, inputs["input_ids"].shape[1] :]]


@cache
def load(folder: str, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    settings = {"trust_remote_code": True, "dtype": torch.float32} | options
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def raises(function: Callable[[], Any], *words: str) -> None:
    try:
        function()
    except ValueError as error:
        assert all(word in str(error) for word in words), error
        assert "\n" not in str(error)
    else:
        raise AssertionError(f"nothing was raised about {words}")


@call
def is_a_pretrained_model(our: Everyday) -> None:
    import torch
    from transformers import GenerationMixin, PreTrainedModel

    assert isinstance(our.model, PreTrainedModel) and isinstance(our.model, GenerationMixin)
    assert our.model.can_generate() and not our.model.training
    assert our.model.device == torch.device("cpu") and our.model.dtype == torch.float32
    assert our.model.config.model_type == our.plain.config.model_type
    assert our.model.num_parameters() == our.plain.num_parameters()
    assert set(our.model.state_dict()) == set(our.plain.state_dict())
    assert our.model.get_input_embeddings().weight.shape[0] == our.model.config.vocab_size


@call
def forward_gives_ar_logits(our: Everyday) -> None:
    import torch

    inputs = our.inputs(*TEXTS)
    with torch.no_grad():
        found, expected = our.model(**inputs), our.autoregressive(**inputs)
    assert type(found) is type(expected)
    tolerance = 0.0 if our.preserve else 1e-5
    torch.testing.assert_close(found.logits, expected.logits, atol=tolerance, rtol=tolerance)
    assert found.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]


@call
def forward_with_labels_trains(our: Everyday) -> None:
    ids = our.inputs()["input_ids"]
    output = our.model(input_ids=ids, labels=ids, output_hidden_states=True)
    assert len(output.hidden_states) == our.model.config.num_hidden_layers + 1
    output.loss.backward()
    gradients = [p.grad for p in our.model.parameters() if p.grad is not None]
    assert gradients and output.loss.item() > 0
    our.model.zero_grad()


@call
def generate_without_arguments(our: Everyday) -> None:
    ids = our.inputs()["input_ids"]
    output = our.model.generate(ids)
    assert output[0, : ids.shape[1]].tolist() == ids[0].tolist()
    assert ids.shape[1] < output.shape[1] <= ids.shape[1] + 20  # transformers' default


@call
def greedy_ar_is_transformers_generate(our: Everyday) -> None:
    inputs = our.inputs(*TEXTS)
    banned = [
        i for i in our.model.config.block_diffusion["banned_token_ids"] if i < our.plain.config.vocab_size
    ]
    options = {"max_new_tokens": 24, "do_sample": False}
    stops = {"eos_token_id": our.model.config.block_diffusion["stop_token_ids"]}
    stock = our.autoregressive.generate(**inputs, **options, **stops, suppress_tokens=banned or None)
    assert our.model.generate(**inputs, **options, mode="ar").tolist() == stock.tolist()


@call
def lossless_is_ar(our: Everyday) -> None:
    if not our.preserve:
        raises(lambda: our.generate(mode="lossless"), "lossless", "preserve")
        return
    import torch

    for options in ({}, {"do_sample": True, "top_k": 0, "temperature": 0.8}):
        outputs = []
        for mode in ("ar", "lossless"):
            torch.manual_seed(7)
            outputs.append(our.new_ids(*TEXTS, mode=mode, **options))
        assert outputs[0] == outputs[1], options
    rejection = {"mode": "lossless", "draft_sampling": "rejection", "forward_overhead": 1e6}
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(our.new_ids(*TEXTS, **rejection, do_sample=True))
    assert drawn[0] == drawn[1] != our.new_ids(*TEXTS, **rejection, do_sample=False)
    raises(lambda: our.generate(draft_sampling="rejection"), "draft_sampling", "mode=lossless")


@call
def max_new_tokens(our: Everyday) -> None:
    assert len(our.new_ids(max_new_tokens=3, eos_token_id=None)[0]) == 3


@call
def max_length(our: Everyday) -> None:
    width = our.inputs()["input_ids"].shape[1] + 5
    output = our.model.generate(**our.inputs(), max_length=width, eos_token_id=None)
    assert output.shape[1] == width


@call
def eos_token_id(our: Everyday) -> None:
    ids = our.new_ids(eos_token_id=None, mode="ar")[0]
    assert len(ids) == NEW
    end = ids.index(ids[4]) + 1
    for value in (ids[4], [ids[4]]):
        assert our.new_ids(eos_token_id=value, mode="ar") == [ids[:end]]


@call
def pad_token_id(our: Everyday) -> None:
    rows = our.new_ids(*TEXTS, eos_token_id=None, mode="ar")
    stop = next(i for i in rows[0][:-1] if i not in rows[1][: rows[0].index(i) + 1])
    rows = our.new_ids(*TEXTS, eos_token_id=stop, pad_token_id=5, mode="ar")
    end = rows[0].index(stop) + 1
    assert len(rows[0]) == len(rows[1]) > end and set(rows[0][end:]) == {5}


def padded_like_single(our: Everyday, side: str) -> None:
    width = our.inputs(*TEXTS)["input_ids"].shape[1]
    output = our.generate(*TEXTS, side=side, eos_token_id=None)
    for text, row in zip(TEXTS, output, strict=True):
        assert row[width:].tolist() == our.new_ids(text, eos_token_id=None)[0]


@call
def left_padding(our: Everyday) -> None:
    padded_like_single(our, "left")


@call
def right_padding(our: Everyday) -> None:
    padded_like_single(our, "right")


@call
def no_token_at_all(our: Everyday) -> None:
    inputs = our.inputs(*TEXTS)
    inputs["attention_mask"][1] = 0
    raises(lambda: our.model.generate(**inputs), "attention_mask", "prompt 1")


@call
def do_sample_with_a_seed(our: Everyday) -> None:
    import torch

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return our.new_ids(*TEXTS, do_sample=True, temperature=2.0, top_k=0)

    assert draw(1) == draw(1) != draw(2)


@call
def temperature_top_k_and_top_p(our: Everyday) -> None:
    greedy = our.new_ids(do_sample=False, mode="ar")
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert our.new_ids(do_sample=True, mode="ar", **narrow) == greedy, narrow


@call
def num_return_sequences(our: Everyday) -> None:
    output = our.generate(*TEXTS, do_sample=True, temperature=5.0, top_k=0, num_return_sequences=3)
    assert output.shape[0] == 6 and len({tuple(row.tolist()) for row in output[:3]}) > 1


@call
def return_dict_in_generate(our: Everyday) -> None:
    output = our.generate(return_dict_in_generate=True)
    assert output.sequences.tolist() == our.generate().tolist()
    assert type(output).__name__ == "GenerateDecoderOnlyOutput"


@call
def streamer(our: Everyday) -> None:
    from transformers import TextIteratorStreamer

    for mode in ("ar", "threshold"):
        stream = TextIteratorStreamer(our.tokenizer, skip_prompt=True)
        ids = our.new_ids(streamer=stream, mode=mode)[0]
        assert "".join(stream) == our.tokenizer.decode(ids)
    raises(lambda: our.generate(*TEXTS, streamer=Silent()), "streamer", "one")


class Silent:
    """Accepts any number of rows."""

    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


@call
def stopping_criteria(our: Everyday) -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    width = our.inputs(*TEXTS)["input_ids"].shape[1]

    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.new_full((len(input_ids),), input_ids.shape[1] >= width + 4).bool()

    whole = our.new_ids(*TEXTS, eos_token_id=None, pad_token_id=0)
    criteria = StoppingCriteriaList([AfterFour()])
    cut = our.new_ids(*TEXTS, eos_token_id=None, pad_token_id=0, stopping_criteria=criteria)
    assert cut == [ids[:4] for ids in whole]


@call
def stop_strings(our: Everyday) -> None:
    tokenizer = our.tokenizer
    ids = our.new_ids(eos_token_id=None, mode="ar")[0]
    string = tokenizer.decode(ids[3:6])
    cut = our.new_ids(eos_token_id=None, mode="ar", stop_strings=string, tokenizer=tokenizer)[0]
    assert cut == ids[: len(cut)] and string in tokenizer.decode(cut)
    assert string not in tokenizer.decode(cut[:-1])
    raises(lambda: our.generate(stop_strings="a"), "tokenizer")


@call
def max_time(our: Everyday) -> None:
    assert len(our.new_ids(max_new_tokens=40, eos_token_id=None, max_time=1e-6, mode="ar")[0]) == 1


@call
def generation_config_as_an_argument(our: Everyday) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=5, eos_token_id=None, do_sample=False)
    width = our.inputs()["input_ids"].shape[1]
    assert our.model.generate(**our.inputs(), generation_config=config).shape[1] <= width + 5


@call
def generation_config_of_the_model(our: Everyday) -> None:
    before = our.model.generation_config
    assert before.eos_token_id == our.model.config.block_diffusion["stop_token_ids"]
    try:
        expected = our.generate(mode="ar", max_new_tokens=6).tolist()
        our.model.generation_config = copy.deepcopy(before)
        our.model.generation_config.max_new_tokens = 6
        our.model.generation_config.mode = "ar"
        assert our.model.generate(**our.inputs()).tolist() == expected
        our.model.generation_config.num_beams = 2
        raises(lambda: our.generate(), "num_beams")
    finally:
        our.model.generation_config = before


@call
def decode_settings(our: Everyday) -> None:
    block_size = our.model.config.block_diffusion["block_size"]
    for options in (
        {"mode": "static", "denoising_steps": 1},
        {"mode": "entropy", "entropy_bound": 0.5},
        {"mode": "threshold", "confidence_threshold": 0.5, "batch_size": 1},
    ):
        assert our.new_ids(*TEXTS, **options), options
    raises(lambda: our.generate(mode="nonsense"), "mode", "threshold")
    raises(lambda: our.generate(denoising_steps=block_size + 1), "denoising_steps")


@call
def logits_are_processed_as_by_the_plain_model(our: Everyday) -> None:
    if not our.preserve:
        return
    spec = our.model.diffusion.spec
    banned, stops = list(spec.banned_token_ids), our.model.generation_config.eos_token_id
    inputs, changed, written = our.inputs(), 0, our.new_ids(mode="ar")[0]  # padding would be penalised too
    greedy = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": stops}
    for options in (
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": [written[:1], written[2:4]]},
        {"suppress_tokens": written[1:3]},
        {"min_new_tokens": NEW},
        {"min_length": 9},
    ):
        options = {"suppress_tokens": [], **options}
        options["suppress_tokens"] = [*options["suppress_tokens"], *banned] or None
        expected = our.plain.generate(**inputs, **greedy, **options).tolist()
        for mode in ("lossless", "ar"):
            assert our.model.generate(**inputs, **greedy, **options, mode=mode).tolist() == expected, options
        changed += expected != our.model.generate(**inputs, **greedy, mode="ar").tolist()
    assert changed > 2
    stopping = {"eos_token_id": written[2], "mode": "lossless"}
    for row in our.new_ids(*TEXTS[::-1], min_new_tokens=8, **stopping):
        assert written[2] not in row[:8]
    assert written[2] in our.new_ids(**stopping)[0][:8]
    for copied in (0, 3):
        copies = our.new_ids(*TEXTS, mode="lossless", prompt_lookup_num_tokens=copied)
        assert copies == our.new_ids(*TEXTS, mode="ar")


@call
def what_cannot_be_honoured_is_refused(our: Everyday) -> None:
    import torch
    from transformers import LogitsProcessorList, MinLengthLogitsProcessor

    for options in (
        {"num_beams": 2},
        {"repetition_penalty": 1.2, "mode": "static"},
        {"bad_words_ids": [[1]], "mode": "threshold"},
        {"min_p": 0.1, "do_sample": True},
        {"output_scores": True, "return_dict_in_generate": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3, "mode": "static"},
        {"forward_overhead": 8.0, "mode": "threshold"},
        {"denoising_steps": 2, "mode": "lossless"},
        {"assistant_model": our.plain},
        {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, 1)])},
        {"prefix_allowed_tokens_fn": lambda *_: [1]},
        {"negative_prompt_ids": torch.tensor([[1]]), "guidance_scale": 2.0},
        {"position_ids": torch.arange(3)[None]},
        {"max_new_tokns": 3},
    ):
        raises(lambda options=options: our.generate(**options), next(iter(options)), "leave it out")  # type: ignore[misc]
    embedded = our.model.get_input_embeddings()(our.inputs()["input_ids"])
    raises(lambda: our.model.generate(inputs_embeds=embedded), "inputs_embeds", "leave it out")


@call
def pipeline_with_a_model(our: Everyday) -> None:
    from transformers import pipeline

    pipe = pipeline("text-generation", model=our.model, tokenizer=our.tokenizer)
    (answer,) = pipe(TEXTS[0], max_new_tokens=5, do_sample=False, mode="ar", return_full_text=False)
    expected = our.tokenizer.decode(our.new_ids(max_new_tokens=5, mode="ar")[0], skip_special_tokens=True)
    assert answer["generated_text"] == expected
    assert len(pipe(TEXTS, max_new_tokens=5, batch_size=2)) == 2
    assert pipe(TEXTS[0], max_new_tokens=5, stop_sequence="a")


@call
def pipeline_with_a_path(our: Everyday) -> None:
    from transformers import pipeline

    pipe = pipeline("text-generation", model=our.folder, trust_remote_code=True, device_map="auto")
    (answer,) = pipe([{"role": "user", "content": TEXTS[0]}], max_new_tokens=5)
    assert answer["generated_text"][-1]["role"] == "assistant"
    assert hasattr(pipe.model, "diffusion")


@call
def chat_template(our: Everyday) -> None:
    inputs = our.tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXTS[0]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert our.model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]


@call
def device_map(our: Everyday) -> None:
    import torch

    expected, fastest = our.generate().tolist(), torch.accelerator.current_accelerator(check_available=True)
    for value in ("auto", "cpu", {"": "cpu"}):
        model = load.__wrapped__(our.folder, device_map=value)
        assert model.device.type == (fastest.type if fastest and value == "auto" else "cpu")
        assert model.generate(**our.inputs(), max_new_tokens=NEW).tolist() == expected
    layers = {"model": "cpu", "lm_head": "disk"}
    with tempfile.TemporaryDirectory() as offload:
        raises(
            lambda: load.__wrapped__(our.folder, device_map=layers, offload_folder=offload),
            "device_map",
            "one device",
        )


@call
def dtype(our: Everyday) -> None:
    import torch

    for value in (torch.bfloat16, "bfloat16", torch.float16):
        model = load.__wrapped__(our.folder, dtype=value)
        assert model.dtype == (torch.float16 if value == torch.float16 else torch.bfloat16)
        assert model.generate(**our.inputs(), max_new_tokens=4).shape[0] == 1
    stored = json.loads(Path(our.folder, "config.json").read_text())["dtype"]
    assert load.__wrapped__(our.folder, dtype="auto").dtype == getattr(torch, stored)


@call
def attn_implementation(our: Everyday) -> None:
    model = load.__wrapped__(our.folder, attn_implementation="sdpa")
    assert model.generate(**our.inputs(), max_new_tokens=NEW).tolist() == our.generate().tolist()
    for value in ("eager", "flash_attention_2", "nonsense"):
        raises(
            lambda value=value: load.__wrapped__(our.folder, attn_implementation=value),  # type: ignore[misc]
            "attn_implementation",
            value,
        )


@call
def casting(our: Everyday) -> None:
    import torch

    for cast in ("bfloat16", "half", "float"):
        model = getattr(load.__wrapped__(our.folder), cast)().to("cpu")
        kept = [model.diffusion.mask_embedding, *model.diffusion.student.parameters(), *model.buffers()]
        wanted = {"half": torch.float16, "float": torch.float32}.get(cast, torch.bfloat16)
        assert {t.dtype for t in kept if t is not None and t.is_floating_point()} >= {wanted}
        assert model.dtype == wanted
        assert model.generate(**our.inputs(), max_new_tokens=4).shape[0] == 1
    model = load.__wrapped__(our.folder).to("meta")
    assert {p.device.type for p in model.diffusion.parameters()} == {"meta"}


@call
def save_pretrained_and_load_again(our: Everyday) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        for source in (our.model, None):
            source = source or load.__wrapped__(folder)  # a saved folder can be saved again
            source.save_pretrained(folder, max_shard_size="50MB")
            our.tokenizer.save_pretrained(folder)
            again = load.__wrapped__(folder)
            again.generation_config.confidence_threshold = 0.7
            again.generation_config.save_pretrained(folder)
            assert load.__wrapped__(folder).generation_config.confidence_threshold == 0.7
            for mode in ("ar", "static", "threshold"):
                expected = our.generate(*TEXTS, mode=mode).tolist()
                found = again.generate(**our.inputs(*TEXTS), mode=mode, max_new_tokens=NEW).tolist()
                assert found == expected, mode
            plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            assert not hasattr(plain, "diffusion")
            for name, weight in plain.state_dict().items():
                assert torch.equal(weight, our.plain.state_dict()[name]), name
        raises(lambda: our.model.save_pretrained(folder, push_to_hub=True), "push_to_hub")


@call
def the_class_of_a_model_loads(our: Everyday) -> None:
    again = type(our.model).from_pretrained(our.folder)
    assert again.generate(**our.inputs(), max_new_tokens=NEW).shape == our.generate().shape
    _, info = load.__wrapped__(our.folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def main() -> None:
    sys.modules["opdlm"] = None  # type: ignore[assignment]  # an import raises ImportError
    our, outcomes = Everyday(*sys.argv[1:3]), {}
    for name, function in CALLS.items():
        try:
            function(our)
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
