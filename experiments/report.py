"""Report on runs: curves, figures, cost, lineage and commands, in one HTML file that works offline.

    python experiments/report.py runs/quickstart
    python experiments/report.py runs/seed0 runs/seed1 runs/seed2 --output=runs/seeds

A run is the folder of one, or of a pipeline. Several are compared: what was set otherwise, and whether their
held-out figures differ by more than chance. Writes report.html and report.md into the folder of the run, or
for several into `report/`. The pictures need an extra: pip install 'jaxllm[plot]'.
"""

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.config import run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    flags.DEFINE_multi_string(
        "run", [], "a run's folder; the same as without --run=", flag_values=flag_values
    )
    flags.DEFINE_string("output", None, "folder to write the report into", flag_values=flag_values)


def main(_: None, flags: "FlagValues") -> None:
    """Write the report and say where it is."""
    from jaxllm.report import write_report

    if not flags.run:
        raise ConfigError("give a run's folder, or several: python experiments/report.py runs/quickstart")
    runs = [Path(run).expanduser() for run in flags.run]
    folder = runs[0] if len(runs) == 1 else Path("report")
    print(write_report(runs, folder if flags.output is None else Path(flags.output).expanduser()))


def runs_as_flags(argv: list[str]) -> list[str]:
    """RUN as --run=RUN, but for what follows a flag that waits for its value."""
    waiting = {"--run", "-run", "--output", "-output"}
    return argv[:1] + [
        argument if argument.startswith("-") or before in waiting else f"--run={argument}"
        for before, argument in itertools.pairwise(argv)
    ]


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags, runs_as_flags(sys.argv)))
