"""Settings of the process, before JAX computes anything: every script calls `set_up_process`."""

import ctypes
import os
import platform

import jax

from jaxllm.errors import ConfigError
from jaxllm.files import cache_folder


def set_up_process() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR, or below --cache_dir. Raises
    ConfigError where JAX has no device to compute on."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # for an unknown platform, jax asserts
        platforms = os.environ.get("JAX_PLATFORMS")
        fix = f"unset JAX_PLATFORMS={platforms}, or install" if platforms else "install"
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"JAX cannot use its devices{reason and ': '}{reason}; {fix} jaxllm[cuda] or jaxllm[tpu], "
            "whichever they are"
        ) from None


def give_back_freed_memory() -> None:
    """Return what malloc keeps of freed memory, such as a compiler's, to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
