"""Settings of the process, before JAX computes anything: every script calls `set_up_process`."""

import ctypes
import os
import platform

import jax

from jaxllm.errors import ConfigError
from jaxllm.files import cache_folder

# Options of mallopt(3), by their numbers in malloc.h. XLA takes a step's temporaries from malloc every
# time; faulting in their pages again, once they were given back, costs a third of a step on a CPU.
KEEP_FREED_MEMORY = {
    -1: -1,  # M_TRIM_THRESHOLD: never give the top of the heap back
    -2: 64 << 20,  # M_TOP_PAD: grow by 64 MiB at a time
    -4: 0,  # M_MMAP_MAX: large blocks come from the heap as well
    -8: 1,  # M_ARENA_MAX: one heap for all threads, so that each reuses what another freed
}


def set_up_process() -> None:
    """Keep compiled programs between runs (in JAX_COMPILATION_CACHE_DIR, or below --cache_dir), and freed
    memory within this one. Raises ConfigError where JAX has no device to compute on."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    keep_freed_memory()
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


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory, unless its own environment variables, MALLOC_..., are set."""
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, value in KEEP_FREED_MEMORY.items():
            ctypes.CDLL(None).mallopt(option, value)
