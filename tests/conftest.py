"""Every test sees 8 CPU devices; compiled programs are kept between runs; tests share tiny trained runs."""

import os
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(os.path.dirname(__file__), "..", ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# For the workers and scripts that this process starts, as scripts do for themselves: fewer page faults.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

# Tests compile many programs and run each of them little: optimizing them costs more than it gives. Without
# the fusion emitters, which are for fast programs, a train step compiles in a quarter of the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

import jax

jax.config.update("jax_num_cpu_devices", 8)

# A shell's background job ignores Ctrl-C, and so would the runs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What runs keep between them, such as tokenized text, is kept within one session.
_cache = tempfile.TemporaryDirectory()
os.environ["JAXLLM_CACHE_DIR"] = _cache.name

pytest_plugins = ["tiny_runs"]
