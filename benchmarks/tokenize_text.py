r"""Tokens a second of tokenizing pretraining text with 1, 2, ... cores, its memory, and what a kill costs.

    python benchmarks/tokenize_text.py --sources 'texts/*.jsonl.gz' --tokenizer=FOLDER --bytes=2e9

The rows of the sources are repeated with variations until they are so many bytes. For each number of cores a
process tokenizes them; memory is the sum of its resident pages and those of its workers, sampled, of which
shared pages count several times. The last one is killed in the middle and started again, and must give the
same files. Without --sources the text is of the built-in world, without --tokenizer it is trained on it.
"""

import argparse
import filecmp
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxllm.data.rows import BadRowPolicy
from jaxllm.data.sources import open_source
from jaxllm.data.token_cache import cached_tokens
from jaxllm.data.tokenizer import load_tokenizer, train_tokenizer
from jaxllm.files import CACHE_VARIABLE

TOKENIZER = "tokenizer.model"


def texts(sources: list[str]) -> Iterator[str]:
    """The texts of the sources, again and again, each time with other words in other places."""
    for turn in itertools.count():
        draw = random.Random(turn)
        for name in sources:
            source = open_source(name, split="train", text_key="text", synthetic_rows=20_000, seed=0)
            for row in source.rows():
                lines = (row.value or "").splitlines(keepends=True)
                if turn:
                    draw.shuffle(lines)
                yield f"{turn} {draw.random()}\n{''.join(lines)}"


def write_text(path: Path, sources: list[str], size: int) -> None:
    """A .jsonl of at least `size` bytes."""
    written = 0
    with path.open("w") as file:
        for text in texts(sources):
            written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if written >= size:
                return


def tokenize(path: str, tokenizer: str) -> None:
    """What a run does with the file, in this process; prints the figures as JSON."""
    source = open_source(path, split="train", text_key="text", synthetic_rows=1, seed=0)
    began = time.perf_counter()
    cache = cached_tokens(source, load_tokenizer(tokenizer), BadRowPolicy("skip", 0.5))
    seconds = time.perf_counter() - began
    print(json.dumps({"tokens": cache.counts.tokens, "bytes": cache.counts.text_bytes, "seconds": seconds}))


def start(path: Path, tokenizer: str, cores: int, cache: Path) -> subprocess.Popen[str]:
    """`tokenize` as a process that may use so many cores."""
    command = [sys.executable, __file__, "--run", str(path), "--tokenizer", tokenizer]
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, CACHE_VARIABLE: str(cache)},
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        start_new_session=True,
    )


def resident(pid: int) -> int:
    """Bytes of memory of a process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # it has ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident, map(int, children)))


def measure(process: subprocess.Popen[str]) -> dict[str, float]:
    """The figures that it prints, and the peak of its memory."""
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    before = cpu_seconds()
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    return json.loads(output.splitlines()[-1]) | {"peak": peak, "cpu": cpu_seconds() - before}


def cpu_seconds() -> float:
    """Of all processes that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def killed(process: subprocess.Popen[str], cache: Path, size: int) -> tuple[float, float]:
    """Kill it once half of the file is tokenized; the fraction of the rows that was recorded, and seconds."""
    began = time.perf_counter()
    while process.poll() is None:
        time.sleep(0.2)
        for record in cache.glob("*.partial/progress.json"):
            if json.loads(record.read_text())["state"]["text_bytes"] > size / 2:
                os.kill(process.pid, signal.SIGKILL)  # not its workers: they end by themselves
    process.communicate()
    (record,) = cache.glob("*.partial/progress.json")
    return json.loads(record.read_text())["state"]["text_bytes"], time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sources", nargs="+", default=["synthetic"])
    parser.add_argument("--tokenizer", help="a .model, a tokenizer.json or a folder with one")
    parser.add_argument("--bytes", type=float, default=2e8)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="for twice as many bytes")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.run is not None:
        tokenize(flags.run, flags.tokenizer)
        return
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        path, tokenizer = Path(folder) / "text.jsonl", flags.tokenizer
        write_text(path, flags.sources, int(flags.bytes))
        if tokenizer is None:
            trained = train_tokenizer(texts(flags.sources), vocab_size=8192, max_bytes=5_000_000)
            tokenizer = f"{folder}/{TOKENIZER}"
            Path(tokenizer).write_bytes(trained.files()[TOKENIZER])
        print(f"{path.stat().st_size / 1e6:,.0f} MB of text", flush=True)
        for cores in flags.cores:
            found = measure(start(path, tokenizer, cores, Path(folder) / f"cache-{cores}"))
            print(
                f"{cores} cores: {found['tokens'] / found['seconds']:,.0f} tokens/s, "
                f"{found['bytes'] / found['seconds'] / 1e6:.2f} MB/s, {found['seconds']:.0f} s, "
                f"{found['cpu']:.0f} s of CPU, "
                f"peak {found['peak'] / 1e6:,.0f} MB",
                flush=True,
            )
        cache, cores = Path(folder) / "killed", flags.cores[-1]
        process = start(path, tokenizer, cores, cache)
        kept, seconds = killed(process, cache, int(flags.bytes))
        again = measure(start(path, tokenizer, cores, cache))
        print(
            f"killed after {seconds:.0f} s, {kept / found['bytes']:.0%} of the text recorded; the rest took "
            f"{again['seconds']:.0f} s, in all {seconds + again['seconds'] - found['seconds']:+.0f} s"
        )
        whole = next(path.parent for path in (Path(folder) / f"cache-{cores}").glob("*/meta.json"))
        names = [file.name for file in whole.iterdir()]
        _, differ, missing = filecmp.cmpfiles(whole, cache / whole.name, names, shallow=False)
        print("the same files" if not differ + missing else f"OTHER FILES: {differ + missing}")


if __name__ == "__main__":
    main()
