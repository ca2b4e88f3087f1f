"""Errors as HTTP responses, in the format of OpenAI's API."""

import json
from typing import Any

from starlette.responses import JSONResponse


class AsciiJSONResponse(JSONResponse):
    """JSON in ASCII: a lone surrogate, which a client may send as an escape, cannot be encoded in UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


class ApiError(Exception):
    """An error response: HTTP status, message, and `param`, the field of the request that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> AsciiJSONResponse:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": "1"} if self.status == 503 else {}
        return AsciiJSONResponse({"error": error}, self.status, headers)
