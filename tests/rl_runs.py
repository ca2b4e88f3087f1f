"""Small RL runs for the tests, trained in this process, and readers of what they write."""

import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tiny_runs import parse_config

from jaxllm.runs.train import train
from jaxllm.stages import find_stage
from jaxllm.training.checkpoint import read_arrays
from jaxllm.training.metrics import read_metrics
from jaxllm.training.step_folder import find_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = {
    "sft": "sft_chat.py",
    "reward_model": "reward_model_pairs.py",
    "ppo": "ppo_preferences.py",
    "grpo": "grpo_problems.py",
}
TINY = {
    "model.num_layers": 1,
    "data.sequence_length": 32,
    "optimizer.warmup_steps": 0,
    "mesh.data": -1,
}
STAGES = {
    "sft": {
        "training.steps": 30,
        "training.evaluate_every": 0,
        "training.sample_every": 0,
        "training.checkpoint_every": 0,
        "checkpoint.best_metric": None,
    },
    "reward_model": {
        "data.batch_size": 8,
        "training.steps": 4,
        "training.evaluate_every": 4,
        "training.checkpoint_every": 4,
        "optimizer.learning_rate": 1e-2,
    },
}
ROLLOUTS = {  # 4 iterations of 2 updates on 16 completions
    "data.batch_size": 8,
    "rollout.num_prompts": 4,
    "rollout.group_size": 4,
    "rollout.epochs": 1,
    "rollout.num_minibatches": 2,
    "rollout.sampling.max_new_tokens": 6,
    "sample.sampling.max_new_tokens": 6,
    "training.steps": 8,
    "training.log_every": 2,
    "training.evaluate_every": 4,
    "training.sample_every": 0,
    "training.checkpoint_every": 4,
    "evaluation.max_rows": 4,
    "optimizer.learning_rate": 1e-2,
}
STAGES |= {"ppo": ROLLOUTS | {"data.validation": ()}, "grpo": ROLLOUTS | {"data.validation": ()}}


REWARDS = """
def vowels(example, completion):
    assert "prompt" in example
    return sum(c in "aeiou" for c in completion) / max(1, len(completion))
"""


def settings(stage, **changes):
    """Fields of a small run and their values as on a command line; `a__b=c` sets the field a.b."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: str(value) for name, value in (TINY | STAGES[stage] | changes).items()}


def make_config(stage, **changes):
    """The config of a small run."""
    return parse_config(f"{FILES[stage]}:tiny", settings(stage, **changes))


def run(config, workdir, *, init_from=None, devices=1):
    """Train on the first `devices` devices. Returns the run folder."""
    train(
        find_stage(config.stage),
        config,
        workdir=str(workdir),
        init_from=init_from and str(init_from),
        command=["train.py"],
        devices=jax.devices()[:devices],
    )
    return workdir


def rows_of(workdir):
    """The metrics by step, without times."""
    return {
        row.pop("step"): {name: x for name, x in row.items() if not name.startswith(("perf/", "time/"))}
        for row in read_metrics(workdir / "metrics.jsonl")
    }


def arrays_of(workdir, prefix="", step=None):
    """name -> bytes of the arrays whose names start with `prefix`; of the last step, or of `step`."""
    saved = read_all(checkpoint_of(workdir, step))
    return {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}


def metadata_of(workdir, step=None):
    """metadata.json of a checkpoint."""
    return json.loads((checkpoint_of(workdir, step) / "metadata.json").read_text())


def checkpoint_of(workdir, step=None):
    return find_checkpoint(workdir if step is None else workdir / "checkpoints" / str(step))


def read_all(folder):
    """name -> bytes of every array of a step folder."""
    abstract = {}
    for name, text in json.loads((folder / "arrays.json").read_text()).items():
        dtype, _, shape = text.rstrip("]").partition("[")
        dtype = jax.random.key(0).dtype if dtype.startswith("key<") else jnp.dtype(dtype)
        abstract[name] = jax.ShapeDtypeStruct([int(n) for n in shape.split(",") if n], dtype)
    arrays = read_arrays(folder, abstract)
    return {
        name: np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ).tobytes()
        for name, x in arrays.items()
    }


def write_rows(folder):
    """Write a file of rows of random words for every stage, and a file of rewards."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeiounrstlk", k=draw.randrange(2, 8))) for _ in range(60)]

    def text(shortest, longest):
        return " ".join(draw.choices(words, k=draw.randrange(shortest, longest)))

    rows = {
        "sft": [{"prompt": text(1, 5), "completion": text(1, 3)} for _ in range(150)],
        "reward_model": [
            {"prompt": text(1, 4), "chosen": text(1, 3), "rejected": text(3, 5)} for _ in range(60)
        ],
        "prompts": [{"prompt": text(1, 5), "answer": str(i)} for i in range(60)],
    }
    (folder / "mine.py").write_text(REWARDS)
    for name, records in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def make_policy(folder):
    """Write rows and rewards, and train a policy that ends its completions. Returns its run folder."""
    write_rows(folder)
    return run(make_config("sft", data__train=folder / "sft.jsonl"), folder / "policy")
