"""How much GRPO improves a small model on countdown, for several seeds, from random weights.

    python benchmarks/countdown.py --data=FOLDER

FOLDER has TinyZero's rows, countdown_tinyzero_{train,test}.jsonl.gz. Only the easier ones are used: with
three numbers that + and - alone can solve. A model of 1M parameters is pretrained, then fine-tuned on
solutions of problems with other numbers (SFT), then trained by GRPO, whose reward is 1 for a right answer.

Runs go to --workdir; the same command again resumes them. Each is a command of experiments/train.py, which is
printed.
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
UPDATES = 8  # per rollout


def train(config: str, workdir: Path, **flags: object) -> list[dict]:
    """Train or resume; returns the metrics of all steps. `a__b=c` is the flag --a.b=c."""
    command = [sys.executable, "experiments/train.py", f"--config=configs/{config}", f"--workdir={workdir}"]
    command += [f"--{name.replace('__', '.')}={value}" for name, value in flags.items()]
    print(f"$ {shlex.join(['python', *command[1:]])}", flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"failed with exit code {done.returncode}")
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
    """The easier rows of a file, each with a solution. Rollouts do not read the solution."""
    with gzip.open(path, "rt") as file:
        for row in map(json.loads, file):
            if len(row["nums"]) == 3 and (found := solutions(row["nums"], row["target"])):
                prompt = question(row["nums"], row["target"])
                yield {**row, "prompt": prompt, "completion": found[0]}


def solved_rows(count: int, taken: set[str]) -> Iterator[dict]:
    """Random problems whose prompts are not in `taken`, each with one of its solutions."""
    draw = random.Random(0)
    while count:
        numbers = [draw.randint(1, 99) for _ in range(3)]
        target = numbers[0] + sum(draw.choice((1, -1)) * number for number in numbers[1:])
        draw.shuffle(numbers)
        prompt = question(numbers, target)
        if 10 <= target <= 100 and prompt not in taken:
            yield {"prompt": prompt, "completion": draw.choice(solutions(numbers, target))}
            count -= 1


def improvement(rows: list[dict], seed: int) -> Iterator[str]:
    """Lines with pass@1 before and after GRPO."""
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
    problems, held_out = (
        write_rows(workdir / f"{part}.jsonl", easy_rows(flags.data / f"countdown_tinyzero_{part}.jsonl.gz"))
        for part in ("train", "test")
    )
    taken = {json.loads(line)["prompt"] for file in (problems, held_out) for line in file.open()}
    solved = write_rows(workdir / "solved.jsonl", solved_rows(20_000, taken))
    train("quickstart.py:pretrain", workdir / "base")
    train(
        "sft_chat.py:1m",
        workdir / "sft",
        init_from=workdir / "base",
        config__data__train=solved,
        config__data__validation=held_out,
        config__data__sequence_length=128,
        config__training__steps=400,
    )
    lines: list[str] = []
    for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
        rows = train(
            "grpo_problems.py:1m",
            workdir / f"grpo{seed}",
            init_from=workdir / "sft",
            config__seed=seed,
            config__data__train=problems,
            config__data__validation=held_out,
            config__data__sequence_length=40,
            config__reward__functions="countdown",
            config__rollout__num_prompts=64,
            config__rollout__group_size=16,
            config__rollout__num_minibatches=UPDATES,
            config__rollout__decode_batch_size=256,
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
        lines += improvement(rows, seed)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
