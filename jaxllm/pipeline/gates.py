"""Did each stage of a pipeline reach its gate? Measured on held-out data, with standard errors."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.chat_template import PlainTextTemplate
from jaxllm.data.loader import evaluation_batches
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.errors import ConfigError
from jaxllm.evaluation.perplexity import evaluate
from jaxllm.evaluation.preference import mean, numbered
from jaxllm.evaluation.trigram import count_trigrams
from jaxllm.files import to_json, write_file
from jaxllm.pipeline.completions import PipelineCompletions, column, complete_by_all, has_references
from jaxllm.pipeline.config import PARENTS, GatesConfig, PipelineConfig
from jaxllm.runs.context import InitialWeights, RunInputs
from jaxllm.runs.hooks import held_out_batches
from jaxllm.runs.process import set_up_process
from jaxllm.runs.program import Program
from jaxllm.stages import pretrain
from jaxllm.training.metrics import read_metrics
from jaxllm.training.run_folder import RunFolder

WINDOWS = 256  # scored or counted at a time
COUNTED = 20_000_000  # tokens of the training text that the trigram counts, at most


@dataclass(frozen=True)
class Gate:
    """One claim about a stage, and what was measured."""

    name: str
    claim: str
    measured: float | None
    standard_error: float | None
    needed: float | None  # what `measured` is compared with
    passed: bool | None  # None: not measured
    says: str


def measure_gates(config: PipelineConfig, folder: Path) -> None:
    """Measure all gates of the pipeline in `folder`, write gates.json and shown.json, print a line each."""
    if missing := [name for name in PARENTS if not (folder / name / "checkpoints").is_dir()]:
        raise ConfigError(f"--workdir={folder} lacks {', '.join(missing)}: run experiments/pipeline.py first")
    set_up_process()
    gates = list(measure(config, folder))
    passed = all(gate.passed is not False for gate in gates)
    shown = complete_by_all(config.gates, folder, config.seed)
    write_file(folder / "shown.json", to_json(shown))
    write_file(folder / "gates.json", to_json({"passed": passed, "gates": [asdict(gate) for gate in gates]}))
    for gate in gates:
        print(f"{gate.name}: {gate.says} ({gate.passed})")


def measure(config: PipelineConfig, folder: Path) -> Iterator[Gate]:
    """All gates, in the order of the stages."""
    completions, gates = PipelineCompletions(config.gates, folder, config.seed), config.gates
    yield text_gate(config, folder)
    before = completions.of("sft", scored_by_model=True)
    by_rubric = has_references(before)
    if by_rubric:
        yield answers_gate(gates, completions)
    else:
        yield unmeasured(
            "answers", "rows of gates.prompts have no `reference` with `answer`, `key`, `rivals`"
        )
    yield reward_gate(gates, evaluated(folder, "reward_model")[-1])
    for name in ("ppo", "dpo"):
        after = completions.of(name, scored_by_model=True, reference="sft")
        yield preference_gate(gates, name, before, after, "rubric" if by_rubric else "model")
    yield reasoning_gate(gates, evaluated(folder, "grpo"))


def evaluated(folder: Path, stage: str) -> list[dict[str, float]]:
    """The rows of a stage's metrics with held-out figures."""
    rows = read_metrics(folder / stage / "metrics.jsonl")
    return [row for row in rows if any(name.startswith("eval/") for name in row)] or [{}]


def text_gate(config: PipelineConfig, folder: Path) -> Gate:
    """Bits per byte of held-out text, beside those of a trigram model of the same training text."""
    row = evaluated(folder, "pretrain")[-1]
    if "eval/bits_per_byte" not in row:
        return unmeasured("text", "pretraining had no held-out text")
    bits, error = row["eval/bits_per_byte"], row["eval/bits_per_byte_se"]
    baseline, baseline_error = trigram(config, folder)
    needed = config.gates.text_share * baseline
    errors = (needed - bits) / math.hypot(error, config.gates.text_share * baseline_error)
    return Gate(
        "text",
        f"held-out bits per byte are below {config.gates.text_share:g} of a trigram's",
        bits,
        error,
        needed,
        errors >= config.gates.errors,
        f"{bits:.3f} ± {error:.3f} bits per byte, a trigram has {baseline:.3f} ± {baseline_error:.3f}",
    )


def trigram(config: PipelineConfig, folder: Path) -> tuple[float, float]:
    """Bits per byte, with its standard error, of the windows that pretraining was evaluated on."""
    tokenizer = load_tokenizer(folder / "pretrain")
    program: Program[Any, Any] = Program(pretrain, config.pretrain)
    run = RunFolder(folder / "pretrain", "", resuming=True, step=None)
    initial = InitialWeights(None, "", lambda: {})  # nothing reads them
    data = pretrain.load(RunInputs(program, tokenizer, PlainTextTemplate(tokenizer), run, initial))
    byte_lengths = pretrain.model_byte_lengths(program, tokenizer)
    some = (COUNTED // (WINDOWS * config.pretrain.data.sequence_length) + 1) * WINDOWS
    batches = evaluation_batches(data.train, batch_size=WINDOWS, max_rows=some)
    counted = count_trigrams(batches, tokenizer.vocab_size)
    held_out = held_out_batches(config.pretrain, data.validation)
    found = evaluate({}, held_out, lambda _, rows: counted.row_sums(rows, byte_lengths), lambda: None)
    return found["eval/bits_per_byte"], found["eval/bits_per_byte_se"]


def answers_gate(gates: GatesConfig, completions: PipelineCompletions) -> Gate:
    """Correct completions of held-out questions, before and after instruction fine-tuning."""
    (before, error), (after, error_after) = (
        average(column(rows, "correct"), by_prompt(rows))
        for rows in (
            completions.of("pretrain", temperature=0.0, plain=True),
            completions.of("sft", temperature=0.0),
        )
    )
    rise, rise_error = after - before, math.hypot(error, error_after)
    return Gate(
        "answers",
        f"accuracy rises by {gates.answer_rise:g} and {gates.errors:g} standard errors over pretraining",
        rise,
        rise_error,
        gates.answer_rise,
        rise >= max(gates.answer_rise, gates.errors * rise_error),
        f"{percent(after, error_after)} of held-out questions answered correctly; pretrained, "
        f"{percent(before, error)}",
    )


def reward_gate(gates: GatesConfig, row: dict[str, float]) -> Gate:
    """The reward model's accuracy on held-out pairs."""
    if "eval/accuracy_se" not in row:
        return unmeasured("reward_model", "there were no held-out pairs")
    accuracy, error = row["eval/accuracy"], row["eval/accuracy_se"]
    needed = 0.5 + gates.reward_share * (gates.reward_ceiling - 0.5)
    return Gate(
        "reward_model",
        f"accuracy on held-out pairs is {gates.errors:g} standard errors above 0.5 and at least {needed:.2f}",
        accuracy,
        error,
        needed,
        accuracy >= max(needed, 0.5 + gates.errors * error),
        f"{percent(accuracy, error)} of held-out pairs; at best {gates.reward_ceiling:.0%}",
    )


def preference_gate(
    gates: GatesConfig, name: str, before: list[dict], after: list[dict], measure: str
) -> Gate:
    """The score of completions by a rubric that training never sees, and their KL to SFT's model."""
    old, new = column(before, measure), column(after, measure)
    groups = by_prompt(after)
    (was, _), (now, _), (rise, error) = (average(values, groups) for values in (old, new, new - old))
    kl, kl_error = average(np.array([row["kl"] for row in after]), groups)
    says = f"{measure} {was:.3f} to {now:.3f}, {rise:+.3f} ± {error:.3f}; KL to SFT {kl:.1f} ± {kl_error:.1f}"
    if measure == "model":
        return unmeasured(name, f"no rubric; the reward model's own score: {says}")
    return Gate(
        name,
        f"the hidden rubric's score rises by {gates.preference_errors:g} standard errors over SFT, within "
        f"{gates.kl_limit:g} nats of it",
        rise,
        error,
        0.0,
        0 < rise >= gates.preference_errors * error and kl <= gates.kl_limit,
        says,
    )


def reasoning_gate(gates: GatesConfig, rows: list[dict[str, float]]) -> Gate:
    """pass@1 of sampled completions of held-out problems, before and after GRPO."""
    rows = [row for row in rows if row.get("eval/sampled_pass@1_se") is not None]  # null: under two prompts
    if len(rows) < 2:
        return unmeasured("reasoning", "set grpo.sample.group_size, the sampled completions of each problem")
    (was, error), (now, error_now) = (
        (row["eval/sampled_pass@1"], row["eval/sampled_pass@1_se"]) for row in (rows[0], rows[-1])
    )
    rise, rise_error = now - was, math.hypot(error, error_now)
    return Gate(
        "reasoning",
        f"held-out pass@1 rises by {gates.pass_rise:g} and {gates.errors:g} standard errors",
        rise,
        rise_error,
        gates.pass_rise,
        rise >= max(gates.pass_rise, gates.errors * rise_error),
        f"pass@1 {was:.3f} to {now:.3f}, {rise:+.3f} ± {rise_error:.3f}",
    )


def unmeasured(name: str, why: str) -> Gate:
    """A gate that this data cannot measure."""
    return Gate(name, "", None, None, None, None, why)


def average(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of those that are numbers; groups as in `mean`."""
    is_number = ~np.isnan(values)
    return mean(values[is_number], groups[is_number])


def by_prompt(rows: list[dict]) -> np.ndarray:
    """The same number for rows with the same prompt."""
    return numbered(json.dumps(row.get("prompt", row.get("messages", i))) for i, row in enumerate(rows))


def percent(share: float, error: float) -> str:
    """`71.2% ± 1.4%`"""
    return f"{100 * share:.1f}% ± {100 * error:.1f}%"
