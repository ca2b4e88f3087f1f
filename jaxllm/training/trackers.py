"""Trackers beside TensorBoard: Weights & Biases and trackio. Their runs continue when a run resumes, and a
tracker that fails is left out with one warning: it never stops a run."""

import importlib
import logging
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The attribute of a library's run with the first step that it does not have.
NEXT_STEP = {"wandb": operator.attrgetter("starting_step"), "trackio": operator.attrgetter("_next_step")}


class Tracker:
    """The run of a library whose `init` returns what has `log` and `finish`, until one of them fails."""

    def __init__(self, library: str, **settings: Any):
        self.library = library
        self.run: Any = None
        self.run = self._try(lambda: importlib.import_module(library).init(**settings))
        self.next_step: int | None = self.run and self._try(lambda: NEXT_STEP[library](self.run))

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log one step's values, if the run does not have that step."""
        if self.next_step is not None and step >= self.next_step and self.run is not None:
            self._try(lambda: self.run.log(dict(values), step=step))

    def finish(self) -> None:
        """End the library's run, which a resumption continues."""
        if self.run is not None:
            self._try(lambda: self.run.finish())

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ImportError as error:
            reason = f"{error}; pip install 'jaxllm[{self.library}]'"
        except Exception as error:
            reason = str(error)
        logging.warning("%s failed; continuing without it: %s", self.library, reason)
        self.run = None


def start_trackers(
    workdir: Path, run_id: str, projects: Mapping[str, str | None], config: Mapping[str, Any]
) -> list[Tracker]:
    """A tracker for each library whose project is named.

    `run_id`, of run.json, is the id of a wandb run, and with the name of the folder the name of either, which
    trackio goes by.
    """
    settings: dict[str, Any] = {"name": f"{workdir.name}-{run_id}", "config": config, "resume": "allow"}
    own = {"wandb": {"id": run_id, "dir": str(workdir)}}
    return [
        Tracker(library, project=project, **settings, **own.get(library, {}))
        for library, project in projects.items()
        if project is not None
    ]
