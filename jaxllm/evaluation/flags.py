"""Which flags of experiments/evaluate.py fit together. Imports little, so that --help is quick."""

from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.config import check_output
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues

    from jaxllm.rollout.sampling import SamplingConfig


def check_flags(flags: "FlagValues", sampling: "SamplingConfig") -> None:
    """ConfigError for combinations that are not supported."""
    if (flags.input is None) == (not flags.suite):
        problem = "(or --suite=FILE) is missing" if flags.input is None else "and --suite exclude each other"
        raise ConfigError(f"--input=FILE {problem}")
    if flags.suite:
        check_suite_flags(flags)
    else:
        check_output(flags.output, "--output")
    for name in ("samples", "max_rows"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise ConfigError(f"--{name}={value} must be at least 1")
    if flags.plain and flags.template_options:
        raise ConfigError("--template_options has no effect with --plain: remove one of them")
    if sampling.greedy and flags.samples > 1:
        raise ConfigError(
            f"--samples={flags.samples} with --temperature={flags.temperature:g} would generate the same "
            "completion every time: raise --temperature"
        )
    if sampling.greedy and flags.reference is not None:
        raise ConfigError("--reference needs sampled completions: set --temperature, such as 1")
    if sampling.filters and flags.reference is not None:
        raise ConfigError(
            f"--reference needs unfiltered completions, from which alone the KL can be estimated: remove "
            f"{', '.join(f'--{name}={value}' for name, value in sampling.filters.items())}"
        )


def check_suite_flags(flags: "FlagValues") -> None:
    """ConfigError for flags that a suite does not read."""
    from jaxllm.evaluation.suites import PREFIX

    for flag in ("--reward_model", "--reference"):
        if getattr(flags, flag[2:]) is not None:
            raise ConfigError(f"{flag} is not read with --suite: remove it, or pass --input")
    if flags.output is not None and Path(flags.output).expanduser().is_file():
        raise ConfigError(f"--output={flags.output} is a file: results of suites go to a folder")
    if flags.suite_path is not None:
        if not any(name.startswith(PREFIX) for name in flags.suite):
            raise ConfigError(f"--suite_path has no effect without --suite={PREFIX}TASK: remove it")
        if not Path(flags.suite_path).expanduser().is_dir():
            raise ConfigError(f"--suite_path={flags.suite_path}: there is no such folder")
    if len(flags.rewards) > 1:
        raise ConfigError("--rewards names the one function that checks the completions of a suite")
