"""`opdlm convert` from start to end: check the inputs, train, write the result folder, evaluate it.

Nothing is written before all inputs are checked. The evaluation loads the written folder, as a user would.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import PartialState
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlm.checkpoints.convert import make_student
from opdlm.checkpoints.export import write_model
from opdlm.checkpoints.folders import trust_remote_code
from opdlm.checkpoints.load import (
    check_fits,
    load,
    load_causal_lm,
    load_tokenizer,
    vocabulary_rows,
    with_known_dtype,
)
from opdlm.config.sections import CONFIG_COPY, Config, EvalSection
from opdlm.data.prompts import (
    Ids,
    Task,
    count_prompts,
    hold_back,
    load_prompts,
    weighted_sources,
    write_prompt_ids,
)
from opdlm.data.rows import evenly_spaced
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Prompt, Rollout
from opdlm.distill.rollout_file import load_rollouts
from opdlm.distill.rollouts import check_engine, check_launch
from opdlm.distill.self_prompts import self_prompts, user_turn
from opdlm.distill.trainer import Run, train
from opdlm.errors import ConfigError, DataError, require_package
from opdlm.evaluation.evaluate import Outputs, evaluate, score_of
from opdlm.evaluation.retention import (
    HELD_BACK_FILE,
    MODEL_FOLDER,
    RESULTS_FILE,
    load_eval_tasks,
    measure_folder,
    run_results,
)
from opdlm.files import atomic_folder, find_damage, write_atomic, write_manifest
from opdlm.modeling.attention import choose_backend, unsupported_reason
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.objectives.mask_theory import ngram_signal_weights, optimal_t
from opdlm.objectives.masking import auto_window, needs_optimal_t, resolve_auto
from opdlm.reporting.card import model_card
from opdlm.reporting.pages import DRAFTED, read_retention
from opdlm.reporting.plots import plot_metrics, plot_signal
from opdlm.training.checkpoint import (
    find_checkpoints,
    load_average,
    load_weights,
    trainable_weights,
)
from opdlm.training.devices import check_trackers, is_sharded, join_ranks
from opdlm.training.loop import EvalCallback, result_checkpoint
from opdlm.training.metrics import Doing, MetricsLog, PhaseProgress, read_metrics
from opdlm.training.run_folder import owned, prepare_output, start_date

CARD_FILE = "README.md"
"""Of a result folder, written last."""
LEARNT = 0.05
"""Tokens per forward that a student which has learnt something gains, at least."""
HELD_BACK_TOKENS, HELD_BACK_TIMED = 64, 4
"""Response tokens of held-back prompts, and how many of them are timed."""
MOST_MEASUREMENTS = 8
"""Of held-back prompts while a run trains."""
HELD_BACK_OVERHEAD = 1000.0
"""The `forward_overhead` of these measurements: next drafts that are hardly ever needed are left out, which
halves the time of the fewest forwards for one to four per cent more of them.
"""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a run, loaded and checked."""

    student: DiffusionLM
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    tasks: list[Task]
    recorded: Sequence[Rollout] = ()
    """Rollouts of `rollout.path`, instead of prompts."""


@dataclass(slots=True)
class RetentionCallback:
    """Retention of the student during training, on a fixed subset of the evaluation prompts. The teacher's
    responses are decoded once.
    """

    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[Task]
    section: EvalSection
    doing: Doing | None = None
    teacher: Outputs | None = None

    def __post_init__(self) -> None:
        self.tasks = evenly_spaced(self.tasks, self.section.subset)

    def __call__(self, model: DiffusionLM) -> dict[str, float]:
        """Metrics; `score` and `retention` are those of the worst mode."""
        report, outputs = evaluate(
            model, self.tokenizer, self.tasks, self.section, teacher=self.teacher, doing=self.doing
        )
        self.teacher = outputs["teacher"]
        rows = {mode.name.replace(", ", "_"): mode for mode in report.student}
        retained = {f"retention_{name}": report.retention(mode) for name, mode in rows.items()}
        speeds = {f"tokens_per_forward_{name}": mode.tokens_per_forward for name, mode in rows.items()}
        return {"score": score_of(report), "retention": min(retained.values())} | retained | speeds


@dataclass(slots=True)
class DraftingCallback:
    """Tokens per forward on a few held-back prompts during training: short greedy responses, lossless where
    the format can verify, so that a run that learns nothing is seen.
    """

    prompts: Sequence[Ids]
    doing: Doing | None = None

    def __call__(self, model: DiffusionLM) -> dict[str, float]:
        mode: Mode = "lossless" if model.spec.format == "preserve" else "threshold"
        decode = DecodeConfig(mode=mode, max_new_tokens=32, batch_size=4, forward_overhead=HELD_BACK_OVERHEAD)
        prompts = self.prompts[:4]
        with PhaseProgress("measure", len(prompts), None, self.doing) as progress:
            rollouts = generate(model, prompts, decode, on_step=progress.on_step)
        speed = DecodeStats.of(rollouts).tokens_per_forward
        return {"score": speed, DRAFTED: speed}


def untrained_score(held_back: Sequence[Ids], student: DiffusionLM, console: Console) -> float:
    """The score before training, also of a run that resumes later; on several devices what it usually is."""
    state = PartialState()
    if state.num_processes > 1:
        return 1.0
    with PhaseProgress("measure before training", 1, console) as progress:
        measure = DraftingCallback(held_back, lambda what: progress.show(0, what))
        score = measure(student.to(state.device).eval())["score"]
        progress.advance(1)
    return score


def load_inputs(config: Config) -> Inputs:
    """Load and check model, prompts and evaluation tasks; ConfigError or DataError. Writes nothing."""
    if not config.model.path:
        raise ConfigError("model.path is empty: give a recipe or a checkpoint folder as the target.")
    check_trackers(config)
    if needs_optimal_t(config.masking) and not config.rollout.path:
        raise ConfigError(
            "masking.windows (auto) counts the n-grams of the training text, which a conversion knows "
            "beforehand only with rollout.path: give such a file, or numbers such as [[0.45, 0.55]]."
        )
    if config.model.load_in_4bit:
        require_package("bitsandbytes", "quant", "model.load_in_4bit (true)")
    if config.optimizer.name == "adamw8bit":
        require_package("bitsandbytes", "quant", "optimizer.name (adamw8bit)")
    check_launch(config)
    tokenizer = load_tokenizer(config.model.path, config.model.trust_remote_code)
    student = load_student(config, tokenizer)
    if type(student.student).__module__.startswith("transformers_modules"):
        check_round_trip(student, tokenizer, config)
        student = load_student(config, tokenizer)
    num_tokens = vocabulary_rows(student.student)
    if (config.loss.top_k or 0) > num_tokens:
        raise ConfigError(
            f"loss.top_k ({config.loss.top_k}) exceeds the model's vocabulary ({num_tokens}): lower it, or "
            "leave it out for all tokens."
        )
    prompts: list[Prompt] = []
    recorded: Sequence[Rollout] = ()
    if config.rollout.path:
        recorded = load_rollouts(config, student, tokenizer)
    elif config.data.path or not config.data.self_prompts:
        prompts = load_prompts(config.data, tokenizer, student.spec.mask_token_id)
        check_fits(
            student,
            [p.ids for p in prompts],
            config.rollout.decode.max_new_tokens,
            "rollout.decode.max_new_tokens",
        )
    check_engine(student, prompts, config)
    if config.data.self_prompts:
        user_turn(tokenizer, config.data)
    tasks = load_eval_tasks(student, tokenizer, config) if config.eval.path else []
    return Inputs(student, tokenizer, prompts, tasks, recorded)


def load_student(config: Config, tokenizer: PreTrainedTokenizerBase) -> DiffusionLM:
    """The student at step 0, from the files of `model.path`."""
    section = config.model
    model = load_causal_lm(
        section.path, section.dtype, section.trust_remote_code, load_in_4bit=section.load_in_4bit
    )
    check_attention(model, config)
    return make_student(model, tokenizer, config)


def check_round_trip(student: DiffusionLM, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """DataError where the result folder of a checkpoint that brings code could not be used: it is written,
    loaded, and decodes one token. This removes the LoRA layers from `student`.
    """
    parent = next(folder for folder in Path(config.output_dir).resolve().parents if folder.is_dir())
    with TemporaryDirectory(dir=parent) as folder, trust_remote_code(config.model.trust_remote_code):
        write_model(Path(folder), student, tokenizer, config.model.path)
        try:
            model, _ = load(folder)
        except DataError as error:
            raise DataError(
                f"model.path ({config.model.path}) brings code that a result folder cannot load: {error}"
            ) from error
        generate(model, [[model.spec.stop_token_ids[0]]], DecodeConfig(mode="static", max_new_tokens=1))


def check_attention(model: PreTrainedModel, config: Config) -> None:
    """ConfigError if `model.attention` cannot run here."""
    device = PartialState().device
    reason = unsupported_reason(config.model.attention, device, model.config)
    if reason:
        raise ConfigError(f"model.attention ({config.model.attention}) cannot run: {reason}.")


def convert_checkpoint(config: Config, console: Console) -> Path:
    """Run or resume a conversion; returns the folder of the converted model."""
    started, config = time.monotonic(), with_known_dtype(config)
    ranks = join_ranks(config)
    with owned(Path(config.output_dir), writes=ranks.is_main_process):
        return run_conversion(config, ranks, console, started)


def run_conversion(config: Config, ranks: PartialState, console: Console, started: float) -> Path:
    """`convert_checkpoint` in a run folder of its own. `started` is a time of `time.monotonic`."""
    config = replace(config, data=replace(config.data, date=start_date(config.data.date, config.output_dir)))
    with console.status(Text(f"loading {config.model.path}")):
        inputs = load_inputs(config)
    weights = signal_weights(inputs, config)
    if weights:
        window = auto_window(optimal_t(weights), config.masking.auto_width)
        config = replace(config, masking=resolve_auto(config.masking, optimal_t(weights)))
    output_dir = prepare_output(config, writes=ranks.is_main_process)
    if weights and ranks.is_main_process:
        plot_signal(weights, window, output_dir / "mask_window.png")
        console.out(
            f"masking.windows=auto: t* = {optimal_t(weights):.3f}, window {window[0]:g} to {window[1]:g} "
            f"({output_dir / 'mask_window.png'})"
        )
    if config.data.self_prompts:
        with ranks.main_process_first():  # the other ranks read the file
            add_self_prompts(inputs, config, output_dir, console)
    inputs, held_back = without_held_back(inputs, config)
    describe(inputs, config, console)
    folder = output_dir / MODEL_FOLDER
    with console.status(Text(f"checking {folder}")):
        finished = is_finished(folder, output_dir, config)
    with MetricsLog(output_dir, console, opened=started) as log:
        eval_callback, every = measurement_while_training(inputs, held_back, config, log.doing)
        if held_back and not finished:
            untrained = untrained_score(held_back, inputs.student, console)
        run = train(inputs.student, inputs.prompts, config, log, inputs.recorded, eval_callback, every)
    if finished:
        console.out(f"{folder} is finished: nothing was trained or measured again")
        return folder
    if held_back:
        tell_if_nothing_learnt(output_dir, untrained, config, console)
    if ranks.is_main_process:
        write_result(run, inputs, held_back, config, console)
    return folder


def write_result(
    run: Run, inputs: Inputs, held_back: Sequence[Ids], config: Config, console: Console
) -> None:
    """Write the folder of the converted model, measure it, and describe both in its card."""
    output_dir = Path(config.output_dir)
    folder = output_dir / MODEL_FOLDER
    if not is_written(folder, output_dir, config):  # else the measurement was interrupted, and goes on
        with atomic_folder(folder) as partial:
            write_model(partial, trained_student(run, config).eval(), inputs.tokenizer, config.model.path)
            write_record(partial, output_dir, config)
            if held_back:
                write_prompt_ids(partial / HELD_BACK_FILE, held_back, inputs.tokenizer)
    if inputs.tasks or held_back:
        measure_folder(folder, measured_config(folder, config), folder, console=console)
    write_card(folder, config)
    write_manifest(folder)


def tell_if_nothing_learnt(output_dir: Path, untrained: float, config: Config, console: Console) -> None:
    """Say so where the last measurement on held-back prompts is that of the untrained student."""
    measured = [row[DRAFTED] for row in read_metrics(output_dir / "metrics.jsonl") if DRAFTED in row]
    if measured and measured[-1] < untrained + LEARNT:
        console.out(
            f"This run learnt nothing: {measured[-1]:.2f} tokens per forward on held-back prompts, "
            f"{untrained:.2f} before training. Raise optimizer.learning_rate "
            f"({config.optimizer.learning_rate:g}) or train.num_steps ({config.train.num_steps})."
        )


def measurement_while_training(
    inputs: Inputs, held_back: Sequence[Ids], config: Config, doing: Doing
) -> tuple[EvalCallback | None, int]:
    """What is measured, if anything, and every how many steps."""
    if config.eval.every:
        return RetentionCallback(inputs.tokenizer, inputs.tasks, config.eval, doing), config.eval.every
    if held_back:
        return DraftingCallback(held_back, doing), ceil(config.train.num_steps / MOST_MEASUREMENTS)
    return None, 0


def without_held_back(inputs: Inputs, config: Config) -> tuple[Inputs, list[Ids]]:
    """The inputs without the prompts that `eval.held_back` keeps from training, and these prompts."""
    number = config.eval.held_back
    if config.eval.path or not number:
        return inputs, []
    if inputs.recorded:
        recorded, chosen = hold_back(inputs.recorded, lambda rollout: rollout.prompt_ids, number)
        return replace(inputs, recorded=recorded), chosen
    prompts, chosen = hold_back(inputs.prompts, lambda prompt: prompt.ids, number)
    weighted_sources(prompts, config.data)  # none may be empty now
    return replace(inputs, prompts=prompts), chosen


def measured_config(folder: Path, config: Config) -> Config:
    """The settings of the measurement at the end; that of held-back prompts takes minutes on a CPU."""
    section = config.eval
    if section.path:
        return config
    longest = min(config.rollout.decode.max_new_tokens, section.decode.max_new_tokens, HELD_BACK_TOKENS)
    modes = section.modes
    if not modes and config.format.name == "preserve":
        modes = ("lossless", "threshold") if config.format.can_denoise else ("lossless",)
    cheap = replace(
        section,
        path=str(folder / HELD_BACK_FILE),
        modes=modes,
        decode=replace(section.decode, max_new_tokens=longest),
        timed_prompts=min(section.timed_prompts, HELD_BACK_TIMED),
        agreement=False,
    )
    return replace(config, eval=cheap)


def signal_weights(inputs: Inputs, config: Config) -> tuple[float, ...]:
    """n-gram weights of the recorded rollouts if `masking.windows=auto` needs them, else none."""
    if not needs_optimal_t(config.masking):
        return ()
    return ngram_signal_weights([rollout.prompt_ids + rollout.text_ids for rollout in inputs.recorded])


def add_self_prompts(inputs: Inputs, config: Config, output_dir: Path, console: Console) -> None:
    """Add prompts sampled from the model, without evaluation prompts, to those of `data.path`."""
    evaluated = {task.text for task in inputs.tasks}
    inputs.student.to(PartialState().device)
    added = self_prompts(inputs.student, inputs.tokenizer, config, output_dir, evaluated, console)
    check_fits(
        inputs.student, [p.ids for p in added], config.rollout.decode.max_new_tokens, "data.max_prompt_tokens"
    )
    check_engine(inputs.student, added, config)
    source = inputs.prompts[-1].source + 1 if inputs.prompts else 0
    inputs.prompts.extend(replace(p, index=len(inputs.prompts) + p.index, source=source) for p in added)


def trained_student(run: Run, config: Config) -> DiffusionLM:
    """The trained model, unsharded; after a sharded run it is rebuilt from a checkpoint."""
    if not is_sharded(run.model):
        return run.model
    student = load_inputs(config).student
    result = result_checkpoint(run)
    load_weights(result, student)
    if config.train.ema_decay is not None:
        load_average(result, trainable_weights(student))
    return student


def describe(inputs: Inputs, config: Config, console: Console) -> None:
    """Print model, parameters, objective and data of the run."""
    student = inputs.student
    total = sum(p.numel() for name, p in student.student.named_parameters() if "lora_" not in name)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    backend = choose_backend(student.attention, PartialState().device, student.student.config)
    if config.rollout.path:
        source = f"{len(inputs.recorded)} rollouts of {config.rollout.path}"
    else:
        source = count_prompts(inputs.prompts, config.data)
    console.out(
        f"{config.model.path}: {student.student.config.model_type}, {total / 1e6:.2f} M parameters, "
        f"{trained / 1e6:.2f} M trained; format {student.spec.format}, block size {student.spec.block_size}, "
        f"objective {config.loss.objective}, {source}, "
        f"attention {backend}, mask token id {student.spec.mask_token_id}"
    )


def write_record(folder: Path, output_dir: Path, config: Config) -> None:
    """Write settings, results and training curves of the run beside the weights."""
    (folder / CONFIG_COPY).write_text(config.to_yaml())
    (folder / RESULTS_FILE).write_text(json.dumps(run_results(output_dir), indent=2))
    plot_metrics({"": read_metrics(output_dir / "metrics.jsonl")}, folder / "training.png")


def is_written(folder: Path, output_dir: Path, config: Config) -> bool:
    """Whether the folder holds the undamaged result of the run as it stands: its weights are not written
    again then, and a log of responses beside them stays of use. Versions and threads of today do not count.
    """
    copy, results = folder / CONFIG_COPY, folder / RESULTS_FILE
    if not (copy.is_file() and results.is_file()) or copy.read_text() != config.to_yaml():
        return False
    written, now = json.loads(results.read_text()), run_results(output_dir)
    return written == now | {"versions": written.get("versions")} and not find_damage(folder)


def is_finished(folder: Path, output_dir: Path, config: Config) -> bool:
    """Whether an earlier run has made all steps, and has written, measured and described their result."""
    is_trained = config.train.resume_from_checkpoint and bool(find_checkpoints(output_dir))
    return is_trained and (folder / CARD_FILE).is_file() and is_written(folder, output_dir, config)


def write_card(folder: Path, config: Config) -> None:
    """Write the model card, README.md."""
    results = json.loads((folder / RESULTS_FILE).read_text())
    write_atomic(folder / CARD_FILE, model_card(config, results, read_retention(folder)))
