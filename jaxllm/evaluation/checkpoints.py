"""A checkpoint evaluated on a source of prompts, or on suites: for experiments/evaluate.py."""

import importlib.util
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jaxllm.data.chat_template import PlainTextTemplate
from jaxllm.data.prompts import PromptOptions
from jaxllm.errors import ConfigError
from jaxllm.evaluation.completions import (
    complete_prompts,
    completion_metrics,
    completion_rows,
    kl_to,
    read_prompts,
)
from jaxllm.evaluation.suite_model import SuiteModel, suite_template
from jaxllm.evaluation.suites import PREFIX, TaskResult, metrics, read_suites, write_results
from jaxllm.files import naming
from jaxllm.parallel.processes import is_first
from jaxllm.rewards.load import load_reward
from jaxllm.rewards.pool import json_value
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.runs.checkpoints import (
    check_generates,
    checkpoint_template,
    inference_dtype,
    load_checkpoint,
    local_mesh,
)


def evaluate_checkpoint(
    checkpoint: str | None,
    source: str,
    *,
    options: PromptOptions,
    rewards: Sequence[str],
    reward_model: str | None,
    reference: str | None,
    plain: bool,
    template_options: Sequence[str],
    untrained: bool,
    samples: int,
    max_rows: int,
    sampling: SamplingConfig,
    seed: int,
    dtype: str | None,
    output: Path | None,
) -> None:
    """Complete the prompts of a source, score the completions, write them to `output`, and print means.

    The arguments are the flags of experiments/evaluate.py.
    """
    for reward in rewards:
        load_reward(reward)  # an unknown one is an error before anything is loaded
    dtype = inference_dtype(dtype)
    loaded = load_checkpoint(checkpoint, local_mesh, dtype=dtype, untrained=untrained)
    check_generates(loaded, f"--checkpoint={checkpoint}")
    reference_model = None
    if reference is not None:
        reference_model = load_checkpoint(reference, local_mesh, dtype=dtype)
        check_generates(reference_model, f"--reference={reference}")
        if reference_model.tokenizer.hash != loaded.tokenizer.hash:
            raise ConfigError(f"--reference={reference} has another tokenizer than --checkpoint")
    if plain:
        template = PlainTextTemplate(loaded.tokenizer)
    else:
        template = checkpoint_template(loaded, template_options)
    longest = loaded.model.config.max_length - sampling.max_new_tokens
    prompts = read_prompts(source, options, template, longest=longest, max_rows=max_rows, seed=seed)
    completions = complete_prompts(
        loaded,
        template,
        prompts,
        functions=rewards,
        reward_model=reward_model,
        samples=samples,
        sampling=sampling,
        seed=seed,
        dtype=dtype,
    )
    if not is_first():  # all have the completions
        return
    kl = None if reference_model is None else kl_to(reference_model, completions, sampling.temperature)
    if output is not None:
        with naming(output), output.open("w") as file:
            for i, row in enumerate(completion_rows(completions, kl)):
                file.write(json.dumps({**prompts[i // samples].row, **row}, default=json_value) + "\n")
    print(f"{len(prompts)} prompts, {samples} completions each")
    if not rewards and reward_model is None:
        print("not scored: name --rewards, such as math_answer, or --reward_model")
    print_metrics(completion_metrics(completions, samples, "", kl))


def print_metrics(row: Mapping[str, float], prefix: str = "") -> None:
    """A line for each metric, with its standard error where it has one."""
    for name, value in row.items():
        if not name.endswith("_se"):
            error = row.get(f"{name}_se", math.nan)  # NaN where there is one prompt alone
            print(f"{prefix}{name} {value:.4g}" + (f" ± {error:.2g}" if not math.isnan(error) else ""))


def evaluate_suites(
    checkpoint: str | None,
    sources: Sequence[str],
    *,
    options: PromptOptions,
    check: str,
    suite_path: Path | None,
    plain: bool,
    template_options: Sequence[str],
    untrained: bool,
    samples: int,
    max_rows: int | None,
    sampling: SamplingConfig,
    seed: int,
    dtype: str | None,
    output: Path | None,
) -> None:
    """Measure suites, print their metrics, and write what the model made of each question: `results_file`.

    The arguments are the flags of experiments/evaluate.py.
    """
    tasks = [source.removeprefix(PREFIX) for source in sources if source.startswith(PREFIX)]
    files = [source for source in sources if not source.startswith(PREFIX)]
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"--suite={PREFIX}{tasks[0]} needs lm-eval: pip install 'jaxllm[eval]'")
    load_reward(check)
    suites = read_suites(files, options, check=check, max_rows=max_rows, seed=seed)
    loaded = load_checkpoint(checkpoint, local_mesh, dtype=inference_dtype(dtype), untrained=untrained)
    check_generates(loaded, f"--checkpoint={checkpoint}")
    template = suite_template(loaded, plain, template_options)
    model = SuiteModel(loaded, template, sampling=sampling, samples=samples, seed=seed)
    for name, row, results in itertools.chain(
        ((suite.name, metrics(found := model.measure(suite)), found) for suite in suites),
        task_results(model, tasks, suite_path, max_rows),
    ):
        if not is_first():
            continue
        print(f"{name}: {len(results):,} questions")
        print_metrics(row, f"{name}/")
        file = results_file(loaded.folder, name, untrained, output)
        if file is not None and results:
            if file.exists() and (before := len(file.read_bytes().splitlines())) != len(results):
                print(
                    f"note: {name}: replaces the results of {before:,} questions; --output=FOLDER keeps both"
                )
            write_results(file, results)
            print(f"{name}: results in {file}")


def task_results(
    model: SuiteModel, tasks: Sequence[str], path: Path | None, limit: int | None
) -> Iterable[TaskResult]:
    """`measure_tasks`, which imports lm-eval where there are tasks alone."""
    if not tasks:
        return ()
    from jaxllm.evaluation.lm_eval_tasks import measure_tasks

    return measure_tasks(model, tasks, path, limit)


def results_file(folder: Path, suite: str, untrained: bool, output: Path | None) -> Path | None:
    """Where the results of a suite go: `output`/NAME.jsonl, or for the step folder of a run
    RUN/suites/NAME/STEP.jsonl, where reports find it; None for any other checkpoint."""
    if output is not None:
        return output / f"{suite}.jsonl"
    if folder.parent.name != "checkpoints":
        return None
    return folder.parents[1] / "suites" / suite / f"{0 if untrained else folder.name}.jsonl"
