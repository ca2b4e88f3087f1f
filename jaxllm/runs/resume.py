"""What may change when a run resumes, and the lines that say what the change does."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import Difference, as_dict, differences, parse
from jaxllm.errors import ConfigError
from jaxllm.runs.config import TrainConfig
from jaxllm.store import local_path, url_of
from jaxllm.training.optimizer import OptimizerConfig, make_schedule

# How long, how often, what is logged and kept.
FREE = (
    "training.steps",
    "optimizer.warmup_steps",  # follows training.steps
    "training.log_every",
    "training.evaluate_at_start",
    "training.evaluate_every",
    "training.sample_every",
    "training.checkpoint_every",
    "training.patience",
    "training.target",
    "training.max_bad_steps",
    "training.hang_timeout",
    "checkpoint.keep",
    "evaluation.max_rows",
    "evaluation.num_sources",
    "sample",
    "wandb_project",
    "trackio_project",
    "reward.workers",
    "reward.error_reward",  # was 0.0 by default, and concerns calls that fail alone
)
# Memory and speed: the same computation in another order, whose rounding differs.
ROUNDING = (
    "mesh",
    "training.num_microbatches",
    "model.remat",
    "model.attention",
    "model.scan_layers",
    "rollout.decode_batch_size",
    "rollout.replicate_params",
    "data.reference",
)
# Where inputs lie: their content is compared by fingerprint, or the run's own copy is used.
MOVABLE = (
    "data.train",
    "data.validation",
    "data.held_out",
    "reward.model",
    "data.template",
    "tokenizer.path",
)
COPIED = ("data.template", "tokenizer.path")

MAY_DIFFER = FREE + ROUNDING + MOVABLE


def resume_notes(
    before: Mapping[str, Any], config: TrainConfig, workdir: str, step: int, updates: int
) -> Iterator[str]:
    """A line for each kind of change between the stored config of a run and the one that it resumes with, at
    `step`, after so many `updates`."""
    changed = differences(before, as_dict(config))
    if found := among(changed, ROUNDING):
        yield f"{join(found)}: the bits may differ from those of a run without this change"
    moved = [each for each in among(changed, MOVABLE) if each.path not in COPIED]
    if moved:
        yield f"{join(moved)}: moved, with the same content by fingerprint"
    for each in among(changed, ("tokenizer.path",)):
        yield f"{each}: not used, the run keeps its tokenizer"
    if among(changed, ("training.steps", "optimizer.warmup_steps")):
        yield from schedule_note(before, config, workdir, step, updates)


def schedule_note(
    before: Mapping[str, Any], config: TrainConfig, workdir: str, step: int, updates: int
) -> Iterator[str]:
    """A line where another number of steps changes the learning rate of the next update."""
    try:
        stored = parse(OptimizerConfig, before["optimizer"])
        was = float(np.asarray(make_schedule(stored, before["training"]["steps"])(updates)))
    except ConfigError:  # of an older version, without a field of today
        return
    now = float(np.asarray(make_schedule(config.optimizer, config.training.steps)(updates)))
    if abs(now - was) > 1e-6 * max(now, was):
        yield (
            f"training.steps {before['training']['steps']} -> {config.training.steps} moves the schedule: "
            f"after step {step} the learning rate is {now:.3g} instead of {was:.3g}. For a schedule of its "
            f"own start another run from these weights, with --init_from={workdir}"
        )


def parent_note(init_from: str | None, parent: Path | None) -> Iterator[str]:
    """A line where a run that resumes is given another --init_from than the checkpoint `parent` that it was
    initialized from."""
    if init_from is None:
        return
    given = local_path(init_from).resolve()
    given = given.parent if given.name in ("best", "checkpoints") else given
    if parent is None or given not in (parent.resolve(), *parent.resolve().parents):
        origin = "random weights" if parent is None else url_of(parent)
        yield f"--init_from={init_from} is not used: the run resumes, and was initialized from {origin}"


def check_number_of_sources(before: Mapping[str, Any], config: TrainConfig) -> None:
    """ConfigError where it is another than in the stored config: fingerprints do not tell whether a source is
    trained or validated on."""
    for each in among(differences(before, as_dict(config)), MOVABLE):
        if isinstance(each.before, list) and len(each.before) != len(each.after):
            raise ConfigError(f"{each}: a run that resumes must have as many sources as before")


def among(changed: list[Difference], names: tuple[str, ...]) -> list[Difference]:
    """The differences in these fields and sections."""
    return [each for each in changed if each.is_in(names)]


def join(changed: list[Difference]) -> str:
    """`model.remat "none" -> "full", mesh.data 1 -> 8`."""
    return ", ".join(map(str, changed))
