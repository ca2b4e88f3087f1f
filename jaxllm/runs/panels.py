"""Which metrics a report plots in one picture: each stage lists its own as `panels`."""

from typing import Literal, NamedTuple


class Curve(NamedTuple):
    """A metric of `metrics.jsonl`, under the name that the legend gives it."""

    label: str
    metric: str

    @property
    def is_held_out(self) -> bool:
        """Whether it is measured on held-out rows, with a standard error."""
        return self.metric.startswith("eval/")


class Panel(NamedTuple):
    """The curves of one picture, all in the same unit."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    best: Literal["lowest", "highest"] | None = None  # None: neither is better


def panel(title: str, unit: str, best: Literal["lowest", "highest"] | None = None, **metrics: str) -> Panel:
    """A panel with a curve for each of `metrics`: LABEL=METRIC, with _ for a space in the label.

    >>> panel("Loss", "nats per token", "lowest", held_out="eval/loss").curves
    (Curve(label='held out', metric='eval/loss'),)
    """
    curves = tuple(Curve(label.replace("_", " "), metric) for label, metric in metrics.items())
    return Panel(title, unit, curves, best)


LOSS = panel("Loss", "nats per token", "lowest", training="train/loss", held_out="eval/loss")
TOKEN_ACCURACY = panel(
    "Next-token accuracy",
    "fraction of tokens",
    "highest",
    training="train/accuracy",
    held_out="eval/accuracy",
)
REWARD = panel(
    "Reward", "mean per completion", "highest", training_rollouts="reward/mean", held_out="eval/reward"
)
KL = panel("KL to the reference", "nats per completion", training_rollouts="kl/reference")
COMPLETION_LENGTH = panel(
    "Completion length",
    "tokens",
    training_rollouts="completion/mean_length",
    held_out="eval/length",
)

# For a run whose stage this version does not know.
OTHER = (panel("Loss", "", "lowest", training="train/loss", held_out="eval/loss"),)
