"""Serve checkpoints: chat in the browser, let people compare answers, and OpenAI's API.

python experiments/serve.py --checkpoint=runs/chat
python experiments/serve.py --checkpoint=runs/chat,runs/dpo --prompts=questions.jsonl --raters_per_pair=2
python experiments/train.py --config=configs/reward_model_pairs.py:1m --workdir=runs/reward \
    --init_from=runs/chat --config.data.train=preferences.jsonl

Clients send a checkpoint's name as `model`: by default the end of its path that distinguishes it (`chat`,
`dpo`, `dpo/best`), otherwise what --checkpoint=NAME=PATH says. Choices are appended to preferences.jsonl,
which reward models and DPO train on as it is. --host=0.0.0.0 --token_file=FILE (or the environment variable
JAXLLM_TOKEN) opens the server to other machines; the connection is not encrypted, so put a proxy with TLS in
front of it on an open network. docs/serving.md has the rest.
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

    where = {"flag_values": flag_values}
    flags.DEFINE_list(
        "checkpoint",
        [],
        "[NAME=]PATH of run folders, RUN/best or step folders; the first is the default model",
        **where,
    )
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on; other than local needs --token", **where)
    flags.DEFINE_integer("port", 8000, "port to listen on; 0 takes any free port", **where)
    flags.DEFINE_string(
        "token_file", None, "file with a secret that clients must send (or JAXLLM_TOKEN=SECRET)", **where
    )
    flags.DEFINE_string("token", None, "the secret itself, visible to all users of this machine", **where)
    flags.DEFINE_list(
        "allowed_hosts", [], "further host names of this server, such as that of a proxy", **where
    )
    flags.DEFINE_string("preferences", "preferences.jsonl", "file that choices are appended to", **where)
    flags.DEFINE_string(
        "prompts", None, "prompts to compare answers to: .jsonl, .parquet, synthetic:preferences", **where
    )
    flags.DEFINE_integer("max_prompts", 1000, "use the first of these prompts", **where)
    flags.DEFINE_list("rename", [], "THEIRS=OURS for columns of the prompts with other names", **where)
    flags.DEFINE_string("prompt_format", None, "a text with {column}s to fill in as the prompt", **where)
    flags.DEFINE_string("system", None, "a system message before each of these prompts", **where)
    flags.DEFINE_integer("raters_per_pair", 1, "raters who compare each pair", **where)
    flags.DEFINE_integer("rows", 16, "completions that each model decodes at a time", **where)
    flags.DEFINE_integer(
        "max_length", None, "tokens of a prompt and its completion; default: as many as fit", **where
    )
    define_dtype(flag_values)
    define_template_options(flag_values)
    define_sampling_flags(flag_values)


def main(_: None, flags: "FlagValues") -> None:
    """Load the checkpoints and serve them until Ctrl-C."""
    from jaxllm.serve.server import ServerOptions, read_token, serve

    options = {name: flags[name].value for name in ServerOptions.__dataclass_fields__}
    options["token"] = read_token(flags.token, flags.token_file)
    sampling = read_sampling(flags)
    with named_as_flags({"data.template_options": "--template_options"}):
        serve(ServerOptions(**options), sampling)


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
