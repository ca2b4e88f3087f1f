"""The pictures of the README, from the folder of a finished quickstart.

    python docs/pictures.py --workdir=runs/quickstart

writes docs/images/report.png, a screenshot of the top of the report by a headless Chromium or Chrome, and
docs/images/reasoning.svg, the curve of the GRPO stage.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from jaxllm.training.metrics import read_metrics

IMAGES = Path(__file__).parent / "images"
WINDOW = "1200,1500"  # pixels of the screenshot
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/quickstart"))
    workdir = parser.parse_args().workdir.absolute()
    IMAGES.mkdir(exist_ok=True)
    draw_curve(workdir / "grpo", IMAGES / "reasoning.svg")
    take_screenshot(workdir / "report.html", IMAGES / "report.png")


def draw_curve(run: Path, file: Path) -> None:
    """The mean reward of the rollouts, and pass@1 on held-out problems with its standard error."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "jaxllm"  # the same file for the same run
    rows = read_metrics(run / "metrics.jsonl")
    rollouts = [row for row in rows if "reward/mean" in row]
    held_out = [row for row in rows if "eval/sampled_pass@1" in row]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.plot(
        [row["step"] for row in rollouts],
        [row["reward/mean"] for row in rollouts],
        color="#3b6ea8",
        label="mean reward of a rollout (training problems)",
    )
    axes.errorbar(
        [row["step"] for row in held_out],
        [row["eval/sampled_pass@1"] for row in held_out],
        yerr=[row["eval/sampled_pass@1_se"] for row in held_out],
        color="#c05a2b",
        marker="o",
        linestyle="none",
        capsize=3,
        label="pass@1 on held-out problems, ± standard error",
    )
    axes.set(xlabel="GRPO updates", ylabel="fraction correct", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(file, metadata={"Date": None})


def take_screenshot(page: Path, file: Path) -> None:
    """The top of a page, as a browser shows it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"no browser for the screenshot: install one of {', '.join(BROWSERS)}")
    options = ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={WINDOW}")
    command = [browser, *options, f"--screenshot={file}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
