"""Why a request gets no number: errors with the status and message that a client is told."""

from __future__ import annotations


class Refusal(Exception):
    """What a client is told.

    Attributes:
        status: of HTTP.
        kind: a word for programs.
        headers: besides.
    """

    status, kind = 500, "internal_error"

    def __init__(self, message: str, cause: Exception | None = None) -> None:
        super().__init__(message)
        self.__cause__ = cause
        self.headers: dict[str, str] = {}


class Refused(Refusal):
    """The request is wrong."""

    status, kind = 400, "invalid_request_error"


class Denied(Refusal):
    """There is no token, or a wrong one."""

    status, kind = 401, "authentication_error"

    def __init__(self) -> None:
        super().__init__(
            "expected the header Authorization: Bearer TOKEN, with the server's token (or http://any:TOKEN@HOST as URL)"
        )
        self.headers = {"WWW-Authenticate": "Bearer"}


class Unknown(Refusal):
    """There is no such model."""

    status, kind = 404, "not_found_error"


class Slow(Refusal):
    """The body did not come in time."""

    status, kind = 408, "request_timeout"


class Elsewhere(Refusal):
    """It was sent to another name than this machine's, as by a web page whose own name was made to lead here."""

    status, kind = 421, "misdirected_request"

    def __init__(self) -> None:
        super().__init__("expected the header Host to be localhost, 127.0.0.1 or [::1], where no token is asked for")


class TooLarge(Refusal):
    """It is over a limit."""

    status, kind = 413, "request_too_large"


class Busy(Refusal):
    """The queue is full."""

    status, kind = 429, "too_many_requests"

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} texts wait already: try again in {seconds} s")
        self.headers = {"Retry-After": str(seconds)}


class Unscored(Refusal):
    """The model gave no finite number, or failed."""


class Closed(Refusal):
    """The server is about to end."""

    status, kind = 503, "unavailable"

    def __init__(self) -> None:
        super().__init__("the server is about to end, and takes no more requests")
        self.headers = {"Connection": "close"}


class Late(Refusal):
    """It took too long."""

    status, kind = 504, "timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"there was no answer within {seconds:g} s")
