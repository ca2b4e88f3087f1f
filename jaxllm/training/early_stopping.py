"""The best checkpoint of a run by one metric, and whether to wait for a better one."""

import dataclasses
import math


@dataclasses.dataclass
class EarlyStopping:
    """The best value of `metric` so far. Saved with every checkpoint, so that a resumed run knows it too."""

    metric: str
    highest: bool  # whether higher is better
    patience: int  # evaluations without a better value that end the run; 0: none do
    target: float | None = None  # a value that ends the run; None: none does
    value: float | None = None
    step: int | None = None
    waited: int = 0  # evaluations since

    def update(self, step: int, value: float) -> bool:
        """Take note of an evaluation; whether it is the best yet. NaN never is."""
        better = not math.isnan(value) and (
            self.value is None or (value > self.value if self.highest else value < self.value)
        )
        if better:
            self.value, self.step, self.waited = value, step, 0
        else:
            self.waited += 1
        return better

    @property
    def reached(self) -> bool:
        """Whether the target is."""
        if self.target is None or self.value is None:
            return False
        return self.value >= self.target if self.highest else self.value <= self.target

    @property
    def over(self) -> bool:
        """Whether there is nothing to wait for."""
        return self.reached or 0 < self.patience <= self.waited
