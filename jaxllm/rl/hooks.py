"""What is looked at while a policy learns by reinforcement: held-out prompts, samples, its own rollouts."""

import json
from collections.abc import Callable

import jax
import numpy as np

from jaxllm.evaluation.completions import Answers, answer_metrics, answer_rows
from jaxllm.runs.program import Program
from jaxllm.rl.rollouts import Rollout, Rollouts
from jaxllm.runs.train import write_samples
from jaxllm.data.rows import Dataset
from jaxllm.data.show import show_mask
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.training.loop import Hook
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import TrainState


def make_hooks(
    program: Program,
    data: Dataset,
    tokenizer: BaseTokenizer,
    folder: RunFolder,
    check: Callable[[], None],
    feed: Rollouts,
) -> list[Hook]:
    """Evaluation on held-out prompts; samples, and the last rollout as a table."""
    config = program.config
    held_out = [rows[i] for rows in data.validation for i in range(len(rows))][: config.evaluation.max_rows]
    prompts = [data.template.prompt([{"role": "user", "content": text}]) for text in config.sample.prompts]

    def evaluate(step: int, state: TrainState) -> dict[str, float]:
        def ask(group_size: int, sampling: SamplingConfig) -> Answers:
            key = jax.random.fold_in(jax.random.fold_in(state.key, step), group_size)
            return feed.answer(
                feed.policy(state.params),
                held_out,
                group_size=group_size,
                sampling=sampling,
                keys=jax.random.split(key, len(held_out) * group_size),
                check=check,
            )

        answers = ask(1, config.sample.sampling)
        lines = [
            json.dumps({"prompt": show_mask(prompt.ids, [True] * len(prompt.ids), tokenizer), **row})
            for prompt, row in zip(held_out, answer_rows(answers), strict=True)
        ]
        folder.file("evals", f"{step}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        row = answer_metrics(answers, 1, "eval/")
        if config.sample.group_size:
            sampled = ask(config.sample.group_size, config.rollout.sampling)
            row |= answer_metrics(sampled, config.sample.group_size, "eval/sampled_")
        return row

    def show(step: int, state: TrainState) -> dict[str, float]:
        texts = []
        if prompts:
            said = feed.answer.sample(
                feed.policy(state.params),
                prompts,
                group_size=1,
                sampling=config.sample.sampling,
                stop_ids=data.template.stop_ids,
                keys=jax.random.split(jax.random.fold_in(state.key, step), len(prompts)),
                check=check,
            )
            texts = [
                f"{show_mask(prompt, [True] * len(prompt), tokenizer)}\n{tokenizer.decode(tokens)}"
                for prompt, tokens in zip(prompts, said.tokens, strict=True)
            ]
        if feed.last is not None:
            texts = rollout_tables(*feed.last, feed.config.group_size, tokenizer) + texts
        if texts:
            write_samples(folder, step, texts, width=160)
        return {}

    evaluation = [Hook(config.training.evaluate_every, evaluate)] if held_out else []
    return [*evaluation, Hook(config.training.sample_every, show)]


def rollout_tables(
    rollout: Rollout, advantages: np.ndarray, group_size: int, tokenizer: BaseTokenizer
) -> list[str]:
    """A text for every prompt of a rollout: each answer with its reward and its advantage."""
    if advantages.ndim == 2:  # one a token: their mean over the answer
        counted = np.maximum(rollout.mask.sum(1), 1)
        advantages = np.where(rollout.mask, advantages, 0).sum(1) / counted
    tables = []
    for first in range(0, len(rollout.texts), group_size):
        lines = [tokenizer.decode(rollout.num_prompts[first].ids), "  reward  advantage  tokens  answer"]
        for i in range(first, first + group_size):
            text = " ".join(rollout.texts[i].split()) + (" [cut]" if rollout.truncated[i] else "")
            lines.append(f"{rollout.rewards[i]:8.3g} {advantages[i]:10.3g} {rollout.lengths[i]:7}  {text}")
        tables.append("\n".join(lines))
    return tables
