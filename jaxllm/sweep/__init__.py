"""Sweeps: many runs of one config, each with some of its fields overridden.

A config file defines `sweep()` beside `get_config()`. It yields one dict of overrides for each trial, made by
the functions below or by plain Python:

>>> from jaxllm.sweep import grid, seeds
>>> for trial in seeds(grid({"optimizer.learning_rate": [1e-3, 3e-3]}), 2):
...     print(trial)
{'optimizer.learning_rate': 0.001, 'seed': 0}
{'optimizer.learning_rate': 0.001, 'seed': 1}
{'optimizer.learning_rate': 0.003, 'seed': 0}
{'optimizer.learning_rate': 0.003, 'seed': 1}
"""

from jaxllm.sweep.overrides import Overrides as Overrides
from jaxllm.sweep.overrides import chain as chain
from jaxllm.sweep.overrides import grid as grid
from jaxllm.sweep.overrides import log_uniform as log_uniform
from jaxllm.sweep.overrides import seeds as seeds
from jaxllm.sweep.overrides import zipped as zipped
