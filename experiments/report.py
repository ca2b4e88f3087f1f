"""Write a report on runs: curves, metrics, cost, lineage and commands, in one HTML file that works offline.

    python experiments/report.py runs/quickstart
    python experiments/report.py runs/seed0 runs/seed1 runs/seed2 --output=runs/seeds

Each argument is the folder of a run, of a pipeline or of a sweep. Several runs are compared: which settings
differ, and whether held-out metrics differ by more than chance. report.html and report.md are written into
the folder, or into `report/` for several; of a sweep, report.csv too. The report needs an extra:
pip install 'jaxllm[plot]'.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.command_line import define_run_flags, runs_as_flags
from jaxllm.config import run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    define_run_flags(flag_values)
    flags.DEFINE_string("output", None, "folder to write the report into", flag_values=flag_values)
    text = "of a sweep: compare its trials by this metric, not by the one that it was run for"
    flags.DEFINE_string("metric", None, text, flag_values=flag_values)
    flags.DEFINE_enum(
        "goal", None, ["lowest", "highest"], "which values of --metric are better", flag_values=flag_values
    )


def main(_: None, flags: "FlagValues") -> None:
    """Write the report and print where it is."""
    from jaxllm.files import is_url
    from jaxllm.report import write_report, write_sweep_report
    from jaxllm.store import local_copy

    if not flags.run:
        raise ConfigError(
            "no run given; pass one or more folders: python experiments/report.py runs/quickstart"
        )
    runs = [local_copy(run) for run in flags.run]
    folder = runs[0] if len(runs) == 1 and not is_url(flags.run[0]) else Path("report")
    folder = folder if flags.output is None else Path(flags.output).expanduser()
    if flags.metric is not None or flags.goal is not None:
        print(write_sweep_report(runs, folder, flags.metric, flags.goal))
    else:
        print(write_report(runs, folder))


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags, runs_as_flags(sys.argv)))
