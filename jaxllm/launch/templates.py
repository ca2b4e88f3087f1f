"""Files of `launch/`, with `{{NAME}}` or `{{NAME:DEFAULT}}` where a value belongs."""

import re
import shlex
from collections.abc import Mapping, Sequence

from jaxllm.errors import ConfigError
from jaxllm.launch.slurm import RELAUNCH

_PLACE = re.compile(r"\{\{(\w+)(?::([^}]*))?\}\}")


def fill(template: str, values: Mapping[str, str], command: Sequence[str]) -> str:
    """The template with its values, the command and the exit codes that relaunch it (`{{relaunch}}`).

    Raises ConfigError where a value is missing, or has no place.
    """
    own = {"command": shlex.join(command), "relaunch": ", ".join(map(str, RELAUNCH))}
    places = {name: default for name, default in _PLACE.findall(template) if name not in own}
    known = {name: default for name, default in places.items() if default} | dict(values)
    if unused := [name for name in values if name not in places]:
        raise ConfigError(f"--set={unused[0]}=: no such place; the file has {', '.join(places)}")
    if missing := [name for name in places if name not in known]:
        raise ConfigError(" ".join(f"--set={name}=..." for name in missing) + " missing")
    return _PLACE.sub(lambda match: (known | own)[match[1]], template)
