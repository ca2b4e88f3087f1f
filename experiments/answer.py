"""Let a model answer many prompts, and judge the answers.

python experiments/answer.py --checkpoint=runs/reasoner --input=synthetic:problems --rewards=math_answer
python experiments/answer.py --checkpoint=runs/preferred --input=prompts.jsonl --reward_model=runs/reward \
    --output=answers.jsonl --samples=4

Rows have a `prompt` or `messages` and whatever the rewards read, as for GRPO; of preference pairs the prompt
is taken. OUTPUT gets a line for every answer. Means over prompts are printed, with their standard errors.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from experiments.sampling_flags import define_sampling_flags, read_sampling
from jaxllm.config import run_script
from jaxllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from absl.flags import FlagValues

ROWS = 64  # answers decoded at a time


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    where = {"flag_values": flag_values}
    flags.DEFINE_string("checkpoint", None, "a run folder, RUN/best, or step folder", **where)
    flags.DEFINE_string("input", None, "rows to answer: .jsonl, .parquet, a dataset, synthetic:KIND", **where)
    flags.DEFINE_string("output", None, "file to write the answers to (.jsonl)", **where)
    flags.DEFINE_list("rename", [], "theirs=ours for columns called otherwise", **where)
    flags.DEFINE_string("prompt_format", None, "a text with {column}s to fill in", **where)
    flags.DEFINE_string("system", None, "a system message before every prompt", **where)
    flags.DEFINE_list(
        "rewards", [], "as reward.functions: names, PACKAGE.FUNCTION, FILE.py:FUNCTION", **where
    )
    flags.DEFINE_string("reward_model", None, "the run folder of a reward model", **where)
    flags.DEFINE_integer("samples", 1, "answers to each prompt", **where)
    flags.DEFINE_integer("max_rows", 256, "prompts, from the first", **where)
    define_sampling_flags(flag_values)


def read_prompts(flags: "FlagValues", template: Any, longest: int) -> list[Any]:
    """The prompts of --input that a model of this length can answer; what is left out goes to stderr."""
    from jaxllm.data.chat import renamed
    from jaxllm.data.prompts import Prompt, question_messages
    from jaxllm.data.sources import BadRow, open_source

    source = open_source(
        flags.input, split="validation", text_key=None, synthetic_rows=flags.max_rows, seed=flags.seed
    )
    prompts = []
    for row in source.rows():
        try:
            if row.value is None:
                raise BadRow(row.problem, row.detail)
            record = renamed(row.value, flags.rename)
            _, messages = question_messages(record, flags)
            ids = template.prompt(messages)
            if len(ids) > longest:
                raise BadRow("prompt that leaves no room for --max_new_tokens", f"{len(ids)} tokens")
        except BadRow as error:
            print(f"left out: {row.where}: {error}", file=sys.stderr)
            continue
        prompts.append(Prompt(ids, record))
        if len(prompts) == flags.max_rows:
            break
    if not prompts:
        raise DataError(f"--input={flags.input}: no row can be answered")
    return prompts


def judge_of(flags: "FlagValues", loaded: Any, template: Any, length: int) -> Any:
    """The rewards that the flags name; the reward model reads `length` tokens."""
    import jax

    from experiments.rewards import Judge, RewardConfig, RewardModel
    from jaxllm.sharding import MeshConfig, make_mesh

    config = RewardConfig(
        functions=tuple(flags.rewards),
        weights=(1.0,) * len(flags.rewards),
        model=flags.reward_model,
        model_weight=1.0,
        normalise=True,
        workers=1,
        time_limit=5.0,
        default=0.0,
        overlong_buffer=0,
        missing_stop=0.0,
    )
    model = None
    if flags.reward_model is not None:
        mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        model = RewardModel(config, loaded.tokenizer, template, rows=ROWS, length=length, mesh=mesh)
    return Judge(config, model)


def main(_: None, flags: "FlagValues") -> None:
    """Answer the input, judge the answers, write them, and say what was found."""
    import functools

    import jax

    from experiments.answers import Answering, answer_metrics, answer_rows
    from experiments.loading import checkpoint_template, load_checkpoint
    from experiments.run import enable_compilation_cache
    from jaxllm.data.chat import check_rename
    from jaxllm.rollout.collect import collect
    from jaxllm.rollout.generate import bucket

    if flags.input is None:
        raise ConfigError("--input=FILE is missing")
    if flags.output is not None and not Path(flags.output).expanduser().parent.is_dir():
        raise ConfigError(f"--output={flags.output}: there is no such folder")
    for name in ("samples", "max_rows"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name}={getattr(flags, name)} must be at least 1")
    check_rename(flags.rename)
    sampling = read_sampling(flags)
    if flags.samples > 1 and sampling.temperature == 0:
        raise ConfigError(f"--samples={flags.samples} with --temperature=0 would say the same every time")
    enable_compilation_cache()
    loaded = load_checkpoint(flags.checkpoint)
    if loaded.stage == "reward_model":
        raise ConfigError(f"--checkpoint={flags.checkpoint} is a reward model, which says nothing")
    template, longest = checkpoint_template(loaded), loaded.model.config.max_length
    prompts = read_prompts(flags, template, longest - sampling.max_new_tokens)
    length = min(longest, bucket(max(len(prompt.ids) for prompt in prompts) + sampling.max_new_tokens))
    with judge_of(flags, loaded, template, length) as judge:
        answer = Answering(
            sample=functools.partial(collect, loaded.model, max_rows=ROWS),
            tokenizer=loaded.tokenizer,
            stop_ids=template.stop_ids,
            judge=judge,
            length=length,
        )
        answers = answer(
            loaded.params,
            prompts,
            group_size=flags.samples,
            sampling=sampling,
            keys=jax.random.split(jax.random.key(flags.seed), len(prompts) * flags.samples),
            check=lambda: None,
        )
    if flags.output is not None:
        with Path(flags.output).expanduser().open("w") as file:
            for i, row in enumerate(answer_rows(answers)):
                file.write(json.dumps({**prompts[i // flags.samples].row, **row}) + "\n")
    print(f"{len(prompts)} prompts, {flags.samples} answers each")
    row = answer_metrics(answers, flags.samples, "")
    for name, value in row.items():
        if not name.endswith("_se"):
            print(f"{name} {value:.4g} ± {row[f'{name}_se']:.2g}")


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
