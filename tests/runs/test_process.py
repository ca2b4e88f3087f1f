"""What scripts ask of their process: memory that is freed is kept, and the user's own settings stand."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.errors import ConfigError
from jaxllm.runs import process

PAGES_TAKEN_AGAIN = """
import ctypes, resource
from jaxllm.runs.process import keep_freed_memory

keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def fill(size):
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(block, 1, size)
    libc.free(block)

fill(64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill(64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this malloc has no mallopt")
@pytest.mark.parametrize(("variables", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)])
def test_freed_memory_is_kept_unless_the_user_has_settings_of_his_own(variables, kept):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PAGES_TAKEN_AGAIN]
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(command, cwd=root, env=plain | variables, capture_output=True, text=True, check=True)
    assert (int(run.stdout) < 100) == kept


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Unable to initialize backend 'cuda':\nno plugin"), ": .* no plugin"),
        (AssertionError(), ""),
    ],
)
def test_devices_that_jax_cannot_use_are_an_error_of_one_line(monkeypatch, error, reason):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(
        ConfigError, match=rf"^JAX cannot use its devices{reason}; unset JAX_PLATFORMS=cuda, .*\S$"
    ):
        process.set_up_process()
