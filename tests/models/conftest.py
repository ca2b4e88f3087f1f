"""One small decoder with every option off; a test replaces the field that it is about."""

import pytest

from jaxllm.models import ModelConfig, RopeScaling


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
        activation="silu",
        max_length=256,
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
        norm_epsilon=1e-6,
        qk_norm=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        attention_softcap=None,
        logit_softcap=None,
        sliding_window=None,
        tie_embeddings=True,
        scan_layers=True,
        remat="none",
        attention="xla",
        compute_dtype="float32",
        param_dtype="float32",
    )
