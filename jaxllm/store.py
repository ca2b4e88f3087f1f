"""Object stores (gs://, s3://, whatever fsspec knows): objects below a URL, and local copies of them.

An object store has neither rename nor append nor a lock. What it has, and all that is used here: an object
appears as a whole, or is created only where there is none; objects are listed with their sizes.

The rest of the code works on local paths. A path below `--cache_dir` may be the copy of a URL:

    stores/SCHEME/...           what was read: checkpoints to initialize from, to evaluate, to serve
    workdirs/PROCESS/SCHEME/... run folders that a process writes (`jaxllm.training.workdir`)
"""

import contextlib
import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import xxhash

from jaxllm.errors import ConfigError, RunError
from jaxllm.files import cache_folder, is_leftover, is_url, write_file

THREADS = 16  # of uploads and downloads: a single stream does not fill a network
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
# What only one kind of reader wants, and may be large: arrays, traces, what another machine's process wrote.
_LARGE = re.compile(r"(.*/)?(state/.*|profile/.*|lock|.*\.tmp)")


class StoreError(RunError):
    """An object store does not do what it is asked to."""


class Object(NamedTuple):
    """What a listing says of an object."""

    size: int
    version: str  # changes with its content


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it; ConfigError for a scheme that needs a package, or
    that it does not know."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        fix = f"pip install 'jaxllm[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else str(error)
        raise ConfigError(f"{url} needs a package: {fix}") from None
    except ValueError:
        close = difflib.get_close_matches(scheme, fsspec.available_protocols(), 1)
        hint = f"; did you mean {close[0]!r}?" if close else ": use gs://, s3://, or a local path"
        raise ConfigError(f"{url}: {scheme}:// is no known kind of store{hint}") from None


class Store:
    """The objects below a URL. What fails is a StoreError, what is missing a FileNotFoundError."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fs, root = file_system(self.url)
        self.root = root.rstrip("/")

    def list(self) -> dict[str, Object]:
        """All objects, by their names below the URL."""
        found: dict[str, Any] = {}
        with self._named(), contextlib.suppress(FileNotFoundError):  # nor is there a bucket
            self.fs.invalidate_cache()
            found = cast("dict[str, Any]", self.fs.find(self.root, detail=True))
        return {
            path[len(self.root) + 1 :]: Object(info["size"], _version(info))
            for path, info in found.items()
            if path.startswith(f"{self.root}/")
        }

    def read(self, name: str) -> bytes:
        """The content of an object. Raises FileNotFoundError."""
        with self._named(name):
            return self.fs.cat_file(f"{self.root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Create or replace an object."""
        with self._named(name):
            if self.fs.protocol[0] == "file":  # which writes in place, unlike any object store
                self._make_parent(name)
                write_file(Path(self.root, name), content)
            else:
                self.fs.pipe_file(f"{self.root}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        """Create an object, if there is none of this name; whether there was none."""
        path = f"{self.root}/{name}"
        with self._named(name):
            self._make_parent(name)
            try:
                self.fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError):  # two creations at the same instant are not told apart
                if self.fs.exists(path):
                    return False
                self.fs.pipe_file(path, content)
        return True

    def modified(self, name: str) -> float:
        """When an object was written, in seconds by the store's clock. Raises FileNotFoundError."""
        with self._named(name):
            self.fs.invalidate_cache()
            return self.fs.modified(f"{self.root}/{name}").timestamp()

    def upload(self, files: Mapping[str, Path]) -> None:
        """Create or replace objects, several at a time."""

        def put(item: tuple[str, Path]) -> None:
            with self._named(item[0]):
                self._make_parent(item[0])
                self.fs.put_file(str(item[1]), f"{self.root}/{item[0]}")

        _in_threads(put, files.items())

    def download(self, files: Mapping[str, Path]) -> None:
        """Write objects to files, several at a time; each appears as a whole."""

        def get(item: tuple[str, Path]) -> None:
            name, path = item
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with self._named(name):
                self.fs.get_file(f"{self.root}/{name}", str(temporary))
            temporary.replace(path)

        _in_threads(get, files.items())

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, if they are there."""

        def remove(name: str) -> None:
            with self._named(name), contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(f"{self.root}/{name}")

        _in_threads(remove, names)

    def copy(self, names: Mapping[str, str]) -> None:
        """Copy objects within the store, from each key to its value."""

        def duplicate(item: tuple[str, str]) -> None:
            with self._named(item[0]):
                self._make_parent(item[1])
                self.fs.cp_file(f"{self.root}/{item[0]}", f"{self.root}/{item[1]}")

        _in_threads(duplicate, names.items())

    def _make_parent(self, name: str) -> None:
        if self.fs.protocol[0] == "file":  # any other has no folders, or makes them
            Path(self.root, name).parent.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _named(self, name: str = "") -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError, RunError):
            raise
        except Exception as error:  # each library has exceptions of its own
            reason = str(error).partition("\n")[0]
            raise StoreError(f"{self.url}/{name}: {type(error).__name__}: {reason}") from error


def _version(info: Mapping[str, Any]) -> str:
    """A hash of all that a listing says: times, generations and ETags have other names in each store."""
    return xxhash.xxh3_64_hexdigest(str(sorted(info.items())).encode())


def _in_threads(act: Callable[[Any], None], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(act, items))


# Copies


def copy_of(url: str, process: int | None = None) -> Path:
    """Where the copy of a URL lies: the one to read, or a run folder that a process writes."""
    scheme, _, path = url.partition("://")
    if scheme in ("file", "local") and not path.startswith("/"):
        raise ConfigError(f"{url} must be an absolute path: {scheme}:///{path}")
    kind = "stores" if process is None else f"workdirs/{process}"
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        raise ConfigError(f"{url} must not contain ..")
    return cache_folder().absolute().joinpath(kind, scheme, *parts)


def url_of(path: str | Path) -> str:
    """The URL of a copy; any other path as it is."""
    for kind, skipped in (("stores", 0), ("workdirs", 1)):
        with contextlib.suppress(ValueError):
            parts = Path(path).relative_to(cache_folder().absolute() / kind).parts[skipped:]
            if len(parts) > 1:
                slash = "/" if parts[0] in ("file", "local") else ""
                return f"{parts[0]}://{slash}{'/'.join(parts[1:])}"
    return str(path)


def store_of(path: Path) -> Store | None:
    """The store below the URL that a path is a copy of; None for any other path."""
    url = url_of(path)
    return Store(url) if is_url(url) else None


def local_path(path: str | Path) -> Path:
    """The local path of a URL, or of a path as a user gives it. Downloads nothing."""
    if found := re.match(r"([a-z][a-z0-9+.-]*):/(?!/)(.*)", str(path)):
        slashes = "///" if found[1] == "file" else "//"
        raise ConfigError(f"{path}: a URL of this kind begins with {found[1]}:{slashes}")
    return copy_of(str(path)) if is_url(path) else Path(path).expanduser().absolute()


def working_path(workdir: str, process: int = 0) -> Path:
    """Where a process works on a run folder: in it, or in its own copy of a URL."""
    return copy_of(workdir, process) if is_url(workdir) else local_path(workdir)


def local_copy(path: str | Path) -> Path:
    """`local_path`, where a URL's small files are those that are on the store now: all but arrays."""
    local = local_path(path)
    if cache_folder().absolute() / "stores" in local.parents:
        update_copy(local)
    return local


def update_copy(local: Path) -> list[str]:
    """Make the small files of a copy those of its URL, and drop what is not there; the names of those.

    What was read is downloaded again where its version has changed, a run folder in any case: a process that
    was killed may have changed it. Its logs are kept.
    """
    store = store_of(local)
    assert store is not None
    found = store.list()
    record = local.with_name(f"{local.name}.versions.json")
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(record.read_bytes())
    dropped = []
    files = [path for path in local.rglob("*") if path.is_file()]
    for name, path in {path.relative_to(local).as_posix(): path for path in files}.items():
        if name not in found and not name.startswith("logs/") and not is_leftover(path.name):
            dropped.append(name)
            path.unlink()
            with contextlib.suppress(OSError):  # not empty
                os.removedirs(path.parent)
    small = {name: each for name, each in found.items() if _LARGE.fullmatch(name) is None}
    changed = [name for name, each in small.items() if not _is_same(local / name, each, known.get(name))]
    store.download({name: local / name for name in changed})
    if found and cache_folder().absolute() / "stores" in local.parents:
        with contextlib.suppress(OSError):  # of another process that does the same
            write_file(record, json.dumps({name: each.version for name, each in small.items()}).encode())
    return sorted(dropped)


def _is_same(path: Path, found: Object, known: str | None) -> bool:
    return known == found.version and path.is_file() and path.stat().st_size == found.size


def publish(path: Path) -> None:
    """Upload a file of a copy; nothing for any other."""
    if (store := store_of(path.parent)) is not None:
        store.write(path.name, path.read_bytes())
