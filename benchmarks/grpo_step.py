"""Time of whole GRPO steps and of their phases, beside TRL's GRPOTrainer on the same machine and model.

    python benchmarks/grpo_step.py [--config=FILE] [--steps=5] [--peer] [--lengths geometric equal]

Steps of jaxllm are those of `experiments/train.py`: its rollouts, reward processes and compiled train step.
Both have random weights of the same shape, float32, prompts of random tokens, AdamW, no reference model and
one update per rollout. `equal`: there is no stop token, so every completion has the maximum length.
`geometric`: a fraction of the vocabulary are stop tokens, so the mean length is a quarter of the maximum.
Each has a process of its own, and they take turns. Results are medians over the steps, and the ratio is the
median of the turns' ratios. `generate alone` generates as many completions in static batches of --rows, as
benchmarks/rollout.py.

Phases: rollout, from prompts to decoded completions; reward, waiting for rewards after the last completion;
score, all else before the gradient. Score includes the old log-probs, which TRL does not compute where they
equal the new ones; with --no-recompute_log_probs jaxllm takes the sampler's instead.
Torch's threads spin while they wait for one another: on a shared machine, pin all to one core (taskset -c 0),
or TRL appears many times slower than it is.

For a fair comparison with TRL:
- TRL's prompts are texts of a dataset: here words of a word-level tokenizer, one token each;
- TRL needs an EOS token: it gets one for which the model has no logit, and the stop tokens are in the model's
  generation config, which TRL follows;
- gradient checkpointing, bfloat16, saving and logging, on by default in TRL, are off;
- TRL's process has imported this script, and with it JAX, which takes 0.1 GB;
- completions change during training: the learning rate is so small that their lengths stay the same.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contestants import Contestant, Turn, Turns, compare, ratio
from benchmarks.peers import even_words, llama_config
from benchmarks.rollout import our_runs
from configs import grpo_problems
from jaxllm.config import HUGE_PAGES, load_config, parse
from jaxllm.data.examples import Example
from jaxllm.data.prompts import Prompts
from jaxllm.data.rows import Dataset
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.runs.context import InitialWeights, RunInputs
from jaxllm.runs.process import set_up_process
from jaxllm.runs.program import Program
from jaxllm.runs.step_by_length import compile_step
from jaxllm.stages import build_program, grpo
from jaxllm.training.metrics import to_scalars

PHASES = ("rollout", "score", "reward", "update")
LEARNING_RATE = 1e-7
REWARD = Path(__file__).with_name("peers.py")


class Step(NamedTuple):
    """What one step did."""

    tokens: int  # generated
    phases: dict[str, float]  # seconds, by PHASES
    compiled: int = 0  # programs, since the first step

    @property
    def rate(self) -> float:
        """Tokens per second of the rollout."""
        return self.tokens / self.phases["rollout"]


class Words(BaseTokenizer):
    """A tokenizer whose token i is the word `wi`."""

    pad_id = 0

    def __init__(self, vocab_size: int):
        self.pieces = [f" w{i}" for i in range(vocab_size)]
        self.token_bytes = [piece.encode() for piece in self.pieces]
        self.special_ids = {}


def make_config(flags: argparse.Namespace) -> grpo.Config:
    """configs/grpo_problems.py in the size of the flags."""
    config = grpo_problems.get_config()
    config.model = load_config(str(flags.config)).model
    config.optimizer.learning_rate = LEARNING_RATE
    config.optimizer.warmup_steps = 0
    config.training.num_microbatches = flags.microbatches
    config.data.sequence_length = flags.prompt + flags.new
    config.data.batch_size = flags.prompts * flags.group
    config.rollout.num_prompts, config.rollout.group_size = flags.prompts, flags.group
    config.rollout.num_minibatches = config.rollout.epochs = 1
    config.rollout.decode_batch_size = flags.rows
    config.rollout.recompute_log_probs = flags.recompute_log_probs
    config.rollout.sampling.max_new_tokens = flags.new
    config.reward.functions = (f"{REWARD}:{even_words.__name__}",)
    return parse(grpo.Config, config)


def our_steps(
    program: Program, train_step: Callable[..., Any], prompts: np.ndarray, stop_ids: tuple[int, ...]
) -> Iterator[Step]:
    """The measurements of one step after another, taken as by the training loop."""
    rows = [Example((ids,), (np.zeros(len(ids), bool),), "", "prompt", row={}) for ids in prompts]
    data = Dataset((Prompts(rows),), (), (), "", "")
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    )
    state = program.fresh_state()
    inputs = RunInputs(
        program,
        Words(program.config.model.vocab_size),
        SimpleNamespace(stop_ids=stop_ids),
        folder=None,
        initial=InitialWeights(None, "", lambda: state.params),
    )
    with closing(grpo.make_source(inputs, data)) as source:
        batches = source.batches(state, lambda: None)
        for step in count(1):
            state, metrics = train_step(state, next(batches))
            source.after_step(state)
            row = source.finish_row(step, to_scalars(metrics, "train"))
            tokens = round(row["completion/mean_length"] * program.config.rollout.rows)
            yield Step(tokens, {name: row[f"time/{name}"] for name in PHASES}, len(compiled))


def ours(config: grpo.Config, prompts: np.ndarray, stop_ids: tuple[int, ...], turns: Turns) -> None:
    """One step a turn, in a process set up as by experiments/train.py."""
    set_up_process()
    program = build_program(config)
    began = time.perf_counter()
    train_step = compile_step(program)
    print(f"{program.describe()}\ntrain step compiled in {time.perf_counter() - began:.1f} s", flush=True)
    with jax.set_mesh(program.mesh), closing(our_steps(program, train_step, prompts, stop_ids)) as steps:
        turns.repeat(steps.__next__)


def generate_alone(config: grpo.Config, prompts: np.ndarray, stop_ids: tuple[int, ...], turns: Turns) -> None:
    """As many completions a turn, without training; tokens per second."""
    set_up_process()
    rollout = config.rollout
    runs = our_runs(
        config.model, rollout.group_size, rollout.decode_batch_size, rollout.sampling.max_new_tokens
    )
    first = prompts[: rollout.num_prompts].tolist()

    def run() -> float:
        began = time.perf_counter()
        return runs["generate, static batches"](first, stop_ids) / (time.perf_counter() - began)

    turns.repeat(run)


def trl(
    config: grpo.Config, prompts: np.ndarray, stop_ids: tuple[int, ...], steps: int, turns: Turns
) -> None:
    """One step of TRL's trainer a turn."""
    from datasets import Dataset as TextDataset
    from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback
    from transformers.utils import logging
    from trl import GRPOTrainer

    took: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        took[name] = time.perf_counter() - began

    class Timed(GRPOTrainer):
        def _generate(self, prompts: list[str]) -> Any:
            with timed("rollout"):
                generated = super()._generate(prompts)
            took["tokens"] = sum(map(len, generated[1]))
            return generated

        def _calculate_rewards(self, *arguments: Any) -> Any:
            with timed("reward"):
                return super()._calculate_rewards(*arguments)

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
            with timed("before the update"):
                return super()._generate_and_score_completions(inputs)

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            took["score"] = took["before the update"] - took["rollout"] - took["reward"]
            took["update"] = time.perf_counter() - turns.began - took["before the update"]
            turns.end(Step(took["tokens"], {name: took[name] for name in PHASES}))

    logging.set_verbosity_error()
    llama = LlamaForCausalLM(llama_config(config.model))
    llama.generation_config.eos_token_id = list(stop_ids) or None
    texts = [" ".join(f"w{i}" for i in ids) for ids in prompts]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        trainer = Timed(
            llama,
            reward_funcs=lambda completions, **_: [even_words({}, text) for text in completions],
            args=trl_arguments(config, folder, steps),
            train_dataset=TextDataset.from_dict({"prompt": texts}),
            processing_class=trl_tokenizer(config.model.vocab_size),
            callbacks=[TakeTurns()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def trl_arguments(config: grpo.Config, folder: str, steps: int) -> Any:
    """The same config for TRL."""
    from trl import GRPOConfig

    rollout, optimizer, pieces = config.rollout, config.optimizer, config.training.num_microbatches
    return GRPOConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=rollout.rows // pieces,
        gradient_accumulation_steps=pieces,
        num_generations=rollout.group_size,
        max_completion_length=rollout.sampling.max_new_tokens,
        temperature=rollout.sampling.temperature,
        top_k=0,
        beta=config.objective.kl_coefficient,
        loss_type=config.objective.variant,
        epsilon=config.objective.clip_low,
        scale_rewards=config.objective.advantage_scale,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=optimizer.schedule,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.clip_norm,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=jax.default_backend() == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trl_tokenizer(vocab_size: int) -> Any:
    """`Words`, and an EOS token after them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab_size)} | {"<end>": vocab_size}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="w0")


def report(results: dict[str, list[Turn]]) -> None:
    """Print a line per implementation, and the ratios."""
    alone = results.pop("generate alone")
    print(
        f"  {'':8s} {'s/step':>7s} {'tokens/s':>9s}" + "".join(f"{name:>9s}" for name in PHASES) + "   peak"
    )
    for name, turns in results.items():
        seconds = statistics.median(turn.seconds for turn in turns)
        shares = [
            statistics.median(turn.value.phases[phase] / turn.seconds for turn in turns) for phase in PHASES
        ]
        print(
            f"  {name:8s} {seconds:7.2f} {statistics.median(turn.value.rate for turn in turns):9,.0f}"
            + "".join(f"{share:9.1%}" for share in shares)
            + f"{turns[-1].peak_bytes / 1e9:5.2f} GB"
        )
    our = results["jaxllm"]
    if "TRL" in results:
        step, cpu = (ratio(results["TRL"], our, attrgetter(name)) for name in ("seconds", "cpu_seconds"))
        rollout = ratio(our, results["TRL"], attrgetter("value.rate"))
        print(
            f"  jaxllm is {step:.2f}x as fast, {cpu:.2f}x by CPU time; its rollout is {rollout:.2f}x as fast"
        )
    share = statistics.median(step.value.rate / rate.value for step, rate in zip(our, alone, strict=True))
    rate = statistics.median(turn.value for turn in alone)
    print(f"  generate alone {rate:,.0f} tokens/s, the rollout reaches {share:.0%} of it")
    print(
        f"  {our[-1].value.compiled - our[0].value.compiled} programs were compiled between timed steps",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default=Path(__file__).with_name("model_s.py"), help="of the model")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each implementation")
    # Not 1: lengths are random, and later steps may still compile for a new shape.
    parser.add_argument("--warm_up", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--peer", action="store_true", help="also run TRL")
    parser.add_argument(
        "--lengths", nargs="+", choices=["equal", "geometric"], default=["equal", "geometric"]
    )
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="most tokens to generate")
    parser.add_argument("--rows", type=int, default=64, help="decoded at a time; TRL: all")
    parser.add_argument("--microbatches", type=int, default=8, help="microbatches per update")
    parser.add_argument(
        "--recompute_log_probs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="old log-probs by the trainer",
    )
    flags = parser.parse_args()
    config = make_config(flags)
    vocab_size = config.model.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocab_size, (16 * flags.prompts, flags.prompt))
    for lengths in flags.lengths:
        print(f"{lengths} lengths, {flags.prompts} x {flags.group}, {flags.prompt} + {flags.new} tokens")
        stop_ids = tuple(range(4 * vocab_size // flags.new if lengths == "geometric" else 0))
        contestants: dict[str, Contestant] = {
            "jaxllm": partial(ours, config, prompts, stop_ids),
            "generate alone": partial(generate_alone, config, prompts, stop_ids),
        }
        if flags.peer:
            # One step more: at its end TRL would also leave its loop.
            contestants["TRL"] = partial(trl, config, prompts, stop_ids, flags.warm_up + flags.steps + 1)
        huge = {"jaxllm": HUGE_PAGES, "generate alone": HUGE_PAGES}
        report(compare(contestants, rounds=flags.steps, warm_up=flags.warm_up, variables=huge))


if __name__ == "__main__":
    main()
