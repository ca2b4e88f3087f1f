"""The families of models that Hugging Face checkpoints are read and written as: a table each.

A family is its fields in `config.json` and its tensors: our path, theirs, and whether theirs is transposed.
`*` is the layer. Several of our arrays in one row are parts of one of theirs, one after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxllm.errors import ConfigError
from jaxllm.models.config import HOW, NO_LORA, ModelConfig, RopeScaling
from jaxllm.models.hf.fields import (
    ALTERNATING,
    HEADS,
    LAST_LAYERS,
    LOCAL_ROPE,
    NO_SCALING,
    NO_WINDOW,
    ONE_IN_SIX,
    QUERY_SCALE,
    ROPE,
    WINDOW,
    WITHOUT_ROPE,
    Field,
    Fields,
    Json,
    activation,
    as_values,
    biases,
    same,
)


class Row(NamedTuple):
    """One of their tensors."""

    ours: tuple[str, ...]
    theirs: str
    transposed: bool = False


def row(ours: str, theirs: str, transposed: bool = False) -> Row:
    """`a/{b,c}/d` stands for `a/b/d` and `a/c/d`."""
    before, brace, rest = ours.partition("{")
    if not brace:
        return Row((ours,), theirs, transposed)
    names, _, after = rest.partition("}")
    return Row(tuple(f"{before}{name}{after}" for name in names.split(",")), theirs, transposed)


T = True  # transposed: torch's Linear has [out, in], ours [in, out]

OUTSIDE = (
    row("embed/table", "model.embed_tokens.weight"),
    row("final_norm/scale", "model.norm.weight"),
    row("head/kernel", "lm_head.weight", T),
    row("scalar_head/kernel", "score.weight", T),
)
ATTENTION = (
    row("blocks/attention/query/kernel", "model.layers.*.self_attn.q_proj.weight", T),
    row("blocks/attention/query/bias", "model.layers.*.self_attn.q_proj.bias"),
    row("blocks/attention/key/kernel", "model.layers.*.self_attn.k_proj.weight", T),
    row("blocks/attention/key/bias", "model.layers.*.self_attn.k_proj.bias"),
    row("blocks/attention/value/kernel", "model.layers.*.self_attn.v_proj.weight", T),
    row("blocks/attention/value/bias", "model.layers.*.self_attn.v_proj.bias"),
    row("blocks/attention/output/kernel", "model.layers.*.self_attn.o_proj.weight", T),
    row("blocks/attention/output/bias", "model.layers.*.self_attn.o_proj.bias"),
    row("blocks/attention/query_norm/scale", "model.layers.*.self_attn.q_norm.weight"),
    row("blocks/attention/key_norm/scale", "model.layers.*.self_attn.k_norm.weight"),
)
MLP = (
    row("blocks/mlp/gate/kernel", "model.layers.*.mlp.gate_proj.weight", T),
    row("blocks/mlp/gate/bias", "model.layers.*.mlp.gate_proj.bias"),
    row("blocks/mlp/up/kernel", "model.layers.*.mlp.up_proj.weight", T),
    row("blocks/mlp/up/bias", "model.layers.*.mlp.up_proj.bias"),
    row("blocks/mlp/down/kernel", "model.layers.*.mlp.down_proj.weight", T),
    row("blocks/mlp/down/bias", "model.layers.*.mlp.down_proj.bias"),
)
NORMS_BEFORE = (
    row("blocks/attention_norm/scale", "model.layers.*.input_layernorm.weight"),
    row("blocks/mlp_norm/scale", "model.layers.*.post_attention_layernorm.weight"),
)
NORMS_AFTER = (
    row("blocks/attention_output_norm/scale", "model.layers.*.post_attention_layernorm.weight"),
    row("blocks/mlp_output_norm/scale", "model.layers.*.post_feedforward_layernorm.weight"),
)
NORMS_AROUND = (
    row("blocks/attention_norm/scale", "model.layers.*.input_layernorm.weight"),
    row("blocks/attention_output_norm/scale", "model.layers.*.post_attention_layernorm.weight"),
    row("blocks/mlp_norm/scale", "model.layers.*.pre_feedforward_layernorm.weight"),
    row("blocks/mlp_output_norm/scale", "model.layers.*.post_feedforward_layernorm.weight"),
)
FUSED = (
    row("blocks/attention/{query,key,value}/kernel", "model.layers.*.self_attn.qkv_proj.weight", T),
    row("blocks/attention/output/kernel", "model.layers.*.self_attn.o_proj.weight", T),
    row("blocks/mlp/{gate,up}/kernel", "model.layers.*.mlp.gate_up_proj.weight", T),
    row("blocks/mlp/down/kernel", "model.layers.*.mlp.down_proj.weight", T),
)
GPT2_TENSORS = (
    row("embed/table", "transformer.wte.weight"),
    row("embed/positions", "transformer.wpe.weight"),
    row("blocks/attention_norm/scale", "transformer.h.*.ln_1.weight"),
    row("blocks/attention_norm/bias", "transformer.h.*.ln_1.bias"),
    row("blocks/attention/{query,key,value}/kernel", "transformer.h.*.attn.c_attn.weight"),
    row("blocks/attention/{query,key,value}/bias", "transformer.h.*.attn.c_attn.bias"),
    row("blocks/attention/output/kernel", "transformer.h.*.attn.c_proj.weight"),
    row("blocks/attention/output/bias", "transformer.h.*.attn.c_proj.bias"),
    row("blocks/mlp_norm/scale", "transformer.h.*.ln_2.weight"),
    row("blocks/mlp_norm/bias", "transformer.h.*.ln_2.bias"),
    row("blocks/mlp/up/kernel", "transformer.h.*.mlp.c_fc.weight"),
    row("blocks/mlp/up/bias", "transformer.h.*.mlp.c_fc.bias"),
    row("blocks/mlp/down/kernel", "transformer.h.*.mlp.c_proj.weight"),
    row("blocks/mlp/down/bias", "transformer.h.*.mlp.c_proj.bias"),
    row("final_norm/scale", "transformer.ln_f.weight"),
    row("final_norm/bias", "transformer.ln_f.bias"),
    row("head/kernel", "lm_head.weight", T),
    row("scalar_head/kernel", "score.weight", T),
)

# What our config says of a family unless the family or its config.json says otherwise.
PLAIN: Json = {
    "mlp": "gated",
    "position_embedding": "rotary",
    "local_rope_theta": None,
    "norm": "rms",
    "norm_position": "before",
    "zero_centered_norm": False,
    "qk_norm": "none",
    "qkv_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "attention_scale": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "scale_embeddings": False,
}
SIZES = same(
    vocab_size="vocab_size",
    hidden_size="width",
    intermediate_size="mlp_width",
    num_hidden_layers="num_layers",
    max_position_embeddings="max_length",
    rms_norm_eps="norm_epsilon",
    tie_word_embeddings="tie_embeddings",
)
COMMON = (SIZES, HEADS, ROPE)
ATTENTION_BIAS = biases(attention_bias=("qkv_bias", "output_bias"))
BIASES = biases(attention_bias=("qkv_bias", "output_bias"), mlp_bias=("mlp_bias",))
SOFTCAPS = same(attn_logit_softcapping="attention_softcap", final_logit_softcapping="logit_softcap")


OLD_DEFAULTS: Json = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """How one model_type is read and written."""

    model_type: str
    architecture: str  # without its ending
    fields: tuple[Field, ...]
    tensors: tuple[Row, ...]
    defaults: Json = field(default_factory=dict)  # theirs, where config.json lacks the field
    fixed: Json = field(default_factory=dict)  # ours, in every model of the family
    causal_ending: str = "ForCausalLM"
    scalar_prefix: str = ""  # of the architecture with a scalar head, where it is another

    def architecture_of(self, *, scalar: bool) -> str:
        """The name of transformers' class, with a scalar head or that of a language model."""
        if scalar:
            return f"{self.scalar_prefix or self.architecture}ForSequenceClassification"
        return self.architecture + self.causal_ending

    def read(self, raw: Mapping[str, Any]) -> Json:
        """Our fields of a config.json; ConfigError, which names the field, for what is not supported."""
        fields = Fields(raw, self.defaults)
        values = PLAIN | self.fixed
        for each in self.fields:
            values |= each.read(fields)
        fields.check()
        return values

    def write(self, config: ModelConfig) -> Json:
        """Their fields of our config. They may say less than ours: see `family_of`."""
        written: Json = {"model_type": self.model_type}
        for each in self.fields:
            written |= each.write(config)
        return written

    def expresses(self, config: ModelConfig) -> bool:
        """Whether reading what is written gives the same model."""
        try:
            return as_values(make_config(self.read(self.write(config)), like=config)) == as_values(config)
        except ConfigError:
            return False


FAMILIES = (
    Family(
        "llama",
        "Llama",
        (*COMMON, activation(), BIASES, NO_WINDOW),
        (*OUTSIDE, *NORMS_BEFORE, *ATTENTION, *MLP),
        OLD_DEFAULTS | {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    ),
    Family(
        "qwen3",
        "Qwen3",
        (*COMMON, activation(), ATTENTION_BIAS, LAST_LAYERS),
        (*OUTSIDE, *NORMS_BEFORE, *ATTENTION, *MLP),
        OLD_DEFAULTS
        | {"max_position_embeddings": 32768, "attention_bias": False, "head_dim": 128, "sliding_window": 4096}
        | {"use_sliding_window": False, "max_window_layers": 28},
        {"qk_norm": "head"},
    ),
    Family(
        "qwen2",
        "Qwen2",
        (*COMMON, activation(), LAST_LAYERS),
        (*OUTSIDE, *NORMS_BEFORE, *ATTENTION, *MLP),
        OLD_DEFAULTS
        | {"max_position_embeddings": 32768, "sliding_window": 4096}
        | {"use_sliding_window": False, "max_window_layers": 28},
        {"qkv_bias": True},
    ),
    Family(
        "mistral",
        "Mistral",
        (*COMMON, activation(), WINDOW),
        (*OUTSIDE, *NORMS_BEFORE, *ATTENTION, *MLP),
        OLD_DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family(
        "smollm3",
        "SmolLM3",
        (*COMMON, activation(), BIASES, WITHOUT_ROPE),
        (*OUTSIDE, *NORMS_BEFORE, *ATTENTION, *MLP),
        OLD_DEFAULTS
        | {"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6}
        | {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False},
    ),
    Family(
        "olmo2",
        "Olmo2",
        (*COMMON, activation(), ATTENTION_BIAS, NO_WINDOW),
        (*OUTSIDE, *NORMS_AFTER, *ATTENTION, *MLP),
        OLD_DEFAULTS | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attention_bias": False},
        {"norm_position": "after", "qk_norm": "all_heads"},
    ),
    Family(
        "phi3",
        "Phi3",
        (*COMMON, activation(), WINDOW),
        (*OUTSIDE, *NORMS_BEFORE, *FUSED),
        OLD_DEFAULTS | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
    ),
    Family(
        "gemma2",
        "Gemma2",
        (
            *COMMON,
            activation("hidden_activation", "hidden_act"),
            ATTENTION_BIAS,
            ALTERNATING,
            QUERY_SCALE,
            SOFTCAPS,
        ),
        (*OUTSIDE, *NORMS_AROUND, *ATTENTION, *MLP),
        OLD_DEFAULTS
        | {"max_position_embeddings": 8192, "attention_bias": False, "head_dim": 256, "sliding_window": 4096}
        | {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "num_key_value_heads": 4},
        {"norm_position": "both", "zero_centered_norm": True, "scale_embeddings": True},
    ),
    Family(
        "gemma3_text",
        "Gemma3",
        (
            *(SIZES, HEADS, LOCAL_ROPE),
            *(
                activation("hidden_activation", "hidden_act"),
                ATTENTION_BIAS,
                ONE_IN_SIX,
                QUERY_SCALE,
                SOFTCAPS,
            ),
        ),
        (*OUTSIDE, *NORMS_AROUND, *ATTENTION, *MLP),
        OLD_DEFAULTS
        | {"max_position_embeddings": 131072, "attention_bias": False, "head_dim": 256, "rope_theta": 1e6}
        | {"sliding_window": 4096, "query_pre_attn_scalar": 256, "rope_local_base_freq": 1e4}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "num_key_value_heads": 4}
        | {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "vocab_size": 262208}
        # A text_config inside another config.json lacks the fields that are as transformers has them.
        | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8},
        {
            "norm_position": "both",
            "zero_centered_norm": True,
            "scale_embeddings": True,
            "qk_norm": "head",
        },
        scalar_prefix="Gemma3Text",
    ),
    Family(
        "gpt2",
        "GPT2",
        (
            same(
                vocab_size="vocab_size",
                n_embd="width",
                n_layer="num_layers",
                n_positions="max_length",
                layer_norm_epsilon="norm_epsilon",
                tie_word_embeddings="tie_embeddings",
            ),
            Field(
                lambda f: {
                    "num_heads": f["n_head"],
                    "num_kv_heads": f["n_head"],
                    "head_dim": f["n_embd"] // f["n_head"],
                    "mlp_width": f["n_inner"] or 4 * f["n_embd"],
                },
                lambda c: {"n_head": c.num_heads, "n_inner": c.mlp_width},
            ),
            activation("activation_function"),
        ),
        GPT2_TENSORS,
        {
            "n_positions": 1024,
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        },
        {
            "mlp": "plain",
            "position_embedding": "learned",
            "norm": "layer",
            "rope_theta": 1e4,  # unused
            "rope_scaling": NO_SCALING,
            "layer_pattern": ("global",),
            "sliding_window": None,
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
        },
        "LMHeadModel",
    ),
)

ENCODER_DECODERS = ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "longt5", "led", "encoder-decoder")


def find_family(raw: Mapping[str, Any]) -> Family:
    """The family of a config.json; ConfigError, which lists those known, for any other."""
    kind = raw.get("model_type")
    if kind in ENCODER_DECODERS or raw.get("is_encoder_decoder"):
        raise ConfigError(f"config.json: {kind} is an encoder-decoder; only decoders are supported")
    for family in FAMILIES:
        if family.model_type == kind:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ConfigError(f"config.json: model_type={kind!r} is not supported (supported: {known})")


def text_model(raw: Json) -> Json:
    """The fields of the decoder: of a Gemma 3 that sees images, those of its text model."""
    if raw.get("model_type") != "gemma3" or not isinstance(raw.get("text_config"), dict):
        return raw
    return {"model_type": "gemma3_text", **raw["text_config"], "architectures": raw.get("architectures")}


def family_of(config: ModelConfig) -> Family:
    """The first family that can express a config; ConfigError where none can."""
    for family in FAMILIES:
        if family.expresses(config):
            return family
    raise ConfigError(
        "no Hugging Face family computes what this model config says: an export needs the norms, biases, "
        "layer pattern, MLP and softcaps of one of those in jaxllm/models/hf/families.py"
    )


def make_config(values: Json, like: ModelConfig | None = None) -> ModelConfig:
    """A ModelConfig of these fields; how it is computed is that of `like`, or the plainest."""
    how = {"scan_layers": True, "remat": "none", "attention": "xla", "compute_dtype": "float32"}
    how |= {"param_dtype": "float32", "lora": NO_LORA}
    if like is not None:
        how = {name: getattr(like, name) for name in HOW}
    values = {**values, "rope_scaling": RopeScaling(**values["rope_scaling"])}
    return ModelConfig(**values, **how)
