"""Loads a reward function by its name, or from a file of the user."""

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxllm.config import did_you_mean
from jaxllm.errors import ConfigError

Reward = Callable[[Mapping[str, Any], str], float | None]


def reward_names() -> list[str]:
    """The rewards of this package: the modules that define a function of their own name of an example."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if re.search(rf"\ndef {file.stem}\(\s*example\b", file.read_text())]


def load_reward(name: str) -> Reward:
    """The function of a name such as `math_answer` (of this package), `package.module.function` or
    `path/to/file.py:function`. Raises ConfigError where it cannot be loaded or called."""
    if name.endswith(".py") or ".py:" in name:
        path, _, function = name.rpartition(":")
        if not path:
            raise ConfigError(f"reward {name!r}: give the name of the function too, as {name}:FUNCTION")
        reward = _attribute(_module_of_file(path), function, path)
    elif "." in name:
        module, _, function = name.rpartition(".")
        reward = _attribute(_import(module, name), function, module)
    else:
        names = reward_names()
        if name not in names:
            raise ConfigError(
                f"reward {name!r}: unknown{did_you_mean(name, names)} "
                f"(choose one of {', '.join(names)}, package.module.function or file.py:function)"
            )
        reward = getattr(_import(f"jaxllm.rewards.{name}", name), name)
    _check_signature(reward, name)
    return reward


def _module_of_file(name: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        beside = [each.name for each in path.parent.glob("*.py")]
        raise ConfigError(f"reward file {name}: no such file{did_you_mean(path.name, beside)}")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None  # a .py file always has one
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module of their class there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{error_place(error, path)}: {error_line(error)}") from error
    return module


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"reward {name!r}: {error_place(error)}: {error_line(error)}") from error


def _attribute(module: ModuleType, function: str, where: str) -> Reward:
    known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    if not callable(getattr(module, function, None)):
        raise ConfigError(
            f"reward file {where}: no function {function!r}{did_you_mean(function, known)} (it has "
            f"{', '.join(known) or 'none'})"
        )
    return getattr(module, function)


def _check_signature(reward: Reward, name: str) -> None:
    try:
        inspect.signature(reward).bind({}, "")
    except TypeError as error:
        raise ConfigError(f"reward {name!r}: must take (example, completion): {error}") from None
    except ValueError:  # a C function without a signature
        pass


def error_line(error: BaseException) -> str:
    """`KeyError: 'answer'` on one line; works for exceptions whose text cannot be formatted too."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg}"
    return " ".join(traceback.format_exception_only(error)[-1].split())[:300]


def error_place(error: BaseException, path: Path | None = None) -> str:
    """`file:line` where the exception was raised: the deepest line in `path`, or in any file."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if path is None or frame.filename == str(path)] or frames
    return f"{frames[-1].filename}:{frames[-1].lineno}"
