"""Check the machines and processes of a run before it: devices, versions, disks, clocks, data, speed.

python experiments/doctor.py --workdir=runs --tokenizer=tokenizer.json --data=train.jsonl
srun python experiments/doctor.py --workdir=/shared/runs       # in all processes, as in training

Prints a table, the time of a matrix product and of an all-reduce, and every problem with what to do; the exit
code is 1 if there is one. --workdir is the folder of run folders, which all processes must share.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.command_line import define_process_flags
from jaxllm.config import run_script

if TYPE_CHECKING:
    from absl.flags import FlagValues


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    where = {"flag_values": flag_values}
    flags.DEFINE_string("workdir", None, "folder that all processes must share", **where)
    flags.DEFINE_list("folders", [], "further folders that they must share", **where)
    flags.DEFINE_string("tokenizer", None, "tokenizer that must be the same in all processes", **where)
    flags.DEFINE_list("data", [], "sources that must be the same in all processes", **where)
    define_process_flags(flag_values)


def main(_: None, flags: "FlagValues") -> int:
    """Check, print, and return the exit code."""
    from jaxllm.parallel.processes import joined
    from jaxllm.runs.doctor import diagnose
    from jaxllm.runs.process import set_up_process

    folders = [*([flags.workdir] if flags.workdir else []), *flags.folders]
    with joined(flags.coordinator, flags.num_processes, flags.process_id):
        set_up_process()
        return min(1, diagnose(folders, flags.tokenizer, flags.data))


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
