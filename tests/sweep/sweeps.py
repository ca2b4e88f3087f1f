"""Helpers: sweeps whose trials are a small script in place of experiments/train.py."""

import json

from configs.sweep_pretrain import get_config
from jaxllm.config import as_dict, parse
from jaxllm.stages.pretrain import Config
from jaxllm.sweep.goal import Goal
from jaxllm.sweep.record import Sweep
from jaxllm.sweep.trials import Base, make_trials

RATE = "optimizer.learning_rate"
LOSS = Goal("eval/loss", highest=False)

CONFIG = "from configs.sweep_pretrain import get_config\nfrom jaxllm.sweep import grid, seeds\n"

# Logs a loss that is the learning rate at each step, and does what PLAN (a JSON file beside it) says for its
# learning rate: an exit code for each start, the last one for all that follow; null: run until it is stopped.
SCRIPT = """
import json, os, pathlib, signal, sys, time
flags = dict(each.lstrip("-").split("=", 1) for each in sys.argv[1:])
rate, folder = flags["config.optimizer.learning_rate"], pathlib.Path(flags["workdir"])
folder.mkdir(parents=True, exist_ok=True)
starts = folder / "starts.jsonl"
with starts.open("a") as file:
    print(json.dumps({"cores": sorted(os.sched_getaffinity(0))}), file=file)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with (folder / "metrics.jsonl").open("a") as file:
    for step in (0, 10, 20):
        row = {"step": step, "eval/loss": float(rate), "eval/loss_se": 0.01}
        print(json.dumps(row), file=file, flush=True)
plan = json.loads((pathlib.Path(__file__).parent / "plan.json").read_text()).get(rate, [0])
code = plan[min(len(starts.read_text().splitlines()), len(plan)) - 1]
if code is None:
    time.sleep(60)
if code:
    print("error: as planned")
sys.exit(code)
"""


def write_config(folder, body, name="config.py"):
    """A config file with this sweep() or search()."""
    file = folder / name
    file.write_text(CONFIG + body)
    return str(file)


def write_script(folder, **plan):
    """The script in place of train.py; `plan` is by learning rate, as in r0_1=[0]."""
    named = {rate.removeprefix("r").replace("_", "."): codes for rate, codes in plan.items()}
    (folder / "plan.json").write_text(json.dumps(named))
    (folder / "train.py").write_text(SCRIPT)
    return folder / "train.py"


def make_base(folder, body="def sweep(): return []\n", **plan):
    """What the trials of a config file share; their process is SCRIPT."""
    return Base(write_config(folder, body), Config, {}, write_script(folder, **plan), {})


def make_sweep(folder, base, overrides):
    """A sweep in `folder` of these trials."""
    folder.mkdir(exist_ok=True)
    config = as_dict(parse(Config, get_config()))
    return Sweep(folder, base.config_file, "command", LOSS, config, {}, make_trials(base, overrides)[0])


def starts(sweep, trial):
    """What the script wrote down each time that it was started."""
    return [
        json.loads(line) for line in (sweep.folder / trial.name / "starts.jsonl").read_text().splitlines()
    ]
