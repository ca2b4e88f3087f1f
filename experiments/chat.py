"""Talk to a checkpoint in the terminal.

python experiments/chat.py --checkpoint=runs/chat
python experiments/chat.py --checkpoint=runs/chat --system="Answer in one sentence." --temperature=0

Commands: /reset forgets the conversation, /save FILE.jsonl adds it to a file that SFT can train on, /exit
(or Ctrl-D) ends. Ctrl-C cuts an answer short.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.command_line import define_sampling_flags, read_sampling
from jaxllm.config import run_script
from jaxllm.data.show import printable
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues

STRETCH = 4  # tokens between two looks at what has been said

Messages = list[dict[str, str]]


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    define = flags.DEFINE_string
    define("checkpoint", None, "run folder, RUN/best, or step folder", flag_values=flag_values)
    define("system", None, "system message that every conversation begins with", flag_values=flag_values)
    define_sampling_flags(flag_values)


class Chat:
    """A conversation with a model, and what it takes to go on with it."""

    def __init__(self, loaded: Any, sampling: Any, system: str | None, seed: int):
        import jax

        from jaxllm.runs.checkpoints import checkpoint_template

        self.loaded, self.sampling, self.key = loaded, sampling, jax.random.key(seed)
        self.template = checkpoint_template(loaded)
        self.system: Messages = [{"role": "system", "content": system}] if system else []
        self.messages: Messages = []
        self.answers = 0

    def answer(self, text: str) -> Iterator[str]:
        """What the model says to this, piece by piece. However it ends, it is part of the conversation."""
        import jax

        from jaxllm.data.sources import BadRow
        from jaxllm.rollout.generate import stream

        self.messages.append({"role": "user", "content": text})
        try:
            prompt, forgotten = self.fitting_prompt()
        except (BadRow, ConfigError) as error:
            self.messages.pop()
            raise ConfigError(str(error)) from None
        if forgotten:
            print(f"(the first {forgotten} messages no longer fit and are forgotten)", file=sys.stderr)
        self.answers += 1
        tokens: list[int] = []
        said = ""
        try:
            for more in stream(
                self.loaded.model,
                self.loaded.params,
                prompt,
                sampling=self.sampling,
                stop_ids=self.template.stop_ids,
                key=jax.random.fold_in(self.key, self.answers),
                max_steps=STRETCH,
            ):
                tokens += more
                whole = printable(self.loaded.tokenizer.decode(tokens, from_start=False)).lstrip()
                ready = whole.rstrip("\ufffd")  # the rest of that character is still to come
                piece, said = ready[len(said) :], ready
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": said.strip() or "..."})

    def fitting_prompt(self) -> tuple[list[int], int]:
        """The prompt, with as much of the conversation as fits before an answer; how much was left out."""
        room = self.loaded.model.config.max_length - min(64, self.loaded.model.config.max_length // 4)
        for first in range(0, len(self.messages), 2):
            prompt = self.template.prompt([*self.system, *self.messages[first:]])
            if len(prompt) <= room:
                self.messages = self.messages[first:]
                return prompt, first
        raise ConfigError(
            f"the message is too long: {len(prompt)} tokens with its system message, and model.max_length="
            f"{self.loaded.model.config.max_length} must leave room for an answer"
        )

    def save(self, name: str) -> str:
        """Add the conversation to a .jsonl file; what came of it."""
        if not self.messages:
            return "nothing has been said yet"
        if not name.endswith(".jsonl"):
            return "give a file: /save FILE.jsonl"
        try:
            with Path(name).expanduser().open("a") as file:
                file.write(json.dumps({"messages": [*self.system, *self.messages]}) + "\n")
        except OSError as error:
            return f"{name}: {error.strerror}"
        return f"saved to {name}"


def main(_: None, flags: "FlagValues") -> None:
    """Read lines and answer them until the input ends."""
    from jaxllm.runs.checkpoints import load_checkpoint
    from jaxllm.runs.process import set_up_process

    sampling = read_sampling(flags)
    set_up_process()
    loaded = load_checkpoint(flags.checkpoint)
    if loaded.stage == "reward_model":
        raise ConfigError(f"--checkpoint={flags.checkpoint} is a reward model, which writes nothing")
    chat = Chat(loaded, sampling, flags.system, flags.seed)
    if loaded.stage == "pretrain":
        print("note: this model is only pretrained and has not learnt to answer", file=sys.stderr)
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
            chat.messages.clear()
        elif command == "/save":
            print(chat.save(argument.strip()))
        elif command.startswith("/"):
            print("commands: /reset, /save FILE.jsonl, /exit")
        elif text:
            say(chat, text)


def say(chat: Chat, text: str) -> None:
    """Print the answer as it comes."""
    try:
        for piece in chat.answer(text):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (cut short)", end="")
    except ConfigError as error:
        print(error, end="")
    print()


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
