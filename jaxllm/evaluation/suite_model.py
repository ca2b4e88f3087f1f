"""A model as evaluation suites use it: log-probs of given continuations, and checked completions."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxllm.batches import TokenBatch
from jaxllm.data.chat import last_span_start
from jaxllm.data.chat_template import ChatTemplate, PlainTextTemplate
from jaxllm.data.preferences import encode_completion
from jaxllm.data.prompts import Prompt
from jaxllm.data.sources import BadRow
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import ConfigError, DataError
from jaxllm.evaluation.completions import ScoredCompletions, complete_prompts
from jaxllm.evaluation.pass_at_k import pass_at_k
from jaxllm.evaluation.perplexity import row_sums
from jaxllm.evaluation.suites import Question, Result, Score, Suite
from jaxllm.models import Params
from jaxllm.rollout.collect import bucket
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.rollout.score import InBatches
from jaxllm.runs.checkpoints import LoadedModel, checkpoint_template
from jaxllm.runs.sampling_weights import SamplingWeights

BATCH_TOKENS = 2**15  # scored at a time
GREEDY = SamplingConfig(temperature=0.0, top_k=None, top_p=None, min_p=None, max_new_tokens=64)
BATCHES = 8  # between two calls of `check`


class Request(NamedTuple):
    """A continuation to score, and what it continues: token ids, neither of them empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Continuations(NamedTuple):
    """Of N continuations."""

    log_probs: np.ndarray  # float64 [N], in nats
    greedy: np.ndarray  # bool [N], whether greedy decoding gives it


class SuiteModel:
    """The model, with what is fixed for all suites. Programs compile once for each length of questions."""

    def __init__(
        self,
        loaded: LoadedModel,
        template: ChatTemplate,
        *,
        sampling: SamplingConfig = GREEDY,
        samples: int = 1,
        seed: int = 0,
        weights: SamplingWeights | None = None,
        check: Callable[[], None] = lambda: None,
        own_check: Callable[[], None] = lambda: None,
    ):
        """`samples` completions of each prompt. `template`: a PlainTextTemplate continues prompts as text.
        `weights` as in `Completer`; `check` and `own_check` as in RunContext."""
        self.loaded, self.template, self.sampling, self.samples = loaded, template, sampling, samples
        self.seed, self.weights, self.check, self.own_check = seed, weights, check, own_check
        self.length: int = loaded.model.config.max_length
        self.in_batches = functools.cache(self._in_batches)
        self.said: set[str] = set()

    def measure(self, suite: Suite) -> list[Result]:
        """What the model makes of each question. Raises DataError for a question that its template cannot
        render."""
        measure = {"choices": self._choices, "text": self._texts, "answer": self._answers}[suite.kind]
        return measure(suite)

    def with_params(self, params: Params) -> "SuiteModel":
        """The same with other parameters, and what is compiled."""
        self.loaded = self.loaded._replace(params=params)
        return self

    def score(self, requests: Sequence[Request], name: str) -> Continuations:
        """Log-probs of continuations. What is longer than the model reads loses its beginning, which is said
        of the suite `name`."""
        ends = np.array([len(r.context) + len(r.continuation) - 1 for r in requests])
        self._say_cut(name, int((ends > self.length).sum()), len(requests), self.length)
        ends = np.minimum(ends, self.length)  # tokens that the model reads
        length = min(self.length, bucket(int(ends.max())))
        scorer, order = self.in_batches(length), np.argsort(-ends, kind="stable")
        sums = np.zeros((len(requests), 2))
        chunks = np.split(order, range(scorer.rows * BATCHES, len(order), scorer.rows * BATCHES))
        for chunk in tqdm(chunks, desc=name, leave=False, disable=None):
            self.check()
            tokens = np.zeros((2, len(chunk), length), np.int32)
            for i, number in enumerate(chunk):
                ids = [*requests[number].context, *requests[number].continuation][-ends[number] - 1 :]
                tokens[:, i, : ends[number]] = ids[:-1], ids[1:]
            counts = np.array([len(requests[number].continuation) for number in chunk])
            columns = (*tokens, np.maximum(ends[chunk] - counts, 0), ends[chunk])
            sums[chunk] = scorer(self.loaded.params, ends[chunk], *columns)[:, :2]
        return Continuations(-sums[:, 0], sums[:, 1] == 0)

    def generate(
        self,
        name: str,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        check: str | None = None,
        samples: int = 1,
    ) -> ScoredCompletions:
        """`samples` completions of each prompt, scored by the reward function `check`. What leaves no room
        for `max_new_tokens` loses its beginning, which is said of the suite `name`."""
        room = self.length - sampling.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"sampling.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in "
                f"model.max_length={self.length}: lower it"
            )
        self._say_cut(name, sum(len(prompt.ids) > room for prompt in prompts), len(prompts), room)
        return complete_prompts(
            self.loaded,
            self.template,
            [Prompt(prompt.ids[-room:], prompt.row) for prompt in prompts],
            functions=[] if check is None else [check],
            reward_model=None,
            samples=samples,
            sampling=sampling,
            seed=self.seed,
            weights=self.weights,
            check=self.own_check,
        )

    def _in_batches(self, length: int) -> InBatches:
        """(params, lengths, tokens, targets, starts, ends) -> [N, 2]: nats, and targets that are not the most
        likely token, of targets[:, start:end]."""
        model = self.loaded.model
        no_bytes = np.zeros(model.config.vocab_size, np.int32)

        def sums(
            params: Params, tokens: jax.Array, targets: jax.Array, starts: jax.Array, ends: jax.Array
        ) -> jax.Array:
            at = jnp.arange(tokens.shape[1])
            mask = (at >= starts[:, None]) & (at < ends[:, None])
            found = row_sums(params, TokenBatch(tokens, targets, mask, None, None), no_bytes, model=model)
            return jnp.stack([found.nats, found.tokens - found.correct], axis=1)

        rows = max(1, min(64, BATCH_TOKENS // length))
        return InBatches(sums, rows, length, self.loaded.mesh)

    # Suites

    def _choices(self, suite: Suite) -> list[Result]:
        requests = []
        for question in suite.questions:
            own = list(self._choice_requests(question))
            if (longest := max(len(request.continuation) for request in own)) > self.length:
                raise DataError(
                    f"{question.where}: a choice has {longest} tokens, more than max_length={self.length}"
                )
            requests += own
        found = iter(self.score(requests, suite.name).log_probs)
        results = []
        for question in suite.questions:
            log_probs = np.array([next(found) for _ in question.choices])
            per_byte = log_probs / [len(choice.encode()) for choice in question.choices]
            picked = [int(np.argmax(values)) for values in (log_probs, per_byte)]
            scores: dict[str, Score] = {
                name: float(pick == question.answer)
                for name, pick in zip(("accuracy", "accuracy_normalized"), picked, strict=True)
            }
            details = {"answer": question.answer, "picked": picked, "log_probs": log_probs.tolist()}
            results.append(Result(question.id, scores, details))
        return results

    def _choice_requests(self, question: Question) -> Iterator[Request]:
        """In a chat, a choice is the whole completion, with the token that ends it; as plain text it follows
        the prompt after a space, unless one of them has white space there."""
        if not isinstance(self.template, PlainTextTemplate):
            for choice in question.choices:
                completion = {"role": "assistant", "content": choice}
                try:
                    ids, mask = encode_completion(self.template, question.messages, completion)
                except BadRow as error:
                    raise DataError(f"{question.where}: {error}") from None
                start = last_span_start(mask)
                yield Request(ids[:start], ids[start:])
            return
        prompt = plain_text(question)
        for choice in question.choices:
            space = "" if not prompt or prompt[-1].isspace() or choice[0].isspace() else " "
            yield encode_pair(self.loaded.tokenizer, prompt, space + choice)

    def _texts(self, suite: Suite) -> list[Result]:
        """Bits per byte of each text with the token that ends it, as in pretraining's evaluation."""
        tokenizer = self.loaded.tokenizer
        texts = tokenizer.encode_batch([question.text for question in suite.questions])
        parts = [list(windows([*ids, tokenizer.eos_id], tokenizer.bos_id, self.length)) for ids in texts]
        log_probs = self.score([request for part in parts for request in part], suite.name).log_probs
        nats = -np.add.reduceat(log_probs, np.cumsum([0, *map(len, parts)])[:-1])
        return [
            Result(
                question.id,
                {"bits_per_byte": (float(total / np.log(2)), float(len(question.text.encode())))},
                {"tokens": len(ids) + 1},
            )
            for question, ids, total in zip(suite.questions, texts, nats, strict=True)
        ]

    def _answers(self, suite: Suite) -> list[Result]:
        """Completions, checked by the suite's reward function: one that it gives 1 is right."""
        prompts, n = [self._prompt(question) for question in suite.questions], self.samples
        completions = self.generate(suite.name, prompts, self.sampling, check=suite.check, samples=n)
        (rewards,) = completions.scores.by_name.values()
        rewards = rewards.reshape(-1, n)
        known, right = ~np.isnan(rewards), rewards == 1
        ks = [1 << i for i in range(n.bit_length())]
        columns = {"exact_match" if k == 1 else f"pass@{k}": pass_at_k(right, k, known=known) for k in ks}
        return [
            Result(
                question.id,
                {name: None if np.isnan(x[i]) else float(x[i]) for name, x in columns.items()},
                {"completions": completions.texts[i * n : (i + 1) * n]},
            )
            for i, question in enumerate(suite.questions)
        ]

    def _prompt(self, question: Question) -> Prompt:
        try:
            return Prompt(self.template.prompt(question.messages), question.row)
        except BadRow as error:
            raise DataError(f"{question.where}: {error}") from None

    def _say_cut(self, name: str, count: int, total: int, length: int) -> None:
        """Say once how many prompts lose their beginning."""
        each = " with their choices" if length == self.length else ""
        line = f"{name}: {count:,} of {total:,} prompts{each} lose their beginning: more than {length} tokens"
        if count and line not in self.said:
            tqdm.write(f"note: {line}")
            self.said.add(line)


def suite_template(loaded: LoadedModel, plain: bool = False, options: Sequence[str] = ()) -> ChatTemplate:
    """The chat template of a checkpoint, with `options` as in `checkpoint_template`; one that continues text
    where `plain`, or where it was trained on no conversations."""
    if plain or not loaded.conversational:
        return PlainTextTemplate(loaded.tokenizer)
    return checkpoint_template(loaded, options)


def plain_text(question: Question) -> str:
    """A prompt as PlainTextTemplate writes it."""
    return "\n".join(message["content"] for message in question.messages)


def encode_pair(tokenizer: BaseTokenizer, context: str, continuation: str) -> Request:
    """The ids of two texts as they are encoded together, after BOS; white space between them is the second's.

    As lm-eval does it, so that a continuation has the tokens that it has within the text.
    """
    text = context.rstrip()
    before = tokenizer.encode_markup(text)
    whole = tokenizer.encode_markup(context + continuation)
    bos = [] if before[:1] == [tokenizer.bos_id] else [tokenizer.bos_id]
    return Request([*bos, *before], whole[len(before) :] or tokenizer.encode(continuation))


def windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[Request]:
    """Requests that score each of `ids`, which follow the token `prefix`, once: `length` of them at a time,
    the last ones after as much context as `length` tokens of input leave room for."""
    whole = [prefix, *ids]
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        yield Request(whole[max(0, end - length) : start + 1], ids[start:end])
