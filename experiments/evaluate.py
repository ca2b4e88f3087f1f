r"""Evaluate a checkpoint: on suites of questions, or by scoring completions of prompts.

python experiments/evaluate.py --checkpoint=runs/chat --suite=arc_easy.jsonl,stories.txt
python experiments/evaluate.py --checkpoint=runs/reasoner --suite=synthetic:additions --rewards=math_answer

python experiments/evaluate.py --checkpoint=runs/reasoner --input=synthetic:problems --rewards=math_answer
python experiments/evaluate.py --checkpoint=runs/preferred --input=prompts.jsonl --reward_model=runs/reward \
    --output=answers.jsonl --samples=4

A suite is a file of multiple-choice questions (accuracy), of questions with an answer (exact match, pass@k)
or of texts (bits per byte): docs/how-to/evaluate.md. What the model makes of each question goes to
RUN/suites, where experiments/report.py compares runs, or to the folder OUTPUT.

With --input rows are those of GRPO: a `prompt` or `messages`, and the columns that the rewards read. Of
preference pairs the prompt is used. --reference=runs/chat estimates the KL to that run, from completions
sampled without a filter. OUTPUT gets a line per completion.
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
from jaxllm.evaluation.flags import check_flags

if TYPE_CHECKING:
    from absl.flags import FlagValues


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    where = {"flag_values": flag_values}
    flags.DEFINE_string("checkpoint", None, "run folder, RUN/best or step folder", **where)
    what = "suites: .jsonl, .parquet, .txt, synthetic:additions, lm_eval:TASK"
    flags.DEFINE_list("suite", [], what, **where)
    flags.DEFINE_string(
        "suite_path", None, "folder of YAML files that define tasks for lm_eval:TASK", **where
    )
    flags.DEFINE_string("input", None, "prompts: .jsonl, .parquet, a dataset, synthetic:KIND", **where)
    flags.DEFINE_string(
        "output", None, "file to write the completions to (.jsonl); with --suite a folder", **where
    )
    flags.DEFINE_list("rename", [], "THEIRS=OURS for each column with another name", **where)
    flags.DEFINE_string("prompt_format", None, "a text with {COLUMN}s to fill in", **where)
    flags.DEFINE_string("system", None, "system message before every prompt", **where)
    flags.DEFINE_list("rewards", [], "names in jaxllm.rewards, PACKAGE.FUNCTION, FILE.py:FUNCTION", **where)
    flags.DEFINE_string("reward_model", None, "run folder of a reward model", **where)
    flags.DEFINE_string("reference", None, "run to which the checkpoint's KL is estimated", **where)
    flags.DEFINE_bool("plain", False, "continue prompts as plain text, without a chat template", **where)
    flags.DEFINE_bool("untrained", False, "use random weights, by --checkpoint's config and seed", **where)
    flags.DEFINE_integer("samples", 1, "completions of each prompt", **where)
    flags.DEFINE_integer("max_rows", None, "from the first; default: 256 prompts, or a whole suite", **where)
    define_dtype(flag_values)
    define_template_options(flag_values)
    define_sampling_flags(flag_values)
    define_process_flags(flag_values)


def main(_: None, flags: "FlagValues") -> None:
    """Measure the suites, or complete the prompts and score the completions; write them, and print means."""
    if flags.suite and flags.samples == 1 and not flags["temperature"].present:
        flags.temperature = 0.0
    sampling = read_sampling(flags)
    check_flags(flags, sampling)
    from jaxllm.data.records import check_rename
    from jaxllm.evaluation.checkpoints import evaluate_checkpoint, evaluate_suites
    from jaxllm.parallel.processes import joined
    from jaxllm.runs.process import set_up_process

    check_rename(flags.rename, "--rename")
    names = {"reward.model": "--reward_model", "data.template_options": "--template_options"}
    output = None if flags.output is None else Path(flags.output).expanduser()
    shared = {
        "options": flags,
        "plain": flags.plain,
        "template_options": flags.template_options,
        "untrained": flags.untrained,
        "samples": flags.samples,
        "sampling": sampling,
        "seed": flags.seed,
        "dtype": flags.dtype,
        "output": output,
    }
    with (
        joined(flags.coordinator, flags.num_processes, flags.process_id),
        named_as_flags(names | {"sampling.": "--"}),
    ):
        set_up_process()
        if flags.suite:
            check = flags.rewards[0] if flags.rewards else "exact_match"
            path = None if flags.suite_path is None else Path(flags.suite_path).expanduser()
            shared |= {"check": check, "suite_path": path, "max_rows": flags.max_rows}
            evaluate_suites(flags.checkpoint, flags.suite, **shared)
            return
        evaluate_checkpoint(
            flags.checkpoint,
            flags.input,
            rewards=flags.rewards,
            reward_model=flags.reward_model,
            reference=flags.reference,
            max_rows=256 if flags.max_rows is None else flags.max_rows,
            **shared,
        )


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
