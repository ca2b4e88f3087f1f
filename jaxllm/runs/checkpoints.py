"""A trained model from its checkpoint: weights, tokenizer, chat template."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import optax

from jaxllm.config import as_dict, parse
from jaxllm.config_versions import upgrade
from jaxllm.data.base_tokenizer import HF_TOKENIZER_FILE
from jaxllm.data.chat_template import ChatTemplate, NativeTemplate, load_template
from jaxllm.data.hf_tokenizer import TEMPLATE_FILE as CHAT_TEMPLATE_FILE
from jaxllm.data.hf_tokenizer import has_chat_template
from jaxllm.data.tokenizer import BaseTokenizer, load_tokenizer
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.files import is_hf_folder
from jaxllm.models import Model, ModelConfig, Params, ScalarModel, build_model, build_scalar_model
from jaxllm.models.config import for_platform
from jaxllm.models.hf import fill_hf, is_reward_model, load_hf_config
from jaxllm.parallel.sharding import placed
from jaxllm.training.checkpoint import find_checkpoint, read_arrays
from jaxllm.training.state import init_state

TEMPLATE_FILE = "template.jinja"  # of a run whose conversations have another template than the tokenizer's


class ModelKind(NamedTuple):
    """What the parameters of a checkpoint are, whichever stage trained them: `metadata.json` says it."""

    generates: bool  # text; a reward model gives a number instead
    conversational: bool  # reads conversations, by a chat template
    policy_prefix: str  # where in the parameters the model stands; "" where they are one model


# What checkpoints were before their metadata said so (config.json without a version): by stage.
VERSION_1 = {
    "pretrain": ModelKind(generates=True, conversational=False, policy_prefix=""),
    "reward_model": ModelKind(generates=False, conversational=True, policy_prefix=""),
    "ppo": ModelKind(generates=True, conversational=True, policy_prefix="policy"),
}
VERSION_1 |= dict.fromkeys(("sft", "dpo", "grpo"), ModelKind(True, True, ""))


class LoadedModel(NamedTuple):
    """A model as a checkpoint holds it. One that generates is a Model, any other a ScalarModel."""

    folder: Path
    kind: ModelKind
    model: Any
    params: Params
    tokenizer: BaseTokenizer
    metadata: dict[str, Any]

    @property
    def generates(self) -> bool:
        return self.kind.generates

    @property
    def conversational(self) -> bool:
        return self.kind.conversational


T = TypeVar("T", LoadedModel, ModelKind)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a run or of a step folder, under today's names whichever version wrote it; of a Hugging
    Face model, that of the model alone."""
    if is_hf_folder(folder):
        return {"model": as_dict(load_hf_config(folder)), "seed": 0}
    try:
        return upgrade(json.loads((folder / "config.json").read_bytes()))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def read_metadata(folder: Path) -> dict[str, Any]:
    """What a run saved with the arrays of a step folder; nothing in a Hugging Face model."""
    return {} if is_hf_folder(folder) else json.loads((folder / "metadata.json").read_bytes())


def read_kind(folder: Path) -> ModelKind:
    """What the parameters of a step folder are."""
    if is_hf_folder(folder):
        in_config = (folder / HF_TOKENIZER_FILE).exists() and has_chat_template(folder)
        conversational = in_config or (folder / CHAT_TEMPLATE_FILE).exists()
        return ModelKind(not is_reward_model(folder), conversational, policy_prefix="")
    metadata = read_metadata(folder)
    if "model" in metadata:
        return ModelKind(**metadata["model"])
    return VERSION_1[read_config(folder)["stage"]]


def read_policy(folder: Path, wanted: Any, optional: Collection[str] = ()) -> Params:
    """The parameters of the model in a step folder that generates or scores: PPO's hold a critic besides.

    `wanted` and `optional` are as in `read_arrays`.
    """
    if is_hf_folder(folder):
        return fill_hf(folder, wanted, optional)
    prefix = "/".join(filter(None, ("params", read_kind(folder).policy_prefix)))
    return cast(Params, read_arrays(folder, wanted, prefix=prefix, optional=optional))


def load_checkpoint(
    path: str | Path | None, mesh: jax.sharding.Mesh | None = None, *, untrained: bool = False
) -> LoadedModel:
    """The newest valid checkpoint of a run folder (RUN/best: its best), on a mesh or the first device.

    Of PPO's two models this is the policy. `untrained`: the random weights at step 0 of a run with this
    config and no --init_from.
    """
    if path is None:
        raise ConfigError("--checkpoint=RUN_FOLDER is missing")
    return load_folder(find_checkpoint(path), mesh, untrained=untrained)


def load_folder(
    folder: Path, mesh: jax.sharding.Mesh | None = None, *, untrained: bool = False
) -> LoadedModel:
    """`load_checkpoint` of a step folder that `find_checkpoint` has found to be whole."""
    config, kind = read_config(folder), read_kind(folder)
    trained = for_platform(parse(ModelConfig, config["model"], "model"), jax.default_backend())
    model: Model | ScalarModel = build_model(trained) if kind.generates else build_scalar_model(trained)
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    if untrained:
        key = jax.random.key(config["seed"])
        params = init_state(key, init=jax.jit(model.init), optimizer=optax.identity()).params
    else:
        params = read_policy(folder, wanted if mesh is None else placed(wanted, mesh))
    return LoadedModel(folder, kind, model, params, load_tokenizer(folder), read_metadata(folder))


def checkpoint_template(loaded: LoadedModel) -> ChatTemplate:
    """The template of the conversations that the checkpoint was trained on, with its clock."""
    return load_template(loaded.tokenizer, saved_template(loaded.folder), loaded.metadata.get("clock"))


def saved_template(folder: Path) -> str | None:
    """The file of a folder with its chat template, where that is neither the tokenizer's nor our own."""
    if (file := folder / TEMPLATE_FILE).exists():
        return str(file)
    file = folder / CHAT_TEMPLATE_FILE  # which a tokenizer.json has read already
    if not file.exists() or (folder / HF_TOKENIZER_FILE).exists():
        return None
    return None if file.read_text() == NativeTemplate.AS_JINJA else str(file)


def check_generates(loaded: T, flag: str) -> T:
    """The checkpoint that `flag` names, loaded or its kind alone; ConfigError where it is a reward model."""
    if not loaded.generates:
        raise ConfigError(f"{flag} is a reward model and cannot generate; pass a policy checkpoint")
    return loaded


def check_scores(loaded: T, flag: str) -> T:
    """The checkpoint that `flag` names, loaded or its kind alone; ConfigError where it is no reward model."""
    if loaded.generates:
        raise ConfigError(f"{flag} is not a reward model; pass the run of one")
    return loaded
