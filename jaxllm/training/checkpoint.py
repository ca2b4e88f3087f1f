"""Checkpoints: Orbax writes the arrays; a manifest of hashes, written last, marks a checkpoint as complete.

`checkpoints/STEP/` holds `state/` (Orbax's files), `arrays.json` (name, dtype and shape of each array),
`metadata.json`, small files that the caller adds, and `manifest.json`: size and hash of all of these. A
folder without a manifest is left over from a killed save. One that does not match its manifest is damaged,
which Orbax alone does not notice: a flipped bit restores as another number.

Only this module uses Orbax. It passes a flat dict from names such as `params/layers/query` to arrays, so
that any tree of arrays can be saved, and any part of it read back, on any mesh.
"""

import hashlib
import itertools
import json
import logging
import re
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import xxhash

from jaxllm.config import did_you_mean
from jaxllm.errors import CheckpointError, ConfigError, NoCheckpoint
from jaxllm.files import is_hf_folder, is_leftover, is_peft_folder, to_json, write_file
from jaxllm.parallel.processes import first_process_decides
from jaxllm.parallel.sharding import path_name

PyTree = Any  # of jax.Arrays, or of their shapes

MANIFEST = "manifest.json"
_STEP = re.compile("0|[1-9][0-9]*")

# Orbax logs each error as pages of traceback before it raises it; raising is enough.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of one run. In a run of several processes, every process makes the same calls.

    Args:
      folder: holds a folder `STEP/` for each checkpoint.
      keep: number of the newest checkpoints to keep.
      keep_every: steps divisible by this are never deleted.
      log: called with `saved step N` once the checkpoint is complete, from another thread.
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
            raise ConfigError(f"checkpoint.keep={keep} must be at least 1")
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._keep_every = keep_every
        self._log = log
        self.best_step: int | None = None  # never deleted either
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

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
                _replace_metadata(folder, to_json(metadata))
            return
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
            self._orbax.wait_until_finished()
            if jax.process_index() != 0:
                return
            for name, content in documents.items():
                write_file(folder / name, content)
            _write_manifest(folder)
        except Exception as error:
            self._failure = _clean_up_failed_save(error, folder, size)
            return
        try:
            self._log(f"saved step {step}")
            self._delete_old(step, best_step)
        except OSError as error:
            self._failure = CheckpointError(
                f"step {step} was saved, but logging or cleanup failed: {_first_line(error)}"
            )

    def _delete_old(self, newest: int, best: int | None) -> None:
        """Delete the checkpoints that are not kept, after the newest has been read back and found valid."""
        steps = [step for step in self.steps() if step <= newest]
        obsolete = {
            self.folder / str(s)
            for s in steps[: -self._keep]
            if s != best and not (self._keep_every and s % self._keep_every == 0)
        }
        older = (folder for folder in step_folders(self.folder) if int(folder.name) < newest)
        obsolete |= {folder for folder in older if not (folder / MANIFEST).exists()}  # killed while deleting
        if obsolete and (what := damage(self.folder / str(newest))):
            self._failure = CheckpointError(f"{what}; the older checkpoints are kept")
            return
        for folder in obsolete:
            # The manifest first, so that a half-deleted folder is not valid.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps valid by manifest, file list and sizes, ascending; `restore` checks the hashes too."""
        return [int(folder.name) for folder in step_folders(self.folder) if not damage(folder, hashes=False)]

    def restore(self, step: int | None, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """State and metadata of `step`; None stands for the newest valid step."""
        self.wait()
        wanted = self.folder if step is None else self.folder / str(step)
        found = first_process_decides(lambda: int(find_checkpoint(wanted).name))
        folder = self.folder / str(found)
        return read_arrays(folder, abstract_state), json.loads((folder / "metadata.json").read_bytes())

    def rewind(self, step: int) -> None:
        """Rename the checkpoints after `step`, before a run resumes from there.

        Otherwise a damaged or abandoned later step would count as the newest. No complete checkpoint is
        deleted: `30/` becomes `30.aside-1/`.
        """
        if jax.process_index() == 0:
            for folder in step_folders(self.folder):
                if int(folder.name) > step:
                    _set_aside(folder)


def find_checkpoint(path: str | Path) -> Path:
    """The newest valid step folder in a run folder or in a folder of checkpoints; or a step folder itself.

    A folder with a Hugging Face model, or with adapters in PEFT's files, is one too. RUN/best stands for the
    best step, as recorded in the newest one. Damaged and unfinished step folders are named on stderr and
    skipped. Raises CheckpointError where no valid one is found.
    """
    path = Path(path).expanduser().absolute()
    if is_hf_folder(path) or is_peft_folder(path):
        return path
    if path.name == "best" and not path.exists() and (path.parent / "checkpoints").is_dir():
        newest = find_checkpoint(path.parent)
        path = newest.with_name(str(_best_step(newest)))
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not inside.is_dir():
        raise NoCheckpoint(f"{path} does not exist")
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
        f"{path} holds no valid checkpoint: pass another one, or start a new run in another --workdir"
    )


def _best_step(newest: Path) -> int:
    best = json.loads((newest / "metadata.json").read_bytes()).get("best")
    if best is None:
        raise NoCheckpoint(
            f"{newest}: its run recorded no best step: set checkpoint.best_metric, or pass a step"
        )
    if not best["step"]:
        raise NoCheckpoint(
            f"{newest}: no step of its run has a better {best['metric']} than the initial weights; pass the "
            f"checkpoint that it was initialized from"
        )
    return best["step"]


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
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
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


# Folders and files


def damage(folder: Path, *, hashes: bool = True) -> str | None:
    """Why a step folder is not a valid checkpoint, or None if it is. `hashes=False` compares sizes only.

    Files that its manifest does not list do not matter: `.DS_Store`, leftovers of a copy.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        expected = {name: (size, digest) for name, (size, digest) in manifest["files"].items()}
    except FileNotFoundError:
        return f"{folder} is unfinished: it has no {MANIFEST}"
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder} is damaged: {MANIFEST} cannot be read"
    for name, (size, _) in expected.items():
        if not (folder / name).is_file():
            return f"{folder} is damaged: {name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{folder} is damaged: {name} has {found} bytes, not {size}"
    if hashes:
        for name, digest in _hash_all({name: folder / name for name in expected}).items():
            if digest != expected[name][1]:
                return f"{folder} is damaged: the content of {name} has changed"
    return None


def checkpoint_hash(folder: Path) -> str:
    """One hash of all files of a valid step folder, as they were saved first, or of a Hugging Face model or
    adapters."""
    if is_hf_folder(folder) or is_peft_folder(folder):
        found = [path for path in sorted(folder.iterdir()) if path.is_file() and not is_leftover(path.name)]
        return xxhash.xxh3_128_hexdigest(to_json(_hash_all({path.name: path for path in found})))
    content = (folder / MANIFEST).read_bytes()
    return json.loads(content).get("hash") or xxhash.xxh3_128_hexdigest(content)


def _write_manifest(folder: Path) -> None:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    own = {name: found[name] for name in sorted(found) if not is_leftover(found[name].name)}
    files = {name: (own[name].stat().st_size, digest) for name, digest in _hash_all(own).items()}
    write_file(folder / MANIFEST, to_json({"files": files}))


def _replace_metadata(folder: Path, content: bytes) -> None:
    """Replace the metadata of a valid step folder, which is valid at every moment."""
    name = "metadata.json"
    if (folder / name).read_bytes() == content:
        return
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["hash"] = checkpoint_hash(folder)  # by which runs know the parent that they are initialized from
    manifest["files"].pop(name, None)
    write_file(folder / MANIFEST, to_json(manifest))  # a file that it does not list may change
    write_file(folder / name, content)
    manifest["files"][name] = (len(content), xxhash.xxh3_128_hexdigest(content))
    write_file(folder / MANIFEST, to_json(manifest))


def _hash_all(files: Mapping[str, Path]) -> dict[str, str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(digest, files.values()), strict=True))


def step_folders(folder: Path) -> list[Path]:
    """The step folders, complete or not, by ascending step."""
    return sorted(
        (path for path in folder.glob("*") if _STEP.fullmatch(path.name) and path.is_dir()),
        key=lambda path: int(path.name),
    )


def _set_aside(folder: Path) -> None:
    """Rename a step folder so that it no longer counts; delete it if it was never complete."""
    if not (folder / MANIFEST).exists():
        shutil.rmtree(folder)
        return
    numbers = itertools.count(1)
    aside = (folder.with_name(f"{folder.name}.aside-{number}") for number in numbers)
    folder.rename(next(path for path in aside if not path.exists()))


def _prepare_folder(folder: Path, size: int) -> bool:
    """Whether a step must still be saved. If so, its folder no longer exists and the disk has room for it."""
    if folder.exists():
        if damage(folder) is None:
            return False
        _set_aside(folder)
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
