"""Continue text with a checkpoint.

python experiments/generate.py --checkpoint=runs/shakespeare --prompt="ROMEO:"
python experiments/generate.py --checkpoint=runs/shakespeare --num_samples=3 --seed=1 --top_p=0.9
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.config import parse, run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    flags.DEFINE_string(
        "checkpoint", None, "run folder, checkpoints folder or step folder", flag_values=flag_values
    )
    flags.DEFINE_multi_string(
        "prompt", [""], "text to continue; may be given several times", flag_values=flag_values
    )
    flags.DEFINE_integer("num_samples", 1, "continuations of each prompt", flag_values=flag_values)
    flags.DEFINE_integer("seed", 0, "of the samples", flag_values=flag_values)
    flags.DEFINE_integer("max_new_tokens", 200, "longest continuation", flag_values=flag_values)
    flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token every time", flag_values=flag_values)
    flags.DEFINE_integer("top_k", None, "only the k likeliest tokens", flag_values=flag_values)
    flags.DEFINE_float(
        "top_p", None, "only the likeliest tokens that hold this probability", flag_values=flag_values
    )
    flags.DEFINE_float(
        "min_p", None, "only tokens this fraction as likely as the likeliest", flag_values=flag_values
    )


def main(_: None, flags: "FlagValues") -> None:
    """Load the checkpoint, continue every prompt, print prompt and continuation."""
    if flags.checkpoint is None:
        raise ConfigError("--checkpoint=RUN_FOLDER is missing")
    if flags.num_samples < 1:
        raise ConfigError(f"--num_samples={flags.num_samples} must be at least 1")
    import jax

    from experiments.run import enable_compilation_cache
    from jaxllm.data.tokenizer import load_tokenizer
    from jaxllm.models import ModelConfig, build_model
    from jaxllm.rollout.generate import generate
    from jaxllm.rollout.sampling import SamplingConfig
    from jaxllm.training.checkpoint import find_checkpoint, read_arrays

    names = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
    sampling = SamplingConfig(**{name: getattr(flags, name) for name in names})
    enable_compilation_cache()
    folder = find_checkpoint(flags.checkpoint)
    config = json.loads((folder / "config.json").read_text())
    model = build_model(parse(ModelConfig, config["model"], "model"))
    params = read_arrays(folder, jax.eval_shape(model.init, jax.random.key(0)), prefix="params")
    tokenizer = load_tokenizer(folder / "tokenizer.model")

    texts = [prompt for prompt in flags.prompt for _ in range(flags.num_samples)]
    said = generate(
        model,
        params,
        [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts],
        sampling=sampling,
        stop_ids=(tokenizer.eos_id,),
        keys=jax.random.split(jax.random.key(flags.seed), len(texts)),
    )
    for number, (text, tokens) in enumerate(zip(texts, said.tokens, strict=True)):
        print("" if number == 0 else "-" * 20)
        print(text + tokenizer.decode(tokens, from_start=False))
        if said.stop_reasons[number] == "length" and len(tokens) < sampling.max_new_tokens:
            print(f"note: ends at model.max_length={model.config.max_length} tokens", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
