"""Generation speed, beside Hugging Face's generate on a Llama of the same shape where torch is installed.

    python benchmarks/generate.py [--config=FILE] [--batch 1 16 64] [--prompt=64] [--new=128] [--rounds=5]

Random weights, greedy decoding, all rows of the same length. The implementations take turns in each round, so
that load on the machine affects all of them. Sequences per second are medians over the rounds, and the ratio
is the median of the rounds' ratios. The first call, which compiles, is timed apart; later calls must not.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import llama_config
from jaxllm.config import load_config, parse
from jaxllm.models import ModelConfig, build_model
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig

Run = Callable[[np.ndarray, int], int]  # prompts [B, T], number of new tokens -> number of tokens generated


def our_run(config: ModelConfig) -> Run:
    model = build_model(config)
    params = jax.jit(model.init)(jax.random.key(0))

    def run(prompts, new_tokens):
        sampling = SamplingConfig(0.0, top_k=None, top_p=None, min_p=None, max_new_tokens=new_tokens)
        keys = jax.random.split(jax.random.key(1), len(prompts))
        completions = generate(model, params, prompts.tolist(), sampling=sampling, stop_ids=(), keys=keys)
        return sum(map(len, completions.tokens))

    return run


def transformers_runs(config: ModelConfig) -> dict[str, Run]:
    """Empty where torch or transformers is not installed."""
    try:
        import torch
        from transformers import GenerationConfig, LlamaForCausalLM
    except ImportError:
        return {}
    llama = LlamaForCausalLM(llama_config(config)).eval()

    def run_with(cache: str) -> Run:
        def run(prompts, new_tokens):
            generation = GenerationConfig(
                max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, cache_implementation=cache
            )
            with torch.inference_mode():
                out = llama.generate(torch.tensor(prompts), generation_config=generation)
            return out[:, prompts.shape[1] :].numel()

        return run

    return {f"transformers, {cache} cache": run_with(cache) for cache in ("dynamic", "static")}


def compare(runs: dict[str, Run], prompts: np.ndarray, new_tokens: int, rounds: int) -> None:
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compilations.append(event) if "backend_compile" in event else None
    )
    seconds = {name: [] for name in runs}
    for turn in range(rounds + 1):  # the first compiles and warms up
        if turn == 1:
            compilations.clear()
        for name, run in runs.items():
            start = time.perf_counter()
            generated = run(prompts, new_tokens)
            seconds[name].append(time.perf_counter() - start)
            assert generated == len(prompts) * new_tokens, f"{name} generated {generated} tokens"
    assert not compilations, f"{len(compilations)} programs were compiled after warm-up"
    (ours, first), *_ = seconds.items()
    for name, times in seconds.items():
        rate = len(prompts) / statistics.median(times[1:])
        ratio = statistics.median(theirs / our for theirs, our in zip(times[1:], first[1:], strict=True))
        note = f"first call {times[0]:.1f} s" if name == ours else f"{ours} is {ratio:.2f}x as fast"
        print(f"batch {len(prompts):4d}  {name:28s} {rate:7.2f} sequences/s  {note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default=Path(__file__).with_name("model_s.py"), help="of the model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="batch sizes")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    config = parse(ModelConfig, load_config(str(flags.config)).model)
    runs = {"jaxllm": our_run(config), **transformers_runs(config)}
    print(f"{jax.devices()[0].device_kind}, {flags.prompt} prompt tokens, {flags.new} new tokens")
    for batch in flags.batch:
        prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, flags.prompt))
        compare(runs, prompts, flags.new, flags.rounds)


if __name__ == "__main__":
    main()
