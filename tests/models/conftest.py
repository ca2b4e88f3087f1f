"""One small decoder with every option off; a test replaces the field that it is about."""

import pytest

from jaxllm.models import ModelConfig, RopeScaling
from jaxllm.models.config import NO_LORA


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return ModelConfig(
        vocab_size=61,
        num_layers=3,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=48,
        mlp="gated",
        activation="silu",
        max_length=256,
        position_embedding="rotary",
        rope_theta=10_000.0,
        rope_scaling=RopeScaling(
            kind="none",
            factor=1.0,
            original_length=256,
            low_frequency=1.0,
            high_frequency=4.0,
            beta_fast=32.0,
            beta_slow=1.0,
        ),
        local_rope_theta=None,
        layer_pattern=("global",),
        norm="rms",
        norm_epsilon=1e-6,
        norm_position="before",
        zero_centered_norm=False,
        qk_norm="none",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        attention_scale=None,
        attention_softcap=None,
        logit_softcap=None,
        sliding_window=None,
        tie_embeddings=True,
        scale_embeddings=False,
        scan_layers=True,
        remat="none",
        attention="xla",
        compute_dtype="float32",
        param_dtype="float32",
        lora=NO_LORA,
    )
