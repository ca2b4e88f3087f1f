r"""Evaluate a checkpoint on prompts: generate completions and score them.

python experiments/evaluate.py --checkpoint=runs/reasoner --input=synthetic:problems --rewards=math_answer
python experiments/evaluate.py --checkpoint=runs/preferred --input=prompts.jsonl --reward_model=runs/reward \
    --output=answers.jsonl --samples=4

Rows are those of GRPO: a `prompt` or `messages`, and the columns that the rewards read. Of preference pairs
the prompt is used. --reference=runs/chat estimates the KL to that run, from completions sampled without a
filter. OUTPUT gets a line per completion.
Prints means over prompts with their standard errors.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.command_line import (
    define_dtype,
    define_process_flags,
    define_sampling_flags,
    define_template_options,
    named_as_flags,
    read_sampling,
)
from jaxllm.config import run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues

    from jaxllm.rollout.sampling import SamplingConfig


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    where = {"flag_values": flag_values}
    flags.DEFINE_string("checkpoint", None, "run folder, RUN/best or step folder", **where)
    flags.DEFINE_string("input", None, "prompts: .jsonl, .parquet, a dataset, synthetic:KIND", **where)
    flags.DEFINE_string("output", None, "file to write the completions to (.jsonl)", **where)
    flags.DEFINE_list("rename", [], "THEIRS=OURS for each column with another name", **where)
    flags.DEFINE_string("prompt_format", None, "a text with {COLUMN}s to fill in", **where)
    flags.DEFINE_string("system", None, "system message before every prompt", **where)
    flags.DEFINE_list("rewards", [], "names in jaxllm.rewards, PACKAGE.FUNCTION, FILE.py:FUNCTION", **where)
    flags.DEFINE_string("reward_model", None, "run folder of a reward model", **where)
    flags.DEFINE_string("reference", None, "run to which the checkpoint's KL is estimated", **where)
    flags.DEFINE_bool("plain", False, "continue prompts as plain text, without a chat template", **where)
    flags.DEFINE_bool("untrained", False, "use random weights, by --checkpoint's config and seed", **where)
    flags.DEFINE_integer("samples", 1, "completions of each prompt", **where)
    flags.DEFINE_integer("max_rows", 256, "number of prompts, from the first", **where)
    define_dtype(flag_values)
    define_template_options(flag_values)
    define_sampling_flags(flag_values)
    define_process_flags(flag_values)


def check_flags(flags: "FlagValues", sampling: "SamplingConfig") -> None:
    """ConfigError for combinations that are not supported."""
    if flags.input is None:
        raise ConfigError("--input=FILE is missing")
    if flags.output is not None and not Path(flags.output).expanduser().parent.is_dir():
        raise ConfigError(f"--output={flags.output}: there is no such folder")
    for name in ("samples", "max_rows"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name}={getattr(flags, name)} must be at least 1")
    if flags.plain and flags.template_options:
        raise ConfigError("--template_options has no effect with --plain: remove one of them")
    if sampling.greedy and flags.samples > 1:
        raise ConfigError(
            f"--samples={flags.samples} with --temperature={flags.temperature:g} would generate the same "
            "completion every time: raise --temperature"
        )
    if sampling.greedy and flags.reference is not None:
        raise ConfigError("--reference needs sampled completions: set --temperature, such as 1")
    if sampling.filters and flags.reference is not None:
        raise ConfigError(
            f"--reference needs unfiltered completions, from which alone the KL can be estimated: remove "
            f"{', '.join(f'--{name}={value}' for name, value in sampling.filters.items())}"
        )


def main(_: None, flags: "FlagValues") -> None:
    """Complete the prompts, score the completions, write them, and print means."""
    sampling = read_sampling(flags)
    check_flags(flags, sampling)

    from jaxllm.data.records import check_rename
    from jaxllm.evaluation.checkpoints import evaluate_checkpoint
    from jaxllm.parallel.processes import joined
    from jaxllm.runs.process import set_up_process

    check_rename(flags.rename)
    names = {"reward.model": "--reward_model", "data.template_options": "--template_options"}
    with joined(flags.coordinator, flags.num_processes, flags.process_id), named_as_flags(names):
        set_up_process()
        evaluate_checkpoint(
            flags.checkpoint,
            flags.input,
            options=flags,
            rewards=flags.rewards,
            reward_model=flags.reward_model,
            reference=flags.reference,
            plain=flags.plain,
            template_options=flags.template_options,
            untrained=flags.untrained,
            samples=flags.samples,
            max_rows=flags.max_rows,
            sampling=sampling,
            seed=flags.seed,
            dtype=flags.dtype,
            output=None if flags.output is None else Path(flags.output).expanduser(),
        )


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
