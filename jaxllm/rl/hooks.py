"""Evaluation and samples while a policy trains by reinforcement: held-out prompts, and its own rollouts."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxllm.data.loader import shares
from jaxllm.data.prompts import Prompt
from jaxllm.data.rows import Rows
from jaxllm.data.show import show_mask
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.evaluation.completions import ScoredCompletions, completion_metrics, completion_rows
from jaxllm.evaluation.suite_hook import suite_hooks
from jaxllm.files import write_text
from jaxllm.parallel.processes import is_first
from jaxllm.random_streams import EVALUATION, SAMPLED_EVALUATION, SAMPLES, stream
from jaxllm.rl.config import RolloutTrainConfig
from jaxllm.rl.rollouts import Rollout, RolloutSource
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.runs.context import RunContext
from jaxllm.runs.hooks import write_samples
from jaxllm.training.loop import Hook
from jaxllm.training.state import TrainState


def make_hooks(context: RunContext[Any, Any]) -> list[Hook]:
    """Evaluation on held-out prompts and on suites; samples, and the last rollout as a table."""
    source = context.source
    assert isinstance(source, RolloutSource)
    suites = suite_hooks(context, source.algorithm.policy)
    return [*evaluation_hooks(context, source), *suites, samples_hook(context, source)]


def evaluation_hooks(context: RunContext[Any, Any], source: RolloutSource) -> list[Hook]:
    """Rewards of completions of the held-out prompts, if there are any: one each as `sample.sampling` says,
    and `sample.group_size` as in a rollout. The first are written to `evals/STEP.jsonl`."""
    config: RolloutTrainConfig = context.program.config
    sources = context.data.validation[: config.evaluation.num_sources]
    held_out = held_out_prompts(sources, config.evaluation.max_rows)
    if not held_out:
        return []

    def run(step: int, state: TrainState) -> dict[str, float]:
        def complete(group_size: int, sampling: SamplingConfig, purpose: int) -> ScoredCompletions:
            key = stream(state.key, purpose, step)
            return source.completer(
                source.algorithm.policy(state.params),
                held_out,
                group_size=group_size,
                sampling=sampling,
                keys=jax.random.split(key, len(held_out) * group_size),
                check=context.own_check,
            )

        completions = complete(1, config.sample.sampling, EVALUATION)
        lines = [
            json.dumps({"prompt": show_mask(prompt.ids, [True] * len(prompt.ids), context.tokenizer), **row})
            for prompt, row in zip(held_out, completion_rows(completions), strict=True)
        ]
        if is_first():
            write_text(context.folder.file("evals", f"{step}.jsonl"), "".join(f"{line}\n" for line in lines))
        row = completion_metrics(completions, 1, "eval/")
        if config.sample.group_size:
            sampled = complete(config.sample.group_size, config.rollout.sampling, SAMPLED_EVALUATION)
            row |= completion_metrics(sampled, config.sample.group_size, "eval/sampled_")
        return row

    return [Hook(config.training.evaluate_every, run)]


def held_out_prompts(sources: Sequence[Rows[Prompt]], max_rows: int | None) -> list[Prompt]:
    """The first prompts of every source, at most about `max_rows` of them."""
    counts = shares([len(rows) for rows in sources], max_rows)
    return [rows[i] for rows, count in zip(sources, counts, strict=True) for i in range(count)]


def samples_hook(context: RunContext[Any, Any], source: RolloutSource) -> Hook:
    """The last rollout as a table, and completions of `sample.prompts`, into `samples/STEP.txt`."""
    config, template, tokenizer = context.program.config, context.template, context.tokenizer
    prompts = [template.prompt([{"role": "user", "content": text}]) for text in config.sample.prompts]

    def run(step: int, state: TrainState) -> dict[str, float]:
        texts = []
        if prompts:
            completions = source.completer.complete(
                source.algorithm.policy(state.params),
                prompts,
                group_size=1,
                sampling=config.sample.sampling,
                keys=jax.random.split(stream(state.key, SAMPLES, step), len(prompts)),
                check=context.own_check,
            )
            texts = [
                f"{show_mask(prompt, [True] * len(prompt), tokenizer)}\n{tokenizer.decode(tokens)}"
                for prompt, tokens in zip(prompts, completions.tokens, strict=True)
            ]
        if source.last is not None:
            texts = rollout_tables(*source.last, config.rollout.group_size, tokenizer) + texts
        elif step:
            tqdm.write(
                f"step {step}: samples/ has no table of its rollout, after which the run was interrupted"
            )
        if texts:
            write_samples(context.folder, step, texts, width=160)
        return {}

    return Hook(config.training.sample_every, run)


def rollout_tables(
    rollout: Rollout, advantages: np.ndarray, group_size: int, tokenizer: BaseTokenizer
) -> list[str]:
    """A text for every prompt of a rollout: each completion with its reward and its advantage."""
    if advantages.ndim == 2:  # one a token: their mean over the completion
        counted = np.maximum(rollout.mask.sum(1), 1)
        advantages = np.where(rollout.mask, advantages, 0).sum(1) / counted
    tables = []
    for first in range(0, len(rollout.texts), group_size):
        lines = [tokenizer.decode(rollout.prompts[first].ids), "  reward  advantage  tokens  completion"]
        for i in range(first, first + group_size):
            text = " ".join(rollout.texts[i].split()) + (" [truncated]" if rollout.truncated[i] else "")
            lines.append(f"{rollout.rewards[i]:8.3g} {advantages[i]:10.3g} {rollout.lengths[i]:7}  {text}")
        tables.append("\n".join(lines))
    return tables
