"""Milliseconds to sample a token for each row of logits, with its log-prob: ours, Gumbel noise, and argmax.

    python benchmarks/sampling.py [--shapes 256x1024 64x4096 16x151936]

Medians of rounds in which the three take turns, in one process: they share no state, and the noise that jax
makes for `jax.random.categorical` is what is compared.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from jaxllm.losses.language_model import token_log_probs
from jaxllm.rollout.sampling import SamplingConfig, sample

ROUNDS, CALLS = 9, 5


def gumbel(logits: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens = jax.vmap(jax.random.categorical)(keys, logits)
    return tokens, token_log_probs(logits[:, None], tokens[:, None])[:, 0]


def ours(logits: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    return sample(logits, keys, SamplingConfig(1.0, None, None, None, 1))


def argmax(logits: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    return sample(logits, keys, SamplingConfig(0.0, None, None, None, 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", default=["256x1024", "64x4096", "16x151936"], help="ROWSxVOCABULARY"
    )
    for shape in parser.parse_args().shapes:
        rows, vocabulary = map(int, shape.split("x"))
        logits = 2 * jax.random.normal(jax.random.key(0), (rows, vocabulary), jnp.float32)
        keys = jax.random.split(jax.random.key(1), rows)
        contestants = {each.__name__: jax.jit(each) for each in (ours, gumbel, argmax)}
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(ROUNDS + 1):  # the first one compiles
            for name, run in contestants.items():
                began = time.perf_counter()
                for _ in range(CALLS):
                    jax.block_until_ready(run(logits, keys))
                times[name].append((time.perf_counter() - began) / CALLS)
        medians = {name: 1e3 * statistics.median(each[1:]) for name, each in times.items()}
        print(f"{shape}: " + ", ".join(f"{name} {value:.2f} ms" for name, value in medians.items()))


if __name__ == "__main__":
    main()
