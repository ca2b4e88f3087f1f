"""Tasks of EleutherAI's lm-eval (the extra `eval`), with a model of ours as its `LM`."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.base_tokenizer import BaseTokenizer
from jaxllm.data.chat_template import PlainTextTemplate
from jaxllm.data.prompts import Prompt
from jaxllm.errors import ConfigError
from jaxllm.evaluation.suite_model import SuiteModel, encode_pair, windows
from jaxllm.evaluation.suites import Result, Score, TaskResult

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
except ImportError:
    LM: Any = object

DEFAULT_TOKENS = 256  # of a completion, where the task gives no `max_gen_toks`


class JaxLM(LM):  # pyright: ignore[reportGeneralTypeIssues]
    """A SuiteModel as lm-eval calls it. Every text begins with BOS, as with `add_bos_token=True` of hf."""

    def __init__(self, model: SuiteModel):
        super().__init__()
        self.model = model

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log-prob in nats, whether greedy decoding gives it) of each (context, continuation)."""
        tokenizer = self.model.loaded.tokenizer
        found = self.model.score([encode_pair(tokenizer, *each.args) for each in requests], "lm-eval")
        return list(zip(found.log_probs.tolist(), found.greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-prob in nats of each whole text, in windows of the model's length."""
        tokenizer, length = self.model.loaded.tokenizer, self.model.length
        texts = [tokenizer.encode_markup(request.args[0]) for request in requests]
        parts = [list(windows(ids, tokenizer.bos_id, length)) for ids in texts]
        found = iter(self.model.score([each for part in parts for each in part], "lm-eval").log_probs)
        return [float(sum(next(found) for _ in part)) for part in parts]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """A completion of each context, up to its stop token or the first of the texts `until`."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(i)
        for group in groups.values():
            options = requests[group[0]].args[1]
            prompts = [
                Prompt(list(encode_pair(self.model.loaded.tokenizer, requests[i].args[0], "").context), {})
                for i in group
            ]
            completions = self.model.generate("lm-eval", prompts, self._sampling(options))
            for i, text in zip(group, completions.texts, strict=True):
                texts[i] = before(text, options.get("until") or ())
        return texts

    def _sampling(self, options: Mapping[str, Any]) -> Any:
        greedy = not options.get("do_sample") or not options.get("temperature", 1.0)
        return replace(
            self.model.sampling,
            temperature=0.0 if greedy else float(options.get("temperature", 1.0)),
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
            max_new_tokens=int(options.get("max_gen_toks", DEFAULT_TOKENS)),
        )

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation as text, in which special tokens stand by name."""
        if not add_generation_prompt:
            raise ConfigError("lm-eval tasks with a `gen_prefix` are not supported with a chat template")
        return markup(self.model.loaded.tokenizer, self.model.template.prompt(chat_history))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What lm-eval records of the template."""
        return self.model.template.source or ""

    @property
    def tokenizer_name(self) -> str:
        return self.model.loaded.tokenizer.hash


def markup(tokenizer: BaseTokenizer, ids: Sequence[int]) -> str:
    """The text that `encode_markup` reads as these ids."""
    special = {number: name for name, number in tokenizer.special_ids.items()}
    runs = itertools.groupby(ids, key=special.get)
    return "".join(name * len(list(run)) if name else tokenizer.decode(run) for name, run in runs)


def before(text: str, until: str | Sequence[str]) -> str:
    """The text before the first of the texts `until`."""
    for stop in [until] if isinstance(until, str) else until:
        text = text.partition(stop)[0] if stop else text
    return text


def measure_tasks(
    model: SuiteModel, tasks: Sequence[str], path: Path | None, limit: int | None
) -> Iterator[TaskResult]:
    """What lm-eval measures on tasks of its own, or of the YAML files in the folder `path`; of each on the
    first `limit` documents. Raises ConfigError for a task that it does not know."""
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=None if path is None else str(path))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(
            f"--suite=lm_eval:{unknown[0]}: no such task; --suite_path=FOLDER has YAML files of others"
        )
    found = simple_evaluate(
        model=JaxLM(model),
        tasks=list(tasks),
        limit=limit,
        apply_chat_template=not isinstance(model.template, PlainTextTemplate),
        task_manager=manager,
        bootstrap_iters=0 if limit == 1 else 1000,
    )
    for name, values in found["results"].items():
        samples = found["samples"].get(name, [])
        yield TaskResult(name, task_metrics(values), [sample_result(sample) for sample in samples])


def task_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's `acc,none` and `acc_stderr,none` as `acc` and `acc_se`; another filter than none stays."""
    row = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float):
            error = metric.endswith("_stderr")
            name = metric.removesuffix("_stderr") + ("" if chosen == "none" else f"_{chosen}")
            row[name + "_se" * error] = float(value)
    return row


def sample_result(sample: Mapping[str, Any]) -> Result:
    """The scores of one document that are numbers."""
    scores: dict[str, Score] = {
        name: float(sample[name])
        for name in sample.get("metrics", ())
        if isinstance(sample[name], int | float | np.number)
    }
    return Result(str(sample["doc_hash"]), scores, {"responses": sample.get("filtered_resps")})
