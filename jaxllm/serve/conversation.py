"""A conversation with a checkpoint, and the terminal chat of experiments/chat.py."""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from jaxllm.data.show import printable
from jaxllm.data.sources import BadRow
from jaxllm.errors import ConfigError
from jaxllm.rollout.generate import stream
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.runs.checkpoints import (
    LoadedModel,
    check_generates,
    checkpoint_template,
    inference_dtype,
    load_checkpoint,
    local_mesh,
)
from jaxllm.runs.process import set_up_process

CHUNK = 4  # tokens decoded between two updates of the screen
RESERVED_TOKENS = 64  # left for the reply; fewer where the model's context is small

Messages = list[dict[str, str]]


class Conversation:
    """The messages so far; each reply is sampled with a key of its own."""

    def __init__(
        self,
        loaded: LoadedModel,
        sampling: SamplingConfig,
        system: str | None,
        seed: int,
        template_options: Sequence[str] = (),
    ):
        self.loaded, self.sampling, self.key = loaded, sampling, jax.random.key(seed)
        self.template = checkpoint_template(loaded, template_options)
        self.system: Messages = [{"role": "system", "content": system}] if system else []
        self.messages: Messages = []  # without the system message
        self.replies = 0

    def reply(self, text: str) -> Iterator[str]:
        """The model's reply to a message, in pieces. Closing the iterator early keeps what was generated.

        Raises ConfigError, and leaves the conversation as it was, where the message cannot be encoded.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt, dropped = self.fitting_prompt()
        except (BadRow, ConfigError) as error:
            self.messages.pop()
            raise ConfigError(str(error)) from None
        if dropped:
            print(f"(dropped the first {dropped} messages, which no longer fit)", file=sys.stderr)
        self.replies += 1
        tokens: list[int] = []
        shown = ""
        try:
            for new in stream(
                self.loaded.model,
                self.loaded.params,
                prompt,
                sampling=self.sampling,
                stop_ids=self.template.stop_ids,
                key=jax.random.fold_in(self.key, self.replies),
                max_steps=CHUNK,
                vocab_size=self.loaded.tokenizer.vocab_size,
            ):
                tokens += new
                whole = printable(self.loaded.tokenizer.decode(tokens, from_start=False)).lstrip()
                complete = whole.rstrip("\ufffd")  # the first bytes of a character that is not complete
                piece, shown = complete[len(shown) :], complete
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": shown.strip()})

    def fitting_prompt(self) -> tuple[list[int], int]:
        """The prompt's tokens with as many of the last messages as fit, and how many were dropped."""
        max_length = self.loaded.model.config.max_length
        limit = max_length - min(RESERVED_TOKENS, max_length // 4)
        prompt: list[int] = []
        for first in range(0, len(self.messages), 2):
            prompt = self.template.prompt([*self.system, *self.messages[first:]])
            if len(prompt) <= limit:
                self.messages = self.messages[first:]
                return prompt, first
        raise ConfigError(
            f"the message is too long: {len(prompt)} tokens with the system message; at most {limit} of "
            f"model.max_length={max_length} leave room for the reply"
        )

    def save(self, name: str) -> str:
        """Appends the conversation to a .jsonl file; returns a line about the result."""
        if not self.messages:
            return "nothing to save: the conversation is empty"
        if not name.endswith(".jsonl"):
            return "usage: /save FILE.jsonl"
        try:
            with Path(name).expanduser().open("a") as file:
                file.write(json.dumps({"messages": [*self.system, *self.messages]}) + "\n")
        except OSError as error:
            return f"{name}: {error.strerror}"
        return f"saved to {name}"


def chat_in_terminal(
    checkpoint: str | None,
    sampling: SamplingConfig,
    *,
    system: str | None,
    template_options: Sequence[str],
    seed: int,
    dtype: str | None,
) -> None:
    """Reads lines from stdin and replies until /exit or the end of the input."""
    set_up_process()
    loaded = load_checkpoint(checkpoint, local_mesh, dtype=inference_dtype(dtype))
    check_generates(loaded, f"--checkpoint={checkpoint}")
    conversation = Conversation(loaded, sampling, system, seed, template_options)
    if not loaded.conversational:
        print("note: this model was only pretrained and not trained on conversations", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = text.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            conversation.messages.clear()
        elif command == "/save":
            print(conversation.save(argument.strip()))
        elif command.startswith("/"):
            print("commands: /reset, /save FILE.jsonl, /exit")
        elif text:
            print_reply(conversation, text)


def print_reply(conversation: Conversation, text: str) -> None:
    """Prints the reply while it is generated; Ctrl-C interrupts it."""
    try:
        for piece in conversation.reply(text):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (interrupted)", end="")
    except ConfigError as error:
        print(error, end="")
    print()
