"""A trained model from its checkpoint: weights, tokenizer, chat template."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from jaxllm.runs.train import TEMPLATE_FILE
from jaxllm.runs.weights import read_policy
from jaxllm.config import parse
from jaxllm.data.chat_template import ChatTemplate, load_template
from jaxllm.data.tokenizer import BaseTokenizer, load_tokenizer
from jaxllm.errors import ConfigError
from jaxllm.models import Model, ModelConfig, ScalarModel, build_model, build_scalar_model
from jaxllm.models.config import for_platform
from jaxllm.parallel.sharding import placed
from jaxllm.training.checkpoint import find_checkpoint
from jaxllm.training.state import init_state


class Loaded(NamedTuple):
    """What a checkpoint holds."""

    folder: Path
    stage: str  # that trained it
    model: Model | ScalarModel
    params: Any
    tokenizer: BaseTokenizer
    metadata: dict[str, Any]


def load_checkpoint(
    path: str | None, mesh: jax.sharding.Mesh | None = None, *, untrained: bool = False
) -> Loaded:
    """The newest valid checkpoint of a run folder (RUN/best: its best), on a mesh or the first device. PPO's
    are of two models: this is the one that speaks. `untrained`: the random weights that a run of this config
    without --init_from begins with."""
    if path is None:
        raise ConfigError("--checkpoint=RUN_FOLDER is missing")
    return load_folder(find_checkpoint(path), mesh, untrained=untrained)


def load_folder(folder: Path, mesh: jax.sharding.Mesh | None = None, *, untrained: bool = False) -> Loaded:
    """`load_checkpoint` of a step folder that `find_checkpoint` has found to be whole."""
    config = json.loads((folder / "config.json").read_text())
    build = build_scalar_model if config["stage"] == "reward_model" else build_model
    trained = parse(ModelConfig, config["model"], "model")
    model = build(for_platform(trained, jax.default_backend()))
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    if untrained:
        key = jax.random.key(config["seed"])
        params = init_state(key, init=jax.jit(model.init), optimizer=optax.identity()).params
    else:
        params = read_policy(folder, wanted if mesh is None else placed(wanted, mesh))
    metadata = json.loads((folder / "metadata.json").read_bytes())
    return Loaded(folder, config["stage"], model, params, load_tokenizer(folder), metadata)


def checkpoint_template(loaded: Loaded) -> ChatTemplate:
    """The template that the checkpoint's conversations had."""
    file = loaded.folder / TEMPLATE_FILE
    return load_template(loaded.tokenizer, str(file) if file.exists() else None)
