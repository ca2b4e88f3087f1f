"""The model of the speed measurements: a Llama of about 10M parameters, 8 x 256 tokens per step."""

from ml_collections import ConfigDict

from configs import pretrain_text


def get_config() -> ConfigDict:
    """8 layers, width 320, 5 heads, SwiGLU 864, vocabulary 4096, AdamW, float32."""
    config = pretrain_text.get_config("10m")
    config.model.qk_norm = "none"
    config.model.tie_embeddings = False
    config.data.batch_size = 8
    config.training.num_microbatches = 1
    config.optimizer.name = "adamw"
    return config
