"""Access control: only the server's own page, programs on this machine, and clients that have the token."""

import hashlib
import hmac
import sys
from collections import Counter
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.serve.errors import ApiError

MAX_DENIED_CLIENTS = 1000  # whose denials are counted
COOKIE = "jaxllm"
OPEN_PATHS = ("/", "/page.js", "/page.css", "/api/login")  # no secrets here: the page must ask for the token
# Text written by a model or a rater must never run as a script: only the page's own file may run.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware: 403 for a foreign Host or Origin, 401 without the token, security headers on every
    response."""

    def __init__(self, app: ASGIApp, allowed_hosts: Collection[str], token: str | None):
        """`allowed_hosts`: host names that a request may be sent to. The address that a connection came in on
        is always allowed."""
        self.app, self.token = app, token
        self.allowed_hosts = {name.lower() for name in allowed_hosts}
        self.denials: Counter[tuple[str, int]] = Counter()  # by client and status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
                if message["status"] in (401, 403):
                    self.log_denial(scope, message["status"])
            await send(message)

        try:
            self.check(scope)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def log_denial(self, scope: Scope, status: int) -> None:
        """A line on stderr for the first, second, fourth, eighth ... denial of a client: somebody who guesses
        tokens must be seen, and must not fill the terminal."""
        if len(self.denials) >= MAX_DENIED_CLIENTS:
            self.denials.clear()
        client = (scope.get("client") or ["unknown"])[0]
        self.denials[client, status] += 1
        count = self.denials[client, status]
        if count & (count - 1) == 0:
            print(
                f"{status} to {client}: {scope['method']} {scope['path'][:100]!r} ({count} so far)",
                file=sys.stderr,
                flush=True,
            )

    def check(self, scope: Scope) -> None:
        """ApiError for a request without access."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if hostname(host) not in {*self.allowed_hosts, (scope.get("server") or [None])[0]}:
            raise ApiError(403, f"host {host!r} is not allowed; add it to --allowed_hosts")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, f"requests from pages of {origin} are not allowed")
        if self.token is None or scope["path"] in OPEN_PATHS:
            return
        if not has_token(headers, self.token):
            raise ApiError(
                401, "the token is missing or wrong; send Authorization: Bearer TOKEN", code="token"
            )


def has_token(headers: Headers, token: str) -> bool:
    """Whether a request carries the token: as a bearer token or by the page's cookie."""
    kind, _, bearer = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return same(bearer.strip(), token)
    # Parsed as leniently as browsers do: another program on this machine may set malformed cookies.
    return same(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""), cookie_of(token))


def cookie_of(token: str) -> str:
    """What a browser stores instead of the token: valid for this server, useless elsewhere."""
    return hmac.digest(token.encode(), b"the page", hashlib.sha256).hex()


def same(given: str, expected: str) -> bool:
    """String equality in constant time."""
    # `given` may hold a lone surrogate.
    return hmac.compare_digest(given.encode(errors="surrogatepass"), expected.encode())


def hostname(host: str) -> str | None:
    """The name without the port: `::1` of `[::1]:8000`."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
