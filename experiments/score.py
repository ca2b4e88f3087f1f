"""Score answers with a reward model.

python experiments/evaluate.py --checkpoint=runs/reward --input=answers.jsonl --output=scores.jsonl

Rows are anything that SFT reads (the last answer of each is scored) or pairs that a reward model is trained
on (both answers are scored, and compared). OUTPUT gets every row with its `reward`, or `chosen_reward` and
`rejected_reward`; `normalised` ones count standard deviations from the mean of the validation's answers.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.config import run_script
from jaxllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from absl.flags import FlagValues

BATCH = 16  # sequences scored at a time


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    define = flags.DEFINE_string
    define(
        "checkpoint", None, "a reward model's run folder, RUN/best, or step folder", flag_values=flag_values
    )
    define("input", None, "rows to score: .jsonl, .parquet, a dataset", flag_values=flag_values)
    define("output", None, "file to write them to with their rewards (.jsonl)", flag_values=flag_values)
    flags.DEFINE_list("rename", [], "theirs=ours for columns called otherwise", flag_values=flag_values)


def encoded(record: dict[str, Any], template: Any, rename: list[str]) -> tuple[list[Any], int]:
    """The sequences of a record's answers, and how long their prompt is."""
    from jaxllm.data.chat import conversation, last_run
    from jaxllm.data.preferences import answered, is_pair, pair

    if is_pair(record, rename):
        _, prompt, *answers = pair(record, rename)
    else:
        *prompt, answer = conversation(record, rename)[1]
        answers = [answer]
    found = [answered(template, prompt, answer) for answer in answers]
    return [each.ids for each in found], last_run(found[0].loss_mask)


def score(loaded: Any, sequences: list[list[int]]) -> Any:
    """A reward for each, float32 [N]. Neighbours in length share a batch."""
    import jax
    import numpy as np

    from jaxllm.rollout.generate import bucket

    rewards = jax.jit(loaded.model.rewards)
    found = np.zeros(len(sequences), np.float32)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for first in range(0, len(order), BATCH):
        rows = order[first : first + BATCH]
        tokens = np.zeros((BATCH, bucket(len(sequences[rows[-1]]))), np.int32)
        lengths = np.ones(BATCH, np.int32)
        for row, i in enumerate(rows):
            tokens[row, : len(sequences[i])], lengths[row] = sequences[i], len(sequences[i])
        found[rows] = np.asarray(rewards(loaded.params, tokens, lengths))[: len(rows)]
    return found


def main(_: None, flags: "FlagValues") -> None:
    """Score the input, write it, and say what was found."""
    import numpy as np

    from jaxllm.runs.checkpoints import checkpoint_template, load_checkpoint
    from jaxllm.runs.process import set_up_process
    from jaxllm.data.chat import check_rename
    from jaxllm.data.sources import BadRow, open_source
    from jaxllm.evaluation.preference import PairScores, mean, reward_metrics

    if flags.input is None:
        raise ConfigError("--input=FILE is missing")
    if flags.output is not None and not Path(flags.output).expanduser().parent.is_dir():
        raise ConfigError(f"--output={flags.output}: there is no such folder")
    check_rename(flags.rename)
    set_up_process()
    loaded = load_checkpoint(flags.checkpoint)
    if loaded.stage != "reward_model":
        raise ConfigError(f"--checkpoint={flags.checkpoint} is of stage {loaded.stage}, not a reward model")
    template, longest = checkpoint_template(loaded), loaded.model.config.max_length
    records, prompts, sequences, owners, dropped = [], [], [], [], 0
    source = open_source(flags.input, split="validation", text_key=None, synthetic_rows=1000, seed=0)
    for row in source.rows():
        try:
            if row.value is None:
                raise BadRow(row.problem, row.detail)
            ids, prompt = encoded(row.value, template, flags.rename)
            if max(map(len, ids)) > longest:
                raise BadRow("longer than model.max_length", f"{max(map(len, ids))} tokens")
        except BadRow as error:
            print(f"left out: {row.where}: {error}", file=sys.stderr)
            dropped += 1
            continue
        owners += [len(records)] * len(ids)
        records.append(row.value)
        prompts.append(prompt)
        sequences += ids
    if not records:
        raise DataError(f"--input={flags.input}: no row can be scored")
    rewards = score(loaded, sequences)
    known = loaded.metadata["metrics"] or {}  # none where an evaluation was broken off
    level, spread = known.get("eval/reward_mean", 0.0), known.get("eval/reward_std", 1.0) or 1.0
    groups: list[list[int]] = [[] for _ in records]
    for i, owner in enumerate(owners):
        groups[owner].append(i)
    if flags.output is not None:
        with Path(flags.output).expanduser().open("w") as file:
            for record, group in zip(records, groups, strict=True):
                names = ["reward"] if len(group) == 1 else ["chosen_reward", "rejected_reward"]
                found = {name: float(rewards[i]) for name, i in zip(names, group, strict=True)}
                found |= {f"{name}_normalised": (x - level) / spread for name, x in found.items()}
                file.write(json.dumps(record | found) + "\n")
    value, error = mean(rewards.astype(np.float64))
    print(f"{len(records)} rows scored, {dropped} left out; reward {value:.4f} ± {error:.4f}")
    pairs = [group for group in groups if len(group) == 2]
    if pairs:
        lengths = [[len(sequences[i]) - prompts[owners[i]] for i in group] for group in pairs]
        zeros = np.zeros((len(pairs), 2))
        found = PairScores(rewards[np.array(pairs)], np.array(lengths), zeros[:, 0], zeros)
        row = reward_metrics(found)
        for name in ("accuracy", "accuracy_longer_chosen", "accuracy_shorter_chosen", "length_baseline"):
            print(f"{name} {row[f'eval/{name}']:.3f} ± {row[f'eval/{name}_se']:.3f}")


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
