"""What scripts ask of their process: huge pages, where the user has no settings of his own; devices."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.errors import ConfigError
from jaxllm.runs import process

SCRIPT = """
import ctypes, os, resource, sys
from jaxllm.config import run_script

def main(config, flags):
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    ctypes.memset(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(256 << 20))), 1, 256 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(os.environ.get("GLIBC_TUNABLES"), faults, *sys.argv[1:], flags.name)

def define_flags(values):
    from absl import flags
    flags.DEFINE_string("name", "", "", flag_values=values)

sys.exit(run_script(main, None, define_flags))
"""
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such pages")
@pytest.mark.parametrize(
    ("variables", "tunables"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"MALLOC_ARENA_MAX": "8"}, "None"),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}, "glibc.malloc.arena_max=8"),
    ],
)
def test_scripts_run_with_huge_pages_unless_the_user_has_settings_of_his_own(tmp_path, variables, tunables):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("GLIBC_", "MALLOC_"))}
    environment = plain | variables | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, str(script), "--name=a b"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found, faults, *rest = run.stdout.split(maxsplit=2)
    assert (found, rest) == (tunables, ["--name=a b a b\n"])
    glibc = tuple(map(int, (platform.libc_ver()[1] or "0").split(".")))
    if HUGE.exists() and "[madvise]" in HUGE.read_text() and glibc >= (2, 35):
        assert (int(faults) < 10_000) == ("hugetlb" in found)  # 65,536 pages of 4 KiB


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
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(
        ConfigError, match=rf"^JAX cannot use its devices{reason}; unset JAX_PLATFORMS=cuda, .*\S$"
    ):
        process.set_up_process()
