"""The pages and calls of experiments/serve.py."""

import asyncio
import json
from collections.abc import Awaitable, Collection, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from jaxllm.serve import completions
from jaxllm.serve.board import ComparisonQueue, Offer, Refused
from jaxllm.serve.comparing import Comparing
from jaxllm.serve.errors import ApiError, AsciiJSONResponse
from jaxllm.serve.guard import COOKIE, Guard, cookie_of, same
from jaxllm.serve.preferences import CHOICES
from jaxllm.serve.speaker import ServedModel, together
from jaxllm.rollout.sampling import SamplingConfig

MAX_BODY = 1 << 20  # bytes
LONGEST_NAME = 40  # characters of a rater's
PAGE = Path(__file__).parents[1] / "page"
KINDS = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}


def build_app(
    speakers: Mapping[str, ServedModel],
    board: ComparisonQueue,
    sampling: SamplingConfig,
    *,
    seed: int,
    names: Collection[str],
    token: str | None,
) -> ASGIApp:
    """The whole server; the first speaker answers who names none."""
    calls = Calls(speakers, board, sampling, seed, token)
    routes = [
        *(page_route("/" if name == "index.html" else f"/{name}", PAGE / name) for name in KINDS),
        Route("/v1/models", calls.models),
        Route("/v1/chat/completions", calls.chat, methods=["POST"]),
        Route("/api/login", calls.login, methods=["POST"]),
        Route("/api/state", calls.state),
        Route("/api/next", calls.next, methods=["POST"]),
        Route("/api/choice", calls.choice, methods=["POST"]),
        Route("/api/undo", calls.undo, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            ApiError: lambda _, error: error.response(),
            ClientDisconnect: lambda _, error: Response(status_code=499),  # nobody reads it
            OSError: lambda _, error: ApiError(500, f"could not be saved: {error}").response(),
            404: lambda request, _: ApiError(404, f"there is no {request.url.path}").response(),
            405: lambda request, _: ApiError(405, f"not {request.method}: see the README").response(),
            Exception: lambda *_: ApiError(500, "a bug: see the server's terminal").response(),
        },
    )
    return Guard(app, names, token)  # around all of it: errors too have the headers


def page_route(path: str, file: Path) -> Route:
    content, kind = file.read_bytes(), KINDS[file.name]
    return Route(path, lambda _: Response(content, media_type=f"{kind}; charset=utf-8"))


class Calls:
    """What the routes lead to."""

    def __init__(
        self,
        speakers: Mapping[str, ServedModel],
        board: ComparisonQueue,
        sampling: SamplingConfig,
        seed: int,
        token: str | None,
    ):
        self.speakers, self.board, self.sampling, self.token = speakers, board, sampling, token
        self.comparing = Comparing(board, list(speakers.values()), sampling, seed)

    async def models(self, _: Request) -> Response:
        models = [
            {"id": name, "object": "model", "created": 0, "owned_by": "jaxllm"} for name in self.speakers
        ]
        return AsciiJSONResponse({"object": "list", "data": models})

    async def chat(self, request: Request) -> Response:
        body = await read_json(request)
        # In a thread: a Jinja template takes seconds to render a thousand messages.
        asked = await asyncio.to_thread(completions.read_request, body, self.speakers, self.sampling)
        speaker, prompt = asked.speaker, asked.prompt
        if asked.stream:
            pieces = speaker.say(prompt, asked.sampling, asked.seed, asked.stop)
            return StreamingResponse(completions.events(asked, pieces), media_type="text/event-stream")
        seeds = [(asked.seed + i) % 2**32 for i in range(asked.n)]
        answers = together(speaker.answer(prompt, asked.sampling, seed, asked.stop) for seed in seeds)
        return AsciiJSONResponse(completions.response(asked, await while_connected(request, answers)))

    async def login(self, request: Request) -> Response:
        token = (await read_json(request)).get("token")
        if self.token is not None and not (isinstance(token, str) and same(token, self.token)):
            raise ApiError(401, "this is not the token", "token", "token")
        response = AsciiJSONResponse({})
        if self.token is not None:
            response.set_cookie(COOKIE, cookie_of(self.token), httponly=True, samesite="strict")
        return response

    async def state(self, request: Request) -> Response:
        rater = request.query_params.get("rater", "")
        progress = await asyncio.to_thread(self.board.progress, rater)
        return AsciiJSONResponse({"models": list(self.speakers), "progress": progress})

    async def next(self, request: Request) -> Response:
        """The next comparison; with a `prompt`, of answers to that."""
        body = await read_json(request)
        rater, prompt = read_rater(body), body.get("prompt")
        if prompt is None:
            return await self.offered(rater, await self.comparing.next(rater))
        if not isinstance(prompt, str) or not prompt.strip():
            raise ApiError(400, "prompt must be a text, and not empty", "prompt")
        asking = asyncio.ensure_future(
            self.comparing.ask(rater, [{"role": "user", "content": prompt.strip()}])
        )
        offer = await while_connected(request, asking)
        if offer is None:
            raise ApiError(
                422, "the answers to this prompt are all the same, or empty: try another", "prompt"
            )
        return await self.offered(rater, offer)

    async def choice(self, request: Request) -> Response:
        body = await read_json(request)
        rater, choice, id = read_rater(body), body.get("choice"), body.get("id")
        if isinstance(choice, bool | float) or choice not in CHOICES:
            raise ApiError(400, f"choice is {choice!r}, not 0, 1, tie or bad", "choice")
        if not isinstance(id, str):
            raise ApiError(400, "id must be that of the comparison", "id")
        try:
            await asyncio.to_thread(self.board.choose, id, rater, choice)
        except Refused as error:
            raise ApiError(409, str(error), "id") from None
        return AsciiJSONResponse({"progress": await asyncio.to_thread(self.board.progress, rater)})

    async def undo(self, request: Request) -> Response:
        rater = read_rater(await read_json(request))
        try:
            offer = await asyncio.to_thread(self.board.undo, rater)
        except Refused as error:
            raise ApiError(409, str(error), "rater") from None
        return await self.offered(rater, offer)

    async def offered(self, rater: str, offer: Offer | None) -> Response:
        """As the page shows it: which checkpoint said what stays with the server."""
        shown = None
        if offer is not None:
            shown = {"id": offer.id, "prompt": offer.comparison.prompt, "answers": offer.answers}
        progress = await asyncio.to_thread(self.board.progress, rater)
        return AsciiJSONResponse({"offer": shown, "progress": progress})


async def read_json(request: Request) -> dict[str, Any]:
    """The object that is the request's body, of which no more is read than MAX_BODY."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY:
            raise ApiError(413, f"the request is larger than {MAX_BODY} bytes")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the request must be a JSON object")
    return value


def read_rater(body: Mapping[str, Any]) -> str:
    rater = body.get("rater")
    name = rater.strip() if isinstance(rater, str) else ""
    if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise ApiError(400, f"rater must be a name of 1 to {LONGEST_NAME} characters", "rater")
    return name


async def while_connected(request: Request, work: Awaitable[Any]) -> Any:
    """What `work` gives, which is ended when the client goes away."""
    work = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([work], timeout=0.5))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
