"""The weights that a run begins with: random ones, or another run's."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxllm.runs.program import Program
from jaxllm.runs.config import TrainConfig
from jaxllm.config import as_dict
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.training.checkpoint import checkpoint_hash, find_checkpoint, read_arrays
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import merge_params

SHAPE = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")


class InitialWeights(NamedTuple):
    """The weights that a run begins, or began, with."""

    parent: Path | None  # the checkpoint they are from; None: they are random
    hash: str
    params: Callable[[], Any]  # the weights themselves, laid out as the run's


def starting_point(program: Program, folder: RunFolder, init_from: str | None) -> InitialWeights:
    """From --init_from; for a run that goes on, from what it wrote down then."""
    parent = None
    if init_from and not folder.resuming:
        try:
            parent = find_checkpoint(init_from)
        except CheckpointError as error:
            raise ConfigError(f"--init_from: {error}") from None
    digest = None if parent is None else checkpoint_hash(parent)
    if parent is not None:
        check_shape(program.config, parent, f"--init_from={init_from}")
        if stage_of(parent) == "reward_model" != program.config.stage:
            raise ConfigError(f"--init_from={init_from} is a reward model, which says nothing: give another")
    if folder.resuming and (record := json.loads(folder.file("run.json").read_bytes())["parent"]):
        parent, digest = Path(record["path"]), record["hash"]

    def params() -> Any:
        if parent is None:
            return program.fresh_state().params
        if folder.resuming and checkpoint_hash(find_checkpoint(parent)) != digest:
            raise CheckpointError(
                f"{parent} is not the checkpoint this run began with: its hash was {digest}"
            )
        return program.stage.initial_params(program, parent)

    return InitialWeights(parent, digest or f"seed {program.config.seed}", params)


def initial_params(program: Program, parent: Path, optional: Collection[str] = ()) -> Any:
    """The weights of a checkpoint. Those under `optional` names may be missing there, and are then fresh."""
    read = read_policy(parent, program.placed_state.params, optional)
    if jax.tree.structure(read) == jax.tree.structure(program.placed_state.params):
        return read
    return merge_params(read, program.fresh_state().params)


def read_policy(folder: Path, wanted: Any, optional: Collection[str] = ()) -> Any:
    """The weights of the model that speaks: PPO's checkpoints have a critic beside it."""
    prefix = "params/policy" if stage_of(folder) == "ppo" else "params"
    return read_arrays(folder, wanted, prefix=prefix, optional=optional)


def stage_of(folder: Path) -> str:
    """The stage that made a checkpoint."""
    return json.loads((folder / "config.json").read_bytes())["stage"]


def check_shape(config: TrainConfig, folder: Path, name: str) -> None:
    """ConfigError where the weights of a checkpoint, `name` to the user, are of another size."""
    given = json.loads((folder / "config.json").read_bytes())["model"]
    here = as_dict(config)["model"]
    pairs = [(field, given[field], here[field]) for field in SHAPE]
    found = [f"{field} {theirs} -> {ours}" for field, theirs, ours in pairs if theirs != ours]
    if found:
        raise ConfigError(
            f"{name} is a model of another size: {', '.join(found)}; give the config that size "
            f"(--config=FILE.py:SIZE)"
        )
