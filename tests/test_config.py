"""An invalid config or command line is an error of one line that names the field, with exit code 78."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import jax
import pytest
from absl import flags
from ml_collections import config_dict

from jaxllm.config import (
    Difference,
    Text,
    as_dict,
    differences,
    load_config,
    nearest_multiples,
    override,
    parse,
    run_script,
)
from jaxllm.errors import ConfigError, NumericsError, Stopped
from jaxllm.files import cache_folder
from jaxllm.runs import process

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Training:
    steps: int
    warmup_steps: int
    learning_rate: float
    shuffle: bool
    name: str
    seed: int | None
    note: str | None


@dataclass(frozen=True)
class Data:
    train: tuple[str, ...]
    weights: tuple[float, ...]
    sizes: tuple[int, ...] | None
    prompts: tuple[Text, ...]


@dataclass(frozen=True)
class Config:
    training: Training
    data: Data
    evaluation: Data | None


VALUES = {
    "training": {
        "steps": 10,
        "warmup_steps": 2,
        "learning_rate": 0.1,
        "shuffle": True,
        "name": "a",
        "seed": None,
        "note": None,
    },
    "data": {"train": ["a.txt"], "weights": [1, 0.5], "sizes": None, "prompts": []},
    "evaluation": None,
}


def changed(path, value):
    """VALUES with the field at the dotted path set, or removed if `value` is Ellipsis."""
    values = json.loads(json.dumps(VALUES))
    *parents, field = path.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    section[field] = value
    if value is ...:
        del section[field]
    return values


# ---- parse


def test_parse_builds_nested_frozen_dataclasses():
    config = parse(Config, config_dict.ConfigDict(VALUES))
    assert config == Config(
        Training(10, 2, 0.1, True, "a", None, None), Data(("a.txt",), (1.0, 0.5), None, ()), None
    )
    with pytest.raises(FrozenInstanceError):
        config.training.steps = 3


def test_an_int_becomes_the_declared_float():
    learning_rate = parse(Config, changed("training.learning_rate", 1)).training.learning_rate
    assert type(learning_rate) is float


def test_json_round_trip():
    config = parse(Config, changed("evaluation", VALUES["data"]))
    assert parse(Config, json.loads(json.dumps(as_dict(config)))) == config
    assert as_dict(config)["data"]["train"] == ["a.txt"]  # equal to what json.loads gives


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.step", 3, "config.training.step: unknown key, did you mean 'steps'?"),
        ("zebra", 3, "config.zebra: unknown key"),
        ("training.steps", ..., "config.training.steps: missing key"),
        ("training.steps", 1e3, "config.training.steps: must be an int, got 1000.0"),
        ("training.steps", True, "config.training.steps: must be an int, got True"),
        ("training.steps", None, "config.training.steps: must be an int, got None"),
        ("training.learning_rate", "0.1", "config.training.learning_rate: must be a finite float, got '0.1'"),
        (
            "training.learning_rate",
            float("nan"),
            "config.training.learning_rate: must be a finite float, got nan",
        ),
        ("training.learning_rate", False, "config.training.learning_rate: must be a finite float, got False"),
        ("training.shuffle", 1, "config.training.shuffle: must be true or false, got 1"),
        ("training.seed", "x", "config.training.seed: must be an int or none, got 'x'"),
        ("data.train", "a.txt", "config.data.train: must be a tuple of str, got 'a.txt'"),
        ("data.weights", [1.0, "b"], "config.data.weights[1]: must be a finite float, got 'b'"),
        ("data", 3, "config.data: must be a section of fields, got 3"),
        ("evaluation", {}, "config.evaluation.train: missing key"),
    ],
)
def test_an_invalid_config_is_one_line_with_the_full_path(path, value, message):
    with pytest.raises(ConfigError) as caught:
        parse(Config, changed(path, value))
    assert str(caught.value) == message


def test_differences_name_the_path_and_both_values():
    before, after = VALUES, changed("training.steps", 20) | {"extra": 1}
    found = differences(before, after)
    assert found == [Difference("training.steps", 10, 20), Difference("extra", None, 1)]
    assert str(found[0]) == "training.steps 10 -> 20"
    assert differences(before, VALUES) == []


# ---- overrides


@pytest.fixture
def config():
    values = config_dict.ConfigDict(changed("training.learning_rate", 1))  # an int in the file
    values.data = config_dict.ConfigDict({"train": ("a.txt",), "weights": (1,), "sizes": None, "prompts": ()})
    values.training.seed = config_dict.placeholder(int)
    values.training.warmup_steps = values.training.get_ref("steps") // 5
    return values.lock()


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("training.steps", "1_000", 1000),
        ("training.steps", "1e3", 1000),
        ("training.steps", "2.0", 2),
        ("training.steps", "-3", -3),
        ("training.steps", "007", 7),
        ("training.learning_rate", "-.5", -0.5),
        ("training.learning_rate", "1_000", 1000.0),
        ("training.learning_rate", "3e-4", 3e-4),
        ("training.learning_rate", "1", 1.0),
        ("training.shuffle", "false", False),
        ("training.shuffle", "True", True),
        ("training.shuffle", "FALSE", False),
        ("training.shuffle", "0", False),
        ("training.name", "none", "none"),
        ("training.name", "12", "12"),
        ("training.name", "1e3", "1e3"),
        ("training.name", "'a'", "'a'"),
        ("training.name", "a, b", "a, b"),
        ("training.seed", "5", 5),
        ("training.note", "hello=there", "hello=there"),
        ("training.note", "None", None),
        ("training.note", "7", "7"),
        ("data.train", "b.txt", ("b.txt",)),
        ("data.train", "/some dir/b*.txt", ("/some dir/b*.txt",)),
        ("data.train", "b.txt,../c.txt", ("b.txt", "../c.txt")),
        ("data.train", "('b.txt','c.txt')", ("b.txt", "c.txt")),
        ("data.train", "['b,c.txt']", ("b,c.txt",)),
        ("data.train", "2024", ("2024",)),
        ("data.train", "2024,1e3, none", ("2024", "1e3", "none")),
        ("data.train", "[2024.jsonl, b.txt]", ("2024.jsonl", "b.txt")),
        ("data.train", "'b,c.txt'", ("b,c.txt",)),
        ("data.train", "('b,c.txt')", ("b,c.txt",)),
        ("data.train", "a=b.txt", ("a=b.txt",)),
        ("data.train", "true", ("true",)),
        ("data.train", "()", ()),
        ("data.train", "", ()),
        ("data.train", "none", ()),
        ("data.weights", "none", ()),
        ("data.weights", "(1, 1e-1)", (1.0, 0.1)),
        ("data.sizes", "1e3", (1000,)),
        ("data.sizes", "[1_000, 2]", (1000, 2)),
        ("data.sizes", "()", ()),
        ("data.sizes", "none", None),
        ("data.prompts", "Hello, world", ("Hello, world",)),
        ("data.prompts", "1, 2 ", ("1, 2 ",)),
        ("data.prompts", "'Yes', she said", ("'Yes', she said",)),
        ("data.prompts", "(Once, twice)", ("(Once, twice)",)),
        ("data.prompts", "('Once, twice', 'b')", ("Once, twice", "b")),
        ("data.prompts", "('',)", ("",)),
        ("data.prompts", "", ()),
        ("data.weights", "0.5", (0.5,)),
        ("data.weights", "1,0.5", (1.0, 0.5)),
        ("data.sizes", "4,5", (4, 5)),
    ],
)
def test_override_reads_the_text_as_the_declared_type(config, field, text, value):
    override(config, Config, field, text)
    section, name = field.split(".")
    assert getattr(getattr(parse(Config, config), section), name) == value


@pytest.mark.parametrize(("field", "text"), [("seed", "7"), ("note", "a")])
def test_an_optional_field_can_be_set_and_set_back_to_none(config, field, text):
    override(config, Config, f"training.{field}", text)
    assert config.training[field] is not None
    override(config, Config, f"training.{field}", "none")
    assert config.training[field] is None


def test_a_derived_value_follows_an_override(config):
    override(config, Config, "training.steps", "50")
    assert parse(Config, config).training.warmup_steps == 10


# ---- the command line

CONFIG_FILE = """
from ml_collections import config_dict

def get_config(size="small"):
    if size not in ("small", "big"):
        raise ValueError(f"unknown size {size}")
    return config_dict.ConfigDict({
        "training": {"steps": 10, "warmup_steps": 2, "learning_rate": 0.1, "shuffle": True,
                     "name": size, "seed": None, "note": None},
        "data": {"train": ("a.txt",), "weights": (1.0,), "sizes": None, "prompts": ()},
        "evaluation": None,
    })
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(CONFIG_FILE)
    return "tiny.py"


def define_flags(values):
    flags.DEFINE_string("workdir", "runs/x", "where outputs go", flag_values=values)
    flags.DEFINE_integer("workers", 1, "how many", flag_values=values)


def run(*arguments, main=lambda config, flags: print(config, flags.workdir)):
    return run_script(main, lambda _: Config, define_flags, ["train.py", *arguments])


def test_main_gets_the_config_and_the_flags(config_file):
    seen = []
    code = run(
        "--config=tiny.py:big",
        "--config.training.steps=3",
        "--workdir=w",
        "--config.training.steps=4",
        main=lambda config, flags: seen.append((config.training, flags.workdir)),
    )
    assert code == 0
    assert seen == [(Training(4, 2, 0.1, True, "big", None, None), "w")]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.training.step=3", "config.training.step: unknown key, did you mean 'steps'?"),
        ("--config.config.training.steps=3", "config.config: unknown key, leave out 'config.'"),
        ("--config.trainin.steps=3", "config.trainin: unknown key, did you mean 'training'?"),
        ("--config.data.train.x=3", "config.data.train.x: unknown key, config.data.train is a tuple of str"),
        ("--config.training.steps=1.5", "config.training.steps: must be an int, got 1.5"),
        ("--config.training.steps=1e999", "config.training.steps: must be an int, got inf"),
        ("--config.training.steps=", "config.training.steps: must be an int, got ''"),
        ("--config.training.steps=true", "config.training.steps: must be an int, got 'true'"),
        ("--config.training.shuffle=2", "config.training.shuffle: must be true or false, got '2'"),
        (
            "--config.training.learning_rate=nan",
            "config.training.learning_rate: must be a finite float, got nan",
        ),
        ("--config.data.train=(1,2)", "config.data.train[0]: must be a string, got 1"),
        ("--config.data.sizes=1,x", "config.data.sizes[1]: must be an int, got 'x'"),
        ("--config.training.steps=many", "config.training.steps: must be an int, got 'many'"),
        ("--config.training.steps=none", "config.training.steps: must be an int, got 'none'"),
        ("--config.data.weights=a", "config.data.weights[0]: must be a finite float, got 'a'"),
        ("--config.training=3", "config.training: must be a section of fields, got '3'"),
        ("--config.training.name", "config.training.name: write --config.training.name=VALUE"),
        ("config.lr=3", "stray argument 'config.lr=3', did you mean --config.lr=3?"),
        ("steps", "stray argument 'steps'"),
        ("--wrkdir=x", "--wrkdir: unknown flag, did you mean 'workdir'?"),
        ("--workers=x", "flag --workers=x: invalid literal for int() with base 10: 'x'"),
        ("--config=tny.py", "config file tny.py: no such Python file, did you mean 'tiny.py'?"),
        ("--config=tiny.py:huge", "tiny.py:6: ValueError: unknown size huge"),
    ],
)
def test_an_invalid_command_line_is_one_line_and_exit_code_78(config_file, capsys, argument, message):
    assert run("--config=tiny.py", argument) == 78
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == ""


def test_a_config_must_be_given(capsys):
    assert run("--workdir=x") == 78
    assert capsys.readouterr().err == "error: --config=FILE.py is missing\n"


NOT_A_SYNTAX = "def get_config(:\n"
NO_ATTRIBUTE = "import os\n\nos.nothing\n"
NO_FUNCTION = "x = 1\n"
NO_RETURN = "def get_config():\n    pass\n"
NO_DEFAULT = "def get_config(size):\n    pass\n"
CONFIG_ERROR = "from jaxllm.errors import ConfigError\n\ndef get_config():\n    raise ConfigError('no')\n"
MISSPELLED = CONFIG_FILE.replace('"steps"', '"stepz"')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NOT_A_SYNTAX, "bad.py:1: invalid syntax"),
        (NO_ATTRIBUTE, "bad.py:3: AttributeError: module 'os' has no attribute 'nothing'"),
        (NO_FUNCTION, "bad.py: AttributeError: module 'config_file' has no attribute 'get_config'"),
        (NO_RETURN, "bad.py: get_config() returned a NoneType, not a ConfigDict"),
        (NO_DEFAULT, "missing a required argument: 'size', give it as --config=FILE.py:ARG"),
        (CONFIG_ERROR, "bad.py:4: no"),
        (MISSPELLED, "config.training.stepz: unknown key, did you mean 'steps'?"),
    ],
)
def test_an_error_in_a_config_file_is_one_line_with_its_line_number(config_file, capsys, text, message):
    Path("bad.py").write_text(text)
    assert run("--config=bad.py") == 78
    error = capsys.readouterr().err
    assert error.endswith(f"{message}\n")
    assert error.count("\n") == 1


def test_an_argument_that_get_config_does_not_take_is_an_error(config_file, capsys):
    Path("plain.py").write_text(NO_RETURN)
    assert run("--config=plain.py:big") == 78
    assert "too many positional arguments, drop the text after the colon" in capsys.readouterr().err


def test_a_config_file_anywhere_can_import_from_the_repository(config_file, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    load_config(config_file)
    assert str(ROOT) in sys.path


def test_print_config_prints_the_resolved_config_and_does_not_run(config_file, capsys):
    assert run("--config=tiny.py", "--config.training.steps=77", "--print_config", main=None) == 0
    assert parse(Config, json.loads(capsys.readouterr().out)).training.steps == 77


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (NumericsError("loss is nan"), 70, "error: loss is nan\n"),
        (Stopped("saved step 3"), 75, "stopped: saved step 3\n"),
    ],
)
def test_a_run_error_is_its_line_and_its_exit_code(config_file, capsys, error, code, line):
    def main(config, flags):
        raise error

    assert run("--config=tiny.py", main=main) == code
    assert capsys.readouterr().err == line


def test_an_unexpected_exception_keeps_its_traceback(config_file):
    with pytest.raises(ZeroDivisionError):
        run("--config=tiny.py", main=lambda config, flags: 1 // 0)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/log"),
            "runs/x/log: No space left on device; free some and run the same command again",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (
            jax.errors.JaxRuntimeError("INTERNAL: a device has failed\n\nmore"),
            "INTERNAL: a device has failed",
        ),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
            "RESOURCE_EXHAUSTED: Out of memory; use less memory: a smaller batch, more "
            "training.num_microbatches or model.remat",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line(config_file, capsys, monkeypatch, error, line):
    def main(config, flags):
        raise error

    assert run("--config=tiny.py", main=main) == 1
    assert capsys.readouterr().err == f"error: {line} (JAXLLM_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("JAXLLM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run("--config=tiny.py", main=main)


def test_a_reader_that_has_read_enough_is_no_error(tmp_path):
    script = tmp_path / "script.py"
    loop = "while True: print('a line')"
    script.write_text(f"def main(*_):\n    {loop}\n{PIPED}")
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


PIPED = """
import sys
from jaxllm.config import run_script
sys.exit(run_script(main, None, lambda values: None))
"""

HELP_SCRIPT = """'Trains a thing.'
import sys
from absl import flags
from jaxllm.config import run_script

def define_flags(values):
    flags.DEFINE_string("workdir", None, "where outputs go", flag_values=values)

run_script(None, lambda _: 1 / 0, define_flags)
assert "jax" not in sys.modules
"""


def test_help_is_fast_and_imports_neither_jax_nor_the_config_class(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(HELP_SCRIPT)
    started = time.monotonic()
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 2
    assert "Trains a thing." in done.stdout
    assert "--workdir: where outputs go" in done.stdout


@pytest.mark.parametrize("hf_home", [None, "/elsewhere"])
def test_one_flag_names_the_folder_of_all_caches(monkeypatch, tmp_path, hf_home):
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # to be restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAXLLM_CACHE_DIR", "/of/the/environment")
    if hf_home is not None:
        monkeypatch.setenv("HF_HOME", hf_home)
    compiled = {}
    monkeypatch.setattr(jax.config, "update", compiled.__setitem__)
    found = []

    def main(config, flags):
        process.set_up_process()
        found.append(cache_folder())

    assert run_script(main, None, lambda values: None, ["script.py", f"--cache_dir={tmp_path}"]) == 0
    assert found == [tmp_path]
    assert compiled["jax_compilation_cache_dir"] == f"{tmp_path}/compiled"
    assert os.environ["JAXLLM_CACHE_DIR"] == str(tmp_path)  # of the stages of a pipeline too
    assert os.environ.get("HF_HUB_CACHE") == (None if hf_home else f"{tmp_path}/huggingface/hub")


# ---- suggestions in messages


def test_nearest_multiples_for_a_size_that_must_be_divisible():
    assert nearest_multiples(30, of=8) == (24, 32)
    assert nearest_multiples(32, of=8) == (32,)
    assert nearest_multiples(3, of=8) == (8,)
