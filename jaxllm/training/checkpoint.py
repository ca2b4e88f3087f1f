"""Checkpoints: Orbax writes the arrays; a manifest of hashes, written last, marks a checkpoint as complete.

`checkpoints/STEP/` holds `state/` (Orbax's files), `arrays.json` (name, dtype and shape of each array),
`metadata.json`, small files that the caller adds, and `manifest.json`: size and hash of all of these. A
folder without a manifest is left over from a killed save. One that does not match its manifest is damaged
(`jaxllm.training.step_folder`).

Only this module uses Orbax. It passes a flat dict from names such as `params/layers/query` to arrays, so
that any tree of arrays can be saved, and any part of it read back, on any mesh. The files of an array are in
the folder of its name, so that any part can also be hashed and downloaded alone.
"""

import json
import logging
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxllm.config import did_you_mean
from jaxllm.errors import CheckpointError, ConfigError, ProcessLost, RunError
from jaxllm.files import to_json, write_file
from jaxllm.parallel.processes import first_process_decides, together
from jaxllm.parallel.sharding import path_name
from jaxllm.store import StoreError, publish, store_of, update_copy
from jaxllm.training.step_folder import (
    MANIFEST,
    Files,
    all_step_folders,
    damage,
    delete,
    find_checkpoint,
    flush_folders,
    hash_files,
    own_files,
    replace_metadata,
    set_aside,
    step_folders,
)

PyTree = Any  # of jax.Arrays, or of their shapes

# Orbax logs each error as pages of traceback before it raises it; raising is enough.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of one run. In a run of several processes, every process makes the same calls.

    Args:
      folder: holds a folder `STEP/` for each checkpoint.
      keep: number of the newest checkpoints to keep.
      keep_every: steps divisible by this are never deleted.
      log: called with `saved step N` once the checkpoint is complete, from another thread.
      before_commit: called before a checkpoint on an object store is valid, to upload what belongs to it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        log: Callable[[str], None] = print,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        if keep < 1:
            raise ConfigError(f"checkpoint.keep={keep} must be at least 1")
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._keep_every = keep_every
        self._log = log
        self.best_step: int | None = None  # never deleted either
        self._before_commit = before_commit
        self._store = store_of(self.folder)
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=self._processes),
            multiprocessing_options=self._processes,
        )
        self._thread: threading.Thread | None = None
        self._failure: RunError | None = None

    @property
    def _processes(self) -> ocp.options.MultiprocessingOptions:
        """Each process of a run on a store writes into a copy of its own; else they share the folder."""
        return ocp.options.MultiprocessingOptions(primary_host=0 if self._store is None else None)

    def save(
        self, step: int, state: PyTree, metadata: Mapping[str, Any], files: Mapping[str, bytes] | None = None
    ) -> None:
        """Save in the background. On return the arrays are copied, so that `state` may be donated.

        First waits for the previous save, and raises its CheckpointError if it failed. Of a step that is
        already saved and valid only the metadata is replaced, such as after an evaluation was repeated.
        """
        self.wait()
        folder = self.folder / str(step)
        arrays = _leaves_by_name(state)
        size = sum(array.nbytes for array in arrays.values())
        if not first_process_decides(lambda: _prepare_folder(folder, size)):
            if jax.process_index() == 0:
                replace_metadata(folder, to_json(metadata))
            return
        if self._store is not None:
            shutil.rmtree(folder, ignore_errors=True)  # a killed save's, in this process's copy
        documents = {
            "arrays.json": to_json({name: _describe(array) for name, array in arrays.items()}),
            "metadata.json": to_json(metadata),
            **(files or {}),
        }
        try:
            self._orbax.save(folder / "state", args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            raise _clean_up_failed_save(error, folder, size) from error
        arguments = (step, documents, size, self.best_step)  # a later best step is not saved yet
        self._thread = threading.Thread(target=self._commit, args=arguments, name="save")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the running save is complete. Raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _commit(self, step: int, documents: Mapping[str, bytes], size: int, best_step: int | None) -> None:
        folder = self.folder / str(step)
        try:
            self._write(folder, documents)
        except ProcessLost as error:
            self._failure = error
            return
        except Exception as error:
            self._failure = _clean_up_failed_save(error, folder, size)
            return
        if jax.process_index() != 0:
            return
        try:
            self._log(f"saved step {step}")
            self._delete_old(step, best_step)
        except (OSError, StoreError) as error:
            self._failure = CheckpointError(
                f"step {step} was saved, but logging or cleanup failed: {_first_line(error)}"
            )

    def _write(self, folder: Path, documents: Mapping[str, bytes]) -> None:
        """Complete what Orbax writes. Each process hashes and uploads its part of the files: those in its
        copy, or of a folder that all share an equal number. The manifest is last."""
        first, shared = jax.process_index() == 0, self._store is None

        def finish() -> None:
            self._orbax.wait_until_finished()
            for name, content in documents.items() if first else ():
                write_file(folder / name, content)

        def hash_part() -> Files:
            found = list(own_files(folder).items())
            part = found[jax.process_index() :: jax.process_count()] if shared else found
            return hash_files(dict(part), flush=shared)

        together("checkpoint written", finish)
        files: Files = {}
        owners: dict[str, int] = {}
        for process, part in enumerate(together("checkpoint hashed", hash_part)):
            for name, (bytes_, digest) in part.items():
                if owners.setdefault(name, process) == process:
                    files[name] = (bytes_, digest)

        def upload() -> None:
            if self._store is not None:
                own = [name for name, owner in owners.items() if owner == jax.process_index()]
                self._store.upload({f"{folder.name}/{name}": folder / name for name in own})
                shutil.rmtree(folder / "state")
                self._before_commit()

        together("checkpoint uploaded", upload)
        if first:
            if shared:
                flush_folders(folder)
            write_file(folder / MANIFEST, to_json({"files": files}))
            publish(folder / MANIFEST)

    def _delete_old(self, newest: int, best: int | None) -> None:
        """Delete the checkpoints that are not kept, if the newest is there."""
        if what := damage(self.folder / str(newest), hashes=False):
            self._failure = CheckpointError(f"{what}; the older checkpoints are kept")
            return
        steps = [step for step in self.steps() if step <= newest]
        obsolete = {
            self.folder / str(s)
            for s in steps[: -self._keep]
            if s != best and not (self._keep_every and s % self._keep_every == 0)
        }
        older = (folder for folder in all_step_folders(self.folder) if int(folder.name) < newest)
        obsolete |= {folder for folder in older if not (folder / MANIFEST).exists()}  # killed while deleting
        for folder in obsolete:
            delete(folder)

    def steps(self) -> list[int]:
        """The steps valid by manifest, file list and sizes, ascending; `restore` checks the hashes too."""
        return [int(folder.name) for folder in step_folders(self.folder) if not damage(folder, hashes=False)]

    def restore(self, step: int | None, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """State and metadata of `step`; None stands for the newest valid step."""
        self.wait()
        wanted = self.folder if step is None else self.folder / str(step)
        found = first_process_decides(lambda: int(find_checkpoint(wanted, whole=True).name))
        folder = self.folder / str(found)
        if self._store is not None and jax.process_index() > 0:
            update_copy(folder)
            find_checkpoint(folder, whole=True)  # into this process's copy
        state = read_arrays(folder, abstract_state)
        if self._store is not None:
            shutil.rmtree(folder / "state")  # of the copy
        return state, json.loads((folder / "metadata.json").read_bytes())

    def rewind(self, step: int) -> None:
        """Rename the checkpoints after `step`, before a run resumes from there.

        Otherwise a damaged or abandoned later step would count as the newest. No complete checkpoint is
        deleted: `30/` becomes `30.aside-1/`.
        """
        if jax.process_index() == 0:
            for folder in all_step_folders(self.folder):
                if int(folder.name) > step:
                    set_aside(folder)


def read_arrays(folder: Path, abstract: PyTree, prefix: str = "", optional: Collection[str] = ()) -> PyTree:
    """Read the arrays of a step folder into a tree like `abstract`, of arrays or `jax.ShapeDtypeStruct`s.

    Each array has the sharding of its leaf, whatever mesh it was saved from, or is on the first device where
    the leaf has none. With `prefix="params"` only the arrays saved under that name are read. Leaves must
    match by name, shape and dtype (Orbax would cast silently), or CheckpointError is raised; but leaves under
    the `optional` names of the tree may be missing on either side, and are None where they were not saved.
    """
    described = json.loads((folder / "arrays.json").read_bytes())
    if prefix:
        described = {name: text for name, text in described.items() if f"{name}/".startswith(f"{prefix}/")}
    wanted = _leaves_by_name({prefix: abstract} if prefix else abstract)
    names = list(wanted)
    one_sided = {
        name
        for name in described.keys() ^ wanted.keys()
        if any(f"{name}/".startswith(f"{prefix}/{each}/".removeprefix("/")) for each in optional)
    }
    described = {name: text for name, text in described.items() if name not in one_sided}
    wanted = {name: leaf for name, leaf in wanted.items() if name not in one_sided}
    _check_match(folder, described, wanted)
    if not wanted:  # Orbax restores no empty tree
        return jax.tree.map(lambda _: None, abstract)
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first_device
        )
        for name, leaf in wanted.items()
    }
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    try:
        own = ocp.options.MultiprocessingOptions(primary_host=None)  # each process reads by itself
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=own)
        with ocp.Checkpointer(handler, multiprocessing_options=own) as orbax:
            arrays = orbax.restore(
                folder / "state", args=ocp.args.PyTreeRestore(targets, restore_args, partial_restore=True)
            )
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read: {_first_line(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays.get(name) for name in names])


def saved_dtypes(folder: Path, prefix: str) -> dict[str, str]:
    """The dtype of each array saved under a name, by the rest of its name."""
    described = json.loads((folder / "arrays.json").read_bytes())
    inside = {name: text for name, text in described.items() if name.startswith(f"{prefix}/")}
    return {name.removeprefix(f"{prefix}/"): text.partition("[")[0] for name, text in inside.items()}


def _check_match(folder: Path, saved: Mapping[str, str], wanted: Mapping[str, Any]) -> None:
    """CheckpointError naming the first arrays that differ between a checkpoint and what is expected of it."""
    problems = []
    for name in wanted:
        if name not in saved:
            problems.append(f"{name} is missing{did_you_mean(name, saved)}")
        elif saved[name] != _describe(wanted[name]):
            problems.append(f"{name} is {saved[name]}, expected {_describe(wanted[name])}")
    missing = wanted.keys() - saved.keys()
    problems += [
        f"{name} is not expected{did_you_mean(name, missing)}" for name in saved if name not in wanted
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder} does not match the model or optimizer: {'; '.join(problems[:3])}{more}"
        )


def _leaves_by_name(tree: PyTree) -> dict[str, Any]:
    """`{"params/layers/query": leaf}`, in the order of the leaves."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def _describe(array: Any) -> str:
    """`float32[8,2]`."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _prepare_folder(folder: Path, size: int) -> bool:
    """Whether a step must still be saved. If so, its folder no longer exists and the disk has room for it."""
    if folder.exists():
        if damage(folder, hashes=False) is None:
            return False
        set_aside(folder)
    # Orbax would find out later: it fails at the next save, in several threads at once.
    if shutil.disk_usage(folder.parent).free < size:
        raise CheckpointError(f"step {folder.name} was not saved: {_full_disk(folder.parent, size)}")
    return True


def _full_disk(folder: Path, size: int) -> str:
    free = shutil.disk_usage(folder).free
    return f"the disk is full: {size / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free in {folder}"


def _clean_up_failed_save(error: Exception, folder: Path, size: int) -> CheckpointError:
    """Delete what a failed save wrote, which may fill the disk, and return the error to raise."""
    shutil.rmtree(folder, ignore_errors=True)
    reason = _first_line(error)
    if any(text in str(error) for text in ("No space left", "Disk quota exceeded")):
        reason = _full_disk(folder.parent, size)
    return CheckpointError(f"step {folder.name} was not saved: {reason}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
