"""The server: checks the options, loads the checkpoints, and runs until it is interrupted."""

import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxllm.errors import ConfigError, RunError

try:
    import uvicorn
    from starlette.types import ASGIApp
except ImportError as error:
    raise ConfigError("the server needs an extra: pip install 'jaxllm[serve]'") from error

from jaxllm.data.records import check_rename
from jaxllm.evaluation.completions import read_messages
from jaxllm.rollout.engine import IDLE, Engine
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.runs.checkpoints import (
    OnMesh,
    check_generates,
    checkpoint_template,
    inference_dtype,
    load_folder,
    loaded_config,
    local_mesh,
    read_kind,
)
from jaxllm.runs.process import set_up_process
from jaxllm.serve.app import build_app
from jaxllm.serve.comparison_queue import ComparisonQueue, Messages
from jaxllm.serve.connections import Protocol
from jaxllm.serve.memory import Plan, available_memory, fitting_plan, sizes_on
from jaxllm.serve.model_names import name_checkpoints
from jaxllm.serve.preferences import PreferenceFile
from jaxllm.serve.served_model import ServedModel
from jaxllm.training.step_folder import checkpoint_hash, find_checkpoint

MIN_TOKEN_LENGTH = 12  # characters
TOKEN_VARIABLE = "JAXLLM_TOKEN"
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServerOptions:
    """The flags of experiments/serve.py, except those for sampling."""

    checkpoint: Sequence[str]  # each PATH or NAME=PATH; the first is the default model
    host: str
    port: int  # 0: any free port
    token: str | None
    allowed_hosts: Sequence[str]  # besides this machine's names
    preferences: str  # the file of choices
    prompts: str | None  # source of the prompts to compare answers to
    max_prompts: int
    rename: Sequence[str]
    prompt_format: str | None
    system: str | None
    raters_per_pair: int
    rows: int  # completions that each model decodes at a time
    max_length: int | None  # tokens of a prompt and its completion; None: as many as fit the memory
    dtype: str | None  # of parameters and computation; None: see `inference_dtype`
    template_options: Sequence[str]  # NAME=VALUE for the chat templates, where a request gives no others
    seed: int

    def check(self, sampling: SamplingConfig) -> None:
        """ConfigError where the options cannot work, before anything is loaded."""
        if not 0 <= self.port < 2**16:  # getaddrinfo would take the remainder
            raise ConfigError(f"--port={self.port} must be from 0 to 65535")
        if not self.checkpoint:
            raise ConfigError("--checkpoint=RUN_FOLDER is missing")
        if self.host not in LOCAL_HOSTS and self.token is None:
            raise ConfigError(
                f"--host={self.host} opens the server to other machines and requires a token; put one, such "
                f"as {secrets.token_urlsafe(16)}, into a file for --token_file=FILE or into {TOKEN_VARIABLE}"
            )
        if self.token is not None and len(self.token) < MIN_TOKEN_LENGTH:
            raise ConfigError(f"the token has {len(self.token)} characters; use at least {MIN_TOKEN_LENGTH}")
        for name in ("max_prompts", "raters_per_pair", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}={getattr(self, name)} must be at least 1")
        if len(self.checkpoint) == 1 and self.prompts is not None and sampling.greedy:
            raise ConfigError(
                f"--temperature={sampling.temperature:g} generates the same answer twice; raise it or serve "
                f"two checkpoints"
            )
        check_rename(self.rename, "--rename")


def read_token(token: str | None, file: str | None) -> str | None:
    """The token of --token, the file of --token_file, or the environment; None where none of them is set.

    Raises ConfigError where both flags are given or the file cannot be read or is empty.
    """
    if token is not None and file is not None:
        raise ConfigError("--token and --token_file are both given; remove one of them")
    if file is None:
        return token or os.environ.get(TOKEN_VARIABLE) or None
    try:
        content = Path(file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token_file={file}: {getattr(error, 'strerror', error)}") from None
    if not content:
        raise ConfigError(f"--token_file={file} is empty; write the token into it")
    return content


def serve(options: ServerOptions, sampling: SamplingConfig) -> None:
    """Serves until Ctrl-C or SIGTERM. `sampling` is the default of requests and applies to comparisons."""
    options.check(sampling)
    paths = name_checkpoints(options.checkpoint)
    set_up_process()
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(bind(options.host, options.port))
        file = stack.enter_context(contextlib.closing(PreferenceFile(Path(options.preferences).expanduser())))
        if file.cut_off:
            print(f"removed an incomplete last line: {file.cut_off[:60]!r}...", file=sys.stderr)
        queue = ComparisonQueue(file, read_prompts(options), options.raters_per_pair)
        folders = {name: find_checkpoint(path) for name, path in paths.items()}  # all, before any is loaded
        dtype = inference_dtype(options.dtype)
        planned = plan_memory(folders, options.rows, options.max_length, dtype)
        models = {}
        for name, folder in folders.items():
            models[name] = load_model(
                name,
                folder,
                options.rows,
                planned.max_length,
                options.template_options,
                mesh=local_mesh,
                dtype=dtype,
            )
            stack.callback(models[name].engine.close)
            warm_up(models[name])
        bound.listen()  # connections are accepted from here on
        hosts = {*LOCAL_HOSTS, *options.allowed_hosts, options.host, socket.gethostname()}
        app = build_app(models, queue, sampling, seed=options.seed, allowed_hosts=hosts, token=options.token)
        print_startup(bound, models, queue)
        run_server(app, bound, models)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, so that a bad one fails before minutes of loading."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--host={host} --port={port}: {error}; use another address (--port=0 takes any free port)"
        ) from None
    return bound


def read_prompts(options: ServerOptions) -> list[Messages]:
    """The messages of each prompt of --prompts; unusable rows are named on stderr."""
    if options.prompts is None:
        return []
    return read_messages(
        options.prompts,
        options,
        lambda _, messages: messages,
        split="train",
        max_rows=options.max_prompts,
        seed=options.seed,
    )


def plan_memory(folders: Mapping[str, Path], rows: int, max_length: int | None, dtype: str | None) -> Plan:
    """The memory of each device that serving these step folders takes, which is printed. ConfigError where
    there is less."""
    models = {}
    for name, folder in folders.items():
        check_generates(read_kind(folder), f"--checkpoint={name}")
        models[name] = sizes_on(local_mesh, loaded_config(folder, dtype))
    planned = fitting_plan(models, rows, max_length, available_memory())
    print(f"memory for {rows} rows of up to {planned.max_length} tokens: {planned}", flush=True)
    for name, sizes in models.items():
        if max_length is None and planned.max_length < sizes.config.max_length:
            print(
                f"note: {name} supports {sizes.config.max_length} tokens, for which the memory is too small; "
                "lower --rows for longer requests",
                file=sys.stderr,
            )
    return planned


def load_model(
    name: str,
    folder: Path,
    rows: int,
    max_length: int | None = None,
    template_options: Sequence[str] = (),
    *,
    mesh: OnMesh = None,
    dtype: str | None = None,
) -> ServedModel:
    """A checkpoint with its engine running; the caller closes the engine."""
    loaded = check_generates(load_folder(folder, mesh, dtype=dtype), f"--checkpoint={name}")
    if not loaded.conversational:
        print(f"note: {name} was only pretrained and not trained on conversations", file=sys.stderr)
    template = checkpoint_template(loaded, template_options)
    engine = Engine(
        loaded.model,
        loaded.params,
        stop_ids=template.stop_ids,
        rows=rows,
        max_length=max_length,
        vocab_size=loaded.tokenizer.vocab_size,
    )
    return ServedModel(
        name,
        {"path": str(loaded.folder), "hash": checkpoint_hash(loaded.folder)},
        engine,
        template,
        loaded.tokenizer,
        engine.max_length,
    )


def warm_up(model: ServedModel) -> None:
    """Starts compiling what every completion needs, before the first request."""
    prompt = model.template.prompt([{"role": "user", "content": "?"}])
    model.engine.submit(prompt, sampling=IDLE, seed=0, on_tokens=lambda *_: None)


def print_startup(bound: socket.socket, models: Mapping[str, ServedModel], queue: ComparisonQueue) -> None:
    """The address, the models and the file of choices."""
    host, port = bound.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"serving the page at {address} and OpenAI's API at {address}/v1 (Ctrl-C stops the server)")
    for name, model in models.items():
        print(f"model {name}: {model.checkpoint['path']} (hash {model.checkpoint['hash'][:12]})")
    print(f"choices: {queue.file.path} ({len(queue.file.rows)} rows, {len(queue.prompts)} prompts left)")
    sys.stdout.flush()


def make_server(app: ASGIApp, engines: Collection[Engine] = ()) -> uvicorn.Server:
    """Stops where an engine has ended by itself. Completions in progress have three seconds to finish."""

    async def check_engines() -> None:
        if any(engine.error for engine in engines):
            server.should_exit = True

    config = uvicorn.Config(
        app,
        http=Protocol,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=3,
        callback_notify=check_engines,
        timeout_notify=1,
    )
    server = uvicorn.Server(config)
    return server


def run_server(app: ASGIApp, bound: socket.socket, models: Mapping[str, ServedModel]) -> None:
    """Runs until Ctrl-C or SIGTERM. RunError where an engine ended by itself: a supervisor must see that this
    process can serve no longer."""
    engines = {name: model.engine for name, model in models.items()}
    # uvicorn raises the signal again when it has stopped. SIGINT is ignored in a background job.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        make_server(app, engines.values()).run(sockets=[bound])
    print("stopped", flush=True)
    for name, engine in engines.items():
        if engine.error:
            raise RunError(f"model {name} has stopped: {engine.error}; start the server again")
