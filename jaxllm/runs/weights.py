"""The weights at step 0 of a run: random ones, or those of another run."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxllm.config import as_dict
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.files import is_hf_folder
from jaxllm.models import Params
from jaxllm.models.config import HOW
from jaxllm.models.hf import load_hf_config
from jaxllm.runs.checkpoints import check_generates, read_config, read_kind, read_policy
from jaxllm.runs.config import TrainConfig
from jaxllm.runs.context import InitialWeights
from jaxllm.runs.program import Program
from jaxllm.runs.stage import Stage
from jaxllm.training.checkpoint import checkpoint_hash, find_checkpoint
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import merge_params

ConfigT = TypeVar("ConfigT", bound=TrainConfig)

SHAPE = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")


def initial_weights(
    stage: Stage, program: Program[Any, Any], folder: RunFolder, init_from: str | None
) -> InitialWeights:
    """From --init_from or, for a run that resumes, from what it recorded at its start."""
    parent = None
    if init_from and not folder.resuming:
        try:
            parent = find_checkpoint(init_from)
        except CheckpointError as error:
            raise ConfigError(f"--init_from: {error}") from None
    digest = None if parent is None else checkpoint_hash(parent)
    if parent is not None:
        check_shape(program.config, parent, f"--init_from={init_from}")
        if stage.generates:
            check_generates(read_kind(parent), f"--init_from={init_from}")
    if folder.resuming and (record := folder.record["parent"]):
        parent, digest = Path(record["path"]), record["hash"]

    def params() -> Params:
        if parent is None:
            return program.fresh_state().params
        found = parent
        if folder.resuming:
            # It may have moved to where --init_from says now.
            found = find_checkpoint(init_from if init_from and not parent.exists() else parent)
            if checkpoint_hash(found) != digest:
                raise CheckpointError(
                    f"{found} is not the checkpoint that this run was initialized from: the hash was {digest}"
                )
        return stage.initial_params(program, found)

    return InitialWeights(parent, digest or f"seed {program.config.seed}", params)


def initial_params(program: Program[Any, Any], parent: Path, optional: Collection[str] = ()) -> Params:
    """The weights of a checkpoint. Those under `optional` names may be missing there, and are then fresh."""
    read = read_policy(parent, program.placed_state.params, optional)
    if jax.tree.structure(read) == jax.tree.structure(program.placed_state.params):
        return read
    return merge_params(read, program.fresh_state().params)


def with_model_of(config: ConfigT, init_from: str | None) -> ConfigT:
    """The config, with the model of --init_from where that is one of Hugging Face. How it is computed
    (dtypes, remat, attention) stays as the config says."""
    if init_from is None or not is_hf_folder(init_from):
        return config
    model = load_hf_config(Path(init_from).expanduser())
    how = {name: getattr(config.model, name) for name in HOW}
    return replace(config, model=replace(model, **how))


def check_shape(config: TrainConfig, folder: Path, name: str) -> None:
    """ConfigError where the weights of a checkpoint, `name` to the user, are of another size."""
    given, here = read_config(folder)["model"], as_dict(config)["model"]
    pairs = [(field, given[field], here[field]) for field in SHAPE]
    found = [f"{field} {theirs} -> {ours}" for field, theirs, ours in pairs if theirs != ours]
    if found:
        raise ConfigError(
            f"{name} is a model of another size: {', '.join(found)}; give the config that size "
            f"(--config=FILE.py:SIZE)"
        )
