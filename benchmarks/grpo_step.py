"""Time of whole GRPO steps and of their phases, beside TRL's GRPOTrainer on the same machine and model.

    python benchmarks/grpo_step.py [--config=FILE] [--steps=5] [--peer] [--lengths geometric equal]

Steps of jaxllm are those of `experiments/train.py`: its rollouts, reward processes and compiled train step.
Both have random weights of the same shape, float32, prompts of random tokens, AdamW, no reference model and
one update per rollout. `equal`: there is no stop token, so every completion has the maximum length.
`geometric`: a fraction of the vocabulary are stop tokens, so the mean length is a quarter of the maximum.
The implementations take turns. Results are medians over the steps, and the ratio is the median of the turns'
ratios. `generate alone` generates as many completions in static batches of --rows, as benchmarks/rollout.py.

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
- TRL's trainer owns the loop: jaxllm takes its turn in a callback at the end of TRL's steps;
- completions change during training: the learning rate is so small that their lengths stay the same.
"""

import argparse
import operator
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import even_words, llama_config
from benchmarks.rollout import our_runs
from configs import grpo_problems
from jaxllm.config import load_config, parse
from jaxllm.data.examples import Example
from jaxllm.data.prompts import Prompts
from jaxllm.data.rows import Dataset
from jaxllm.data.tokenizer import BaseTokenizer
from jaxllm.runs.context import InitialWeights, RunInputs
from jaxllm.runs.process import keep_freed_memory
from jaxllm.runs.program import Program
from jaxllm.stages import build_program, grpo
from jaxllm.training.metrics import to_scalars

PHASES = ("rollout", "score", "reward", "update")
LEARNING_RATE = 1e-7
REWARD = Path(__file__).with_name("peers.py")


class Step(NamedTuple):
    """Measurements of one step."""

    seconds: float
    cpu_seconds: float
    tokens: int  # generated
    phases: dict[str, float]  # seconds, by PHASES

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
            began, cpu_began = time.perf_counter(), time.process_time()
            state, metrics = train_step(state, next(batches))
            source.after_step(state)
            row = source.finish_row(step, to_scalars(metrics, "train"))
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            tokens = round(row["completion/mean_length"] * program.config.rollout.rows)
            yield Step(seconds, cpu_seconds, tokens, {name: row[f"time/{name}"] for name in PHASES})


def generate_alone(
    config: grpo.Config, prompts: np.ndarray, stop_ids: tuple[int, ...]
) -> Callable[[], float]:
    """A function that generates as many completions, without training, and returns tokens per second."""
    rollout = config.rollout
    runs = our_runs(
        config.model, rollout.group_size, rollout.decode_batch_size, rollout.sampling.max_new_tokens
    )
    first = prompts[: rollout.num_prompts].tolist()

    def run() -> float:
        began = time.perf_counter()
        return runs["generate, static batches"](first, stop_ids) / (time.perf_counter() - began)

    return run


def run_trl(
    config: grpo.Config,
    prompts: np.ndarray,
    stop_ids: tuple[int, ...],
    *,
    steps: int,
    after_step: Callable[[Step], None],
) -> None:
    """Train with TRL and call `after_step` after each of its steps."""
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

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began, self.cpu_began = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds, cpu_seconds = time.perf_counter() - self.began, time.process_time() - self.cpu_began
            took["score"] = took["before the update"] - took["rollout"] - took["reward"]
            took["update"] = seconds - took["before the update"]
            after_step(Step(seconds, cpu_seconds, took["tokens"], {name: took[name] for name in PHASES}))

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
            callbacks=[Turns()],
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


def compare(
    program: Program, train_step: Callable[..., Any], flags: argparse.Namespace, stop_ids: tuple[int, ...]
) -> None:
    """Let the implementations take turns and print a table."""
    config = program.config
    compilations: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, fun_name="", **_: (
            compilations.append(fun_name) if "backend_compile" in event else None
        )
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.model.vocab_size, (16 * flags.prompts, flags.prompt))
    generate_as_much = generate_alone(config, prompts, stop_ids)
    turns: dict[str, list[Step]] = {"jaxllm": []}
    rates_alone: list[float] = []
    with closing(our_steps(program, train_step, prompts, stop_ids)) as steps:

        def take_turns() -> None:
            if len(rates_alone) == flags.warm_up:
                compilations.clear()
            turns["jaxllm"].append(next(steps))
            rates_alone.append(generate_as_much())

        def after_trl(step: Step) -> None:
            turns.setdefault("TRL", []).append(step)
            take_turns()

        total = flags.warm_up + flags.steps
        if flags.peer:
            run_trl(config, prompts, stop_ids, steps=total, after_step=after_trl)
        else:
            for _ in range(total):
                take_turns()
    report(turns, flags.warm_up)
    ours, alone = [step.rate for step in turns["jaxllm"][flags.warm_up :]], rates_alone[flags.warm_up :]
    share = statistics.median(map(operator.truediv, ours, alone))
    print(f"  generate alone {statistics.median(alone):,.0f} tokens/s, the rollout reaches {share:.0%} of it")
    print(f"  {len(compilations)} programs were compiled after the warm-up {compilations or ''}", flush=True)


def report(turns: dict[str, list[Step]], warm_up: int) -> None:
    """Print a line per implementation, and the ratios."""
    print(f"  {'':8s} {'s/step':>7s} {'tokens/s':>9s}" + "".join(f"{name:>9s}" for name in PHASES))
    timed = {name: steps[warm_up:] for name, steps in turns.items()}
    for name, steps in timed.items():
        seconds, rate = (statistics.median(getattr(s, field) for s in steps) for field in ("seconds", "rate"))
        shares = [statistics.median(s.phases[phase] / s.seconds for s in steps) for phase in PHASES]
        first = " and ".join(f"{step.seconds:.1f}" for step in turns[name][:warm_up])
        print(
            f"  {name:8s} {seconds:7.2f} {rate:9,.0f}"
            + "".join(f"{share:9.1%}" for share in shares)
            + f"   (first steps {first} s)"
        )
    if "TRL" in timed:
        pairs = [
            (theirs.seconds / our.seconds, theirs.cpu_seconds / our.cpu_seconds, our.rate / theirs.rate)
            for our, theirs in zip(timed["jaxllm"], timed["TRL"], strict=True)
        ]
        step, cpu, rollout = map(statistics.median, zip(*pairs, strict=True))
        print(
            f"  jaxllm is {step:.2f}x as fast, {cpu:.2f}x by CPU time; its rollout is {rollout:.2f}x as fast"
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
    keep_freed_memory()  # as experiments/train.py does; it applies to TRL too, in the same process
    program = build_program(make_config(flags))
    began = time.perf_counter()
    train_step = program.compile()
    print(f"{program.describe()}\ntrain step compiled in {time.perf_counter() - began:.1f} s", flush=True)
    with jax.set_mesh(program.mesh):
        for lengths in flags.lengths:
            stops = 4 * program.config.model.vocab_size // flags.new if lengths == "geometric" else 0
            print(f"{lengths} lengths, {flags.prompts} x {flags.group}, {flags.prompt} + {flags.new} tokens")
            compare(program, train_step, flags, tuple(range(stops)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory of this process, all implementations: {peak:.2f} GB")


if __name__ == "__main__":
    main()
