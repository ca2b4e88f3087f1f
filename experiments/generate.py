"""Generate continuations of text with a checkpoint.

python experiments/generate.py --checkpoint=runs/shakespeare --prompt="ROMEO:"
python experiments/generate.py --checkpoint=runs/shakespeare --num_samples=3 --seed=1 --top_p=0.9
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.command_line import define_dtype, define_sampling_flags, read_sampling
from jaxllm.config import run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    flags.DEFINE_string("checkpoint", None, "run folder, RUN/best or step folder", flag_values=flag_values)
    flags.DEFINE_multi_string(
        "prompt", [""], "text to continue; can be given several times", flag_values=flag_values
    )
    flags.DEFINE_integer("num_samples", 1, "continuations of each prompt", flag_values=flag_values)
    define_dtype(flag_values)
    define_sampling_flags(flag_values)


def main(_: None, flags: "FlagValues") -> None:
    """Continue every prompt and print it with its continuation."""
    if flags.num_samples < 1:
        raise ConfigError(f"--num_samples={flags.num_samples} must be at least 1")
    import jax

    from jaxllm.data.show import printable
    from jaxllm.rollout.generate import generate
    from jaxllm.runs.checkpoints import check_generates, inference_dtype, load_checkpoint, local_mesh
    from jaxllm.runs.process import set_up_process

    sampling = read_sampling(flags)
    set_up_process()
    loaded = load_checkpoint(flags.checkpoint, local_mesh, dtype=inference_dtype(flags.dtype))
    check_generates(loaded, f"--checkpoint={flags.checkpoint}")
    model, tokenizer = loaded.model, loaded.tokenizer
    texts = [prompt for prompt in flags.prompt for _ in range(flags.num_samples)]
    completions = generate(
        model,
        loaded.params,
        [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts],
        sampling=sampling,
        stop_ids=tokenizer.stop_ids,
        keys=jax.random.split(jax.random.key(flags.seed), len(texts)),
        vocab_size=tokenizer.vocab_size,
    )
    for number, (text, tokens) in enumerate(zip(texts, completions.tokens, strict=True)):
        print("" if number == 0 else "-" * 20)
        print(printable(text + tokenizer.decode(tokens, from_start=False)))
        if completions.stop_reasons[number] == "length" and len(tokens) < sampling.max_new_tokens:
            print(f"note: truncated at model.max_length={model.config.max_length} tokens", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
