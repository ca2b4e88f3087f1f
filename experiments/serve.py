"""Talk to checkpoints in the browser, choose between their answers, and call them as OpenAI's API is called.

python experiments/serve.py --checkpoint=runs/chat
python experiments/serve.py --checkpoint=runs/chat,runs/dpo --prompts=questions.jsonl --raters_per_pair=2
python experiments/train.py --config=configs/reward_model_pairs.py:1m --workdir=runs/reward \
    --init_from=runs/chat --config.data.train=preferences.jsonl

Choices are added to preferences.jsonl, which reward models and DPO train on as it is. Others on the network
get in with --host=0.0.0.0 --token=A_LONG_SECRET; what they send is not encrypted, so for strangers put a
proxy with TLS before it. Ctrl-C ends it.
"""

import contextlib
import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without being installed

from jaxllm.command_line import define_sampling_flags, read_sampling
from jaxllm.config import run_script
from jaxllm.errors import ConfigError

if TYPE_CHECKING:
    from absl.flags import FlagValues

SHORTEST_TOKEN = 12  # characters
LOCAL = ("127.0.0.1", "::1", "localhost")


def define_flags(flag_values: "FlagValues") -> None:
    """This script's flags."""
    from absl import flags

    where = {"flag_values": flag_values}
    flags.DEFINE_list(
        "checkpoint", [], "run folders, RUN/best or step folders, the first is asked first", **where
    )
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on; any but this one needs --token", **where)
    flags.DEFINE_integer("port", 8000, "port to listen on; 0 takes a free one", **where)
    flags.DEFINE_string("token", None, "secret that a client must have", **where)
    flags.DEFINE_list(
        "names", [], "other names by which clients call this machine, as behind a proxy", **where
    )
    flags.DEFINE_string("preferences", "preferences.jsonl", "file that choices are added to", **where)
    flags.DEFINE_string(
        "prompts", None, "prompts to compare answers to: .jsonl, synthetic:preferences", **where
    )
    flags.DEFINE_integer("max_prompts", 1000, "of these, from the first", **where)
    flags.DEFINE_list("rename", [], "theirs=ours for columns of the prompts called otherwise", **where)
    flags.DEFINE_string("prompt_format", None, "a text with {column}s to fill in", **where)
    flags.DEFINE_string("system", None, "a system message before every one of these prompts", **where)
    flags.DEFINE_integer("raters_per_pair", 1, "people who are to judge every pair", **where)
    flags.DEFINE_integer("rows", 16, "answers written at a time by each checkpoint", **where)
    define_sampling_flags(flag_values)


def check_flags(flags: "FlagValues") -> None:
    """ConfigError for what cannot work, before anything is loaded."""
    from jaxllm.data.chat import check_rename

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError("the server needs an extra: pip install 'jaxllm[serve]'") from error
    if not 0 <= flags.port < 2**16:  # getaddrinfo would take the rest of a division
        raise ConfigError(f"--port={flags.port} must be from 0 to 65535")
    if not flags.checkpoint:
        raise ConfigError("--checkpoint=RUN_FOLDER is missing")
    if len(set(flags.checkpoint)) < len(flags.checkpoint):
        raise ConfigError("--checkpoint names one twice: with one alone, both answers are its own")
    if flags.host not in LOCAL and flags.token is None:
        raise ConfigError(
            f"--host={flags.host} lets others in, who must have a token: add --token=SECRET, such as "
            f"--token={secrets.token_urlsafe(16)}"
        )
    if flags.token is not None and len(flags.token) < SHORTEST_TOKEN:
        raise ConfigError(f"--token has {len(flags.token)} characters, give at least {SHORTEST_TOKEN}")
    for name in ("max_prompts", "raters_per_pair", "rows"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name}={getattr(flags, name)} must be at least 1")
    if len(flags.checkpoint) == 1 and flags.prompts is not None and flags.temperature == 0:
        raise ConfigError("--temperature=0 gives the same answer twice: raise it, or give two checkpoints")
    check_rename(flags.rename)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before minutes are spent on loading."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--host={host} --port={port}: {error}; choose another (0: any free port)"
        ) from None
    return bound


def load_speaker(name: str, folder: Path, rows: int) -> Any:
    """A checkpoint with its engine running, which is to be closed."""
    from jaxllm.evaluation.completions import check_speaks
    from jaxllm.runs.checkpoints import checkpoint_template, load_folder
    from jaxllm.serve.speaker import ServedModel
    from jaxllm.rollout.engine import Engine
    from jaxllm.training.checkpoint import checkpoint_hash

    loaded = check_speaks(load_folder(folder), f"--checkpoint={name}")
    if loaded.stage == "pretrain":
        print(f"note: {name} is only pretrained and has not learnt to answer", file=sys.stderr)
    template = checkpoint_template(loaded)
    return ServedModel(
        name,
        {"path": str(loaded.folder), "hash": checkpoint_hash(loaded.folder)},
        Engine(loaded.model, loaded.params, stop_ids=template.stop_ids, rows=rows),
        template,
        loaded.tokenizer,
        loaded.model.config.max_length,
    )


def warm_up(speaker: Any) -> None:
    """Compile what every answer needs while nobody waits for one yet."""
    from jaxllm.rollout.engine import IDLE

    prompt = speaker.template.prompt([{"role": "user", "content": "?"}])
    speaker.engine.submit(prompt, sampling=IDLE, seed=0, say=lambda *_: None)


def read_prompts(flags: "FlagValues") -> list[list[dict[str, str]]]:
    """The messages of each prompt of --prompts; rows without one are named on stderr."""
    from jaxllm.evaluation.completions import read_questions

    if flags.prompts is None:
        return []
    return read_questions(
        flags.prompts,
        flags,
        lambda _, messages: messages,
        split="train",
        max_rows=flags.max_prompts,
        seed=flags.seed,
    )


def main(_: None, flags: "FlagValues") -> None:
    """Load, listen, and answer until Ctrl-C."""
    check_flags(flags)
    sampling = read_sampling(flags)

    from jaxllm.runs.process import set_up_process
    from jaxllm.serve.app import build_app
    from jaxllm.serve.board import ComparisonQueue
    from jaxllm.serve.preferences import PreferenceFile
    from jaxllm.training.checkpoint import find_checkpoint

    set_up_process()
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(bind(flags.host, flags.port))
        file = PreferenceFile(Path(flags.preferences).expanduser())
        stack.callback(file.close)
        if file.cut_off:
            print(f"cut off a last line that was never finished: {file.cut_off[:60]!r}...", file=sys.stderr)
        board = ComparisonQueue(file, read_prompts(flags), flags.raters_per_pair)
        folders = {name: find_checkpoint(name) for name in flags.checkpoint}  # all, before any is loaded
        speakers = {}
        for name, folder in folders.items():
            speakers[name] = load_speaker(name, folder, flags.rows)
            stack.callback(speakers[name].engine.close)
            warm_up(speakers[name])
        bound.listen()  # from here on who calls is answered, if a little later
        names = {*LOCAL, *flags.names, flags.host, socket.gethostname()}
        app = build_app(speakers, board, sampling, seed=flags.seed, names=names, token=flags.token)
        host, port = bound.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"serving http://{address} and, as OpenAI's API, http://{address}/v1 (Ctrl-C ends)")
        for speaker in speakers.values():
            path, digest = speaker.checkpoint["path"], speaker.checkpoint["hash"]
            print(f"speaks: {speaker.name} ({path}, hash {digest[:12]})")
        print(f"choices: {file.path} ({len(file.rows)} are there, {len(board.prompts)} prompts to go)")
        sys.stdout.flush()
        run_server(app, bound)


def make_server(app: Any) -> Any:
    """When it is stopped, answers that are being written have three seconds."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=3,
    )
    return uvicorn.Server(config)


def run_server(app: Any, bound: socket.socket) -> None:
    """Until Ctrl-C or SIGTERM."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it again when it has ended
    with contextlib.suppress(KeyboardInterrupt):  # a background job has none: SIGINT is ignored there
        make_server(app).run(sockets=[bound])
    print("stopped")


if __name__ == "__main__":
    sys.exit(run_script(main, None, define_flags))
