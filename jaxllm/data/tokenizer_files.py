"""The files of a Hugging Face folder that say how its tokenizer is used: special tokens, chat templates, what
ends a completion. They lie beside a tokenizer.json, a sentencepiece model, or a vocab.json with merges.txt.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import DataError

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"  # of models with a processor
ADDED_FILE = "added_tokens.json"  # of folders older than added_tokens_decoder
GENERATION_FILE = "generation_config.json"
BESIDE = (CONFIG_FILE, TEMPLATE_FILE, TEMPLATE_JSON, ADDED_FILE, GENERATION_FILE)
_MORE_TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja

Files = Mapping[str, bytes]  # by name


def read_beside(folder: Path) -> dict[str, bytes]:
    """The files of BESIDE that a folder has, by name. Templates in a folder of their own become those of the
    config, which may name several."""
    files = {name: (folder / name).read_bytes() for name in BESIDE if (folder / name).is_file()}
    if more := sorted((folder / _MORE_TEMPLATES).glob("*.jinja")):
        templates = read_templates(files) | {each.stem: _text(each.name, each.read_bytes()) for each in more}
        named = [{"name": name, "template": template} for name, template in templates.items()]
        config = json_object(files, CONFIG_FILE) | {"chat_template": named}
        files[CONFIG_FILE] = json.dumps(config, ensure_ascii=False).encode()
        files.pop(TEMPLATE_FILE, None)
    return files


def json_object(files: Files, name: str) -> dict[str, Any]:
    """The JSON object in the file `name`; empty where there is no such file. Raises DataError."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise DataError(f"{name} beside it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{name} beside it is not a JSON object")
    return value


def read_templates(files: Files) -> dict[str, str]:
    """The chat templates by name; one without a name is "default". A file of its own precedes the config."""
    if TEMPLATE_FILE in files:
        return {"default": _text(TEMPLATE_FILE, files[TEMPLATE_FILE])}
    for name in (TEMPLATE_JSON, CONFIG_FILE):
        template = json_object(files, name).get("chat_template")
        if isinstance(template, str):
            return {"default": template}
        if isinstance(template, list):
            return {each["name"]: each["template"] for each in template}
        if isinstance(template, dict):
            return template
    return {}


def has_chat_template(folder: Path) -> bool:
    """Whether a folder has a chat template. Builds no tokenizer."""
    return bool(read_templates(read_beside(folder)))


def default_template(templates: Mapping[str, str]) -> str | None:
    """The template of conversations. Where one is named "tool_use", it is the one of those with tools, as in
    transformers."""
    default, tool_use = templates.get("default"), templates.get("tool_use")
    if default is None or tool_use is None:
        return default
    # Jinja drops one newline at the end of a template, and `trim_blocks` the one after each tag.
    parts = (part.removesuffix("\n") for part in (tool_use, default))
    return "{{% if tools %}}\n{}{{% else %}}\n{}{{% endif %}}".format(*parts)


def named_token(config: Mapping[str, Any], name: str) -> str | None:
    """The content of `eos_token`, say, in a tokenizer_config.json."""
    token = config.get(name)
    return token["content"] if isinstance(token, dict) else token


def added_tokens(files: Files) -> dict[int, dict[str, Any]]:
    """The tokens that the files add to a vocabulary, by id, as `tokenizers.AddedToken` takes them."""
    config = json_object(files, CONFIG_FILE)
    special = {named_token(config, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    old = {
        i: {"content": content, "special": content in special, "normalized": False}
        for content, i in json_object(files, ADDED_FILE).items()
    }
    return old | {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}


def generation_ids(files: Files, name: str) -> list[int]:
    """The ids of `eos_token_id`, say, in generation_config.json: none, one or several."""
    ids = json_object(files, GENERATION_FILE).get(name)
    ids = [ids] if isinstance(ids, int) else ids or []
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise DataError(f"{GENERATION_FILE}: {name}={ids!r} is not a token id or a list of them")
    return ids


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} beside it is not UTF-8 ({error})") from error
