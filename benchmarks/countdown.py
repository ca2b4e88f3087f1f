"""Does GRPO teach a small model to solve countdown? From random weights on, once for each seed.

    python benchmarks/countdown.py --data=FOLDER

FOLDER has TinyZero's rows, countdown_tinyzero_{train,test}.jsonl.gz. A model of 1M parameters is given the
easier ones: those with three numbers that + and - alone can solve. It is first taught on worked examples with
other numbers; from then on it only hears whether what it said was right.

Runs go to --workdir and go on where they stopped. Everything runs by experiments/train.py, as a user would;
each command is printed.
"""

import argparse
import gzip
import itertools
import json
import math
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxllm.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
UPDATES = 8  # of a rollout


def train(config: str, workdir: Path, **flags: object) -> list[dict]:
    """Train, or go on; the metrics of all steps. Dots in a flag's name are written as `__`."""
    command = [sys.executable, "experiments/train.py", f"--config=configs/{config}", f"--workdir={workdir}"]
    command += [f"--{name.replace('__', '.')}={value}" for name, value in flags.items()]
    print(f"$ {shlex.join(['python', *command[1:]])}", flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"ended with exit code {done.returncode}")
    return read_metrics(workdir / "metrics.jsonl")


def write_rows(path: Path, rows: Iterator[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def solutions(numbers: Sequence[int], target: int) -> list[str]:
    """All `a + b - c` that use each number once and reach the target."""
    found = set()
    for order in itertools.permutations(numbers):
        for signs in itertools.product((1, -1), repeat=len(numbers) - 1):
            if order[0] + sum(sign * number for sign, number in zip(signs, order[1:], strict=True)) == target:
                rest = (f" {'+' if s > 0 else '-'} {n}" for s, n in zip(signs, order[1:], strict=True))
                found.add(f"{order[0]}{''.join(rest)}")
    return sorted(found)


def question(numbers: Sequence[int], target: int) -> str:
    return f"Make {target} from {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}."


def easy_rows(path: Path) -> Iterator[dict]:
    """The rows of a file that are easy enough, each with a solution, which no rollout reads."""
    with gzip.open(path, "rt") as file:
        for row in map(json.loads, file):
            if len(row["nums"]) == 3 and (found := solutions(row["nums"], row["target"])):
                prompt = question(row["nums"], row["target"])
                yield {**row, "prompt": prompt, "completion": found[0]}


def worked_rows(count: int, taken: set[str]) -> Iterator[dict]:
    """Questions that are not among those taken, each with one of its answers."""
    draw = random.Random(0)
    while count:
        numbers = [draw.randint(1, 99) for _ in range(3)]
        target = numbers[0] + sum(draw.choice((1, -1)) * number for number in numbers[1:])
        draw.shuffle(numbers)
        prompt = question(numbers, target)
        if 10 <= target <= 100 and prompt not in taken:
            yield {"prompt": prompt, "completion": draw.choice(solutions(numbers, target))}
            count -= 1


def risen(rows: list[dict], seed: int) -> Iterator[str]:
    """From the weights that GRPO began with to its last, how much more is solved."""
    seconds = sum(row["perf/step_time"] for row in rows if "perf/step_time" in row) * UPDATES
    first, *_, last = (row for row in rows if "eval/pass@1" in row)
    for kind, name in (("sampled", "eval/sampled_pass@1"), ("greedy", "eval/pass@1")):
        (before, error), (after, error_after) = ((row[name], row[f"{name}_se"]) for row in (first, last))
        rise, errors = after - before, (after - before) / math.hypot(error, error_after)
        yield (
            f"seed {seed}, {kind:7}: {before:.3f} ± {error:.3f} to {after:.3f} ± {error_after:.3f}, "
            f"{100 * rise:+.1f} points = {errors:.1f} standard errors; {seconds:.0f} s of steps"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=Path("runs/countdown"))
    flags = parser.parse_args()
    workdir = flags.workdir.resolve()
    asked, held_out = (
        write_rows(workdir / f"{part}.jsonl", easy_rows(flags.data / f"countdown_tinyzero_{part}.jsonl.gz"))
        for part in ("train", "test")
    )
    taken = {json.loads(line)["prompt"] for file in (asked, held_out) for line in file.open()}
    worked = write_rows(workdir / "worked.jsonl", worked_rows(20_000, taken))
    train("quickstart.py:pretrain", workdir / "base")
    train(
        "sft_chat.py:1m",
        workdir / "worked",
        init_from=workdir / "base",
        config__data__train=worked,
        config__data__validation=held_out,
        config__data__sequence_length=128,
        config__training__steps=400,
    )
    lines: list[str] = []
    for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
        rows = train(
            "grpo_problems.py:1m",
            workdir / f"grpo{seed}",
            init_from=workdir / "worked",
            config__seed=seed,
            config__data__train=asked,
            config__data__validation=held_out,
            config__data__sequence_length=40,
            config__reward__functions="countdown",
            config__rollout__prompts=64,
            config__rollout__group_size=16,
            config__rollout__minibatches=UPDATES,
            config__rollout__max_rows=256,
            config__rollout__sampling__max_new_tokens=16,
            config__sample__sampling__max_new_tokens=16,
            config__sample__group_size=4,
            config__evaluation__max_rows=500,
            config__objective__clip_high=0.28,
            config__optimizer__learning_rate=3e-4,
            config__optimizer__schedule="linear",
            config__training__steps=560,
            config__training__evaluate_every=280,
        )
        lines += risen(rows, seed)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
