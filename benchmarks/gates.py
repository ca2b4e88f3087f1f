"""Run the quickstart with several seeds and print a table of its gates.

    python benchmarks/gates.py --seeds=5 --workdir=runs/gates

Each seed is a run of experiments/pipeline.py, with synthetic data of its own, in WORKDIR/SEED. The same
command again resumes. --jobs=2 runs two at a time, each on its share of the cores. WORKDIR/table.md has the
table, and below it a comparison of SFT, PPO and DPO. The exit code is 1 if a gate fails.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxllm.evaluation.preference import mean

ROOT = Path(__file__).resolve().parents[1]


def run_seed(seed: int, job: int, jobs: int, workdir: Path, config: str, flags: list[str]) -> None:
    """Run the pipeline of one seed, with its output in WORKDIR/SEED.txt."""
    folder = workdir / str(seed)
    command = [sys.executable, "experiments/pipeline.py", f"--config={config}", f"--workdir={folder}"]
    cores = sorted(os.sched_getaffinity(0))
    share = cores[job * len(cores) // jobs : (job + 1) * len(cores) // jobs] or cores
    with (workdir / f"{seed}.txt").open("a") as log:
        done = subprocess.run(
            [*command, f"--config.seed={seed}", *flags],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, share),
        )
    print(f"seed {seed}: exit code {done.returncode}", flush=True)


def table(folders: list[Path]) -> str:
    """A row per gate, a column per seed. SEED.txt has the details."""
    found = [json.loads((folder / "gates.json").read_text())["gates"] for folder in folders]
    lines = [f"| gate | {' | '.join(f'seed {folder.name}' for folder in folders)} |"]
    lines.append("|---" * (len(folders) + 1) + "|")
    for gates in zip(*found, strict=True):
        cells = [outcome(gate) for gate in gates]
        lines.append(f"| {gates[0]['name']}: {gates[0]['claim']} | {' | '.join(cells)} |")
    minutes = [json.loads((folder / "pipeline.json").read_text())["seconds"] / 60 for folder in folders]
    lines.append(f"| minutes | {' | '.join(f'{each:.1f}' for each in minutes)} |")
    return "\n".join(lines)


def outcome(gate: dict) -> str:
    if gate["passed"] is None:
        return "not measured"
    return f"{gate['measured']:.3f} ± {gate['standard_error']:.3f} {'✓' if gate['passed'] else '✗'}"


def preferences(folders: list[Path]) -> str:
    """Scores by the hidden rubric and by the reward model of completions of the same held-out prompts."""
    lines = ["| stage | hidden rubric, 0 to 1 | reward model's score | KL to SFT, nats per completion |"]
    lines.append("|---|---|---|---|")
    for stage in ("sft", "ppo", "dpo"):
        completions = [read_rows(folder / "answers" / f"{stage}_1.jsonl") for folder in folders]
        columns = [[row["rewards"] | {"kl": row.get("kl", 0.0)} for row in rows] for rows in completions]
        cells = [
            ", ".join(mean_with_error([row.get(name, math.nan) for row in rows], digits) for rows in columns)
            for name, digits in (("rubric", 3), ("model", 2), ("kl", 2))
        ]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mean_with_error(values: list[float], digits: int) -> str:
    average, error = mean(np.array(values))
    return f"{average:.{digits}f} ± {error:.{digits}f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--workdir", type=Path, default=Path("runs/gates"))
    flags, more = parser.parse_known_args()
    workdir = flags.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    seeds = range(flags.first_seed, flags.first_seed + flags.seeds)

    def run_share(job: int) -> None:
        for seed in seeds[job :: flags.jobs]:
            run_seed(seed, job, flags.jobs, workdir, flags.config, more)

    with ThreadPoolExecutor(flags.jobs) as pool:
        list(pool.map(run_share, range(flags.jobs)))
    folders = [workdir / str(seed) for seed in seeds]
    missing = [folder.name for folder in folders if not (folder / "gates.json").exists()]
    if missing:
        print(f"seeds {', '.join(missing)} did not finish: see {workdir}/SEED.txt")
        return 1
    text = f"{table(folders)}\n\n{preferences(folders)}"
    (workdir / "table.md").write_text(text + "\n")
    print(text)
    return 0 if "✗" not in text else 1


if __name__ == "__main__":
    sys.exit(main())
