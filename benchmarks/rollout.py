"""Rollout speed: continuous batching beside static batches, ours and Hugging Face's where torch is installed.

    python benchmarks/rollout.py [--config=FILE] [--prompts=32] [--group=8] [--rows=64] [--rounds=3] [--peer]

The weights are random, so sampling is close to uniform, and with a fraction of the vocabulary as stop tokens
the lengths are `geometric`: of mean --new / 4, truncated at --new. `equal` has no stop tokens. The
implementations take turns in each round. Tokens per second are medians over the rounds, and the ratio is the
median of the rounds' ratios. Implementations sample different tokens, so each is measured by its own.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import llama_config
from jaxllm.config import load_config, parse
from jaxllm.models import ModelConfig, build_model
from jaxllm.rollout.collect import collect
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig

Run = Callable[[list[list[int]], Sequence[int]], int]  # prompts, stop ids -> number of tokens generated


def our_runs(config: ModelConfig, group: int, rows: int, new_tokens: int) -> dict[str, Run]:
    model = build_model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    sampling = SamplingConfig(1.0, top_k=None, top_p=None, min_p=None, max_new_tokens=new_tokens)

    def continuous(prompts, stop_ids):
        keys = jax.random.split(jax.random.key(1), len(prompts) * group)
        completions = collect(
            model,
            params,
            prompts,
            group_size=group,
            sampling=sampling,
            stop_ids=stop_ids,
            keys=keys,
            decode_batch_size=rows,
        )
        return sum(map(len, completions.tokens))

    def static(prompts, stop_ids):
        repeated = [prompt for prompt in prompts for _ in range(group)]
        keys = jax.random.split(jax.random.key(1), len(repeated))
        total = 0
        for start in range(0, len(repeated), rows):
            batch = slice(start, start + rows)
            completions = generate(
                model, params, repeated[batch], sampling=sampling, stop_ids=stop_ids, keys=keys[batch]
            )
            total += sum(map(len, completions.tokens))
        return total

    return {"collect": continuous, "generate, static batches": static}


def transformers_run(config: ModelConfig, group: int, rows: int, new_tokens: int) -> dict[str, Run]:
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(llama_config(config)).eval()

    def run(prompts, stop_ids):
        generation = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            eos_token_id=list(stop_ids) or None,
        )
        repeated = [prompt for prompt in prompts for _ in range(group)]
        total = 0
        for start in range(0, len(repeated), rows):
            with torch.inference_mode():
                batch = torch.tensor(repeated[start : start + rows])
                out = llama.generate(
                    batch, attention_mask=torch.ones_like(batch), generation_config=generation
                )[:, batch.shape[1] :]
            stopped = torch.isin(out, torch.tensor(stop_ids, dtype=torch.long)).int()
            total += int((stopped.cumsum(1) - stopped == 0).sum())  # up to and including the first stop
        return total

    return {"transformers, static batches": run}


def compare(runs: dict[str, Run], prompts: list[list[int]], stop_ids: Sequence[int], rounds: int) -> None:
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compilations.append(seconds) if "backend_compile" in event else None
    )
    rates, cpu_rates = {name: [] for name in runs}, {name: [] for name in runs}
    for turn in range(rounds + 1):  # the first compiles and warms up
        for name, run in runs.items():
            compilations.clear()
            start, cpu_start = time.perf_counter(), time.process_time()
            tokens = run(prompts, stop_ids)
            rates[name].append(tokens / (time.perf_counter() - start))
            cpu_rates[name].append(tokens / (time.process_time() - cpu_start))
            if turn == 0:
                print(f"  {name}: {tokens} tokens, {len(compilations)} programs in {sum(compilations):.1f} s")
            else:
                assert not compilations, f"{name} compiled {len(compilations)} programs after warm-up"
    ours = next(iter(runs))
    for name in runs:
        ratios = [
            statistics.median(
                our / their for our, their in zip(table[ours][1:], table[name][1:], strict=True)
            )
            for table in (rates, cpu_rates)
        ]
        print(
            f"  {name:30s} {statistics.median(rates[name][1:]):8.0f} tokens/s; "
            f"{ours} is {ratios[0]:.2f}x as fast, {ratios[1]:.2f}x by CPU time",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default=Path(__file__).with_name("model_s.py"), help="of the model")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--rows", type=int, default=64, help="rows decoded at a time")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="most tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="also run transformers")
    parser.add_argument("--lengths", nargs="+", default=["geometric", "equal"])
    flags = parser.parse_args()
    config = parse(ModelConfig, load_config(str(flags.config)).model)
    shape = config, flags.group, flags.rows, flags.new
    runs = {**our_runs(*shape), **(transformers_run(*shape) if flags.peer else {})}
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (flags.prompts, flags.prompt)).tolist()
    for lengths in flags.lengths:
        stops = 4 * config.vocab_size // flags.new if lengths == "geometric" else 0
        print(f"{lengths} lengths, {flags.prompts} prompts x {flags.group}, {flags.rows} rows at a time")
        compare(runs, prompts, range(stops), flags.rounds)


if __name__ == "__main__":
    main()
