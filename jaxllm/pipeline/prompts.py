"""The models of a pipeline asked the same things, to compare what they say."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxllm.evaluation.completions import (
    PlainText,
    answer_prompts,
    answer_rows,
    check_speaks,
    kl_to,
    read_prompts,
)
from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint
from jaxllm.pipeline.config import GatesConfig
from jaxllm.data.prompts import Prompt
from jaxllm.rollout.sampling import SamplingConfig

QUESTION = SimpleNamespace(rename=(), prompt_format=None, system=None)  # a row's `prompt` as it stands

RUBRIC = ("jaxllm.toy_world.rubric", "jaxllm.toy_world.correct")

# How each model is shown: those that only continue text are given the bare prompt.
SHOWN = (
    ("random", "pretrain", "random weights: it babbles"),
    ("pretrain", "pretrain", "pretrained: it continues"),
    ("sft", "sft", "instruction fine-tuned: it answers"),
    ("ppo", "ppo", "PPO: the answer that the reward model likes"),
    ("dpo", "dpo", "DPO: the answer that people chose"),
    ("grpo", "grpo", "GRPO: reasoning that was checked"),
)


class Asking:
    """Held-out prompts, one answer each. What was said is kept in WORKDIR/answers."""

    def __init__(self, config: GatesConfig, folder: Path, seed: int):
        self.config, self.folder, self.seed = config, folder, seed
        (folder / "answers").mkdir(exist_ok=True)

    def ask(
        self,
        stage: str,
        *,
        temperature: float = 1.0,
        plain: bool = False,
        reference: str | None = None,
        judged: bool = False,
    ) -> list[dict[str, Any]]:
        """A row an answer: the prompt's, with `completion`, `rewards` by name and, to `reference`, `kl`.

        Rows with references are judged by the rubric, and all by the reward model if `judged`. `plain`
        prompts have no chat template.
        """
        loaded = check_speaks(load_checkpoint(str(self.folder / stage)), stage)
        template = PlainText(loaded.tokenizer) if plain else checkpoint_template(loaded)
        sampling = unfiltered(temperature, self.config.max_new_tokens)
        prompts = self.prompts(template, loaded.model.config.max_length - sampling.max_new_tokens)
        answers = answer_prompts(
            loaded,
            template,
            prompts,
            functions=RUBRIC if has_references([prompt.row for prompt in prompts]) else (),
            reward_model=str(self.folder / "reward_model") if judged else None,
            samples=1,
            sampling=sampling,
            seed=self.seed,
        )
        kl = None
        if reference is not None:
            kl = kl_to(load_checkpoint(str(self.folder / reference)), answers, temperature)
        rows = [{**prompt.row, **row} for prompt, row in zip(prompts, answer_rows(answers, kl), strict=True)]
        name = f"{stage}_{temperature:g}{'_plain' if plain else ''}.jsonl"
        (self.folder / "answers" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def prompts(self, template: Any, longest: int) -> list[Prompt]:
        """The held-out prompts, as many as are wanted from each source."""
        count = -(-self.config.max_rows // len(self.config.prompts))
        found = [
            read_prompts(name, QUESTION, template, longest=longest, max_rows=count, seed=self.seed)
            for name in self.config.prompts
        ]
        return [prompt for part in found for prompt in part]


def unfiltered(temperature: float, max_new_tokens: int) -> SamplingConfig:
    """The model's own distribution but for the temperature."""
    return SamplingConfig(temperature, top_k=None, top_p=None, min_p=None, max_new_tokens=max_new_tokens)


def has_references(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all rows of prompts bring what the rubric judges answers by."""
    needed = {"answer", "key", "rivals"}
    references = [row.get("reference") for row in rows]
    return all(isinstance(each, dict) and needed <= each.keys() for each in references)


def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """What a reward says of each row; NaN where it does not apply."""
    return np.array([row["rewards"][name] for row in rows], float)


def show_all(config: GatesConfig, folder: Path, seed: int) -> dict[str, Any]:
    """The same prompts put to every model."""
    shown = []
    for name, stage, kind in SHOWN:
        continues = stage == "pretrain"
        loaded = load_checkpoint(str(folder / stage), untrained=name == "random")
        template = PlainText(loaded.tokenizer) if continues else checkpoint_template(loaded)
        prompts = [Prompt(template.prompt([{"role": "user", "content": text}]), {}) for text in config.shown]
        answers = answer_prompts(
            loaded,
            template,
            prompts,
            functions=(),
            reward_model=None,
            samples=1,
            # The likeliest continuation of a text repeats itself; the likeliest answer is the model's best.
            sampling=unfiltered(0.8 if continues else 0.0, config.max_new_tokens),
            seed=seed,
        )
        shown.append({"name": name, "kind": kind, "texts": [text.strip() for text in answers.texts]})
    return {"prompts": list(config.shown), "answers": shown}
