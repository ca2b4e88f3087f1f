"""Completions of the same held-out prompts by every model of a pipeline."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from jaxllm.data.chat import opening
from jaxllm.data.chat_template import ChatTemplate, PlainTextTemplate
from jaxllm.data.held_out import read_keys, text_key
from jaxllm.data.prompts import Prompt, PromptOptions, question_messages
from jaxllm.evaluation.completions import (
    complete_prompts,
    completion_rows,
    kl_to,
    read_prompts,
)
from jaxllm.files import write_text
from jaxllm.pipeline.config import GatesConfig
from jaxllm.rewards.pool import json_value
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.runs.checkpoints import check_generates, checkpoint_template, load_checkpoint, local_mesh

# A row's `prompt` as it is.
AS_IT_IS = cast(PromptOptions, SimpleNamespace(rename=(), prompt_format=None, system=None))

HELD_OUT = "held_out.jsonl"  # in the pipeline's folder: see pipeline/held_out.py

RUBRIC = ("jaxllm.toy_world.rubric", "jaxllm.toy_world.correct")

# Each model with what the report says of it. Those that only continue text get the bare prompt.
SHOWN = (
    ("random", "pretrain", "random weights: it babbles"),
    ("pretrain", "pretrain", "pretrained: it continues"),
    ("sft", "sft", "instruction fine-tuned: it answers"),
    ("ppo", "ppo", "PPO: the answer that the reward model prefers"),
    ("dpo", "dpo", "DPO: the answer that people chose"),
    ("grpo", "grpo", "GRPO: reasoning that was checked"),
)


class PipelineCompletions:
    """One completion of each held-out prompt, by any model. They are kept in WORKDIR/answers."""

    def __init__(self, config: GatesConfig, folder: Path, seed: int):
        self.config, self.folder, self.seed = config, folder, seed
        (folder / "answers").mkdir(exist_ok=True)

    def of(
        self,
        stage: str,
        *,
        temperature: float = 1.0,
        plain: bool = False,
        reference: str | None = None,
        scored_by_model: bool = False,
    ) -> list[dict[str, Any]]:
        """A row a completion: the prompt's, with `completion`, `rewards` by name and, to `reference`, `kl`.

        Rows with references are scored by the rubric, and all by the reward model if `scored_by_model`.
        `plain` prompts have no chat template.
        """
        loaded = check_generates(load_checkpoint(self.folder / stage, local_mesh), stage)
        template = PlainTextTemplate(loaded.tokenizer) if plain else checkpoint_template(loaded)
        sampling = unfiltered(temperature, self.config.max_new_tokens)
        prompts = self.prompts(template, loaded.model.config.max_length - sampling.max_new_tokens)
        completions = complete_prompts(
            loaded,
            template,
            prompts,
            functions=RUBRIC if has_references([prompt.row for prompt in prompts]) else (),
            reward_model=str(self.folder / "reward_model") if scored_by_model else None,
            samples=1,
            sampling=sampling,
            seed=self.seed,
        )
        kl = None
        if reference is not None:
            kl = kl_to(load_checkpoint(self.folder / reference, local_mesh), completions, temperature)
        rows = [
            {**prompt.row, **row}
            for prompt, row in zip(prompts, completion_rows(completions, kl), strict=True)
        ]
        name = f"{stage}_{temperature:g}{'_plain' if plain else ''}.jsonl"
        lines = [json.dumps(row, default=json_value) + "\n" for row in rows]
        write_text(self.folder / "answers" / name, "".join(lines))
        return rows

    def prompts(self, template: ChatTemplate, longest: int) -> list[Prompt]:
        """The held-out prompts, as many as are wanted from each source. None of them was trained on."""
        count = self.config.rows_of_each_source
        found = [
            read_prompts(name, AS_IT_IS, template, longest=longest, max_rows=count, seed=self.seed)
            for name in self.config.prompts
        ]
        prompts = [prompt for part in found for prompt in part]
        file = self.folder / HELD_OUT
        if not file.exists():  # a pipeline of an earlier version
            return prompts
        held_out = read_keys([str(file)], synthetic_rows=1, seed=0)
        kept = [
            each
            for each in prompts
            if text_key(opening(question_messages(each.row, AS_IT_IS)[1])) in held_out
        ]
        if len(kept) < len(prompts):
            print(f"{len(prompts) - len(kept)} rows of gates.prompts are not in {file}: not completed")
        return kept


def unfiltered(temperature: float, max_new_tokens: int) -> SamplingConfig:
    """The model's own distribution but for the temperature."""
    return SamplingConfig(temperature, top_k=None, top_p=None, min_p=None, max_new_tokens=max_new_tokens)


def has_references(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all rows have the `reference` by which the rubric scores completions."""
    needed = {"answer", "key", "rivals"}
    references = [row.get("reference") for row in rows]
    return all(isinstance(each, dict) and needed <= each.keys() for each in references)


def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """A reward of each row; NaN where it does not apply."""
    return np.array([row["rewards"][name] for row in rows], float)


def complete_by_all(config: GatesConfig, folder: Path, seed: int) -> dict[str, Any]:
    """Completions of `gates.shown` by every model, for the report."""
    shown = []
    for name, stage, kind in SHOWN:
        continues = stage == "pretrain"
        loaded = load_checkpoint(folder / stage, local_mesh, untrained=name == "random")
        template = PlainTextTemplate(loaded.tokenizer) if continues else checkpoint_template(loaded)
        prompts = [Prompt(template.prompt([{"role": "user", "content": text}]), {}) for text in config.shown]
        completions = complete_prompts(
            loaded,
            template,
            prompts,
            functions=(),
            reward_model=None,
            samples=1,
            # Greedy continuations of text repeat themselves; a greedy answer is the model's best.
            sampling=unfiltered(0.8 if continues else 0.0, config.max_new_tokens),
            seed=seed,
        )
        shown.append({"name": name, "kind": kind, "texts": [text.strip() for text in completions.texts]})
    return {"prompts": list(config.shown), "answers": shown}
