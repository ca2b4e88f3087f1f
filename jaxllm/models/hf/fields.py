"""The fields of a Hugging Face `config.json` and those of a `ModelConfig`, translated in both directions.

Both dialects are read: that of transformers 4 (`rope_theta`, `rope_scaling`) and that of transformers 5
(`rope_parameters`, `layer_types`). The first is written, because every reader understands it.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.errors import ConfigError
from jaxllm.models.config import HOW, ModelConfig, layer_kinds

Json = dict[str, Any]

# Fields that change nothing about the function that the model computes.
IGNORED = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype use_cache _name_or_path name_or_path
    initializer_range initializer_factor attention_dropout attn_pdrop embd_pdrop resid_pdrop
    hidden_dropout bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    cls_token_id _attn_implementation attn_implementation _attn_implementation_autoset
    cache_implementation auto_map pretraining_tp is_llama_config transformers.js_config
    task_specific_params summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout n_ctx id2label label2id num_labels problem_type output_attentions
    output_hidden_states return_dict return_dict_in_generate chunk_size_feed_forward
    reorder_and_upcast_attn gradient_checkpointing max_window_layers tokenizer_class classifier_dropout
    base_model_tp_plan base_model_pp_plan finetuning_task prefix torchscript model_name
    sliding_window_size unsloth_fixed unsloth_version
    """.split()  # noqa: SIM905  (one a line would hide the rest of the file)
)

# Fields of which one value only is supported: what transformers assumes where they are missing.
SUPPORTED_VALUE = {
    "rope_interleaved": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
    "attention_chunk_size": None,
}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
}


VALUES = {
    int: "a positive integer",
    float: "a number",
    bool: "true or false",
    float | None: "a number or null",
}


class Fields:
    """A config.json, and which of its fields have been read."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.raw, self.defaults = raw, defaults
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        if name not in self.raw and name not in self.defaults:
            raise ConfigError(f"config.json: {name} is missing")
        return self.raw.get(name, self.defaults.get(name))

    def get(self, name: str) -> Any:
        """None where the field is missing."""
        self.read.add(name)
        return self.raw.get(name, self.defaults.get(name))

    def checked(self, name: str, kind: Any) -> Any:
        """A field of a type in VALUES; ConfigError where its value is another."""
        value = self[name]
        fits = isinstance(value, kind)
        if kind is not bool:  # JSON writes 1.0 as 1, and Python takes True for an integer
            fits = (fits or isinstance(value, int)) and not isinstance(value, bool)
        if not fits or (kind is int and value < 1):
            raise ConfigError(f"config.json: {name}={value!r} must be {VALUES[kind]}")
        return value

    def check(self) -> None:
        """ConfigError for a field that is unknown, or whose value is not supported."""
        for name, value in self.raw.items():
            if name in self.read or name in IGNORED or value is None:
                continue
            if name not in SUPPORTED_VALUE:
                raise ConfigError(
                    f"config.json: unknown field {name}={value!r}: it may change what is computed"
                )
            if value != SUPPORTED_VALUE[name]:
                raise ConfigError(
                    f"config.json: {name}={value!r} is not supported, only {SUPPORTED_VALUE[name]!r}"
                )


class Field(NamedTuple):
    """Fields that belong together."""

    read: Callable[[Fields], Json]  # theirs -> ours
    write: Callable[[ModelConfig], Json]  # ours -> theirs


def same(**names: str) -> Field:
    """Fields with another name and the same value: theirs=ours."""
    kinds = typing.get_type_hints(ModelConfig)
    return Field(
        lambda fields: {ours: fields.checked(theirs, kinds[ours]) for theirs, ours in names.items()},
        lambda config: {theirs: getattr(config, ours) for theirs, ours in names.items()},
    )


def activation(name: str = "hidden_act", also: str | None = None) -> Field:
    """The MLP's; `also` is a second name that some config files have, with an outdated value."""

    def read(fields: Fields) -> Json:
        if also is not None:
            fields.get(also)
        value = fields[name] or fields.get(also or name)
        if value not in ACTIVATIONS:
            raise ConfigError(f"config.json: {name}={value!r} is not supported: {', '.join(ACTIVATIONS)}")
        return {"activation": ACTIVATIONS[value]}

    def write(config: ModelConfig) -> Json:
        names = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu"}
        if name == "activation_function":
            names["gelu"] = "gelu_new"
        return {name: names[config.activation]}

    return Field(read, write)


def _read_heads(fields: Fields) -> Json:
    heads, width = (fields.checked(name, int) for name in ("num_attention_heads", "hidden_size"))
    optional = {"num_key_value_heads": heads, "head_dim": width // heads}
    kv_heads, head_dim = (
        value if fields.get(name) is None else fields.checked(name, int) for name, value in optional.items()
    )
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}


HEADS = Field(
    _read_heads,
    lambda c: {
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
    },
)


# Rotary embedding

NO_SCALING = {
    "kind": "none",
    "factor": 1.0,
    "original_length": 1,
    "low_frequency": 1.0,
    "high_frequency": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def read_scaling(given: Mapping[str, Any] | None, max_length: int) -> Json:
    """Our `rope_scaling` of theirs; ConfigError for a kind or a field that is not supported."""
    given = dict(given or {})
    kind = given.pop("type", None)
    kind = given.pop("rope_type", None) or kind or "default"
    given.pop("rope_theta", None)
    if (fraction := given.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"config.json: partial_rotary_factor={fraction} is not supported, only 1.0")
    scaling = {**NO_SCALING, "original_length": max_length}
    if kind == "default":
        return scaling
    names = {
        "linear": {},
        "llama3": {"low_freq_factor": "low_frequency", "high_freq_factor": "high_frequency"},
        "yarn": {"beta_fast": "beta_fast", "beta_slow": "beta_slow"},
    }
    if kind not in names:
        raise ConfigError(
            f"config.json: rope_scaling of type {kind!r} is not supported, only {', '.join(names)}"
        )
    if not isinstance(factor := given.pop("factor", None), int | float):
        raise ConfigError(f"config.json: rope_scaling of type {kind!r} needs a factor, not {factor!r}")
    scaling |= {"kind": kind, "factor": float(factor)}
    scaling["original_length"] = int(given.pop("original_max_position_embeddings", None) or max_length)
    for theirs, ours in names[kind].items():
        if (value := given.pop(theirs, None)) is not None:
            scaling[ours] = float(value)
    if given.get("truncate") is True:  # the default
        given.pop("truncate")
    if left := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"config.json: rope_scaling.{left[0]}={given[left[0]]!r} is not supported")
    return scaling


def write_scaling(config: ModelConfig) -> Json | None:
    """Their `rope_scaling` of ours."""
    ours = config.rope_scaling
    if ours.kind == "none":
        return None
    theirs: Json = {"rope_type": ours.kind, "factor": ours.factor}
    if ours.kind != "linear":
        theirs["original_max_position_embeddings"] = ours.original_length
    if ours.kind == "llama3":
        theirs |= {"low_freq_factor": ours.low_frequency, "high_freq_factor": ours.high_frequency}
    if ours.kind == "yarn":
        theirs |= {"beta_fast": ours.beta_fast, "beta_slow": ours.beta_slow}
    return theirs


def _read_rope(fields: Fields) -> Json:
    length = fields["max_position_embeddings"]
    new, old, theta = (fields.get(name) for name in ("rope_parameters", "rope_scaling", "rope_theta"))
    theta = (new or {}).get("rope_theta") or theta
    if theta is None:
        raise ConfigError("config.json: rope_theta is missing")
    scaling, original = read_scaling(new or old, length), fields.get("original_max_position_embeddings")
    if scaling["kind"] in ("llama3", "yarn") and original not in (None, scaling["original_length"]):
        raise ConfigError(
            f"config.json: original_max_position_embeddings={original} contradicts rope_scaling, "
            f"which says {scaling['original_length']}"
        )
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def _write_rope(config: ModelConfig) -> Json:
    return {"rope_theta": config.rope_theta, "rope_scaling": write_scaling(config)}


ROPE = Field(_read_rope, _write_rope)


def _read_local_rope(fields: Fields) -> Json:
    """Gemma 3: one rotary embedding for global layers, another for local ones."""
    length, new = fields["max_position_embeddings"], fields.get("rope_parameters")
    if new and "full_attention" in new:
        whole, local = new["full_attention"], new["sliding_attention"]
        if (kind := local.get("rope_type", "default")) != "default":
            raise ConfigError(
                f"config.json: rope_parameters.sliding_attention of type {kind!r} is not supported"
            )
        theta, local_theta, scaling = whole["rope_theta"], local["rope_theta"], read_scaling(whole, length)
        for name in ("rope_theta", "rope_local_base_freq", "rope_scaling"):  # some files say it in both ways
            fields.get(name)
    else:
        theta, local_theta = fields["rope_theta"], fields["rope_local_base_freq"]
        scaling = read_scaling(fields.get("rope_scaling"), length)
    return {"rope_theta": float(theta), "local_rope_theta": float(local_theta), "rope_scaling": scaling}


LOCAL_ROPE = Field(
    _read_local_rope, lambda c: {**_write_rope(c), "rope_local_base_freq": c.local_rope_theta or c.rope_theta}
)


# Kinds of layers

KINDS = {"full_attention": "global", "sliding_attention": "local"}


def shortest_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest sequence of which `kinds` is a repetition, the last one possibly cut short."""
    for size in range(1, len(kinds) + 1):
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds)):
            return tuple(kinds[:size])
    return ("global",)


def layers(default: Callable[[Fields, int], list[str]], write: Callable[[ModelConfig], Json]) -> Field:
    """The kinds of layers: `layer_types` where it is given, else `default(fields, number of layers)`."""

    def read(fields: Fields) -> Json:
        count = fields.checked("num_hidden_layers", int)
        given, fallback = fields.get("layer_types"), default(fields, count)
        for name, kinds in (("layer_types", given), ("no_rope_layers", fallback)):
            if kinds and len(kinds) != count:
                raise ConfigError(
                    f"config.json: {name} has {len(kinds)} entries for num_hidden_layers={count}"
                )
        if unknown := set(given or ()) - set(KINDS):
            raise ConfigError(f"config.json: layer_types with {min(unknown)!r} are not supported")
        kinds = [KINDS[each] for each in given] if given else fallback
        if "nope" in fallback:
            kinds = ["nope" if each == "nope" else kind for each, kind in zip(fallback, kinds, strict=True)]
        window = fields.get("sliding_window") if "local" in kinds else None
        return {"layer_pattern": shortest_pattern(kinds), "sliding_window": window}

    return Field(read, write)


def _layer_types(config: ModelConfig) -> Json:
    names = {"global": "full_attention", "local": "sliding_attention", "nope": "full_attention"}
    return {"layer_types": [names[kind] for kind in layer_kinds(config)]}


def _window_of_all(fields: Fields, count: int) -> list[str]:
    return ["local" if fields.get("sliding_window") else "global"] * count


def _window_of_last(fields: Fields, count: int) -> list[str]:
    first, window = fields.get("max_window_layers") or 0, fields.get("sliding_window")
    window = fields.get("use_sliding_window") and window
    return ["local" if window and i >= first else "global" for i in range(count)]


def _alternating(fields: Fields, count: int) -> list[str]:
    fields.get("sliding_window")
    return ["global" if i % 2 else "local" for i in range(count)]


def _one_in_six(fields: Fields, count: int) -> list[str]:
    every = fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern") or 6
    for name in ("_sliding_window_pattern", "sliding_window"):
        fields.get(name)
    return ["local" if (i + 1) % every else "global" for i in range(count)]


def _without_rope(fields: Fields, count: int) -> list[str]:
    given, every = fields.get("no_rope_layers"), fields.get("no_rope_layer_interval") or 4
    has_rope = given or [int((i + 1) % every != 0) for i in range(count)]
    if fields.get("use_sliding_window"):
        raise ConfigError("config.json: use_sliding_window=True is not supported in this family")
    fields.get("sliding_window")
    return ["global" if each else "nope" for each in has_rope]


NO_WINDOW = layers(lambda fields, count: ["global"] * count, lambda c: {})
WINDOW = layers(_window_of_all, lambda c: {"sliding_window": c.sliding_window})
LAST_LAYERS = layers(
    _window_of_last,
    lambda c: {
        "use_sliding_window": c.sliding_window is not None,
        "sliding_window": c.sliding_window,
        "max_window_layers": (*layer_kinds(c), "local").index("local"),
        **_layer_types(c),
    },
)
ALTERNATING = layers(_alternating, lambda c: {"sliding_window": c.sliding_window, **_layer_types(c)})
ONE_IN_SIX = layers(_one_in_six, lambda c: {"sliding_window": c.sliding_window, **_layer_types(c)})
WITHOUT_ROPE = layers(
    _without_rope,
    lambda c: {
        "no_rope_layers": [int(kind != "nope") for kind in layer_kinds(c)],
        "use_sliding_window": False,
        **_layer_types(c),
    },
)


def _read_query_scale(fields: Fields) -> Json:
    scalar, head_dim = fields["query_pre_attn_scalar"], fields["head_dim"]
    return {"attention_scale": None if scalar == head_dim else scalar**-0.5}


QUERY_SCALE = Field(
    _read_query_scale,
    lambda c: {
        "query_pre_attn_scalar": c.head_dim if c.attention_scale is None else round(c.attention_scale**-2)
    },
)


def biases(**names: tuple[str, ...]) -> Field:
    """Their flag and our flags that it stands for, which must be equal."""
    return Field(
        lambda fields: {each: bool(fields[theirs]) for theirs, ours in names.items() for each in ours},
        lambda config: {theirs: getattr(config, ours[0]) for theirs, ours in names.items()},
    )


def as_values(config: ModelConfig) -> Json:
    """The fields of a config that say what is computed, and not how."""
    values = dataclasses.asdict(config)
    if values["rope_scaling"]["kind"] == "none":
        values["rope_scaling"] = None
    if values["position_embedding"] != "rotary":
        values["rope_theta"] = None
    for name in HOW:
        values.pop(name)
    return values
