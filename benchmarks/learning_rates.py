"""Whether the best learning rate of one model size is that of another: the table of docs/scaling.md.

    python experiments/sweep.py --config=configs/learning_rates.py --workdir=runs/rates
    python benchmarks/learning_rates.py runs/rates

takes the folder of the sweep, or several of runs. The best rate is the lowest point of a parabola in the
logarithm of the rate, one for each seed; intervals are of the mean over seeds, 95%, by Student's t.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.polynomial import Polynomial

from jaxllm.report.estimates import Estimate, difference, over_seeds
from jaxllm.report.runs import Run, read_trials

Losses = dict[float, float]  # by learning rate


def setting(run: Run) -> tuple[int, int, bool]:
    """Layers, width, and whether the rates follow them."""
    model, optimizer = run.config["model"], run.config["optimizer"]
    return model["num_layers"], model["width"], optimizer["base_width"] is not None


def best(losses: Losses) -> tuple[float, Callable[[float], float]]:
    """The base-2 logarithm of the best rate, and the parabola of the loss."""
    curve = Polynomial.fit(np.log2(list(losses)), list(losses.values()), 2).convert()
    _, slope, curvature = curve.coef
    if curvature <= 0:
        raise SystemExit(f"error: the losses {losses} have no lowest point between the rates: try others")
    return -slope / (2 * curvature), curve


def mean(values: Iterable[float]) -> Estimate:
    """The mean over seeds, with the standard error from their spread."""
    return over_seeds([Estimate(value, 0.0) for value in values])


def interval(values: Iterable[float]) -> tuple[float, float, float]:
    """The mean over seeds, and the ends of its interval."""
    value, half = difference(Estimate(0.0, 0.0), mean(values))
    return value, value - half, value + half


def name(layers: int, width: int, follows: bool) -> str:
    """A model, in words."""
    return f"{layers} layers of {width}{', rates follow its size' if follows else ''}"


def main() -> None:
    """Print the table, and how far each model's best rate and losses are from those of the smallest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    found: dict[tuple[int, int, bool], dict[int, Losses]] = defaultdict(lambda: defaultdict(dict))
    for run in read_trials(parser.parse_args().runs):
        if (loss := run.last("eval/loss")) is None:
            raise SystemExit(f"error: {run.folder} has no eval/loss yet: finish the sweep first")
        rate = run.config["optimizer"]["learning_rate"]
        found[setting(run)][run.config["seed"]][rate] = loss.value
    smallest = min(found)
    seeds = sorted(found[smallest])
    rates = sorted(found[smallest][seeds[0]])
    if len(seeds) < 2 or any(sorted(model.get(s, ())) != rates for model in found.values() for s in seeds):
        raise SystemExit("error: each model needs the same rates for each of two or more seeds")
    curves = {key: [best(model[seed]) for seed in seeds] for key, model in found.items()}
    print(f"| model | {' | '.join(f'{rate:g}' for rate in rates)} | best rate |")
    print("|---" * (len(rates) + 2) + "|")
    for key, model in sorted(found.items()):
        losses = [mean(model[seed][rate] for seed in seeds) for rate in rates]
        cells = " | ".join(f"{loss.value:.3f} ± {loss.error:.3f}" for loss in losses)
        print(f"| {name(*key)} | {cells} | {2 ** mean(log_rate for log_rate, _ in curves[key]).value:.4f} |")
    lowest = {key: [curve(log_rate) for log_rate, curve in model] for key, model in curves.items()}
    for key in sorted(set(found) - {smallest}):
        pairs = list(zip(curves[smallest], curves[key], strict=True))
        ratio = [2**each for each in interval([base - own for (base, _), (own, _) in pairs])]
        worse = interval([curve(base) - curve(own) for (base, _), (own, curve) in pairs])
        print(f"\n{name(*key)}:")
        print("  best rate of the smallest / its own: {:.2f} ({:.2f} to {:.2f})".format(*ratio))
        print("  loss at that rate above its own best: {:.3f} ({:.3f} to {:.3f})".format(*worse))
        if key[2] and (plain := (*key[:2], False)) in lowest:
            gain = interval(a - b for a, b in zip(lowest[plain], lowest[key], strict=True))
            print("  best loss below that of plain rates: {:.3f} ({:.3f} to {:.3f})".format(*gain))


if __name__ == "__main__":
    main()
