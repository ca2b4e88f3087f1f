"""From a config file and a command line to a frozen dataclass, or to an error of one line.

`get_config()` in a config file returns a ConfigDict; `--config.a.b=v` overrides a field of it; `parse` then
builds the dataclass that the rest of the code uses. Nothing here imports jax: `--help` stays quick, and a
misspelled key is found before any device is touched.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NewType, TypeVar, Union, cast

from jaxllm.config_versions import current_name, replacement
from jaxllm.errors import ConfigError, RunError, Stopped
from jaxllm.files import CACHE_VARIABLE, is_full_disk, is_url, use_cache_folder

if TYPE_CHECKING:
    from absl.flags import FlagValues
    from ml_collections import ConfigDict

# Flags with a path that cannot be on an object store. Those of runs and checkpoints can.
LOCAL_FLAGS = {"cache_dir", "output", "preferences", "token_file"}
Text = NewType("Text", str)  # declares prose: on the command line a comma in it separates nothing
Config = TypeVar("Config")
Values = Union[Mapping[str, Any], "ConfigDict"]


def check_local(path: str | None, name: str) -> None:
    """ConfigError where a path, `name` to the user, is on an object store."""
    if path is not None and is_url(path):
        raise ConfigError(f"{name}={path} must be a local path, not one on an object store")


def check_output(path: str | None, name: str) -> None:
    """ConfigError where no file can be written at a path, `name` to the user: before hours of work."""
    if path is None:
        return
    file = Path(path).expanduser().absolute()
    if file.is_dir():
        raise ConfigError(f"{name}={path} is a folder: name a file in it")
    if not file.parent.is_dir():
        raise ConfigError(f"{name}={path}: there is no such folder")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{name}={path} cannot be written: permission denied")


def parse(config_class: type[Config], values: "Values", path: str = "config") -> Config:
    """`values`, a ConfigDict or what JSON gave, as an instance of the dataclass `config_class`.

    Every field must be there, no other beside them, each of its declared type: int, float, bool, str,
    `tuple[X, ...]` (where X may be Text), a dataclass, or one of these `| None`. A float takes an int and a
    tuple takes a list.
    """
    kinds = typing.get_type_hints(config_class)
    for name in [*values, *kinds]:
        _check_key(name, values, kinds, path)
    given: Any = values
    return config_class(**{name: _parse_value(kinds[name], given[name], f"{path}.{name}") for name in kinds})


def _check_key(name: str, values: "Values", kinds: Mapping[str, Any], path: str) -> None:
    if name not in kinds:
        field = f"{path}.{name}".removeprefix("config.")
        new_name, instead = current_name(field), replacement(field)
        hint = f", it is now called {new_name}" if new_name is not None else did_you_mean(name, kinds)
        hint = f", use {instead}" if instead is not None else hint
        hint = ", leave out 'config.'" if name == "config" else hint
        raise ConfigError(f"{path}.{name}: unknown key{hint}")
    if name not in values:
        raise ConfigError(f"{path}.{name}: missing key")


def _parse_value(kind: Any, value: Any, path: str) -> Any:
    inner = _without_none(kind)
    if value is None:
        if inner is not kind:
            return None
    elif isinstance(inner, type) and dataclasses.is_dataclass(inner) and hasattr(value, "keys"):
        return parse(inner, value, path)
    if typing.get_origin(inner) is tuple and isinstance(value, tuple | list):
        item = _item(inner)
        return tuple(_parse_value(item, each, f"{path}[{i}]") for i, each in enumerate(value))
    if inner is float and isinstance(value, int | float) and type(value) is not bool and math.isfinite(value):
        return float(value)
    if inner in (int, bool, str) and type(value) is inner:  # type(), because a bool is an int to isinstance
        return value
    raise ConfigError(f"{path}: must be {_describe(kind)}, got {value!r}")


def _without_none(kind: Any) -> Any:
    """`X` for the annotation `X | None`; any other annotation as it is."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    return kind


def _item(kind: Any) -> Any:
    """`X` for the annotation `tuple[X, ...]`; str for Text."""
    (item, _) = typing.get_args(kind)
    return getattr(item, "__supertype__", item)


def _describe(kind: Any) -> str:
    inner = _without_none(kind)
    if dataclasses.is_dataclass(inner):
        name = "a section of fields"
    elif typing.get_origin(inner) is tuple:
        name = f"a tuple of {_item(inner).__name__}"
    else:
        name = {int: "an int", float: "a finite float", bool: "true or false", str: "a string"}[inner]
    return name if inner is kind else f"{name} or none"


def as_dict(config: Any) -> dict[str, Any]:
    """The dataclass as JSON gives it back: nested dicts, with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


class Difference(NamedTuple):
    path: str  # dotted
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path} {json.dumps(self.before)} -> {json.dumps(self.after)}"

    def is_in(self, names: Iterable[str]) -> bool:
        """Whether it is in one of these fields or sections of fields."""
        return any(f"{self.path}.".startswith(f"{name}.") for name in names)


def differences(before: Any, after: Any, path: str = "") -> list[Difference]:
    """Where two results of `as_dict` differ; a field that one of them lacks counts as None there."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [Difference(path, before, after)]
    found = []
    for name in before | after:
        dotted = f"{path}.{name}" if path else name
        found += differences(before.get(name), after.get(name), dotted)
    return found


def first_few(found: Sequence[object]) -> str:
    """The first five as text, and how many more there are."""
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return "; ".join(map(str, found[:5])) + more


# What the messages offer


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`, did you mean 'steps'?`, or nothing where no name is near."""
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""


def check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    """ConfigError for a value that is none of the choices."""
    if value not in choices:
        near = did_you_mean(value, choices)
        raise ConfigError(f"{field}={value!r}: choose one of {', '.join(choices)}{near}")


def nearest_multiples(value: int, of: int) -> tuple[int, ...]:
    """The multiples of `of` next to `value`, below and above: 24 and 32 for 30 and 8."""
    below = value // of * of
    return (below,) if below == value else tuple(n for n in (below, below + of) if n > 0)


# The command line

_CACHE_DIR_HELP = (
    "folder for what is kept between runs: tokenized data, log-probs of a reference, compiled programs, "
    "downloads; "
    f"default: ${CACHE_VARIABLE}, or ~/.cache/jaxllm"
)


# XLA takes a step's temporaries from malloc every time: to fault them in as pages of 4 KiB costs a third of a
# step on a CPU. In huge pages (glibc 2.35 or newer, where the kernel gives them to those that ask) it costs a
# few percent. To keep them instead is as fast, but fragments the heap to several times the memory.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def restart_with_huge_pages() -> None:
    """Start this script again with HUGE_PAGES, which malloc reads when a process starts, unless variables of
    the environment set up malloc already. Processes that it starts inherit them."""
    if sys.platform == "linux" and not any(name.startswith(("GLIBC_", "MALLOC_")) for name in os.environ):
        os.execve(sys.executable, sys.orig_argv, os.environ | HUGE_PAGES)


def run_script(
    main: Callable[[Any, "FlagValues"], int | None],
    config_class: Callable[["ConfigDict"], type] | None,
    define_flags: Callable[["FlagValues"], None],
    argv: list[str] | None = None,
) -> int:
    """Read the command line, call `main(config, flags)` and return the exit code of the process.

    `config_class` returns the dataclass; it is called late, so that `--help` imports little. A script with
    `config_class=None` takes flags only, and gets None for its config. A RunError becomes its one line on
    stderr and its exit code; so does what the machine refuses, a file or memory of a device, whose traceback
    JAXLLM_TRACEBACK=1 shows. Any other exception is a bug and keeps its traceback.
    """
    from absl import flags

    own_process, argv = argv is None, sys.argv if argv is None else argv
    script_flags = flags.FlagValues()
    if config_class is not None:
        flags.DEFINE_string("config", None, "config file, FILE.py or FILE.py:ARG", flag_values=script_flags)
        flags.DEFINE_bool("print_config", False, "print the resolved config, exit", flag_values=script_flags)
    flags.DEFINE_string("cache_dir", None, _CACHE_DIR_HELP, flag_values=script_flags)
    define_flags(script_flags)
    if {"-h", "--help"} & set(argv):
        print(_help(script_flags))
        return 0
    if own_process:
        restart_with_huge_pages()
    try:
        config = _read_command_line(argv, script_flags, config_class)
        if config_class is not None and script_flags.print_config:
            print(json.dumps(as_dict(config), indent=2))
            return 0
        for name in LOCAL_FLAGS & set(script_flags):
            check_local(script_flags[name].value, f"--{name}")
        if script_flags.cache_dir is not None:
            use_cache_folder(script_flags.cache_dir)
        return main(config, script_flags) or 0
    except RunError as error:
        print(f"{'stopped' if isinstance(error, Stopped) else 'error'}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at exit
        return RunError.exit_code
    except (OSError, *_jax_errors()) as error:
        if "JAXLLM_TRACEBACK" in os.environ:
            raise
        print(f"error: {_refusal(error)} (JAXLLM_TRACEBACK=1 shows where)", file=sys.stderr)
        return RunError.exit_code
    except KeyboardInterrupt:  # before or after the part of a run that saves what it has
        print("stopped: interrupted", file=sys.stderr)
        return RunError.exit_code


def _jax_errors() -> tuple[type[Exception], ...]:
    """Those of the compiler and the devices, if jax has been imported."""
    return (sys.modules["jax"].errors.JaxRuntimeError,) if "jax" in sys.modules else ()


def _refusal(error: Exception) -> str:
    """What the operating system or a device refused, in one line, with what to do where that is known."""
    if isinstance(error, OSError) and error.strerror:
        line = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return f"{line}; free some and run the same command again" if is_full_disk(error) else line
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    if "RESOURCE_EXHAUSTED" in line:
        line += "; use less memory: a smaller batch, more training.num_microbatches or model.remat"
    return line


def _help(script_flags: "FlagValues") -> str:
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Flags:"]
    for name in sorted(set(script_flags) - {"flagfile", "undefok"}):  # those two are absl's own
        flag = script_flags[name]
        default = "" if flag.default is None else f" (default: {flag.default_as_str})"
        lines.append(f"  --{name}: {flag.help}{default}")
    if "config" in script_flags:
        lines.append("  --config.SECTION.FIELD=VALUE: override a field of the config")
    return "\n".join(lines)


def _read_command_line(
    argv: list[str], script_flags: "FlagValues", config_class: Callable[["ConfigDict"], type] | None
) -> Any:
    from absl import flags

    try:
        _, *arguments = script_flags(argv, known_only=True)
    except flags.Error as error:
        raise ConfigError(" ".join(str(error).split())) from None
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if not argument.startswith("-"):
            dashes = f", did you mean --{argument}?" if argument.startswith("config") else ""
            raise ConfigError(f"stray argument {argument!r}{dashes}")
        if config_class is None or not name.startswith("config."):
            raise ConfigError(f"--{name}: unknown flag{did_you_mean(name, script_flags)}")
    if config_class is None:
        return None
    if script_flags.config is None:
        raise ConfigError("--config=FILE.py is missing")
    config = load_config(script_flags.config)
    kind = config_class(config)
    for argument in arguments:
        field, equals, text = argument.lstrip("-").removeprefix("config.").partition("=")
        if not equals:
            raise ConfigError(f"config.{field}: write --config.{field}=VALUE")
        override(config, kind, field, text)
    return parse(kind, config)


def override(section: "ConfigDict", config_class: type, field: str, text: str, path: str = "config") -> None:
    """Set the dotted `field` to what `text` stands for in the type that the dataclass declares.

    The type decides, not what the text looks like: `1e3` is the int 1000, and in a tuple of strings `2024`
    is a string. `none` is None where that is allowed, and an empty tuple in a field that must be a tuple. Of
    a tuple, `a,b` is what `('a','b')` is, but a Text keeps its commas. What the config derives from the field
    by reference follows. (The flags that ml_collections can define go by the present value: they cannot set
    a field to None, nor give 0.5 to one that holds 1.)
    """
    name, _, rest = field.partition(".")
    kinds = typing.get_type_hints(config_class)
    _check_key(name, section, kinds, path)
    kind, path = kinds[name], f"{path}.{name}"
    if not rest:
        with section.ignore_type():
            section[name] = _parse_value(kind, _read_text(kind, text), path)
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        override(cast("ConfigDict", section[name]), kind, rest, text, path)
    else:
        raise ConfigError(f"{path}.{rest}: unknown key, {path} is {_describe(kind)}")


def with_fields(instance: Config, given: Iterable[str], path: str) -> Config:
    """A dataclass with fields replaced, each given as FIELD=VALUE and read as the command line reads it."""
    from ml_collections import ConfigDict

    values = ConfigDict(dataclasses.asdict(cast(Any, instance)))
    for each in given:
        field, equals, text = each.partition("=")
        if not equals:
            raise ConfigError(f"{path}={each} must be FIELD=VALUE")
        override(values, type(instance), field, text, path)
    return parse(type(instance), values, path)


def _read_text(kind: Any, text: str) -> Any:
    """What `text` stands for in this type; `_parse_value` names a text that stands for nothing in it."""
    from absl.flags import BooleanParser

    inner = _without_none(kind)
    if inner is not kind and text.lower() == "none":
        return None
    if typing.get_origin(inner) is tuple:
        return _read_items(typing.get_args(inner)[0], text)
    if inner not in (int, float, bool):
        return text
    try:
        return BooleanParser().parse(text) if inner is bool else inner(text)
    except ValueError:
        return _whole(text) if inner is int else text


def _whole(text: str) -> Any:
    """The int that `1e3` or `5.0` writes; a float if it is none; the text if it is no number."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def _read_items(item: Any, whole: str) -> Any:
    """The items of `a,b`, `'a','b'`, `(a, b)` or `['a', 'b']`: quotes protect commas."""
    text = whole.strip()
    if text.lower() in ("", "none"):
        return ()
    bracketed = text[0] + text[-1] in ("()", "[]")
    if item in (str, Text):
        try:
            value = ast.literal_eval(text if bracketed else f"({text},)")
        except (ValueError, SyntaxError):
            value = None
        if bracketed and value is not None:
            return value if isinstance(value, tuple | list) else (value,)
        if item is Text:
            return (whole,)
        if value and all(isinstance(each, str) for each in value):
            return value
    parts = [part.strip() for part in (text[1:-1] if bracketed else text).split(",")]
    return tuple(_read_text(item, part) for part in parts if part)


def as_flag(value: Any) -> str:
    """A value of a config as `--config.FIELD=` takes it."""
    if isinstance(value, list | tuple):
        return str(tuple(value))
    return "none" if value is None else str(value)


def load_config(file_and_argument: str) -> "ConfigDict":
    """What `get_config()` returns in the Python file FILE.py, or `get_config(ARG)` for FILE.py:ARG."""
    from ml_collections import ConfigDict

    config = use_config_file(file_and_argument, lambda module, given: _call(module.get_config, given))
    if not isinstance(config, ConfigDict):
        file = file_and_argument.partition(":")[0]
        raise ConfigError(f"{file}: get_config() returned a {type(config).__name__}, not a ConfigDict")
    return config


def use_config_file(file_and_argument: str, use: Callable[[types.ModuleType, list[str]], Any]) -> Any:
    """What `use(module, arguments)` returns for the Python file FILE.py: no argument, or the ARG of
    FILE.py:ARG. What goes wrong in the file becomes a ConfigError that names its line."""
    file, colon, argument = file_and_argument.partition(":")
    path = Path(file).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        beside = [each.name for each in path.parent.glob("*.py")]
        raise ConfigError(f"config file {file}: no such Python file{did_you_mean(path.name, beside)}")
    root = str(Path(__file__).parents[1])
    if root not in sys.path:
        sys.path.append(root)  # so that a config file anywhere can `from configs.base.models import ...`
    try:
        spec = importlib.util.spec_from_file_location("config_file", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return use(module, [argument] if colon else [])
    except Exception as error:
        raise ConfigError(_one_line(error, file, path)) from error


def _call(get_config: Callable[..., Any], arguments: list[str]) -> Any:
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        fix = "drop the text after the colon" if arguments else "give it as --config=FILE.py:ARG"
        raise ConfigError(f"get_config: {error}, {fix}") from None
    return get_config(*arguments)


def _one_line(error: Exception, file: str, path: Path) -> str:
    """`file:line: what`, the line being the deepest one inside the config file."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {error.msg}"
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    place = f"{file}:{lines[-1]}" if lines else file
    kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    return f"{place}: {kind}{' '.join(str(error).split())}"
