"""The best step of a run by one metric, and when to stop the run by it."""

import dataclasses
import math


@dataclasses.dataclass
class EarlyStopping:
    """The best value of `metric` so far. It is saved in every checkpoint, under "best", for a resumed run."""

    metric: str
    highest: bool  # whether higher is better
    patience: int  # stop after this many evaluations in a row without a better value; 0: never
    target: float | None = None  # stop once the value reaches this; None: never
    value: float | None = None  # the best so far
    step: int | None = None  # of the best value
    waited: int = 0  # evaluations since the best one

    def update(self, step: int, value: float) -> bool:
        """Record an evaluation. Returns whether it is the best so far; NaN never is."""
        better = not math.isnan(value) and (
            self.value is None or (value > self.value if self.highest else value < self.value)
        )
        if better:
            self.value, self.step, self.waited = value, step, 0
        else:
            self.waited += 1
        return better

    @property
    def target_reached(self) -> bool:
        if self.target is None or self.value is None:
            return False
        return self.value >= self.target if self.highest else self.value <= self.target

    @property
    def should_stop(self) -> bool:
        """Whether the target is reached or the patience is used up."""
        return self.target_reached or 0 < self.patience <= self.waited
