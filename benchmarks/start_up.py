"""Seconds to load conversations for SFT: tokenized now, and from the cache, in a process of its own.

    python benchmarks/start_up.py --rows=100000

Measured is `load_chats` alone: hashing or looking up the file's hash, reading the columns, holding out,
packing and the report. Imports, tokenizer and template come before. The rows are built-in ones.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jaxllm.config import load_config, override, parse
from jaxllm.data.chat import load_chats
from jaxllm.data.chat_template import load_template
from jaxllm.data.tokenizer import load_tokenizer, train_tokenizer
from jaxllm.files import CACHE_VARIABLE
from jaxllm.stages.sft import Config
from jaxllm.toy_world import chats

CONFIG = f"{Path(__file__).resolve().parents[1]}/configs/sft_chat.py"


def load(folder: Path) -> None:
    """Load the rows as `configs/sft_chat.py` does, and print what it took."""
    config = load_config(CONFIG)
    override(config, Config, "data.train", str(folder / "chats.jsonl"))
    data, tokenizer = parse(Config, config).data, load_tokenizer(folder / "tokenizer.model")
    template = load_template(tokenizer, None)
    began, cpu = time.perf_counter(), time.process_time()
    loaded = load_chats(data, tokenizer, template, seed=0)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    tokens = sum(rows.num_tokens for rows in loaded.train)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"{seconds:.2f} s ({cpu:.2f} s of CPU here), {tokens:,} tokens to train on, {memory:,.0f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.load is not None:
        load(Path(flags.load))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps(row) + "\n" for row in chats("train", count=flags.rows, seed=0)]
        (folder / "chats.jsonl").write_text("".join(lines))
        os.utime(folder / "chats.jsonl", (0, 0))  # the hash of a file that was just written is not kept
        tokenizer = train_tokenizer(lines[:5000], vocab_size=4096, max_bytes=2_000_000)
        (folder / "tokenizer.model").write_bytes(tokenizer.files()["tokenizer.model"])
        for what in ("tokenized now", "from the cache", "from the cache"):
            print(f"{flags.rows:,} conversations, {what}: ", end="", flush=True)
            environment = {**os.environ, CACHE_VARIABLE: f"{name}/cache"}
            command = [sys.executable, __file__, f"--load={name}"]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            print(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
