"""Let a model answer many prompts, and judge the answers.

python experiments/answer.py --checkpoint=runs/reasoner --input=synthetic:problems --rewards=math_answer
python experiments/answer.py --checkpoint=runs/preferred --input=prompts.jsonl --reward_model=runs/reward \
    --output=answers.jsonl --samples=4

Rows have a `prompt` or `messages` and whatever the rewards read, as for GRPO; of preference pairs the prompt
is taken. --reference=runs/chat estimates the KL from it. OUTPUT gets a line for every answer. Means over
prompts are printed, with their standard errors.
"""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.command_line import define_sampling_flags, read_sampling
from jaxllm.config import run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    where = {"flag_values": flag_values}
    flags.DEFINE_string("checkpoint", None, "a run folder, RUN/best, or step folder", **where)
    flags.DEFINE_string("input", None, "rows to answer: .jsonl, .parquet, a dataset, synthetic:KIND", **where)
    flags.DEFINE_string("output", None, "file to write the answers to (.jsonl)", **where)
    flags.DEFINE_list("rename", [], "theirs=ours for columns called otherwise", **where)
    flags.DEFINE_string("prompt_format", None, "a text with {column}s to fill in", **where)
    flags.DEFINE_string("system", None, "a system message before every prompt", **where)
    flags.DEFINE_list(
        "rewards", [], "as reward.functions: names, PACKAGE.FUNCTION, FILE.py:FUNCTION", **where
    )
    flags.DEFINE_string("reward_model", None, "the run folder of a reward model", **where)
    flags.DEFINE_string("reference", None, "a run whose KL from the checkpoint is estimated", **where)
    flags.DEFINE_bool("plain", False, "continue prompts as plain text, without a chat template", **where)
    flags.DEFINE_bool("untrained", False, "the random weights that --checkpoint's seed stands for", **where)
    flags.DEFINE_integer("samples", 1, "answers to each prompt", **where)
    flags.DEFINE_integer("max_rows", 256, "prompts, from the first", **where)
    define_sampling_flags(flag_values)


def check_flags(flags: "FlagValues") -> None:
    """ConfigError for what cannot be."""
    if flags.input is None:
        raise ConfigError("--input=FILE is missing")
    if flags.output is not None and not Path(flags.output).expanduser().parent.is_dir():
        raise ConfigError(f"--output={flags.output}: there is no such folder")
    for name in ("samples", "max_rows"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name}={getattr(flags, name)} must be at least 1")
    if flags.temperature == 0 and flags.samples > 1:
        raise ConfigError(f"--samples={flags.samples} with --temperature=0 would say the same every time")
    if flags.temperature == 0 and flags.reference is not None:
        raise ConfigError("--reference measures what is sampled: set --temperature, such as 1")


def main(_: None, flags: "FlagValues") -> None:
    """Answer the input, judge the answers, write them, and say what was found."""
    check_flags(flags)
    sampling = read_sampling(flags)

    from experiments import answers as asking
    from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint
    from jaxllm.runs.process import set_up_process
    from jaxllm.data.chat import check_rename

    check_rename(flags.rename)
    set_up_process()
    loaded = load_checkpoint(flags.checkpoint, untrained=flags.untrained)
    asking.check_speaks(loaded, f"--checkpoint={flags.checkpoint}")
    reference = None
    if flags.reference is not None:
        reference = asking.check_speaks(load_checkpoint(flags.reference), f"--reference={flags.reference}")
        if reference.tokenizer.hash != loaded.tokenizer.hash:
            raise ConfigError(f"--reference={flags.reference} has another tokenizer than --checkpoint")
    template = asking.PlainText(loaded.tokenizer) if flags.plain else checkpoint_template(loaded)
    prompts = asking.read_prompts(
        flags.input,
        flags,
        template,
        longest=loaded.model.config.max_length - sampling.max_new_tokens,
        max_rows=flags.max_rows,
        seed=flags.seed,
    )
    answers = asking.answer_prompts(
        loaded,
        template,
        prompts,
        functions=flags.rewards,
        reward_model=flags.reward_model,
        samples=flags.samples,
        sampling=sampling,
        seed=flags.seed,
    )
    kl = None if reference is None else asking.kl_to(reference, answers, sampling.temperature)
    if flags.output is not None:
        with Path(flags.output).expanduser().open("w") as file:
            for i, row in enumerate(asking.answer_rows(answers, kl)):
                file.write(json.dumps({**prompts[i // flags.samples].row, **row}) + "\n")
    print(f"{len(prompts)} prompts, {flags.samples} answers each")
    row = asking.answer_metrics(answers, flags.samples, "", kl)
    for name, value in row.items():
        if not name.endswith("_se"):
            error = row[f"{name}_se"]  # NaN where there is one prompt alone
            print(f"{name} {value:.4g}" + (f" ± {error:.2g}" if not math.isnan(error) else ""))


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
