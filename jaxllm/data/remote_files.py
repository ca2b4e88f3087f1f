"""Files behind URLs (gs://, s3://, https://, ...), downloaded once into the cache, from where they are read.

A download is named by its URL and by what the store says of the file's version: size, time of modification
or etag. A file that changes there is downloaded again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from jaxllm.caches import read_or_build
from jaxllm.errors import DataError
from jaxllm.files import cache_folder, is_full_disk
from jaxllm.store import file_system


class RemoteFile(NamedTuple):
    """One file of a store."""

    url: str
    store: Any  # fsspec's AbstractFileSystem
    path: str  # in the store
    info: Mapping[str, Any]  # "size" and whatever else the store says

    def download(self) -> str:
        """The path of its copy on this machine; it is downloaded where there is none. Raises DataError."""
        if "file" in self.store.protocol:
            return self.path
        version = f"{self.url} {self.store.ukey(self.path)} {self.info['size']} {self.info.get('ETag')}"
        name = f"{xxhash.xxh3_128_hexdigest(version.encode())}-{self.path.rpartition('/')[2]}"

        def copy(partial: Path) -> None:
            from fsspec.callbacks import TqdmCallback

            options = {"desc": f"download {self.url}", "unit": "B", "unit_scale": True, "disable": None}
            try:
                self.store.get_file(self.path, str(partial), callback=TqdmCallback(tqdm_kwargs=options))
            except Exception as error:
                if isinstance(error, OSError) and is_full_disk(error):
                    raise
                raise DataError(f"{self.url}: {_reason(error)}") from error
            if partial.stat().st_size != self.info["size"]:
                raise DataError(
                    f"{self.url}: {partial.stat().st_size} of {self.info['size']} bytes arrived; run it again"
                )

        place = cache_folder() / "downloads" / name
        return str(
            read_or_build(place, lambda path: path if path.exists() else None, copy, f"download {self.url}")
        )


def find_files(url: str) -> list[RemoteFile]:
    """The files that a URL names, of a glob in order of name. Raises DataError where there is none, and where
    the store cannot be reached; ConfigError where a package is missing, or the scheme is unknown."""
    store, path = file_system(url)
    try:
        is_glob = "*" in path or "[" in path  # a `?` begins the query of an https:// URL
        found = store.glob(path, detail=True) if is_glob else {path: store.info(path)}
    except FileNotFoundError:
        raise DataError(f"{url!r} does not exist") from None
    except Exception as error:  # each store's client has its own
        raise DataError(f"{url}: {_reason(error)}") from error
    files = [(path, info) for path, info in sorted(found.items()) if info["type"] == "file"]
    if not files:
        is_folder = any(info["type"] == "directory" for info in found.values())
        raise DataError(f"no file matches {url!r}" + (": it is a folder, add /*" if is_folder else ""))
    return [
        RemoteFile(store.unstrip_protocol(path) if is_glob else url, store, path, info)
        for path, info in files
    ]


def _reason(error: Exception) -> str:
    return f"cannot be read ({type(error).__name__}: {error})".splitlines()[0]
