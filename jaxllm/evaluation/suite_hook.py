"""Suites measured while a run trains, every `evaluation.suites_every` steps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxllm.errors import ConfigError, DataError
from jaxllm.evaluation.suite_model import GREEDY, SuiteModel
from jaxllm.evaluation.suites import METRICS, SUITES, metrics, read_suites, write_results
from jaxllm.models import Params, build_model
from jaxllm.parallel.processes import is_first
from jaxllm.runs.checkpoints import LoadedModel, ModelKind
from jaxllm.runs.config import TrainConfig
from jaxllm.runs.context import RunContext
from jaxllm.runs.sampling_weights import SamplingWeights
from jaxllm.training.loop import Hook
from jaxllm.training.state import TrainState


def check_suites(config: TrainConfig) -> None:
    """Raise DataError or ConfigError for suites that cannot be measured; before anything is compiled."""
    try:
        suites, room = read_suites(config.evaluation.suites), config.model.max_length
    except DataError as error:
        raise DataError(f"evaluation.suites: {error}") from None
    if suites and config.evaluation.suites_every == 0:
        raise ConfigError("evaluation.suites_every=0 would never measure evaluation.suites: use 1 or more")
    best = config.checkpoint
    if best.best_metric is not None and best.best_metric.startswith(SUITES):
        name = best.best_metric.rpartition("/")[2]
        goal = METRICS[name][1] if name in METRICS else "highest"  # pass@2, ...
        if best.best_is != goal:
            raise ConfigError(
                f"checkpoint.best_is={best.best_is}, but the {goal} {best.best_metric} is best: set "
                f"checkpoint.best_is={goal}"
            )
    if any(suite.kind == "answer" for suite in suites) and config.evaluation.max_new_tokens >= room:
        raise ConfigError(
            f"evaluation.max_new_tokens={config.evaluation.max_new_tokens} leaves no room for a prompt in "
            f"model.max_length={room}: lower it"
        )


def suite_hooks(
    context: RunContext[Any, Any], policy: Callable[[Params], Params] = lambda params: params
) -> list[Hook]:
    """The hook that measures the config's suites, with greedy completions; none where it names none.

    `policy`: of the parameters those of the model that generates.
    """
    program, config = context.program, context.program.config.evaluation
    if not (suites := read_suites(config.suites)):
        return []
    sampling = replace(GREEDY, max_new_tokens=config.max_new_tokens)
    abstract = policy(program.abstract_state.params)
    model = SuiteModel(
        LoadedModel(
            folder=context.folder.path,
            kind=ModelKind(generates=True, conversational=False, policy_prefix=""),  # not read
            model=build_model(program.config.model),
            params=abstract,
            mesh=program.mesh,
            tokenizer=context.tokenizer,
            metadata={},
        ),
        context.template,
        sampling=sampling,
        weights=SamplingWeights(abstract, program.mesh, dtype=None, replicate=False),
        check=context.check,
        own_check=context.own_check,
    )

    def run(step: int, state: TrainState) -> dict[str, float]:
        row = {}
        for suite in suites:
            results = model.with_params(policy(state.params)).measure(suite)
            if is_first():
                write_results(context.folder.file("suites", suite.name, f"{step}.jsonl"), results)
            row |= {f"{SUITES}{suite.name}/{name}": x for name, x in metrics(results).items()}
        return row

    every = program.config.training.evaluate_every if config.suites_every is None else config.suites_every
    return [Hook(every, run)]
