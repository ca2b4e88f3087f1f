"""Flags that several scripts share. Imports little, so that --help is quick."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues

    from jaxllm.rollout.sampling import SamplingConfig


def define_sampling_flags(flag_values: "FlagValues") -> None:
    """--seed, and a flag for each field of a SamplingConfig."""
    from absl import flags

    flags.DEFINE_integer("seed", 0, "random seed", flag_values=flag_values)
    flags.DEFINE_integer(
        "max_new_tokens", 200, "maximum length of a completion, in tokens", flag_values=flag_values
    )
    flags.DEFINE_integer("top_k", None, "sample from the k most likely tokens", flag_values=flag_values)
    for name, default, meaning in (
        ("temperature", 0.8, "divides the logits; 0 is greedy decoding"),
        ("top_p", None, "sample from the most likely tokens that reach this probability together"),
        ("min_p", None, "sample from tokens at least this fraction as likely as the most likely one"),
    ):
        flags.DEFINE_float(name, default, meaning, flag_values=flag_values)


def define_template_options(flag_values: "FlagValues") -> None:
    """--template_options."""
    from absl import flags

    flags.DEFINE_list(
        "template_options",
        [],
        "NAME=VALUE for variables of the chat template, such as enable_thinking=false",
        flag_values=flag_values,
    )


def define_dtype(flag_values: "FlagValues") -> None:
    """--dtype."""
    from absl import flags

    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "of parameters and computation; default: bfloat16 on GPUs and TPUs, on CPUs as the model was trained",
        flag_values=flag_values,
    )


def define_process_flags(flag_values: "FlagValues") -> None:
    """Which process of several this is: for launchers that JAX does not know."""
    from absl import flags

    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several", flag_values=flag_values)
    flags.DEFINE_integer(
        "num_processes", None, "processes of the run; 1: alone, also within SLURM", flag_values=flag_values
    )
    flags.DEFINE_integer("process_id", None, "number of this process, from 0", flag_values=flag_values)


def read_sampling(flags: "FlagValues") -> "SamplingConfig":
    """The SamplingConfig that the flags describe; ConfigError where a value is out of range."""
    from jaxllm.rollout.sampling import SamplingConfig

    with named_as_flags({"sampling.": "--"}):
        return SamplingConfig(
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            min_p=flags.min_p,
            max_new_tokens=flags.max_new_tokens,
        )


@contextlib.contextmanager
def named_as_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """A ConfigError that begins with a field in `flags` names the flag instead: what the user gave."""
    try:
        yield
    except ConfigError as error:
        for field, flag in flags.items():
            if str(error).startswith(field):
                raise ConfigError(flag + str(error).removeprefix(field)) from None
        raise


def define_run_flags(flag_values: "FlagValues") -> None:
    """--run, of which there may be several."""
    from absl import flags

    what = "folder of a run, a pipeline or a sweep; --run= may be left out"
    flags.DEFINE_multi_string("run", [], what, flag_values=flag_values)


def runs_as_flags(argv: list[str]) -> list[str]:
    """RUN as --run=RUN, except for the value that follows a flag, as in `--output FOLDER`."""
    takes_value = {f"{dash}{name}" for dash in ("-", "--") for name in ("run", "output", "metric", "goal")}
    return argv[:1] + [
        argument if argument.startswith("-") or before in takes_value else f"--run={argument}"
        for before, argument in itertools.pairwise(argv)
    ]
