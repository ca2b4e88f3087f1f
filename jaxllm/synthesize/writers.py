"""Models that write: a checkpoint in this process, or (server.py) one behind OpenAI's API."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax

from jaxllm.data.chat_template import ChatTemplate
from jaxllm.data.messages import Messages
from jaxllm.data.sources import BadRow
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.evaluation.completions import opened_thought, with_thought_tags
from jaxllm.rollout.collect import collect
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.runs.checkpoints import (
    check_generates,
    checkpoint_template,
    inference_dtype,
    load_checkpoint,
    local_mesh,
)
from jaxllm.training.step_folder import checkpoint_hash

Check = Callable[[], None]  # raises to leave early
# User turns that begin and end differently: what their prompts share is the template's.
PROBES = ("What is this?", "a house", "Tell me about 7", "10 plus 3", "(no) one!")


class Written(NamedTuple):
    """A text by a model."""

    text: str  # without white space around it
    ended: bool  # by a stop token, rather than cut off at its maximum length


class Writer(Protocol):
    """A chat model."""

    @property
    def identity(self) -> dict[str, str]:
        """Where the model is, and the hash of its weights where that is known: the same model later."""
        ...

    def problem(self, messages: Messages, max_new_tokens: int) -> str | None:
        """Why these messages cannot be completed; None: they can."""
        ...

    def complete(
        self,
        conversations: Sequence[Messages],
        *,
        group_size: int,
        sampling: SamplingConfig,
        keys: jax.Array,
        check: Check,
    ) -> list[Written]:
        """group_size completions of each conversation in consecutive entries, entry i with keys[i]."""
        ...


class LocalWriter:
    """A checkpoint of a run, or a Hugging Face folder."""

    def __init__(self, path: str, field: str, *, dtype: str | None, decode_batch_size: int):
        """`field` of the config names it in messages. ConfigError where it is no chat model."""
        name = f"{field}={path}"
        try:
            self.loaded = load_checkpoint(path, local_mesh, dtype=inference_dtype(dtype))
        except CheckpointError as error:
            raise ConfigError(f"{name}: {error}") from None
        check_generates(self.loaded, name)
        if not self.loaded.conversational:
            raise ConfigError(f"{name} reads no conversations: pass a run of SFT or of a later stage")
        self.template = checkpoint_template(self.loaded)
        self.identity = {"model": path, "hash": checkpoint_hash(self.loaded.folder)}
        self.name, self.decode_batch_size = name, decode_batch_size

    def problem(self, messages: Messages, max_new_tokens: int) -> str | None:
        """As in `Writer`."""
        try:
            length = len(self.template.prompt(messages))
        except BadRow as error:
            return error.problem
        return "too long for the model" if length + max_new_tokens > self.max_length else None

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion together."""
        return self.loaded.model.config.max_length

    def complete(
        self,
        conversations: Sequence[Messages],
        *,
        group_size: int,
        sampling: SamplingConfig,
        keys: jax.Array,
        check: Check,
    ) -> list[Written]:
        """As in `Writer`."""
        prompts = [self.template.prompt(messages) for messages in conversations]
        opened = [
            opened_thought(self.loaded.tokenizer, prompt) for prompt in prompts for _ in range(group_size)
        ]
        written = self.sample(prompts, group_size, sampling, self.template.stop_ids, keys, check)
        return [each._replace(text=start + each.text) for start, each in zip(opened, written, strict=True)]

    def user_turns(self, *, sampling: SamplingConfig, keys: jax.Array, check: Check) -> list[Written]:
        """One user's turn for each key, from what the chat template writes before it (Magpie, Xu et al. 2024,
        arXiv:2406.08464)."""
        prefix, end = user_turn(self.template, self.loaded.tokenizer, self.name)
        stop_ids = tuple(dict.fromkeys((end, *self.template.stop_ids)))
        return self.sample([prefix], len(keys), sampling, stop_ids, keys, check)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        keys: jax.Array,
        check: Check,
    ) -> list[Written]:
        """group_size completions of each prompt of token ids."""
        tokenizer = self.loaded.tokenizer
        completions = collect(
            self.loaded.model,
            self.loaded.params,
            prompts,
            group_size=group_size,
            sampling=sampling,
            stop_ids=stop_ids,
            keys=keys,
            decode_batch_size=self.decode_batch_size,
            vocab_size=tokenizer.vocab_size,
            check=check,
        )
        texts = [with_thought_tags(tokenizer, ids).strip() for ids in completions.tokens]
        ended = [reason == "stop" for reason in completions.stop_reasons]
        return list(map(Written, texts, ended))


def user_turn(template: ChatTemplate, tokenizer: BaseTokenizer, name: str) -> tuple[list[int], int]:
    """The ids that a chat template writes before a user's first turn, and the special token that ends it.
    ConfigError, with the model's `name`, where no special token does."""
    prompts = [template.prompt([{"role": "user", "content": text}]) for text in PROBES]
    prefix = shared_start(prompts)
    suffix = shared_start([prompt[::-1] for prompt in prompts])[::-1]
    special = set(tokenizer.special_ids.values())
    end = next((i for i in suffix if i in special), None)
    if end is None or not prefix:
        raise ConfigError(
            f"{name}: its chat template ends a user's turn with no special token, which "
            "instructions.source=magpie needs; use self_instruct"
        )
    return prefix, end


def shared_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The longest start that all of them have."""
    same = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False))
    return [ids[0] for ids in same]
