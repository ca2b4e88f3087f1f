"""The HTTP routes: the page, OpenAI's API under /v1, and the page's own API under /api."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from jaxllm.data.show import one_line
from jaxllm.rollout.sampling import SamplingConfig
from jaxllm.serve import openai_api, openai_responses
from jaxllm.serve.comparison_queue import ChoiceError, ComparisonQueue, Offer
from jaxllm.serve.errors import ApiError, AsciiJSONResponse
from jaxllm.serve.guard import COOKIE, Guard, cookie_of, same
from jaxllm.serve.openai_api import CompletionRequest
from jaxllm.serve.pair_generator import PairGenerator
from jaxllm.serve.preferences import CHOICES
from jaxllm.serve.raters import near_names, normalized
from jaxllm.serve.served_model import ServedModel

T = TypeVar("T")

MAX_BODY = 1 << 20  # bytes
MAX_LOGIN_BODY = 1 << 12  # the one body that is read from clients without the token
BODY_SECONDS = 20.0  # less than connections.REQUEST_SECONDS, which closes the connection without a word
MAX_NAME_LENGTH = 40  # characters of a rater's name
PAGE = Path(__file__).parent / "page"
MEDIA_TYPES = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}


def build_app(
    models: Mapping[str, ServedModel],
    queue: ComparisonQueue,
    sampling: SamplingConfig,
    *,
    seed: int,
    allowed_hosts: Collection[str],
    token: str | None,
) -> ASGIApp:
    """The whole server. The first of `models` is the default. Pairs are sampled by `sampling` and `seed`; a
    chat request may set its own."""
    handlers = Handlers(models, queue, sampling, seed, token)
    routes = [
        *(page_route("/" if name == "index.html" else f"/{name}", PAGE / name) for name in MEDIA_TYPES),
        Route("/v1/models", handlers.models),
        Route("/v1/models/{name:path}", handlers.model),  # names may contain slashes
        Route("/v1/chat/completions", handlers.chat, methods=["POST"]),
        Route("/v1/completions", handlers.text, methods=["POST"]),
        Route("/api/login", handlers.login, methods=["POST"]),
        Route("/api/state", handlers.state),
        Route("/api/next", handlers.next, methods=["POST"]),
        Route("/api/choice", handlers.choice, methods=["POST"]),
        Route("/api/undo", handlers.undo, methods=["POST"]),
    ]
    handled = (ApiError, ClientDisconnect, OSError, 404, 405, Exception)
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(handled, error_response))
    return Guard(app, allowed_hosts, token)  # outermost, so that errors have the security headers too


def error_response(request: Request, error: Exception) -> Response:
    """The response to a request whose handler raised an error."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, HTTPException):
        what = "does not exist" if error.status_code == 404 else f"does not allow {request.method}"
        error = ApiError(error.status_code, f"{request.url.path} {what}")
    elif isinstance(error, OSError):
        error = ApiError(500, f"the choice could not be saved: {error}")
    elif not isinstance(error, ApiError):
        error = ApiError(500, "internal error; the server's terminal shows the traceback")
    return error.response()


def page_route(path: str, file: Path) -> Route:
    """Serves a file of the page from memory."""
    content, media_type = file.read_bytes(), MEDIA_TYPES[file.name]
    return Route(path, lambda _: Response(content, media_type=f"{media_type}; charset=utf-8"))


class Handlers:
    """The request handlers."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        queue: ComparisonQueue,
        sampling: SamplingConfig,
        seed: int,
        token: str | None,
    ):
        self.served, self.queue, self.sampling, self.token = models, queue, sampling, token
        self.pairs = PairGenerator(queue, list(models.values()), sampling, seed)

    async def models(self, _: Request) -> Response:
        """OpenAI's list of models, with the path of each checkpoint added."""
        return AsciiJSONResponse({"object": "list", "data": list(map(described, self.served.values()))})

    async def model(self, request: Request) -> Response:
        return AsciiJSONResponse(described(openai_api.find_model(request.path_params["name"], self.served)))

    async def chat(self, request: Request) -> Response:
        return await self.complete(request, openai_api.read_chat)

    async def text(self, request: Request) -> Response:
        return await self.complete(request, openai_api.read_text)

    async def complete(self, request: Request, read: Callable[..., CompletionRequest]) -> Response:
        body = await read_json(request)
        # In a thread, because a Jinja template takes seconds to render a thousand messages.
        asked = await asyncio.to_thread(read, body, self.served, self.sampling)
        if asked.stream:
            return openai_responses.EventStream(asked)
        choices = await while_connected(request, openai_responses.complete(asked))
        return AsciiJSONResponse(await asyncio.to_thread(openai_responses.response, asked, choices))

    async def login(self, request: Request) -> Response:
        token = (await read_json(request, MAX_LOGIN_BODY)).get("token")
        if self.token is not None and not (isinstance(token, str) and same(token, self.token)):
            raise ApiError(401, "wrong token", "token", "token")
        response = AsciiJSONResponse({})
        if self.token is not None:
            response.set_cookie(COOKIE, cookie_of(self.token), httponly=True, samesite="strict")
        return response

    async def state(self, request: Request) -> Response:
        """The progress; and for a name without choices, the known names that it may be a misspelling of."""
        rater = normalized(request.query_params.get("rater", ""))
        progress = await asyncio.to_thread(self.queue.progress, rater)
        near = near_names(rater, await asyncio.to_thread(lambda: self.queue.raters))
        return AsciiJSONResponse({"progress": progress, "near": near})

    async def next(self, request: Request) -> Response:
        """The rater's next comparison; of answers to the body's `prompt`, if there is one."""
        body = await read_json(request)
        rater, prompt = read_rater(body), body.get("prompt")
        if prompt is None:
            return await self.offered(rater, await self.pairs.next(rater))
        if not isinstance(prompt, str) or not prompt.strip():
            raise ApiError(400, "prompt must be a string with text", "prompt")
        work = self.pairs.compare(rater, [{"role": "user", "content": prompt.strip()}])
        offer = await while_connected(request, work)
        if offer is None:
            raise ApiError(
                422, "no two different answers to this prompt were generated; try another prompt", "prompt"
            )
        return await self.offered(rater, offer)

    async def choice(self, request: Request) -> Response:
        body = await read_json(request)
        rater, choice, id = read_rater(body), body.get("choice"), body.get("id")
        if isinstance(choice, bool | float) or choice not in CHOICES:
            raise ApiError(400, f"choice is {choice!r}; it must be 0, 1, tie or bad", "choice")
        if not isinstance(id, str):
            raise ApiError(400, "id must be the id of the comparison", "id")
        try:
            await asyncio.to_thread(self.queue.choose, id, rater, choice)
        except ChoiceError as error:
            raise ApiError(409, str(error), "id") from None
        return AsciiJSONResponse({"progress": await asyncio.to_thread(self.queue.progress, rater)})

    async def undo(self, request: Request) -> Response:
        rater = read_rater(await read_json(request))
        try:
            offer = await asyncio.to_thread(self.queue.undo, rater)
        except ChoiceError as error:
            raise ApiError(409, str(error), "rater") from None
        return await self.offered(rater, offer)

    async def offered(self, rater: str, offer: Offer | None) -> Response:
        """The comparison as the rater sees it, without the checkpoints, so that the choice is blind."""
        shown = None
        if offer is not None:
            shown = {"id": offer.id, "prompt": offer.comparison.prompt, "answers": offer.answers}
        progress = await asyncio.to_thread(self.queue.progress, rater)
        return AsciiJSONResponse({"offer": shown, "progress": progress})


def described(model: ServedModel) -> dict[str, Any]:
    """OpenAI's description of a model, with the path of its checkpoint."""
    fields = {"object": "model", "created": 0, "owned_by": "jaxllm"}
    return {"id": model.name, **fields, "path": model.checkpoint["path"]}


async def read_json(request: Request, limit: int = MAX_BODY) -> dict[str, Any]:
    """The JSON object in the request's body, of at most `limit` bytes, which must arrive in BODY_SECONDS."""
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > limit:
                    raise ApiError(413, f"the request's body is larger than {limit} bytes")
    except TimeoutError:
        raise ApiError(408, f"the request's body did not arrive within {BODY_SECONDS:g} seconds") from None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request's body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the request's body must be a JSON object")
    return value


def read_rater(body: Mapping[str, Any]) -> str:
    """The rater's normalized name."""
    rater = body.get("rater")
    name = normalized(rater) if isinstance(rater, str) and one_line(rater) == rater else ""
    if not 0 < len(name) <= MAX_NAME_LENGTH:
        raise ApiError(400, f"rater must be a name of 1 to {MAX_NAME_LENGTH} characters on one line", "rater")
    return name


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=0.5))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
