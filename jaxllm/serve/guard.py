"""Who may talk to the server: its own page and its own machine, and elsewhere who has the token."""

import hashlib
import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.serve.errors import ApiError

COOKIE = "jaxllm"
OPEN_PATHS = ("/", "/page.js", "/page.css", "/api/login")  # nothing secret: the page has to ask for the token
# Text that a model or a rater wrote must never become a script: nothing runs but the page's own file.
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
    """ASGI middleware: 403 for a foreign Host or Origin, 401 without the token, and headers on everything."""

    def __init__(self, app: ASGIApp, names: Collection[str], token: str | None):
        """`names`: by which the server may be called; the address that a connection came to is always one."""
        self.app, self.names, self.token = app, {name.lower() for name in names}, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        try:
            self.check(scope)
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def check(self, scope: Scope) -> None:
        """ApiError for who may not come in."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if hostname(host) not in {*self.names, (scope.get("server") or [None])[0]}:
            raise ApiError(403, f"this server is not called {host!r}: name it by --names")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(403, f"requests of pages from {origin} are not answered")
        if self.token is not None and scope["path"] not in OPEN_PATHS and not self.knows_token(headers):
            raise ApiError(401, "the token is missing or wrong: Authorization: Bearer TOKEN", code="token")

    def knows_token(self, headers: Headers) -> bool:
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return same(bearer.strip(), self.token)
        # Lenient as browsers are: another program on this machine may set cookies that break the rules.
        return same(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""), cookie_of(self.token))


def cookie_of(token: str) -> str:
    """What a browser keeps instead of the token: as good for this server, and for nothing else."""
    return hmac.digest(token.encode(), b"the page", hashlib.sha256).hex()


def same(given: str, wanted: str) -> bool:
    """In a time that tells nothing about where they differ."""
    # A client may send half a surrogate pair.
    return hmac.compare_digest(given.encode(errors="surrogatepass"), wanted.encode())


def hostname(host: str) -> str | None:
    """`::1` of `[::1]:8000`."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
