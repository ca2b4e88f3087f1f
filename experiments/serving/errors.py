"""What a client is told when something cannot be done, in OpenAI's form."""

from starlette.responses import JSONResponse


class ApiError(Exception):
    """An answer that is an error: status, message, and the field of the request that is to be mended."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": "1"} if self.status == 503 else {}
        return JSONResponse({"error": error}, self.status, headers)
