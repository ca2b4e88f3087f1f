"""The flags that say how to sample, for every script that does. Light, so that --help is quick."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from absl.flags import FlagValues


def define_sampling_flags(flag_values: "FlagValues") -> None:
    """--seed, and a flag for each field of a SamplingConfig."""
    from absl import flags

    where = {"flag_values": flag_values}
    flags.DEFINE_integer("seed", 0, "of the samples", **where)
    flags.DEFINE_integer("max_new_tokens", 200, "longest text", **where)
    flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token every time", **where)
    flags.DEFINE_integer("top_k", None, "only the k likeliest tokens", **where)
    flags.DEFINE_float("top_p", None, "only the likeliest tokens that hold this probability", **where)
    flags.DEFINE_float("min_p", None, "only tokens this fraction as likely as the likeliest", **where)


def read_sampling(flags: "FlagValues") -> Any:
    """The SamplingConfig that the flags describe."""
    from jaxllm.rollout.sampling import SamplingConfig

    names = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
    return SamplingConfig(**{name: getattr(flags, name) for name in names})
