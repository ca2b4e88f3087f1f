"""Fit a scaling law to finished runs: print it, and draw it into scaling.svg.

    python experiments/scaling.py runs/isoflops
    python experiments/scaling.py runs/math --metric=eval/sampled_reward

Several runs, or a sweep (configs/isoflops.py is one): the model size that is best for a compute budget, from
losses at equal FLOPs. One run: a metric against its compute, as a sigmoid. Both with 95% intervals. The
picture needs an extra: pip install 'jaxllm[plot]'.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.command_line import define_run_flags, runs_as_flags
from jaxllm.config import check_local, run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    define_run_flags(flag_values)
    flags.DEFINE_string("metric", None, "what is fitted; eval/loss for several runs", flag_values=flag_values)
    flags.DEFINE_string("output", "scaling.svg", "file for the picture", flag_values=flag_values)


def main(_: None, flags: "FlagValues") -> None:
    """Fit, print and draw."""
    from jaxllm.files import write_file
    from jaxllm.report import check_extra
    from jaxllm.report.laws import reward_law, size_law
    from jaxllm.report.runs import read_trials

    check_extra()
    for run in flags.run:
        check_local(run, "--run")
    runs = read_trials([Path(run) for run in flags.run])
    if len(runs) == 1 and flags.metric is None:
        raise ConfigError("--metric=NAME is missing: what to fit to one run, such as eval/sampled_reward")
    law = reward_law(runs[0], flags.metric) if len(runs) == 1 else size_law(runs, flags.metric or "eval/loss")
    output = Path(flags.output).expanduser().absolute()
    try:
        write_file(output, law.svg)
    except OSError as error:
        raise ConfigError(f"--output={flags.output}: {error.strerror}") from None
    print(f"{law.text}\n\n{output}")


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags, runs_as_flags(sys.argv)))
