"""The hash of the content of files, which is computed once and then remembered.

A file counts as unchanged while its path, its size, its time of modification and a sample of its blocks are
the same. What was modified within the last seconds is not remembered: it could change again within the
resolution of its file system's clock.
"""

import contextlib
import os
import time
from collections.abc import Sequence

import xxhash

from jaxllm.data.readers import opened
from jaxllm.files import cache_folder, write_file

_SMALL = 16 * 2**20  # bytes that are hashed at once, without being remembered
_SAMPLE = 64 * 2**10  # bytes of a block of the sample
_MOST_SAMPLES, _ALL_SAMPLES = 16, 1024  # blocks of each file, at least its first and last, and of all files
_SETTLED_SECONDS = 10.0


def content_hash(start: str, files: Sequence[tuple[str, str]]) -> str:
    """xxh3 of `start` and, of each file (head, path), of its head and its content. Raises DataError."""
    stats = [os.stat(path) for _, path in files]
    if sum(stat.st_size for stat in stats) <= _SMALL:
        return _hash(start, files)
    count = max(2, min(_MOST_SAMPLES, _ALL_SAMPLES // len(files)))
    known = xxhash.xxh3_128(start.encode())
    for (head, path), stat in zip(files, stats, strict=True):
        known.update(f"{head} {os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        with opened(path, decompress=False) as (file, _):
            for i in range(count):
                file.seek(i * max(0, stat.st_size - _SAMPLE) // (count - 1))
                known.update(file.read(_SAMPLE))
    place = cache_folder() / "hashes" / known.hexdigest()
    with contextlib.suppress(OSError, ValueError):
        if len(found := place.read_text("ascii")) == 32:
            return found
    found = _hash(start, files)
    if time.time() - max(stat.st_mtime for stat in stats) > _SETTLED_SECONDS:
        with contextlib.suppress(OSError):  # a disk that is full or read-only: it is hashed again next time
            place.parent.mkdir(parents=True, exist_ok=True)
            write_file(place, found.encode())
    return found


def _hash(start: str, files: Sequence[tuple[str, str]]) -> str:
    content = xxhash.xxh3_128(start.encode())
    for head, path in files:
        content.update(head.encode())
        with opened(path, decompress=False) as (file, _):
            while block := file.read(2**20):
                content.update(block)
    return content.hexdigest()
