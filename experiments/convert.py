"""Hugging Face models: take a checkpoint out, bring one in, or compare with transformers.

    python experiments/convert.py export --checkpoint=runs/sft --output=exported
    python experiments/convert.py export --checkpoint=runs/lora --output=adapters --adapters
    python experiments/convert.py import --checkpoint=SmolLM2-135M --output=runs/smollm2
    python experiments/convert.py check --checkpoint=exported

Importing is rarely needed: every script takes a Hugging Face folder where it takes a run.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.config import run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues

ACTIONS = ("export", "import", "check")
DTYPES = ("float32", "bfloat16", "float16")


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    where = {"flag_values": flag_values}
    flags.DEFINE_string("action", None, f"{', '.join(ACTIONS)}; --action= may be left out", **where)
    flags.DEFINE_string(
        "checkpoint", None, "run folder, RUN/best, step folder or Hugging Face folder", **where
    )
    flags.DEFINE_string("output", None, "new folder to write", **where)
    flags.DEFINE_bool("adapters", False, "export a LoRA run's adapters alone, for PEFT; else merged", **where)
    flags.DEFINE_string(
        "dtype", None, "of exported tensors: float32, bfloat16 or float16; as trained", **where
    )
    flags.DEFINE_float("max_shard_gb", 5.0, "size of an exported file, in GB", **where)


def main(_: None, flags: "FlagValues") -> None:
    """Convert or compare."""
    if flags.action not in ACTIONS:
        raise ConfigError(
            f"name what to do, one of {', '.join(ACTIONS)}: python experiments/convert.py export ..."
        )
    if flags.checkpoint is None:
        raise ConfigError("--checkpoint=FOLDER is missing")
    if flags.output is None and flags.action != "check":
        raise ConfigError("--output=FOLDER is missing")
    if flags.adapters and (flags.action != "export" or flags.dtype is not None):
        raise ConfigError("--adapters is for export, and writes float32: leave out --dtype")
    if flags.dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype={flags.dtype}: choose one of {', '.join(DTYPES)}")
    if flags.max_shard_gb <= 0:
        raise ConfigError(f"--max_shard_gb={flags.max_shard_gb} must be above 0")

    from jaxllm.runs.convert import check_checkpoint, export_adapters, export_checkpoint, import_checkpoint
    from jaxllm.runs.process import set_up_process

    set_up_process()
    if flags.action == "check":
        check_checkpoint(flags.checkpoint)
        return
    output = Path(flags.output).expanduser()
    if flags.action == "import":
        import_checkpoint(flags.checkpoint, output)
    elif flags.adapters:
        export_adapters(flags.checkpoint, output)
    else:
        size = int(flags.max_shard_gb * 10**9)
        export_checkpoint(flags.checkpoint, output, dtype=flags.dtype, max_shard_bytes=size)


def action_as_flag(argv: list[str]) -> list[str]:
    """`export` as `--action=export`."""
    return [f"--action={argument}" if argument in ACTIONS else argument for argument in argv]


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags, action_as_flag(sys.argv)))
