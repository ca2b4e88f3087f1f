"""Rewards that can be checked: plain Python functions `reward(example, completion) -> float | None`.

`example` is the row that the prompt came from, and None says that this reward does not apply to it. Each has
a module of its name; `load` finds them and a user's own by name, `pool` runs them in processes.
"""
