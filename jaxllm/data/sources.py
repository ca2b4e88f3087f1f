"""Documents and records as a stream of rows, from files, saved or hosted datasets, or the toy world.

Every row carries its place (`file:line`), and a row that cannot be read carries the reason, so that none is
dropped silently.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import xxhash

from jaxllm.data.content_hash import content_hash
from jaxllm.data.raw_rows import BadRow as BadRow
from jaxllm.data.raw_rows import Row, check_column, checked_object, checked_record, nearest
from jaxllm.data.raw_rows import is_empty as is_empty
from jaxllm.data.raw_rows import json_type as json_type
from jaxllm.data.raw_rows import without_bom as without_bom
from jaxllm.data.readers import can_read, reader, suffix
from jaxllm.data.remote_files import RemoteFile, find_files
from jaxllm.errors import DataError, RunError
from jaxllm.files import is_url

if TYPE_CHECKING:
    import datasets
    import pyarrow

_SYNTHETIC_KINDS = ["documents", "chats", "drafts", "preferences", "problems", "additions"]
_SYNTHETIC_SAMPLE = 200  # rows that stand for all in the content hash of a synthetic source
_HUB = ("hf:", "hf-stream:")
_DATASET_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Source:
    """A stream of rows that can be read any number of times."""

    name: str  # as the user wrote it
    content_hash: str  # of everything that determines the rows
    size: int  # bytes of the files, or rows of a dataset: the total of a progress bar; 0: unknown
    rows: Callable[[], Iterator[Row]]


def open_source(name: str, *, split: str, text_key: str | None, synthetic_rows: int, seed: int) -> Source:
    """Open the source `name`. Its rows are the texts under `text_key`, or whole records where that is None.

    `name` is a file or a glob of files that `readers` knows, here or behind a URL; a folder saved by
    datasets; `hf:NAME`, `hf:NAME:SUBSET` or `hf:NAME:SUBSET:SPLIT` for the hub (`hf-stream:` downloads while
    it is read); or `synthetic` or `synthetic:KIND` for the toy world. `split` ("train" or "validation") is
    the one to read where the name chooses none. As a record, a .txt file or a synthetic document is
    `{"text": ...}`. Raises DataError.
    """
    if name.partition(":")[0] == "synthetic":
        return _synthetic_source(name, split, text_key, synthetic_rows, seed)
    if is_url(name):
        return _files_source(name, {file.download(): file.url for file in _readable_files(name)}, text_key)
    if name.startswith(_HUB):
        return _hub_source(name, split, text_key)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _dataset_source(name, _load_from_folder(path, split), text_key)
    return _files_source(name, {path: path for path in _matching_files(path, name)}, text_key)


def check_source(name: str) -> None:
    """Raise DataError where `open_source` would find a missing file or an unknown kind. Reads no row and does
    not contact the hub; of files behind a URL it asks whether they are there."""
    path = os.path.expanduser(name)
    if name.partition(":")[0] == "synthetic":
        open_source(name, split="train", text_key=None, synthetic_rows=1, seed=0)
    elif is_url(name):
        _readable_files(name)
    elif not name.startswith(_HUB) and not os.path.isdir(path):
        _matching_files(path, name)


def _files_source(name: str, paths: Mapping[str, str], text_key: str | None) -> Source:
    """The rows of files on this machine; `paths` has what the user knows each by."""

    def rows() -> Iterator[Row]:
        before = 0
        for path, shown in paths.items():
            row = None
            try:
                for row in reader(path)(path, text_key):
                    yield row._replace(where=row.where.replace(path, shown, 1), done=before + row.done)
            except DataError as error:
                raise DataError(str(error).replace(path, shown)) from error
            before += os.path.getsize(path)
            if row is None:
                yield Row(f"{shown}:1", before, "").rejected("empty file")

    heads = [f"{suffix(path)} {os.path.getsize(path)}\n" for path in paths]
    content = content_hash(repr(text_key), list(zip(heads, paths, strict=True)))
    return Source(name, content, sum(map(os.path.getsize, paths)), rows)


def _readable_files(url: str) -> list[RemoteFile]:
    files = find_files(url)
    for file in files:
        reader(file.url)  # fail on an unknown kind before anything is downloaded
    return files


def _matching_files(path: str, name: str) -> list[str]:
    paths = [path] if os.path.isfile(path) else []
    if not paths and glob.has_magic(path):
        paths = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not paths:
            raise DataError(f"no file matches {name!r}")
    for file in paths:
        reader(file)  # fail on an unknown kind before anything is read
    if paths:
        return paths
    folder = os.path.dirname(path) or "."
    names = os.listdir(folder) if os.path.isdir(folder) else []
    known = [each for each in names if can_read(each)]
    raise DataError(f"{name!r} does not exist{nearest(os.path.basename(path), known)}")


def _dataset_source(name: str, dataset: "datasets.Dataset", text_key: str | None, part: str = "") -> Source:
    """A Hugging Face dataset, read as Arrow batches so that no row is decoded twice."""
    unread = check_column(name, dataset.column_names, text_key)
    start = f"{text_key} {len(dataset)}{part}\n"
    if dataset.cache_files:
        content = content_hash(start, [("", file["filename"]) for file in dataset.cache_files])
    else:  # held in memory only
        content = xxhash.xxh3_128_hexdigest(f"{start}{dataset._fingerprint}".encode())
    table = (dataset if text_key is None else dataset.select_columns([text_key])).with_format("arrow")

    def rows() -> Iterator[Row]:
        row = 0
        for batch in cast("Iterator[pyarrow.Table]", table.iter(batch_size=256)):
            for i in range(batch.num_rows):
                row += 1
                yield checked_record(Row(f"{name}:{row}", row, "", unread=unread), batch, i, text_key)

    return Source(name, content, len(dataset), rows)


def _load_from_folder(path: str, split: str) -> "datasets.Dataset":
    if not any(os.path.exists(os.path.join(path, mark)) for mark in _DATASET_MARKS):
        raise DataError(
            f"{path} is a folder, but not a dataset saved by save_to_disk; for a folder of files "
            f"give a glob such as '{path.rstrip('/')}/*.txt'"
        )
    import datasets

    try:
        return _one_split(path, datasets.load_from_disk(path), split)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: the saved dataset cannot be read ({_first_line(error)})") from error


def _hub_source(name: str, split: str, text_key: str | None) -> Source:
    """`hf:NAME[:SUBSET[:SPLIT]]` with the files of that split on disk; `hf-stream:...` keeps none of them."""
    import datasets

    kind, _, place = name.partition(":")
    repository, subset, chosen = [*place.split(":", 2), "", ""][:3]
    part, bracket, _ = (chosen or split).partition("[")
    try:
        builder = datasets.load_dataset_builder(repository, subset or None)
        files = builder.config.data_files or {}
        splits = [str(each) for each in files or builder.info.splits or ()]
        if splits and part not in splits:
            raise DataError(f"{name} has no split {part!r}; it has {', '.join(splits)}")
        if kind == "hf-stream":
            return _stream_source(name, builder, part, text_key)
        # Without data_files, `datasets` would download and convert the other splits too.
        only = {part: files[part]} if part in files else None
        loaded = datasets.load_dataset(repository, subset or None, split=chosen or split, data_files=only)
    except DataError:
        raise
    except Exception as error:  # the hub's client raises a dozen types, from time-outs to missing subsets
        raise DataError(f"{name}: cannot be loaded from the hub ({_first_line(error)})") from error
    return _dataset_source(name, cast("datasets.Dataset", loaded), text_key, chosen if bracket else "")


def _stream_source(name: str, builder: Any, split: str, text_key: str | None) -> Source:
    """A split that is downloaded while it is read; of `SPLIT[:N]` the first N rows."""
    slice_ = re.search(r"\[:(\d+)\]$", name)
    if "[" in name and slice_ is None:
        raise DataError(f"{name}: of a stream only the first rows can be read, such as {split}[:10000]")
    count = int(slice_[1]) if slice_ else None
    stream = builder.as_streaming_dataset(split)
    unread = check_column(name, stream.column_names or [text_key or ""], text_key)
    files = builder.config.data_files[split]  # on the hub their names have the commit
    identity = f"{text_key} {count} {list(files)} {getattr(files, 'origin_metadata', None)}"

    def rows() -> Iterator[Row]:
        row = 0
        try:
            for row, record in enumerate(stream if count is None else stream.take(count), 1):
                value = record if text_key is None else {text_key: record.get(text_key)}
                yield checked_object(Row(f"{name}:{row}", row, "", unread=unread), value, text_key)
        except Exception as error:  # as above; no DataError, after which nothing of the rows would be kept
            raise RunError(
                f"{name}: the download stopped after {row:,} rows ({_first_line(error)}); the same command "
                "continues"
            ) from error

    known = (builder.info.splits or {}).get(split)
    size = count or (known.num_examples if known else 0) or 0
    return Source(name, xxhash.xxh3_128_hexdigest(identity.encode()), size, rows)


def _one_split(name: str, loaded: Any, split: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(loaded)}")
    return loaded[split]


def _synthetic_source(name: str, split: str, text_key: str | None, count: int, seed: int) -> Source:
    from jaxllm import toy_world

    kind = name.partition(":")[2] or "documents"
    if kind not in _SYNTHETIC_KINDS:
        raise DataError(f"{name!r} does not exist{nearest(kind, _SYNTHETIC_KINDS)}")
    generate = getattr(toy_world, kind)

    def rows() -> Iterator[Row]:
        for i, made in enumerate(generate(split, count=count, seed=seed), 1):
            record = {"text": made} if kind == "documents" else made
            yield checked_object(Row(f"{name}:{i}", i, ""), record, "text" if text_key is not None else None)

    # Generating every row only to hash it would take seconds at each start, so the first rows and the word
    # lists stand for all.
    content = xxhash.xxh3_128(f"{kind} {split} {count} {seed} {text_key is None}\n".encode())
    for made in generate(split, count=min(count, _SYNTHETIC_SAMPLE), seed=seed):
        content.update(json.dumps(made).encode())
    for file in sorted(Path(toy_world.__file__).parent.rglob("*.txt")):
        content.update(file.read_bytes())
    return Source(name, content.hexdigest(), count, rows)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
