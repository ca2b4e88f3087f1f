"""Checkpoints: Orbax writes the arrays, and a manifest of hashes, written last, says that everything arrived.

`checkpoints/STEP/` holds `state/` (Orbax's files), `arrays.json` (name, dtype and shape of each array),
`metadata.json`, whatever small files the caller adds, and `manifest.json`: size and hash of all of these.
A folder without a manifest is what a killed save left behind. One that does not match its manifest is
damaged, which Orbax alone does not notice: a flipped bit restores as another number.

This module alone talks to Orbax. It hands it a flat dict from names such as `params/layers/query` to arrays,
so any tree of arrays can be saved, and any part of it read back, on any mesh.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from jax.experimental import multihost_utils

from jaxllm.config import did_you_mean
from jaxllm.errors import CheckpointError, ConfigError, RunError
from jaxllm.parallel.sharding import path_name

PyTree = Any

MANIFEST = "manifest.json"
_STEP = re.compile("0|[1-9][0-9]*")

# Orbax logs each error as pages of traceback before raising it; raising is enough.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of one run. In a run of several processes each makes the same calls.

    Args:
      folder: where they are, `STEP/` each.
      keep: how many of the newest to keep.
      keep_every: steps divisible by this are kept for good.
      log: told `saved step N` when that is true, from another thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_every: int | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        if keep < 1:
            raise ConfigError(f"keep={keep} checkpoints: must be at least 1")
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._keep_every = keep_every
        self._log = log
        self.best_step: int | None = None  # kept as well, however old
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def save(
        self, step: int, state: PyTree, metadata: Mapping[str, Any], files: Mapping[str, bytes] | None = None
    ) -> None:
        """Save in the background; on return the arrays are copied, and `state` may be donated.

        First waits for the save before, and raises what went wrong with it. A step that is already there
        and valid is left as it is.
        """
        self.wait()
        folder = self.folder / str(step)
        arrays = _by_name(state)
        size = sum(array.nbytes for array in arrays.values())
        if not first_process_decides(lambda: _make_room(folder, size)):
            return
        documents = {
            "arrays.json": to_json({name: _describe(array) for name, array in arrays.items()}),
            "metadata.json": to_json(metadata),
            **(files or {}),
        }
        try:
            self._orbax.save(folder / "state", args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            raise _give_up_save(error, folder, size) from error
        arguments = (step, documents, size, self.best_step)  # a best that comes later is not saved yet
        self._thread = threading.Thread(target=self._commit, args=arguments, name="save")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in flight. Raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _commit(self, step: int, documents: Mapping[str, bytes], size: int, best_step: int | None) -> None:
        folder = self.folder / str(step)
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            for name, content in documents.items():
                write_file(folder / name, content)
            _write_manifest(folder)
        except Exception as error:
            self._failure = _give_up_save(error, folder, size)
            return
        try:
            self._log(f"saved step {step}")
            self._delete_old(step, best_step)
        except OSError as error:
            self._failure = CheckpointError(f"step {step} was saved, but then: {_first_line(error)}")

    def _delete_old(self, newest: int, best: int | None) -> None:
        """Delete what retention no longer wants, once the newest is read back and found whole."""
        steps = [step for step in self.steps() if step <= newest]
        obsolete = [
            s
            for s in steps[: -self._keep]
            if s != best and not (self._keep_every and s % self._keep_every == 0)
        ]
        if obsolete and (what := damage(self.folder / str(newest))):
            self._failure = CheckpointError(f"{what}; older steps are kept")
            return
        for step in obsolete:
            (self.folder / str(step) / MANIFEST).unlink()  # first, lest a half-deleted folder look whole
            shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps that look valid by manifest, file list and sizes, ascending; `restore` checks hashes."""
        return [int(folder.name) for folder in step_folders(self.folder) if not damage(folder, hashes=False)]

    def restore(self, step: int | None, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """State and metadata of `step`, or for None of the newest valid step."""
        self.wait()
        wanted = self.folder if step is None else self.folder / str(step)
        step = first_process_decides(lambda: int(find_checkpoint(wanted).name))
        folder = self.folder / str(step)
        return read_arrays(folder, abstract_state), json.loads((folder / "metadata.json").read_bytes())

    def rewind(self, step: int) -> None:
        """Take what lies after `step` out of the way, before a run goes on from there.

        Else a damaged or abandoned later step would look like the newest. Nothing that was once saved is
        deleted: `30/` becomes `30.aside-1/`.
        """
        if jax.process_index() == 0:
            for folder in step_folders(self.folder):
                if int(folder.name) > step:
                    _set_aside(folder)


def find_checkpoint(path: str | Path) -> Path:
    """The newest valid step folder of a run folder or of a folder of checkpoints; or a step folder itself.

    RUN/best is the step that the newest one calls the best. Damaged and unfinished ones are named on stderr
    and skipped.
    """
    path = Path(path).expanduser().absolute()
    if path.name == "best" and not path.exists() and (path.parent / "checkpoints").is_dir():
        newest = find_checkpoint(path.parent)
        path = newest.with_name(str(_best_step(newest)))
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not inside.is_dir():
        raise CheckpointError(f"{path} does not exist")
    if _STEP.fullmatch(inside.name):
        if what := damage(inside):
            raise CheckpointError(what)
        return inside
    for folder in reversed(step_folders(inside)):
        what = damage(folder)
        if what is None:
            return folder
        print(f"warning: skipping a checkpoint: {what}", file=sys.stderr)
    raise CheckpointError(
        f"{path} holds no valid checkpoint: give another or, for a run to begin anew, another --workdir"
    )


def _best_step(newest: Path) -> int:
    best = json.loads((newest / "metadata.json").read_bytes()).get("best")
    if best is None:
        raise CheckpointError(f"{newest}: its run kept no best step; set checkpoint.best_metric for that")
    if not best["step"]:
        raise CheckpointError(
            f"{newest}: by {best['metric']} the best are the weights that its run began with"
        )
    return best["step"]


def read_arrays(folder: Path, abstract: PyTree, prefix: str = "", optional: Collection[str] = ()) -> PyTree:
    """The arrays of a step folder in the tree `abstract`, of arrays or `jax.ShapeDtypeStruct`s.

    Each arrives with the sharding of its leaf, whatever mesh it was saved from; on the first device where
    the leaf has none. With `prefix="params"` only what is saved under that name is read. Leaves must match
    by name, shape and dtype (Orbax would cast in silence); but what lies under `optional` names of the tree
    may be missing on either side, and comes back as None where it was not saved.
    """
    described = json.loads((folder / "arrays.json").read_bytes())
    if prefix:
        described = {name: text for name, text in described.items() if f"{name}/".startswith(f"{prefix}/")}
    wanted = _by_name({prefix: abstract} if prefix else abstract)
    names = list(wanted)
    one_sided = {
        name
        for name in described.keys() ^ wanted.keys()
        if any(f"{name}/".startswith(f"{prefix}/{each}/".removeprefix("/")) for each in optional)
    }
    described = {name: text for name, text in described.items() if name not in one_sided}
    wanted = {name: leaf for name, leaf in wanted.items() if name not in one_sided}
    _check_fit(folder, described, wanted)
    first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first_device
        )
        for name, leaf in wanted.items()
    }
    restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            arrays = orbax.restore(
                folder / "state", args=ocp.args.PyTreeRestore(targets, restore_args, partial_restore=True)
            )
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be read: {_first_line(error)}") from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays.get(name) for name in names])


def _check_fit(folder: Path, saved: Mapping[str, str], wanted: Mapping[str, Any]) -> None:
    problems = []
    for name in wanted:
        if name not in saved:
            problems.append(f"{name} is not in it{did_you_mean(name, saved)}")
        elif saved[name] != _describe(wanted[name]):
            problems.append(f"{name} is {saved[name]} in it, {_describe(wanted[name])} here")
    missing = wanted.keys() - saved.keys()
    problems += [
        f"{name} is in it, not here{did_you_mean(name, missing)}" for name in saved if name not in wanted
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{folder} does not fit: {'; '.join(problems[:3])}{more}")


def _by_name(tree: PyTree) -> dict[str, Any]:
    """`{"params/layers/query": leaf}`, in the order of the leaves."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def _describe(array: Any) -> str:
    """`float32[8,2]`."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


# Folders and files


def damage(folder: Path, *, hashes: bool = True) -> str | None:
    """What keeps a step folder from being a valid checkpoint, or None. `hashes=False` reads sizes only."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        expected = {name: (size, digest) for name, (size, digest) in manifest["files"].items()}
    except FileNotFoundError:
        return f"{folder} is unfinished: it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder} is damaged: {MANIFEST} cannot be read"
    found = _files(folder)
    for name in sorted(expected.keys() ^ found.keys()):
        return f"{folder} is damaged: {name} is {'missing' if name in expected else 'not in its manifest'}"
    for name, (size, _) in expected.items():
        if found[name].stat().st_size != size:
            return f"{folder} is damaged: {name} has {found[name].stat().st_size} bytes, not {size}"
    if hashes:
        for name, digest in _hash_all(found).items():
            if digest != expected[name][1]:
                return f"{folder} is damaged: the content of {name} has changed"
    return None


def checkpoint_hash(folder: Path) -> str:
    """One hash for all that a valid step folder holds."""
    return xxhash.xxh3_128_hexdigest((folder / MANIFEST).read_bytes())


def write_file(path: Path, content: bytes) -> None:
    """Write so that, whenever the machine stops, `path` holds all of `content` or what it held before. A file
    that is replaced keeps its mode."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        if path.exists():
            shutil.copymode(path, temporary)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


def to_json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _write_manifest(folder: Path) -> None:
    found = _files(folder)
    files = {name: (found[name].stat().st_size, digest) for name, digest in _hash_all(found).items()}
    write_file(folder / MANIFEST, to_json({"files": files}))


def _files(folder: Path) -> dict[str, Path]:
    """Every file of a step folder but its manifest, by its path inside the folder."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if name != MANIFEST}


def _hash_all(files: Mapping[str, Path]) -> dict[str, str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(digest, files.values()), strict=True))


def step_folders(folder: Path) -> list[Path]:
    """The folders of steps, finished or not, in order."""
    return sorted(
        (path for path in folder.glob("*") if _STEP.fullmatch(path.name)), key=lambda path: int(path.name)
    )


def _set_aside(folder: Path) -> None:
    """Rename a step folder so that it no longer counts; delete it if nothing was ever saved in it."""
    if not (folder / MANIFEST).exists():
        shutil.rmtree(folder)
        return
    numbers = itertools.count(1)
    aside = (folder.with_name(f"{folder.name}.aside-{number}") for number in numbers)
    folder.rename(next(path for path in aside if not path.exists()))


def _make_room(folder: Path, size: int) -> bool:
    """Whether a step is still to be saved, its folder then being free to write to."""
    if folder.exists():
        if damage(folder) is None:
            return False
        _set_aside(folder)
    # To find out here is much better than in Orbax, which fails one save later, in several threads at once.
    if shutil.disk_usage(folder.parent).free < size:
        raise CheckpointError(f"step {folder.name} was not saved: {_full_disk(folder.parent, size)}")
    return True


def _full_disk(folder: Path, size: int) -> str:
    free = shutil.disk_usage(folder).free
    return f"the disk is full, {size / 1e9:.3g} GB needed and {free / 1e9:.3g} GB free in {folder}"


def _give_up_save(error: Exception, folder: Path, size: int) -> CheckpointError:
    """Delete what a failed save wrote (on a full disk, that is what fills it) and say why it failed."""
    shutil.rmtree(folder, ignore_errors=True)
    reason = _first_line(error)
    if any(text in str(error) for text in ("No space left", "Disk quota exceeded")):
        reason = _full_disk(folder.parent, size)
    return CheckpointError(f"step {folder.name} was not saved: {reason}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def first_process_decides(choose: Callable[[], int]) -> int:
    """What `choose()` returns in the first process, in every process: their views of a disk may differ."""
    if jax.process_count() == 1:
        return choose()
    choice, failure = -1, CheckpointError("the first process refused, see its message")
    if jax.process_index() == 0:
        try:
            choice = choose()
        except RunError as error:
            failure = error
    choice = int(multihost_utils.broadcast_one_to_all(np.int32(choice)))
    if choice < 0:
        raise failure
    return choice
