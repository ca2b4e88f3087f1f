"""Score given completions with a reward model.

python experiments/score.py --checkpoint=runs/reward --input=answers.jsonl --output=scores.jsonl

Rows are those of SFT (the last assistant turn is scored) or preference pairs (both completions are scored and
compared). OUTPUT gets every row with its `reward`, or `chosen_reward` and `rejected_reward`, and the same
with `_normalized`: standardized by the mean and standard deviation of the reward model's validation set.

Of a file of the comparison page it prints how far people and the reward model agree, and with
--judge=runs/chat also that policy, asked in both orders: docs/how-to/evaluate.md.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.command_line import define_dtype
from jaxllm.config import check_output, run_script
from jaxllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from absl.flags import FlagValues


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    where = {"flag_values": flag_values}
    flags.DEFINE_string("checkpoint", None, "a reward model's run folder, RUN/best or step folder", **where)
    flags.DEFINE_string("input", None, "rows to score: .jsonl, .parquet, a dataset", **where)
    flags.DEFINE_string("output", None, "file to write rows and rewards to (.jsonl)", **where)
    flags.DEFINE_string("judge", None, "a policy to ask which of two answers is better", **where)
    flags.DEFINE_list("rename", [], "THEIRS=OURS for each column with another name", **where)
    define_dtype(flag_values)


def main(_: None, flags: "FlagValues") -> None:
    """Score the rows, write them with their rewards, and print means."""
    from jaxllm.data.records import check_rename
    from jaxllm.evaluation.agreement import read_comparisons
    from jaxllm.evaluation.scoring import load_judge, print_agreement, score_rows
    from jaxllm.runs.checkpoints import check_scores, inference_dtype, load_checkpoint, local_mesh
    from jaxllm.runs.process import set_up_process

    if flags.input is None:
        raise ConfigError("--input=FILE is missing")
    check_output(flags.output, "--output")
    output = None if flags.output is None else Path(flags.output).expanduser()
    check_rename(flags.rename, "--rename")
    comparisons = read_comparisons(flags.input)
    if flags.judge is not None and not comparisons:
        raise DataError(
            f"--judge: no row of --input={flags.input} has two 'answers' and a 'choice'; remove it"
        )
    set_up_process()
    loaded = load_checkpoint(flags.checkpoint, local_mesh, dtype=inference_dtype(flags.dtype))
    check_scores(loaded, f"--checkpoint={flags.checkpoint}")
    judge = None if flags.judge is None else load_judge(flags.judge, dtype=flags.dtype)
    score_rows(loaded, flags.input, rename=flags.rename, output=output)
    if comparisons:
        print_agreement(loaded, comparisons, judge)


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
