"""The folders of checkpoints, `STEP/`: which are valid, which is the newest, and their manifests.

A manifest has the size and hash of every file, and is written last. Orbax alone does not notice damage: a
flipped bit restores as another number. Of a folder on an object store the small files lie in a local copy;
sizes are those of its listing, and what is read is downloaded first (`jaxllm.store`).
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import xxhash

from jaxllm.errors import CheckpointError, NoCheckpoint
from jaxllm.files import is_hf_folder, is_leftover, is_peft_folder, is_url, to_json, write_file
from jaxllm.parallel.processes import first_process_decides
from jaxllm.store import local_copy, local_path, publish, store_of, url_of

MANIFEST = "manifest.json"
Files = dict[str, tuple[int, str]]  # by name inside the folder: size and hash

_STEP = re.compile("0|[1-9][0-9]*")
# Arrays besides the parameters: optimizer state and what else a run alone needs.
_NOT_PARAMETERS = re.compile(r"state/(?!params/|array_metadatas/)[^/]+/.*")
_OCDBT = "state/manifest.ocdbt"  # of an older version, whose files hold any part of any array


def find_checkpoint(path: str | Path, *, whole: bool = False) -> Path:
    """The newest valid step folder in a run folder or in a folder of checkpoints; or a step folder itself.

    A folder with a Hugging Face model, or with adapters in PEFT's files, is one too. RUN/best stands for the
    best step, as recorded in the newest one. All of these may be URLs: what is returned is then a local copy.
    Damaged and unfinished step folders are named on stderr and skipped. The sizes of all files are checked,
    and the hashes of those that readers of the parameters need; with `whole` those of all.
    Raises CheckpointError where no valid one is found.
    """
    path = copy_with_config(path)
    if is_hf_folder(path) or is_peft_folder(path):
        return path
    if path.name == "best" and not path.exists() and (path.parent / "checkpoints").is_dir():
        newest = find_checkpoint(path.parent)
        path = newest.with_name(str(_best_step(newest)))
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not inside.is_dir():
        raise NoCheckpoint(f"{url_of(path)} does not exist")
    if _STEP.fullmatch(inside.name):
        if what := damage(inside, whole=whole):
            raise CheckpointError(what)
        return inside
    for folder in reversed(step_folders(inside)):
        what = damage(folder, whole=whole)
        if what is None:
            return folder
        print(f"warning: skipping a checkpoint: {what}", file=sys.stderr)
    raise CheckpointError(
        f"{url_of(path)} holds no valid checkpoint: pass another one, or start a new run in another --workdir"
    )


def agree_on_checkpoint(path: str | Path) -> Path:
    """What process 0 finds, in every process of a run; from a store each downloads it."""
    found = first_process_decides(lambda: url_of(find_checkpoint(path)))
    return find_checkpoint(found) if is_url(found) else Path(found)


def copy_with_config(path: str | Path) -> Path:
    """`local_copy`; of RUN/best and RUN/checkpoints with the files of the run."""
    path = local_path(path)
    local_copy(path.parent if path.name in ("best", "checkpoints") else path)
    return path


def _best_step(newest: Path) -> int:
    best = json.loads((newest / "metadata.json").read_bytes()).get("best")
    if best is None:
        raise NoCheckpoint(
            f"{url_of(newest)}: its run recorded no best step: set checkpoint.best_metric, or pass a step"
        )
    if not best["step"]:
        raise NoCheckpoint(
            f"{url_of(newest)}: no step of its run has a better {best['metric']} than the initial weights; "
            f"pass the checkpoint that it was initialized from"
        )
    return best["step"]


def damage(folder: Path, *, hashes: bool = True, whole: bool = True) -> str | None:
    """Why a step folder is not a valid checkpoint, or None if it is. `hashes=False` compares sizes only,
    `whole=False` the hashes of parameters and small files, which are then there, downloaded if need be.

    Files that its manifest does not list do not matter: `.DS_Store`, leftovers of a copy.
    """
    where = url_of(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        expected = {name: (size, digest) for name, (size, digest) in manifest["files"].items()}
    except FileNotFoundError:
        return f"{where} is unfinished: it has no {MANIFEST}"
    except OSError as error:
        return f"{where} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{where} is damaged: {MANIFEST} cannot be read"
    store = store_of(folder)
    sizes = _sizes(folder, expected) if store is None else {n: each.size for n, each in store.list().items()}
    for name, (size, _) in expected.items():
        if name not in sizes:
            return f"{where} is damaged: {name} is missing"
        if sizes[name] != size:
            return f"{where} is damaged: {name} has {sizes[name]} bytes, not {size}"
    if not hashes:
        return None
    read = [name for name in expected if whole or _OCDBT in expected or not _NOT_PARAMETERS.fullmatch(name)]
    changed = _changed(folder, expected, read)
    if changed and store is not None:
        store.download({name: folder / name for name in changed})
        changed = _changed(folder, expected, changed)
    return f"{where} is damaged: the content of {changed[0]} has changed" if changed else None


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def _changed(folder: Path, expected: Files, names: Iterable[str]) -> list[str]:
    """The files that are missing or have another hash."""
    found = hash_files({name: folder / name for name in names if (folder / name).is_file()})
    return [name for name in names if name not in found or found[name][1] != expected[name][1]]


def checkpoint_hash(folder: Path) -> str:
    """One hash of all files of a valid step folder, as they were saved first, or of a Hugging Face model or
    adapters."""
    if is_hf_folder(folder) or is_peft_folder(folder):
        found = [path for path in sorted(folder.iterdir()) if path.is_file() and not is_leftover(path.name)]
        hashes = {
            name: digest for name, (_, digest) in hash_files({path.name: path for path in found}).items()
        }
        return xxhash.xxh3_128_hexdigest(to_json(hashes))
    content = (folder / MANIFEST).read_bytes()
    return json.loads(content).get("hash") or xxhash.xxh3_128_hexdigest(content)


def hash_files(files: Mapping[str, Path], *, flush: bool = False) -> Files:
    """Size and hash of files, which are read in parallel; `flush`: and are on the disk on return."""

    def digest(path: Path) -> tuple[int, str]:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
            if flush:
                os.fsync(file.fileno())
            return file.tell(), found

    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(digest, files.values()), strict=True))


def own_files(folder: Path) -> dict[str, Path]:
    """The files of a step folder by name, without what file systems add."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in sorted(found) if not is_leftover(found[name].name)}


def flush_folders(folder: Path) -> None:
    """Make the names of all files in a step folder, and its own, survive a power cut."""
    for path in (folder.parent, folder, *(path for path in folder.rglob("*") if path.is_dir())):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def step_folders(folder: Path) -> list[Path]:
    """The step folders, complete or not, by ascending step."""
    return sorted(
        (path for path in folder.glob("*") if _STEP.fullmatch(path.name) and path.is_dir()),
        key=lambda path: int(path.name),
    )


def all_step_folders(folder: Path) -> list[Path]:
    """`step_folders`, with those of which only a store has files: of a save or a deletion that was killed."""
    store = store_of(folder)
    names = set() if store is None else {name.partition("/")[0] for name in store.list()}
    stored = {folder / name for name in names if _STEP.fullmatch(name)}
    return sorted(stored | set(step_folders(folder)), key=lambda path: int(path.name))


def replace_metadata(folder: Path, content: bytes) -> None:
    """Replace the metadata of a valid step folder, which is valid at every moment."""
    name = "metadata.json"
    if (folder / name).read_bytes() == content:
        return
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["hash"] = checkpoint_hash(folder)  # by which runs know the parent that they are initialized from
    manifest["files"].pop(name, None)
    _write(folder / MANIFEST, to_json(manifest))  # a file that it does not list may change
    _write(folder / name, content)
    manifest["files"][name] = (len(content), xxhash.xxh3_128_hexdigest(content))
    _write(folder / MANIFEST, to_json(manifest))


def _write(path: Path, content: bytes) -> None:
    write_file(path, content)
    publish(path)


def delete(folder: Path) -> None:
    """Delete a step folder: the manifest first, so that a half-deleted folder is not valid."""
    if (store := store_of(folder)) is not None:
        store.delete([MANIFEST])
        store.delete(store.list())
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path) -> None:
    """Rename a step folder so that it no longer counts; delete it if it was never complete."""
    if not (folder / MANIFEST).exists():
        delete(folder)
        return
    aside = (folder.with_name(f"{folder.name}.aside-{number}") for number in count(1))
    new = next(path for path in aside if not path.exists())
    if (store := store_of(folder.parent)) is not None:  # which has no rename
        names = [name for name in store.list() if name.startswith(f"{folder.name}/")]
        moved = {name: f"{new.name}/{name.partition('/')[2]}" for name in names}
        last = f"{folder.name}/{MANIFEST}"
        store.copy({name: moved[name] for name in names if name != last})
        store.copy({last: moved[last]})
        store.delete([last])
        store.delete(names)
    folder.rename(new)
