"""Hugging Face checkpoints: `load_hf` and `save_hf`. Needs no transformers."""

from jaxllm.models.hf.weights import (
    check_hf,
    fill_hf,
    is_reward_model,
    load_hf,
    load_hf_config,
    save_hf,
    saved_dtype,
)

__all__ = ["check_hf", "fill_hf", "is_reward_model", "load_hf", "load_hf_config", "save_hf", "saved_dtype"]
