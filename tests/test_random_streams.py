"""Every purpose has a constant of its own, and those of old checkpoints are what they were."""

import jax
import numpy as np

from jaxllm import random_streams
from jaxllm.random_streams import INIT, RUN, stream


def test_init_and_run_are_the_halves_that_checkpoints_were_made_with():
    key = jax.random.key(3)
    halves = jax.random.key_data(jax.random.split(key))
    np.testing.assert_array_equal([jax.random.key_data(stream(key, x)) for x in (INIT, RUN)], halves)


def test_no_constant_is_another_or_the_number_of_a_step():
    numbers = [x for name, x in vars(random_streams).items() if name.isupper()]
    assert len(numbers) == len(set(numbers)) == 8
    assert all(2**31 <= x < 2**32 for x in numbers if x not in (INIT, RUN))  # TrainState.step is an int32
