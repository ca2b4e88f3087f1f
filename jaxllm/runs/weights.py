"""The weights at step 0 of a run: random ones, or those of another run."""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxllm.config import as_dict, differences, first_few
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.files import is_hf_folder, is_peft_folder, is_url
from jaxllm.models import Params
from jaxllm.models.config import HOW
from jaxllm.models.hf import check_hf
from jaxllm.models.lora import ADAPTERS, adapted_layers
from jaxllm.runs.checkpoints import (
    Base,
    check_generates,
    read_base,
    read_base_params,
    read_config,
    read_kind,
    read_model,
    read_policy,
)
from jaxllm.runs.config import TrainConfig
from jaxllm.runs.context import InitialWeights
from jaxllm.runs.program import Program
from jaxllm.runs.stage import Stage
from jaxllm.store import Store, local_copy, local_path
from jaxllm.training.run_folder import RunFolder
from jaxllm.training.state import TrainState, merge_params, split_params
from jaxllm.training.step_folder import (
    agree_on_checkpoint,
    checkpoint_hash,
    copy_with_config,
    find_checkpoint,
)

ConfigT = TypeVar("ConfigT", bound=TrainConfig)

SHAPE = ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")


def initial_weights(
    stage: Stage, program: Program[Any, Any], folder: RunFolder, init_from: str | None
) -> InitialWeights:
    """From --init_from or, for a run that resumes, from what it recorded at its start."""
    parent, base = None, None
    if init_from and not folder.resuming:
        try:
            parent = agree_on_checkpoint(init_from)
        except CheckpointError as error:
            raise ConfigError(f"--init_from: {error}") from None
        if is_hf_folder(parent):
            check_hf(parent)  # before its hash and the data are read
    digest = None if parent is None else checkpoint_hash(parent)
    if parent is not None:
        check_shape(program.config, parent, f"--init_from={init_from}")
        if stage.generates:
            check_generates(read_kind(parent), f"--init_from={init_from}")
        base = base_of(program.config, parent, f"--init_from={init_from}")
    if folder.resuming and (record := folder.record["parent"]):
        parent, digest = local_path(record["path"]), record["hash"]
        base = record_base(record, init_from)
    if parent is None and (rank := program.config.model.lora.rank) is not None:
        raise ConfigError(
            f"model.lora.rank={rank} needs --init_from: a run or a Hugging Face model, which adapters change"
        )

    def found() -> Path | None:
        if parent is None or not folder.resuming:
            return parent
        # It may have moved to where --init_from says now.
        found = find_checkpoint(init_from if init_from and not local_copy(parent).exists() else parent)
        if checkpoint_hash(found) != digest:
            raise CheckpointError(
                f"{found} is not the checkpoint that this run was initialized from: the hash was {digest}"
            )
        return found

    kept: list[Params] = []

    def params(keep: bool = False) -> Params:
        if kept:
            read = kept.pop()
        else:
            here = found()
            read = program.fresh_params() if here is None else stage.initial_params(program, here)
        kept.extend([read] * keep)
        return read

    return InitialWeights(parent, digest or f"seed {program.config.seed}", params, base)


def base_of(config: TrainConfig, parent: Path, name: str) -> Base | None:
    """What the adapters of a run belong to that is initialized from `parent`, `name` to the user: to that or,
    where that has adapters, with which the run's then begin, to its base. None for a run without adapters."""
    if config.model.lora.rank is None:
        return None
    base = read_base(parent)
    if base is None:
        return Base(parent, hash=None).hashed()
    given, here = read_model(parent).lora, config.model.lora
    fields = ["rank", "alpha", "rank_stabilized"]
    differ = [field for field in fields if getattr(given, field) != getattr(here, field)]
    if adapted_layers(given, config.model) != adapted_layers(here, config.model):
        differ.append("targets")
    if found := [f"{field} {getattr(given, field)} -> {getattr(here, field)}" for field in differ]:
        raise ConfigError(
            f"{name} has adapters that training continues with, and model.lora differs from theirs: "
            f"{', '.join(found)}; set these fields as there, or merge them first (experiments/convert.py "
            f"export)"
        )
    return base.hashed()


def record_base(record: Mapping[str, Any], init_from: str | None) -> Base | None:
    """The base of a run that resumes, which may have moved to where --init_from says."""
    if (base := record.get("base")) is None:
        return None
    path = local_copy(base["path"])
    if init_from and not path.exists() and base["path"] == record["path"]:
        path = find_checkpoint(init_from)
    return Base(path, base["hash"])


def with_frozen(stage: Stage, program: Program[Any, Any], state: TrainState, base: Base | None) -> TrainState:
    """A state as a checkpoint holds it (`Program.saved`), with the frozen parameters of its base."""
    if base is None:
        return state
    wanted, name = program.placed_state.params, stage.policy_prefix
    # All that the base has: what trains of it, such as the embedding, is then taken from the state.
    rest = split_params(wanted[name] if name else wanted, ADAPTERS)[1]
    policy = read_base_params(base, "this run", rest)
    params = jax.tree.map(lambda _: None, wanted) | {name: policy} if name else policy
    return state._replace(params=merge_params(state.params, params))


def initial_params(program: Program[Any, Any], parent: Path, optional: Collection[str] = ()) -> Params:
    """The weights of a checkpoint. Those under `optional` names may be missing there, and are then fresh, as
    are adapters."""
    return program.complete(read_policy(parent, program.placed_state.params, optional))


def check_init_from(init_from: str | None) -> None:
    """ConfigError where --init_from is neither a run nor a Hugging Face model."""
    if init_from is not None and folder_with_config(copy_with_config(init_from)) is None:
        raise ConfigError(f"--init_from={init_from} does not exist, or holds no config.json")


def with_model_of(config: ConfigT, init_from: str | None) -> ConfigT:
    """The config, with the model of --init_from. How it is computed (dtypes, remat, attention, adapters)
    stays as the config says."""
    if init_from is None or (folder := folder_with_config(copy_with_config(init_from))) is None:
        return config
    model = replace(read_model(folder), **{name: getattr(config.model, name) for name in HOW})
    return replace(config, model=model)


def run_with_parent(workdir: str) -> str | None:
    """The run folder itself, where it holds a run that was initialized from a checkpoint."""
    name = "run.json"
    try:
        content = Store(workdir).read(name) if is_url(workdir) else (local_path(workdir) / name).read_bytes()
        return workdir if json.loads(content)["parent"] else None
    except (OSError, ValueError, KeyError):  # no run yet; or one that `open_run` has more to say about
        return None


def model_note(config: TrainConfig, used: TrainConfig) -> str | None:
    """What of config.model is not used because --init_from has a model; None where nothing differs."""
    found = list(differences(as_dict(config)["model"], as_dict(used)["model"], "model"))
    return f"note: the model is that of --init_from: {first_few(found)}" if found else None


def folder_with_config(path: Path) -> Path | None:
    """Where a run, RUN/best, a step folder, a Hugging Face model or adapters have a config; None: nowhere."""
    places = (path, path.parent) if path.name in ("best", "checkpoints") else (path,)
    return next((x for x in places if (x / "config.json").exists() or is_peft_folder(x)), None)


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
