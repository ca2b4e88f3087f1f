"""Kill a synthesis at random moments: no row is lost, none is there twice, and every byte is the same.

    python benchmarks/synthesis_kills.py --workdir=runs/kills --kills=10 -- \
        --config=configs/synthesize.py --config.answers.model=runs/sft --config.judge.model=runs/reward

What follows `--` are flags of experiments/synthesize.py. One set is written without a kill, another is killed
after random times, each at most --longest seconds, until --kills kills have hit a running process; the last
start then finishes it.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "experiments" / "synthesize.py"
OUTPUTS = ("rows.jsonl", "sft.jsonl", "preferences.jsonl", "report.json", "README.md", "config.json")


def run(folder: Path, flags: list[str], seconds: float | None = None) -> bool:
    """Whether the script finished, before it was killed after so many seconds."""
    command = [sys.executable, str(SCRIPT), f"--workdir={folder}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    if code:
        sys.exit(f"{SCRIPT.name} ended with exit code {code}")
    return True


def numbers(folder: Path) -> list[int]:
    """The rows that a set holds, by the whole lines of its file."""
    file = folder / "rows.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [json.loads(line)["row"] for line in lines]


def main() -> None:
    """Write both sets and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--longest", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    draw, whole, killed = random.Random(args.seed), args.workdir / "whole", args.workdir / "killed"
    run(whole, args.flags)
    for kill in range(1, args.kills + 1):
        seconds = draw.uniform(1, args.longest)
        if run(killed, args.flags, seconds):
            sys.exit(f"finished before kill {kill}: give more rows or a shorter --longest")
        found = numbers(killed)
        assert found == list(range(len(found))), f"rows lost or doubled: {found}"
        print(f"kill {kill} after {seconds:.1f} s: {len(found)} rows", flush=True)
    run(killed, args.flags)
    same = {name: (whole / name).read_bytes() == (killed / name).read_bytes() for name in OUTPUTS}
    print(f"{len(numbers(killed))} rows; equal to the set without a kill: {same}")
    sys.exit(0 if all(same.values()) else 1)


if __name__ == "__main__":
    main()
