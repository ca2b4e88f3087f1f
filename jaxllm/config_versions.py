"""Config fields by the names they once had: old run folders are read, old names on a command line answered.

`config.json` carries the version that wrote it. To rename a field, raise VERSION and add a row to RENAMED.
To add one, add a row to ADDED, so that runs without it can be resumed.
"""

import copy
from collections.abc import Mapping
from typing import Any

VERSION = 3

# Dotted name in an older version -> dotted name today. Version 1 wrote no version.
RENAMED: dict[str, str] = {
    "rollout.prompts": "rollout.num_prompts",
    "rollout.minibatches": "rollout.num_minibatches",
    "rollout.max_rows": "rollout.decode_batch_size",
    "rollout.refills": "rollout.max_resamples",
    "rollout.gather": "rollout.replicate_params",
    "rollout.rescore": "rollout.recompute_log_probs",
    "rollout.importance": "rollout.importance_sampling",
    "rollout.importance_limit": "rollout.importance_sampling_cap",
    "rollout.difference_limit": "rollout.log_prob_difference_limit",
    "reward.normalise": "reward.normalize",
    "reward.default": "reward.error_reward",
    "reward.missing_stop": "reward.missing_eos_penalty",
    "objective.lambda_": "objective.gae_lambda",
    "objective.whiten": "objective.whiten_advantages",
    "objective.length_normalised": "objective.length_normalized",
    "data.learn": "data.loss_on",
    "data.too_long": "data.overlong",
    "data.worked": "data.solutions",
    "sample.held_out": "sample.num_held_out",
    "worked": "sft_reasoning",
    "expected_seconds.worked": "expected_seconds.sft_reasoning",
}

# Values that were renamed, by today's name of their field.
RENAMED_VALUES: dict[str, dict[Any, Any]] = {
    "data.overlong": {"cut": "truncate"},
    "model.qk_norm": {True: "head", False: "none"},
}

# Dotted name of a field that is no more -> what has its place.
REMOVED: dict[str, str] = {
    "data.cache_dir": "the flag --cache_dir, of all scripts and for all caches",
}

# A field that was added later: a field that configs with it have always had, and the value by which a run
# trains as it did before.
ADDED: dict[str, tuple[str, Any]] = {
    "objective.critic_learning_rate": ("objective.critic_warmup", None),
    "objective.critic_clip_norm": ("objective.critic_warmup", None),
    "data.template_options": ("data.template", []),
    "data.validation_tokens": ("data.text_key", None),
    "optimizer.base_width": ("optimizer.learning_rate", None),
    "optimizer.base_layers": ("optimizer.learning_rate", None),
    "model.mlp": ("model.mlp_width", "gated"),
    "model.position_embedding": ("model.rope_theta", "rotary"),
    "model.local_rope_theta": ("model.rope_theta", None),
    "model.norm": ("model.norm_epsilon", "rms"),
    "model.norm_position": ("model.norm_epsilon", "before"),
    "model.zero_centered_norm": ("model.norm_epsilon", False),
    "model.attention_scale": ("model.head_dim", None),
    "model.scale_embeddings": ("model.tie_embeddings", False),
    "mesh.sequence": ("mesh.tensor", 1),
    "trackio_project": ("wandb_project", None),
    "evaluation.suites": ("evaluation.max_rows", []),
    "evaluation.suites_every": ("evaluation.max_rows", None),
    "evaluation.max_new_tokens": ("evaluation.max_rows", 64),
    "model.lora": (
        "model.param_dtype",
        {
            "rank": None,
            "alpha": 32.0,
            "rank_stabilized": False,
            "dropout": 0.0,
            "targets": "attention/|mlp/",
            "quantize": "none",
        },
    ),
}


def stamped(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` holds: the config, and the version that wrote it."""
    return {"version": VERSION, **config}


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` of any version, under today's names and without its version.

    Raises ValueError where a newer version wrote it.
    """
    config = copy.deepcopy(dict(config))
    version = config.pop("version", 1)
    if version > VERSION:
        raise ValueError(f"config.json has version {version}; this jaxllm reads up to {VERSION}: update it")
    if version == 1:
        for old, new in RENAMED.items():
            section, _, name = old.rpartition(".")
            place = config.get(section, {}) if section else config
            if name in place:
                place[new.rpartition(".")[2]] = place.pop(name)
    if version < VERSION:
        for field, values in RENAMED_VALUES.items():
            section, _, name = field.rpartition(".")
            place = config.get(section, {})
            if name in place:
                place[name] = values.get(place[name], place[name])
    if "sliding_window" in (model := config.get("model", {})):  # was for all layers or for none
        model.setdefault("layer_pattern", ["global"] if model["sliding_window"] is None else ["local"])
    for field in REMOVED:
        section, _, name = field.rpartition(".")
        config.get(section, {}).pop(name, None)
    for field, (beside, value) in ADDED.items():
        section, _, name = field.rpartition(".")
        place = config.get(section) if section else config
        if isinstance(place, dict) and beside.rpartition(".")[2] in place:
            place.setdefault(name, value)
    return config


def replacement(field: str) -> str | None:
    """What has the place of a dotted field that is no more, however deep it lies; None where no version had
    it."""
    return next((new for old, new in REMOVED.items() if f".{field}".endswith(f".{old}")), None)


def current_name(field: str) -> str | None:
    """Today's dotted name of a field that an older version called `field`, however deep it lies
    (`ppo.rollout.prompts` in a pipeline); None where no version did."""
    for old, new in RENAMED.items():
        if field == old or field.endswith(f".{old}"):
            return field.removesuffix(old) + new
    return None
