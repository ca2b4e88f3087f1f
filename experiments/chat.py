"""Chat with a checkpoint in the terminal.

python experiments/chat.py --checkpoint=runs/chat
python experiments/chat.py --checkpoint=runs/chat --system="Answer in one sentence." --temperature=0
python experiments/chat.py --checkpoint=Qwen3-1.7B --template_options=enable_thinking=false

Commands: /reset starts a new conversation, /save FILE.jsonl appends this one to a file that SFT can train on,
/exit (or Ctrl-D) ends. Ctrl-C interrupts a reply.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.command_line import (
    define_dtype,
    define_sampling_flags,
    define_template_options,
    named_as_flags,
    read_sampling,
)
from jaxllm.config import run_script

if TYPE_CHECKING:
    from absl.flags import FlagValues


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    define = flags.DEFINE_string
    define("checkpoint", None, "run folder, RUN/best or step folder", flag_values=flag_values)
    define("system", None, "system message at the start of every conversation", flag_values=flag_values)
    define_dtype(flag_values)
    define_template_options(flag_values)
    define_sampling_flags(flag_values)


def main(_: None, flags: "FlagValues") -> None:
    """Chat until the input ends."""
    from jaxllm.serve.conversation import chat_in_terminal

    sampling = read_sampling(flags)
    with named_as_flags({"data.template_options": "--template_options"}):
        chat_in_terminal(
            flags.checkpoint,
            sampling,
            system=flags.system,
            template_options=flags.template_options,
            seed=flags.seed,
            dtype=flags.dtype,
        )


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
