"""Does reinforcement learning teach? The proofs behind the README's figures, from random weights on.

    python benchmarks/reinforcement.py problems
    python benchmarks/reinforcement.py countdown --data=FOLDER
    python benchmarks/reinforcement.py preferences

`problems`: additions of the synthetic world with their working. `countdown`: TinyZero's rows, in FOLDER's
countdown_tinyzero_{train,test}.jsonl.gz, that have three numbers and are solved by + and - alone; the model
is first taught on worked examples with other numbers. `preferences`: PPO on a reward model, beside DPO on the
same pairs; the rubric that chose between the pairs, and that no training sees, measures both.

Runs go to --workdir and go on where they stopped; --seeds counts those of the last stage. Everything runs by
experiments/train.py, as a user would; each command is printed.
"""

import argparse
import gzip
import itertools
import json
import math
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxllm.data.synthetic import preferences, problem_row
from jaxllm.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LOG_EVERY = 4  # updates: once a rollout


def run(script: str, **flags: object) -> str:
    """What a script of experiments/ prints; dots in a flag's name are written as `__`."""
    command = [sys.executable, f"experiments/{script}.py"]
    command += [f"--{name.replace('__', '.')}={value}" for name, value in flags.items()]
    print(f"$ {shlex.join(command[1:])}", flush=True)
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"ended with exit code {done.returncode}")
    return done.stdout


def train(config: str, workdir: Path, **flags: object) -> list[dict]:
    """Train, or go on; the metrics of all steps."""
    run("train", config=f"configs/{config}", workdir=workdir, **flags)
    return read_metrics(workdir / "metrics.jsonl")


def write_rows(path: Path, rows: Iterator[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def additions(split: str, rows: range, levels: Sequence[int]) -> Iterator[dict]:
    """`What is 37 + 25?`: a question, its working, its answer."""
    for i in rows:
        row = problem_row(split, i, seed=0)
        if row["level"] in levels and re.search(r"\d \+ \d", row["prompt"]):
            yield row


def solutions(numbers: Sequence[int], target: int) -> list[str]:
    """All `a + b - c` that use each number once and reach the target."""
    found = set()
    for order in itertools.permutations(numbers):
        for signs in itertools.product((1, -1), repeat=len(numbers) - 1):
            if order[0] + sum(sign * number for sign, number in zip(signs, order[1:], strict=True)) == target:
                rest = (f" {'+' if s > 0 else '-'} {n}" for s, n in zip(signs, order[1:], strict=True))
                found.add(f"{order[0]}{''.join(rest)}")
    return sorted(found)


def countdown_question(numbers: Sequence[int], target: int) -> str:
    return f"Make {target} from {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}."


def countdown_rows(path: Path) -> Iterator[dict]:
    """The rows of a file that are easy enough, each with a solution, which no rollout reads."""
    with gzip.open(path, "rt") as file:
        for row in map(json.loads, file):
            if len(row["nums"]) == 3 and (found := solutions(row["nums"], row["target"])):
                prompt = countdown_question(row["nums"], row["target"])
                yield {**row, "prompt": prompt, "completion": found[0]}


def countdown_worked(count: int, taken: set[str]) -> Iterator[dict]:
    """Questions that are not among those taken, each with one of its answers."""
    draw = random.Random(0)
    while count:
        numbers = [draw.randint(1, 99) for _ in range(3)]
        target = numbers[0] + sum(draw.choice((1, -1)) * number for number in numbers[1:])
        draw.shuffle(numbers)
        prompt = countdown_question(numbers, target)
        if 10 <= target <= 100 and prompt not in taken:
            yield {"prompt": prompt, "completion": draw.choice(solutions(numbers, target))}
            count -= 1


def pretrain(workdir: Path) -> Path:
    train("quickstart.py", workdir / "base")
    return workdir / "base"


def reason(folder: Path, worked: dict[str, object], asked: dict[str, object], seeds: int) -> None:
    """SFT on worked examples, then GRPO from it, once for each seed; what was reached."""
    base = pretrain(folder.parent)
    train("sft_chat.py:1m", folder / "worked", init_from=base, config__data__sequence_length=128, **worked)
    shared = {
        "init_from": folder / "worked",
        "config__rollout__prompts": 64,
        "config__rollout__minibatches": 4,
        "config__training__log_every": LOG_EVERY,
        "config__training__evaluate_every": 80,
        "config__evaluation__max_rows": 500,
        "config__sample__group_size": 4,
    }
    lines = []
    for seed in range(seeds):
        workdir = folder / f"grpo{seed}"
        rows = train("grpo_problems.py:1m", workdir, config__seed=seed, **shared, **asked)
        seconds = sum(row["perf/step_time"] for row in rows if "perf/step_time" in row) * LOG_EVERY
        rows = [row for row in rows if "eval/pass@1" in row]
        for kind, name in (("sampled", "eval/sampled_pass@1"), ("greedy", "eval/pass@1")):
            (before, error), (after, error_after) = (
                (row[name], row[f"{name}_se"]) for row in (rows[0], rows[-1])
            )
            rise, errors = after - before, (after - before) / math.hypot(error, error_after)
            lines.append(
                f"seed {seed}, {kind:7}: {before:.3f} ± {error:.3f} to {after:.3f} ± {error_after:.3f}, "
                f"{100 * rise:+.1f} points = {errors:.1f} standard errors; {seconds:.0f} s of steps"
            )
    print("\n".join(lines))


def solve_problems(workdir: Path, seeds: int) -> None:
    folder = workdir / "problems"
    worked = write_rows(folder / "worked.jsonl", additions("train", range(40000), (1, 2)))
    asked = write_rows(folder / "asked.jsonl", additions("train", range(40000), (2,)))
    held_out = write_rows(folder / "held_out.jsonl", additions("validation", range(10000), (2,)))
    reason(
        folder,
        {
            "config__data__train": worked,
            "config__data__validation": held_out,
            "config__data__rename": "working=completion",
            "config__training__steps": 200,
        },
        {
            "config__data__train": asked,
            "config__data__validation": held_out,
            "config__data__sequence_length": 104,
            "config__rollout__sampling__max_new_tokens": 68,
            "config__sample__sampling__max_new_tokens": 68,
            "config__optimizer__learning_rate": 2e-4,
            "config__training__steps": 200,
        },
        seeds,
    )


def solve_countdown(workdir: Path, data: Path, seeds: int) -> None:
    folder = workdir / "countdown"
    asked, held_out = (
        write_rows(folder / f"{part}.jsonl", countdown_rows(data / f"countdown_tinyzero_{part}.jsonl.gz"))
        for part in ("train", "test")
    )
    taken = {json.loads(line)["prompt"] for file in (asked, held_out) for line in file.open()}
    worked = write_rows(folder / "worked.jsonl", countdown_worked(20_000, taken))
    reason(
        folder,
        {
            "config__data__train": worked,
            "config__data__validation": held_out,
            "config__training__steps": 400,
        },
        {
            "config__data__train": asked,
            "config__data__validation": held_out,
            "config__reward__functions": "countdown",
            "config__data__sequence_length": 40,
            "config__rollout__sampling__max_new_tokens": 16,
            "config__sample__sampling__max_new_tokens": 16,
            "config__rollout__max_rows": 256,
            "config__optimizer__learning_rate": 3e-4,
            "config__training__steps": 280,
        },
        seeds,
    )


def judged(checkpoint: Path, reward_model: Path, prompts: Path) -> dict[str, str]:
    """What answers to the prompts are worth: NAME -> `value ± standard error`."""
    printed = run(
        "answer",
        checkpoint=checkpoint,
        input=prompts,
        rewards="jaxllm.data.synthetic.rubric",
        reward_model=reward_model,
        temperature=1.0,
        max_new_tokens=100,
        max_rows=400,
        samples=2,
    )
    return dict(re.findall(r"^(\S+) (\S+ ± \S+)$", printed, re.MULTILINE))


def prefer(workdir: Path, seeds: int) -> None:
    """SFT, a reward model, then PPO and DPO, once for each seed; and what their answers are worth."""
    base, folder = pretrain(workdir), workdir / "preferences"
    # Files, since the synthetic world is another one for another seed.
    pairs = write_rows(folder / "pairs.jsonl", preferences("train", count=8000, seed=0))
    held_out = write_rows(folder / "held_out.jsonl", preferences("validation", count=400, seed=0))
    data = {"config__data__train": pairs, "config__data__validation": held_out}
    chosen = write_rows(
        folder / "chosen.jsonl",
        (
            {"prompt": row["prompt"], "completion": row["chosen"]}
            for row in preferences("train", count=8000, seed=0)
        ),
    )
    chat, reward = folder / "chat", folder / "reward"
    train("sft_chat.py:1m", chat, init_from=base, config__data__train=f"synthetic:chats,{chosen}")
    train(
        "reward_model_pairs.py:1m",
        reward,
        init_from=chat,
        config__training__steps=250,
        config__optimizer__learning_rate=1e-3,
        **data,
    )
    print(f"\n{'':8} {'rubric':>18} {'reward model':>18} {'tokens':>14}  KL to SFT, nats an answer")
    show_judged("SFT", judged(chat, reward, held_out))
    for seed in range(seeds):
        ppo, dpo = folder / f"ppo{seed}", folder / f"dpo{seed}"
        flags = data | {"init_from": chat, "config__seed": seed}
        rows = train(
            "ppo_preferences.py:1m",
            ppo,
            config__reward__model=reward,
            config__objective__kl_target=6.0,
            **flags,
        )
        kl = [row["kl/reference"] for row in rows if "kl/reference" in row]
        show_judged(f"PPO {seed}", judged(ppo, reward, held_out), f"{kl[-1]:.2f}, at most {max(kl):.2f}")
        train("dpo_pairs.py:1m", dpo, **flags)
        show_judged(f"DPO {seed}", judged(dpo, reward, held_out))


def show_judged(name: str, found: dict[str, str], kl: str = "") -> None:
    print(f"{name:8} {found['reward/rubric']:>18} {found['reward/model']:>18} {found['length']:>14}  {kl}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("proof", choices=("problems", "countdown", "preferences"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder of the countdown files")
    parser.add_argument("--workdir", type=Path, default=Path("runs/reinforcement"))
    flags = parser.parse_args()
    workdir = flags.workdir.resolve()
    if flags.proof == "preferences":
        prefer(workdir, flags.seeds)
    elif flags.proof == "problems":
        solve_problems(workdir, flags.seeds)
    elif flags.data is None:
        parser.error("countdown needs --data=FOLDER")
    else:
        solve_countdown(workdir, flags.data, flags.seeds)


if __name__ == "__main__":
    main()
