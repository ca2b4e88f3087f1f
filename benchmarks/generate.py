"""Generation speed, beside Hugging Face's generate on a Llama of the same shape where torch is installed.

    python benchmarks/generate.py [--config=FILE] [--batch 1 16 64] [--prompt=64] [--new=128] [--rounds=5]

Random weights, sampling at temperature 1 (--greedy: the most likely token), all rows of the same length. Each
implementation has a process of its own, and they take turns in each round, so that load on the machine
affects all of them. Sequences per second and ratios are medians over the rounds, with the quartiles in
brackets. The first call, which compiles, is not timed; later calls must not compile.
"""

import argparse
import importlib.util
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contestants import Contestant, Turn, Turns, compare
from benchmarks.peers import llama_config
from jaxllm.config import load_config, parse

if TYPE_CHECKING:
    from transformers import LlamaConfig


def ours(path: str, prompts: np.ndarray, new_tokens: int, temperature: float, turns: Turns) -> None:
    """`generate`, in a process set up as by experiments/generate.py."""
    import jax

    from jaxllm.models import ModelConfig, build_model
    from jaxllm.rollout.generate import generate
    from jaxllm.rollout.sampling import SamplingConfig
    from jaxllm.runs.process import set_up_process

    set_up_process()
    model = build_model(parse(ModelConfig, load_config(path).model))
    params = jax.jit(model.init)(jax.random.key(0))
    sampling = SamplingConfig(temperature, top_k=None, top_p=None, min_p=None, max_new_tokens=new_tokens)
    keys = jax.random.split(jax.random.key(1), len(prompts))
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compilations.append(event) if "backend_compile" in event else None
    )
    calls = 0

    def run() -> int:
        nonlocal calls
        if calls == 1:
            compilations.clear()
        calls += 1
        completions = generate(model, params, prompts.tolist(), sampling=sampling, stop_ids=(), keys=keys)
        assert calls == 1 or not compilations, f"{len(compilations)} programs were compiled after warm-up"
        return sum(map(len, completions.tokens)) // new_tokens

    turns.repeat(run)


def transformers(
    llama: "LlamaConfig", cache: str, prompts: np.ndarray, new_tokens: int, temperature: float, turns: Turns
) -> None:
    """transformers' generate."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    model = LlamaForCausalLM(llama).eval()
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    generation = GenerationConfig(
        max_new_tokens=new_tokens, pad_token_id=0, cache_implementation=cache, **sampling
    )
    batch = torch.tensor(prompts)

    def run() -> int:
        with torch.inference_mode():
            out = model.generate(batch, attention_mask=torch.ones_like(batch), generation_config=generation)
        return out[:, prompts.shape[1] :].numel() // new_tokens

    turns.repeat(run)


def with_quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} [{low:.2f} to {high:.2f}]"


def show_rates(results: dict[str, list[Turn]], unit: str) -> None:
    """What each makes a second, by the value of its turns, and how much faster the first one is."""

    def per_second(turn: Turn) -> float:
        return turn.value / turn.seconds

    def per_cpu_second(turn: Turn) -> float:
        return turn.value / turn.cpu_seconds

    (ours, first), *_ = results.items()
    for name, turns in results.items():
        line = f"  {name:28s} {with_quartiles(list(map(per_second, turns)))} {unit}"
        if name != ours:
            for rate, of in ((per_second, f"; {ours} is"), (per_cpu_second, "x as fast, by CPU time")):
                ratios = [rate(our) / rate(their) for our, their in zip(first, turns, strict=True)]
                line += f"{of} {with_quartiles(ratios)}"
            line += "x"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).with_name("model_s.py")), help="of the model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="batch sizes")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--greedy", action="store_true", help="instead of sampling at temperature 1")
    flags = parser.parse_args()
    shape = load_config(flags.config).model
    temperature = 0.0 if flags.greedy else 1.0
    print(f"{flags.prompt} prompt tokens, {flags.new} new tokens, temperature {temperature:g}")
    for batch in flags.batch:
        prompts = np.random.default_rng(0).integers(0, shape.vocab_size, (batch, flags.prompt))
        work = prompts, flags.new, temperature
        contestants: dict[str, Contestant] = {"jaxllm": partial(ours, flags.config, *work)}
        if importlib.util.find_spec("transformers"):
            llama = llama_config(shape)
            for cache in ("dynamic", "static"):
                contestants[f"transformers, {cache} cache"] = partial(transformers, llama, cache, *work)
        results = compare(contestants, rounds=flags.rounds, warm_up=1)
        made = {turn.value for turns in results.values() for turn in turns}
        assert made == {batch}, f"batches of {made} sequences were completed"
        print(f"batch {batch}")
        show_rates(results, "sequences/s")


if __name__ == "__main__":
    main()
