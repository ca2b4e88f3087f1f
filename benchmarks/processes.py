"""The curves of 1, 2 and 4 processes over each other, for every stage.

    python benchmarks/processes.py --workdir=runs/processes [--steps=40] [--picture=docs/images/processes.svg]

Each run is configs/smoke.py on four CPU devices in all, data=2 x fsdp=2, as real processes on this machine:
1 x 4, 2 x 2 and 4 x 1, each initialized from the same parent. Two more runs pretrain: one whose second
process is stopped (SIGSTOP) and continued at random, and one that SIGTERM stops on its way and twice as many
processes continue. Prints a table of the largest differences from the run of one process. A run that is
complete is not repeated. XLA optimizes little: the runs are so short that compiling would take most of the
time. Needs the extra `plot`.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
DEVICES = 4
COUNTS = (1, 2, 4)
# Of configs/smoke.py, in the order in which they are trained, and the stage that each is initialized from.
PARENTS = {
    "pretrain": None,
    "sft": "pretrain",
    "reward_model": "sft",
    "dpo": "sft",
    "ppo": "sft",
    "grpo": "sft",
}
SLOW, CONTINUED = "2 processes, one stopped at random", "2 processes, then 4"
LOSS = "train/loss"
NO_RESULTS = ("perf/", "time/", "sampler/")  # metrics of speed, and of the size of rounding errors
Rows = dict[int, dict[str, float]]


class Runs:
    """The runs below one folder."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps

    def command(self, stage: str, workdir: Path) -> list[str]:
        """The command of every process."""
        fields: dict[str, Any] = {
            "training.steps": self.steps,
            "training.checkpoint_every": self.steps,
            "training.evaluate_every": self.steps // 2,
            "training.log_every": 1,
            "training.sample_every": 0,
            "mesh.data": 2,
            "mesh.fsdp": 2,
            "data.synthetic_rows": 500,
            "data.batch_size": 8,
        }
        if stage in ("ppo", "grpo"):  # two updates on each rollout, so that the ratio is not always 1
            fields |= {"rollout.num_minibatches": 2, "training.log_every": 2, "rollout.num_prompts": 8}
            fields |= {"rollout.sampling.max_new_tokens": 16, "optimizer.learning_rate": 1e-3}
        if stage == "ppo":
            fields["reward.model"] = self.workdir("reward_model", 1)
        if stage == "grpo":  # math_answer would never reward so small a model
            fields |= {"reward.functions": "length", "rollout.num_prompts": 4, "rollout.group_size": 4}
        flags = [f"--config={ROOT}/configs/smoke.py:{stage}", f"--workdir={workdir}"]
        if parent := PARENTS[stage]:
            flags.append(f"--init_from={self.workdir(parent, 1)}")
        flags.append(f"--cache_dir={self.folder / 'cache'}")
        fields_ = [f"--config.{name}={value}" for name, value in fields.items()]
        return [sys.executable, str(ROOT / "experiments" / "train.py"), *flags, *fields_]

    def workdir(self, stage: str, name: object) -> Path:
        return self.folder / f"{stage}-{name}".replace(" ", "_").replace(",", "")

    def run(
        self,
        stage: str,
        count: int,
        name: str | None = None,
        disturb: "Disturb | None" = None,
        exit_code: int = 0,
    ) -> float:
        """Train a stage on `count` processes, unless that is done; returns the seconds. `disturb` is called
        with the processes and the run folder until they end, all with `exit_code`."""
        workdir = self.workdir(stage, name or count)
        if self.steps in rows_of(workdir):
            return 0.0
        start = time.monotonic()
        processes = start_processes(self.command(stage, workdir), count, DEVICES // count, workdir)
        while any(process.poll() is None for process in processes):
            if disturb is not None:
                disturb(processes, workdir)
            time.sleep(0.05)
        codes = {process.returncode for process in processes}
        if codes != {exit_code}:
            sys.exit(f"{workdir}: exit codes {codes}; see {workdir}.txt")
        return time.monotonic() - start


Disturb = Callable[[Sequence[subprocess.Popen], Path], None]


def start_processes(command: list[str], count: int, devices: int, workdir: Path) -> list[subprocess.Popen]:
    """The processes of one run; they write to WORKDIR.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    started = []
    with Path(f"{workdir}.txt").open("a") as output:
        for index in range(count):
            place = (f"--coordinator={coordinator}", f"--num_processes={count}", f"--process_id={index}")
            more = place if count > 1 else ()
            started.append(
                subprocess.Popen([*command, *more], env=environment, stdout=output, stderr=output, cwd=ROOT)
            )
    return started


def stop_at_random(processes: Sequence[subprocess.Popen], workdir: Path) -> None:
    """Once there are steps, stop the second process for up to two seconds, every now and then."""
    if rows_of(workdir) and random.random() < 0.2 and processes[1].poll() is None:
        processes[1].send_signal(signal.SIGSTOP)
        time.sleep(random.uniform(0.2, 2))
        processes[1].send_signal(signal.SIGCONT)


class StopOnce:
    """SIGTERM to the last process, after so many steps."""

    def __init__(self, step: int):
        self.step, self.sent = step, False

    def __call__(self, processes: Sequence[subprocess.Popen], workdir: Path) -> None:
        if not self.sent and max(rows_of(workdir), default=0) >= self.step:
            processes[-1].send_signal(signal.SIGTERM)
            self.sent = True


def rows_of(workdir: Path) -> Rows:
    """The metrics of a run by step, without those that are no results."""
    from jaxllm.training.metrics import read_metrics

    found: Rows = {}
    for row in read_metrics(workdir / "metrics.jsonl"):
        named = {
            name: x for name, x in row.items() if isinstance(x, float) and not name.startswith(NO_RESULTS)
        }
        found.setdefault(row["step"], {}).update(named)
    return found


def column(rows: Rows, name: str) -> dict[int, float]:
    """A metric by step."""
    return {step: row[name] for step, row in rows.items() if name in row}


def largest_difference(rows: Rows, others: Rows, name: str) -> float:
    """Of a metric, over all steps."""
    ours, theirs = column(rows, name), column(others, name)
    if ours.keys() != theirs.keys():
        sys.exit(f"{name} is logged at other steps: {sorted(ours)} and {sorted(theirs)}")
    return max(abs(x - theirs[step]) for step, x in ours.items())


def weight_difference(workdir: Path, other: Path) -> float:
    """The largest difference of a final weight, as a fraction of the largest weight of its array."""
    import jax
    import numpy as np

    from jaxllm.runs.checkpoints import load_checkpoint

    def difference(x: Any, y: Any) -> float:
        x, y = np.asarray(x), np.asarray(y)
        return float(abs(x - y).max() / abs(y).max())

    ours, theirs = (load_checkpoint(each).params for each in (workdir, other))
    return max(jax.tree.leaves(jax.tree.map(difference, ours, theirs)))


def table_row(runs: Runs, stage: str, name: object, label: str) -> str:
    """A run against that of one process."""
    from configs.smoke import get_config
    from jaxllm.stages import find_stage

    workdir, one = runs.workdir(stage, name), runs.workdir(stage, 1)
    rows, others = rows_of(workdir), rows_of(one)
    names = sorted({name for row in others.values() for name in row})
    headline = find_stage(get_config(stage).stage).headline.metric
    if headline not in names:  # GRPO's pass@1, which needs a reward of 1
        headline = "reward/mean"
    differences = {each: largest_difference(rows, others, each) for each in names}
    scales = {each: max(map(abs, column(others, each).values())) or 1.0 for each in names}
    worst = max(names, key=lambda each: differences[each] / scales[each])
    cells = (
        stage,
        label,
        f"{differences[LOSS]:.1e}",
        f"`{headline}` {differences[headline]:.1e}",
        f"`{worst}` {differences[worst] / scales[worst]:.1e}",
        f"{weight_difference(workdir, one):.1e}",
    )
    return f"| {' | '.join(cells)} |"


def draw(runs: Runs, file: Path) -> None:
    """The loss of each stage, one curve a run: thick and light below, thin and dark above."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "jaxllm"  # the same file for the same runs
    styles: dict[Any, dict[str, Any]] = {
        1: {"color": "#b9cfe6", "linewidth": 8, "label": "1 process x 4 devices"},
        2: {"color": "#c05a2b", "linewidth": 3.5, "label": "2 x 2"},
        4: {"color": "#1d2f45", "linewidth": 1.2, "label": "4 x 1"},
        SLOW: {"color": "#2b8a57", "marker": "o", "markersize": 4, "linestyle": "none", "label": SLOW},
        CONTINUED: {"color": "#8a2b7d", "marker": "x", "linestyle": "none", "label": CONTINUED},
    }
    figure, grid = pyplot.subplots(2, 3, figsize=(9.6, 5.2), layout="constrained")
    for stage, axes in zip(PARENTS, grid.flat, strict=True):
        for name, style in styles.items():
            if loss := column(rows_of(runs.workdir(stage, name)), LOSS):
                axes.plot(list(loss), list(loss.values()), **style)
        axes.set(title=stage, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/processes"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "processes.svg")
    options = parser.parse_args()
    runs = Runs(options.workdir.absolute(), options.steps)
    runs.folder.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    seconds = {}
    for stage in PARENTS:
        for count in COUNTS:
            seconds[stage, count] = runs.run(stage, count)
            print(f"{stage} on {count}: {seconds[stage, count]:.0f} s", file=sys.stderr, flush=True)
    slow = runs.run("pretrain", 2, SLOW, stop_at_random)
    runs.run("pretrain", 2, CONTINUED, StopOnce(options.steps // 4), exit_code=75)
    runs.run("pretrain", 4, CONTINUED)
    print("| stage | processes x devices | loss | headline | worst metric, relative | weights, relative |")
    print("|---|---|---|---|---|---|")
    for stage in PARENTS:
        for count in COUNTS[1:]:
            print(table_row(runs, stage, count, f"{count} x {DEVICES // count}"))
    for name in (SLOW, CONTINUED):
        print(table_row(runs, "pretrain", name, name))
    print(f"\nseconds of pretraining on 2: {seconds['pretrain', 2]:.0f}, one of them stopped: {slow:.0f}")
    draw(runs, options.picture)


if __name__ == "__main__":
    main()
