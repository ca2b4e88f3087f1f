"""Time of a DPO or reward-model step, beside TRL's trainers on the same machine, model and pairs.

    python benchmarks/preference_step.py [--stages dpo reward_model] [--lengths equal geometric] [--rounds=10]

Ours is the step of `experiments/train.py`, compiled for rows by length; DPO's reference scores each batch.
TRL's is that of its own trainer loop, with its defaults but for gradient checkpointing, bfloat16, saving and
logging, which are off. Both have random weights of the same shape, float32, AdamW and pairs of random tokens.
`equal`: prompt and completion fill the row. `geometric`: completions are a quarter as long on average.
Each is a process of its own, and they take turns. Results are medians of the rounds' ratios. On a shared
machine pin all to one core (taskset -c 0): torch's threads spin while they wait for one another.
"""

import argparse
import statistics
import sys
import tempfile
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contestants import Turns, compare, ratio
from benchmarks.peers import llama_config

if TYPE_CHECKING:
    from jaxllm.batches import PairBatch

WARM_UP = 3


def stage_and_config(flags: argparse.Namespace, stage: str) -> tuple[ModuleType, Any]:
    """The stage's module, and its config in the size of the flags."""
    from configs import dpo_pairs, reward_model_pairs
    from jaxllm.config import load_config, parse
    from jaxllm.stages import find_stage

    config = (dpo_pairs if stage == "dpo" else reward_model_pairs).get_config("10m")
    config.model = load_config(flags.config).model
    config.optimizer.name = "adamw"
    config.training.num_microbatches = flags.microbatches
    config.data.batch_size, config.data.sequence_length = flags.pairs, flags.length
    if stage == "dpo":
        config.data.reference = "on_the_fly"
    module = find_stage(stage)
    return module, parse(module.Config, config)


def make_pairs(flags: argparse.Namespace, lengths: str, vocab_size: int) -> "PairBatch":
    """The pairs of all rounds; rounds of the same number have the same ones."""
    from jaxllm.batches import PairBatch

    draw, N, T = np.random.default_rng(0), flags.pairs * (flags.rounds + WARM_UP), flags.length
    tokens = draw.integers(2, vocab_size - 1, (N, 2, T)).astype(np.int32)
    tokens[:, 1, : flags.prompt] = tokens[:, 0, : flags.prompt]
    longest = T - flags.prompt
    new = np.full((N, 2), longest)
    if lengths == "geometric":
        new = np.minimum(draw.geometric(4 / longest, (N, 2)), longest)
    prompts, ends = np.full(N, flags.prompt, np.int32), (flags.prompt + new).astype(np.int32)
    tokens[np.arange(T) >= ends[:, :, None]] = 0
    zeros = np.zeros(N, np.float32)
    return PairBatch(tokens, prompts, ends, zeros, zeros + 1, np.zeros((N, 2), np.float32))


def ours(flags: argparse.Namespace, stage: str, lengths: str, turns: Turns) -> None:
    """A step a turn, in a process set up as by experiments/train.py."""
    import jax

    from jaxllm.runs.process import set_up_process
    from jaxllm.runs.step_by_length import compile_step, split_batch
    from jaxllm.stages import build_program

    set_up_process()
    module, config = stage_and_config(flags, stage)
    program = build_program(config)
    pairs = make_pairs(flags, lengths, config.model.vocab_size)
    step, state = compile_step(program), program.fresh_state()
    reference = jax.tree.map(lambda x: x.copy(), state.params)
    rows = np.arange(len(pairs.tokens)).reshape(-1, flags.pairs)

    def split(own: np.ndarray) -> list[Any]:
        return split_batch(program, jax.tree.map(lambda x: x[own], pairs))

    def run(batches: list[Any]) -> None:
        nonlocal state
        if stage == "dpo":
            scores = [module.score_batch(reference, batch, model=program.model) for batch in batches]
            batches = [x._replace(ref_log_probs=y) for x, y in zip(batches, scores, strict=True)]
        state, metrics = step(state, batches)
        jax.block_until_ready((state, metrics))

    with jax.set_mesh(program.mesh):
        compiled = set()
        for own in rows:  # all programs, before anything is timed
            batches = split(own)
            shapes = {batch.tokens.shape for batch in batches}
            if not shapes <= compiled:
                run(batches)
            compiled |= shapes
        left = iter(rows)
        turns.repeat(lambda: run(split(next(left))))


def trl(flags: argparse.Namespace, stage: str, lengths: str, turns: Turns) -> None:
    """A step of TRL's trainer a turn."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from transformers.utils import logging
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    class InTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    logging.set_verbosity_error()
    shape = stage_and_config(flags, stage)[1].model
    pairs = make_pairs(flags, lengths, shape.vocab_size)
    own = {"num_labels": 1, "pad_token_id": 0} if stage == "reward_model" else {}
    auto = AutoModelForSequenceClassification if own else AutoModelForCausalLM
    make = partial(auto.from_config, llama_config(shape, **own))
    models = {"model": make()} if own else {"model": make(), "ref_model": make()}
    Config, Trainer = (RewardConfig, RewardTrainer) if own else (DPOConfig, DPOTrainer)
    with tempfile.TemporaryDirectory() as folder:
        options = Config(
            folder,
            max_steps=flags.rounds + WARM_UP,
            per_device_train_batch_size=flags.pairs,
            max_length=flags.length,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(
            **models,
            args=options,
            train_dataset=Dataset.from_dict(texts(pairs)),
            processing_class=tokenizer(shape.vocab_size),
            callbacks=[InTurns()],
        ).train()
    turns.begin()  # the measurement is over


def texts(pairs: "PairBatch") -> dict[str, list[str]]:
    """The pairs as words, one token each, but for the last of a completion: TRL appends EOS."""

    def words(side: int | None, row: int) -> str:
        start, end = pairs.prompt_lengths[row], pairs.lengths[row, side or 0]
        ids = pairs.tokens[row, side or 0, slice(0, start) if side is None else slice(start, end - 1)]
        return " " * (side is not None) + " ".join(f"w{i}" for i in ids)

    columns = {"prompt": None, "chosen": 0, "rejected": 1}
    return {name: [words(side, row) for row in range(len(pairs.tokens))] for name, side in columns.items()}


def tokenizer(vocab_size: int) -> Any:
    """Token i is the word `wi`; the last is EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"w{vocab_size - 1}", pad_token="w0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).with_name("model_s.py")), help="of the model")
    parser.add_argument("--stages", nargs="+", default=["dpo", "reward_model"])
    parser.add_argument("--lengths", nargs="+", default=["equal", "geometric"])
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each implementation")
    parser.add_argument("--pairs", type=int, default=4, help="pairs per step")
    parser.add_argument("--length", type=int, default=256, help="most tokens of prompt and completion")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--microbatches", type=int, default=1, help="of our step, by length")
    flags = parser.parse_args()
    for stage in flags.stages:
        for lengths in flags.lengths:
            contestants = {
                name: partial(contestant, flags, stage, lengths)
                for name, contestant in (("jaxllm", ours), ("TRL", trl))
            }
            results = compare(contestants, rounds=flags.rounds, warm_up=WARM_UP)
            print(f"{stage}, {lengths} lengths, {flags.pairs} pairs of at most {flags.length} tokens")
            for name, found in results.items():
                seconds, cpu = (
                    statistics.median(map(attrgetter(field), found)) for field in ("seconds", "cpu_seconds")
                )
                print(f"  {name:8s} {seconds:6.2f} s, {cpu:6.2f} CPU s, {found[-1].peak_bytes / 1e9:.2f} GB")
            figures = [
                ratio(results["TRL"], results["jaxllm"], attrgetter(x)) for x in ("seconds", "cpu_seconds")
            ]
            print(f"  jaxllm is {figures[0]:.2f}x as fast, {figures[1]:.2f}x by CPU time", flush=True)


if __name__ == "__main__":
    main()
