"""Full fine-tuning against adapters on the quickstart's SFT: held-out loss, seconds a step, memory.

    python benchmarks/lora.py --init_from=runs/quickstart/pretrain --workdir=runs/lora [--ranks=4,16,64]

Each row is a run of experiments/train.py in a process of its own, with its own learning rates; the best by
held-out loss is shown. Bytes of state: parameters that train, frozen ones, optimizer, by the dry run.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxllm.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RATES = {"full": ("2e-3",), "adapters": ("2e-3", "4e-3", "8e-3")}


def train(workdir: Path, init_from: str, flags: list[str]) -> dict[str, float]:
    """Held-out loss, its standard error, tokens a second, of a run."""
    command = [sys.executable, "experiments/train.py", "--config=configs/quickstart.py:sft"]
    command += [f"--init_from={init_from}", *flags]
    dry = subprocess.run([*command, "--dry_run"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    subprocess.run([*command, f"--workdir={workdir}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = read_metrics(workdir / "metrics.jsonl")
    evaluated = [row for row in rows if "eval/loss" in row]
    best = min(evaluated, key=lambda row: row["eval/loss"])
    seconds = sorted(row["perf/step_time"] for row in rows if "perf/step_time" in row)
    state = [
        float(x)
        for x in re.findall(r"state: ([\d.]+) GB trained.*\+ ([\d.]+) GB f.*\+ ([\d.]+) GB o", dry)[0]
    ]
    checkpoint = max((workdir / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return {
        "loss": best["eval/loss"],
        "error": best["eval/loss_se"],
        "seconds": seconds[len(seconds) // 2],
        "state": sum(state),
        "checkpoint": size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init_from", required=True, help="the quickstart's pretrained run")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--ranks", default="4,16,64")
    args = parser.parse_args()
    cases = {"full": ([], RATES["full"])}
    for rank in args.ranks.split(","):
        lora = [f"--config.model.lora.rank={rank}", f"--config.model.lora.alpha={2 * int(rank)}"]
        cases[f"rank {rank}"] = (lora, RATES["adapters"])
    print("| | learning rate | held-out loss, nats a token | s a step | GB of state | MB of checkpoint |")
    print("|---|---|---|---|---|---|")
    for name, (flags, rates) in cases.items():
        found = {}
        for rate in rates:
            folder = args.workdir / f"{name.replace(' ', '_')}_{rate}"
            found[rate] = train(folder, args.init_from, [*flags, f"--config.optimizer.learning_rate={rate}"])
        rate = min(found, key=lambda rate: found[rate]["loss"])
        row = found[rate]
        print(
            f"| {name} | {rate} | {row['loss']:.3f} ± {row['error']:.3f} | {row['seconds']:.3f} | "
            f"{row['state']:.4f} | {row['checkpoint']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
