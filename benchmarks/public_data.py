"""The quickstart's pipeline on public data: a model of 1M parameters, about half an hour.

    python benchmarks/public_data.py --data=FOLDER --workdir=runs/public

FOLDER has tinystories_train.jsonl.gz, gutenberg_train.jsonl.gz (text), alpaca_5000.jsonl.gz (instructions),
hh_helpful_base_open.jsonl.gz (pairs) and countdown_tinyzero_{train,test}.jsonl.gz, in any subfolders.
The pairs of one prompt in five are held out for the gates. WORKDIR/report.html shows the results. The exit
code is 1 if a gate fails, which is possible: the gates are those of the quickstart, except that for text any
number of bits per byte below a trigram's passes.
"""

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.countdown import ROOT, easy_rows, solved_rows, write_rows
from jaxllm.toy_world import split_of

TEXT, CHATS = ("tinystories_train.jsonl.gz", "gutenberg_train.jsonl.gz"), "alpaca_5000.jsonl.gz"
PAIRS, COUNTDOWN = "hh_helpful_base_open.jsonl.gz", "countdown_tinyzero_train.jsonl.gz"

SETTINGS = {
    "pretrain.data.weights": (1.0, 1.0),
    "pretrain.training.steps": 600,
    "pretrain.training.evaluate_every": 300,
    "sft.optimizer.learning_rate": 2e-3,
    "sft.data.sequence_length": 512,
    "sft.data.batch_size": 8,
    "reward_model.optimizer.name": "adamw",
    "reward_model.optimizer.learning_rate": 5e-4,
    "reward_model.data.sequence_length": 512,
    "reward_model.data.batch_size": 16,
    "reward_model.training.steps": 120,
    "reward_model.training.evaluate_every": 120,
    "ppo.data.sequence_length": 512,
    "ppo.rollout.sampling.max_new_tokens": 100,
    "ppo.training.num_microbatches": 8,
    "ppo.training.steps": 64,
    "dpo.data.sequence_length": 512,
    "dpo.data.batch_size": 16,
    "sft_reasoning.training.steps": 400,
    "sft_reasoning.training.evaluate_every": 400,
    "grpo.data.sequence_length": 40,
    "grpo.reward.functions": ("countdown",),
    "grpo.rollout.sampling.max_new_tokens": 16,
    "grpo.sample.sampling.max_new_tokens": 16,
    "gates.max_rows": 300,
    "gates.text_share": 1.0,
}


def pairs(path: Path, part: str) -> Iterator[dict]:
    """The rows of a file of transcripts whose first prompt belongs to `part`, "train" or "validation"."""
    with gzip.open(path, "rt") as file:
        for row in map(json.loads, file):
            first_prompt = row["chosen"].split("\n\nAssistant:")[0]
            if split_of(first_prompt) == part:
                yield row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the files")
    parser.add_argument("--workdir", type=Path, default=Path("runs/public"))
    flags, more = parser.parse_known_args()
    data = flags.workdir.resolve() / "data"

    def find(name: str) -> Path:
        return next(flags.data.resolve().rglob(name))

    problems = write_rows(data / "problems.jsonl", easy_rows(find(COUNTDOWN)))
    taken = {json.loads(line)["prompt"] for line in problems.open()}
    sources = {
        "data.text": tuple(str(find(name)) for name in TEXT),
        "data.chats": str(find(CHATS)),
        "data.pairs": write_rows(data / "pairs.jsonl", pairs(find(PAIRS), "train")),
        "gates.prompts": write_rows(data / "held_out_pairs.jsonl", pairs(find(PAIRS), "validation")),
        "data.solutions": write_rows(data / "solved.jsonl", solved_rows(20_000, taken)),
        "data.problems": problems,
    }
    command = [sys.executable, "experiments/pipeline.py", "--config=configs/quickstart.py"]
    command += [f"--workdir={flags.workdir.resolve()}"]
    command += [f"--config.{field}={value}" for field, value in (sources | SETTINGS).items()]
    return subprocess.run([*command, *more], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
