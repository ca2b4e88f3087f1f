"""Rewards of completions: plain Python functions `reward(example, completion) -> float | None`.

`example` is the row that the prompt is from; None means that the reward does not apply to it. Each reward is
in the module of its name. `load` finds these, and those of users, by name; `pool` calls them in processes;
`scorer` adds a trained reward model to them.
"""
