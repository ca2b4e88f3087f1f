"""PRNG keys: every purpose draws from a stream of its own.

`jax.random.split(key, n)[i]` equals `fold_in(key, i)`, so that two purposes that both count from 0 would draw
the same numbers. Each therefore folds in its constant first:

    key(seed) -- INIT                                    the parameters
              -- RUN, which is TrainState.key -- step    the train step: at most 2^31 - 1; its DROPOUT
              |                               -- SAMPLES, step
              |                               -- EVALUATION, step
              |                               -- SAMPLED_EVALUATION, step
              -- ROLLOUT, iteration, attempt
              -- EVALUATION                              experiments/evaluate.py and the gates of a pipeline
              -- SYNTHESIS, row                          experiments/synthesize.py

and what needs several keys splits the result. A seed of experiments/generate.py, of a chat or of a request to
the server is the key of that text alone.
"""

import functools

import jax

INIT, RUN = 0, 1  # the halves of split(key(seed)): checkpoints hold the second
# Beyond any step.
ROLLOUT, EVALUATION, SAMPLED_EVALUATION, SAMPLES, DROPOUT, SYNTHESIS = range(2**31, 2**31 + 6)


def stream(key: jax.Array, *numbers: int | jax.Array) -> jax.Array:
    """The key of a purpose: a constant of this module, then what its draws are numbered by."""
    return functools.reduce(jax.random.fold_in, numbers, key)
