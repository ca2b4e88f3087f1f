"""What int8 and nf4 kernels (model.lora.quantize) change: bytes, logits, loss on a text.

    python benchmarks/quantization.py --checkpoint=FOLDER --text=FILE.jsonl   # a trained model
    python benchmarks/quantization.py --size=10m                              # random weights

All products are computed in float32; "bfloat16" only stores the parameters so. Logits are compared with those
of float32: the root mean square of the difference over the standard deviation of the logits, and the largest.
The loss is nats a token, with the standard error over documents; each document begins with BOS.
"""

import argparse
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from configs.base.models import model as model_size
from jaxllm.config import parse
from jaxllm.data.sources import open_source
from jaxllm.models import ModelConfig, Params, build_model
from jaxllm.models.config import LoRAConfig
from jaxllm.models.lora import ADAPTERS
from jaxllm.runs.checkpoints import read_config, read_policy, read_tokenizer
from jaxllm.training.state import is_none, split_params
from jaxllm.training.step_folder import find_checkpoint

KINDS = ("float32", "bfloat16", "int8", "nf4")


def with_storage(config: ModelConfig, kind: str) -> ModelConfig:
    """The config with its kernels stored as `kind`, computed in float32, with adapters that are zero."""
    quantize = kind if kind in ("int8", "nf4") else "none"
    lora = LoRAConfig(1, 1.0, False, 0.0, "", quantize)
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    return replace(config, lora=lora, param_dtype=dtype, compute_dtype="float32", attention="xla")


def load(config: ModelConfig, checkpoint: str | None) -> Params:
    """The checkpoint's parameters, or random ones: the same whatever they are stored as."""
    key = jax.random.key(0)
    model = build_model(config)
    if checkpoint is None:  # drawn in float32: in bfloat16 they would be others
        params = jax.jit(build_model(replace(config, param_dtype="float32")).init)(key)
        return params if config.param_dtype == "float32" else jax.tree.map(jnp.bfloat16, params)
    shapes = jax.eval_shape(model.init, key)
    read = read_policy(find_checkpoint(checkpoint), shapes)
    return jax.tree.map(
        lambda x, s: jnp.zeros(s.shape, s.dtype) if x is None else x, read, shapes, is_leaf=is_none
    )


def documents(checkpoint: str, text: str, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [count, length + 1] and which of the last `length` of each row count."""
    tokenizer = read_tokenizer(find_checkpoint(checkpoint))
    source = open_source(text, split="validation", text_key="text", synthetic_rows=0, seed=0)
    texts = [row.value for row in itertools.islice(source.rows(), count)]
    ids = [[tokenizer.bos_id, *encoded][: length + 1] for encoded in tokenizer.encode_batch(texts)]
    tokens = np.array([row + [tokenizer.pad_id] * (length + 1 - len(row)) for row in ids])
    lengths = np.array([len(row) for row in ids])
    return tokens, np.arange(1, length + 1) < lengths[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", help="a run, step folder or Hugging Face folder; else random weights")
    parser.add_argument("--text", help="JSON lines with a field `text`")
    parser.add_argument("--size", default="10m", help="of the random model: a size of configs/base/models.py")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--length", type=int, default=256, help="tokens of a document that are read")
    flags = parser.parse_args()
    if flags.checkpoint:
        config = parse(ModelConfig, read_config(find_checkpoint(flags.checkpoint))["model"], "model")
    else:
        config = parse(ModelConfig, model_size(flags.size).to_dict(), "model")
    length = min(flags.length, config.max_length)
    mask = None
    if flags.checkpoint and flags.text:
        tokens, mask = documents(flags.checkpoint, flags.text, flags.documents, length)
    else:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, length + 1))
    print(f"{jax.devices()[0].device_kind}, {len(tokens)} rows of up to {length} tokens")
    print("| kernels | bytes of the blocks | logits: rms of the difference | largest | nats a token |")
    print("|---|---|---|---|---|")
    exact = np.zeros(0)
    for kind in KINDS:
        stored = with_storage(config, kind)
        params = load(stored, flags.checkpoint)
        frozen = split_params(params, ADAPTERS)[1]["blocks"]
        size = sum(x.nbytes for x in jax.tree.leaves(frozen))
        run = jax.jit(build_model(stored).logits)
        rows = [np.asarray(run(params, jnp.asarray(row[None, :-1])))[0] for row in tokens]
        logits = np.stack(rows)
        counted = logits if mask is None else logits[mask]
        if kind == "float32":
            exact = counted
        difference = np.abs(counted - exact)
        relative = np.sqrt((difference**2).mean()) / exact.std()
        loss = "" if mask is None else nats(logits, tokens[:, 1:], mask)
        print(f"| {kind} | {size:,} | {relative:.2%} | {difference.max():.3g} | {loss} |")


def nats(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> str:
    """The mean over tokens, and its standard error by documents (a ratio of two sums)."""
    log_probs = np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))
    losses = -np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0] * mask
    sums, counts = losses.sum(1), mask.sum(1)
    mean = sums.sum() / counts.sum()
    error = np.sqrt(((sums - mean * counts) ** 2).sum()) / counts.sum()
    return f"{mean:.4f} ± {error:.4f}"


if __name__ == "__main__":
    main()
