"""Rollout speed: continuous batching beside static batches, ours and Hugging Face's where torch is installed.

    python benchmarks/rollout.py [--config=FILE] [--prompts=32] [--group=8] [--rows=64] [--rounds=3] [--peer]

The weights are random, so sampling is close to uniform, and with a fraction of the vocabulary as stop tokens
the lengths are `geometric`: of mean --new / 4, truncated at --new. `equal` has no stop tokens. Each
implementation has a process of its own, and they take turns in each round. Tokens per second and ratios are
medians over the rounds, with the quartiles in brackets. Implementations sample different tokens, so each is
measured by its own.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contestants import Contestant, Turns, compare
from benchmarks.generate import show_rates
from benchmarks.peers import llama_config
from jaxllm.config import load_config, parse
from jaxllm.models import ModelConfig, build_model
from jaxllm.rollout.collect import collect
from jaxllm.rollout.generate import generate
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.runs.process import set_up_process

if TYPE_CHECKING:
    from transformers import LlamaConfig

Run = Callable[[list[list[int]], Sequence[int]], int]  # prompts, stop ids -> number of tokens generated
OURS = ("collect", "generate, static batches")


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


def ours(
    name: str,
    config: ModelConfig,
    shape: tuple[int, int, int],
    prompts: list[list[int]],
    stop_ids: Sequence[int],
    turns: Turns,
) -> None:
    """One of `our_runs`, in a process set up as by experiments/train.py."""
    set_up_process()
    run, calls, compiled = our_runs(config, *shape)[name], 0, []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if "backend_compile" in event else None
    )

    def turn() -> int:
        nonlocal calls
        compiled.clear()
        tokens, calls = run(prompts, stop_ids), calls + 1
        if calls == 1:
            print(f"  {name}: {len(compiled)} programs compiled in {sum(compiled):.1f} s", flush=True)
        else:
            assert not compiled, f"{name} compiled {len(compiled)} programs after warm-up"
        return tokens

    turns.repeat(turn)


def transformers(
    llama: "LlamaConfig",
    shape: tuple[int, int, int],
    prompts: list[list[int]],
    stop_ids: Sequence[int],
    turns: Turns,
) -> None:
    """transformers' generate, in static batches."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    (group, rows, new_tokens), model = shape, LlamaForCausalLM(llama).eval()
    generation = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
        eos_token_id=list(stop_ids) or None,
    )
    repeated = torch.tensor([prompt for prompt in prompts for _ in range(group)])

    def turn() -> int:
        total = 0
        for batch in repeated.split(rows):
            with torch.inference_mode():
                out = model.generate(
                    batch, attention_mask=torch.ones_like(batch), generation_config=generation
                )[:, batch.shape[1] :]
            stopped = torch.isin(out, torch.tensor(stop_ids, dtype=torch.long)).int()
            total += int((stopped.cumsum(1) - stopped == 0).sum())  # up to and including the first stop
        return total

    turns.repeat(turn)


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
    shape = flags.group, flags.rows, flags.new
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (flags.prompts, flags.prompt)).tolist()
    for lengths in flags.lengths:
        stop_ids = range(4 * config.vocab_size // flags.new if lengths == "geometric" else 0)
        print(f"{lengths} lengths, {flags.prompts} prompts x {flags.group}, {flags.rows} rows at a time")
        contestants: dict[str, Contestant] = {
            name: partial(ours, name, config, shape, prompts, stop_ids) for name in OURS
        }
        if flags.peer:
            peer = partial(transformers, llama_config(config), shape, prompts, stop_ids)
            contestants["transformers, static batches"] = peer
        results = compare(contestants, rounds=flags.rounds, warm_up=1)
        show_rates(results, "tokens/s")


if __name__ == "__main__":
    main()
