"""The errors that a request can end with.

Each error code of the server has a class: the code in CamelCase, such as `Refilling` for `refilling`. It is a
subclass of a class for its status, which is also used for codes that this version does not know.
"""

from __future__ import annotations

from typing import Optional

# Filled by the classes below.
_BY_CODE: dict[str, type[ResponseError]] = {}
_BY_STATUS: dict[int, type[ResponseError]] = {}

# A proxy sends 502 and 504 while it can't reach the server.
_RETRIED = (429, 502, 503, 504)


class TombolaError(Exception):
    """The base class of all errors of a request.

    `key` is the idempotency key of the draw. The same call with this key gets the numbers if they were taken.
    `attempts` is how many attempts were made, and `may_retry` says whether a later one may succeed.
    """

    key: Optional[str] = None
    attempts: int = 0
    may_retry: bool = False
    retry_after: Optional[float] = None


class NoResponse(TombolaError):
    """No complete response arrived before the deadline. The server may have taken numbers for it."""

    may_retry = True

    def __str__(self) -> str:
        advice = "" if self.key is None else f" The same call with key={self.key!r} gets its numbers."
        return f"No complete response arrived (attempts: {self.attempts}). {self.args[0]}.{advice}"


class UnexpectedResponse(TombolaError):
    """The response is not one of a tombola server. Check the base URL."""


class ResponseError(TombolaError):
    """The server refused the request.

    `code` is the server's word for the reason, or `None` if the response has none. `retry_after` is the value
    of `Retry-After` in seconds.
    """

    def __init_subclass__(cls, code: Optional[str] = None, status: Optional[int] = None) -> None:
        """Registers the class for a code or a status."""
        if code is not None:
            _BY_CODE[code] = cls
        if status is not None:
            _BY_STATUS[status] = cls

    def __init__(self, status: int, code: Optional[str], message: str, retry_after: Optional[float]) -> None:
        # With these arguments, the error can be pickled.
        super().__init__(status, code, message, retry_after)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.may_retry = status in _RETRIED

    def __str__(self) -> str:
        attempts = f" ({self.attempts} attempts)" if self.attempts > 1 else ""
        return f"{self.status} {self.code or 'without a code'}: {self.message}{attempts}"


def error_class(status: int, code: Optional[str]) -> type[ResponseError]:
    """Returns the class for a code, or that for the status if the code is unknown."""
    family = ClientError if status < 500 else ServerError
    return _BY_CODE.get(code or "") or _BY_STATUS.get(status, family)


class ClientError(ResponseError):
    """The status is 4xx."""


class ServerError(ResponseError):
    """The status is 5xx."""


class BadRequestError(ClientError, status=400):
    """The status is 400. The request is not valid."""


class UnknownType(BadRequestError, code="unknown_type"):
    """The server has no pool of that name. The message lists those that it has."""


class BadCount(BadRequestError, code="bad_count"):
    """The count is not allowed. The message has the limit."""


class UnknownParameter(BadRequestError, code="unknown_parameter"):
    """The server does not know a parameter, or one was sent twice."""


class BadBody(BadRequestError, code="bad_body"):
    """The body is not a JSON object with valid parameters."""


class BadLabel(BadRequestError, code="bad_label"):
    """The label must have 1 to 128 bytes of UTF-8 without control characters."""


class BadKey(BadRequestError, code="bad_key"):
    """The key must have 1 to 255 visible ASCII characters."""


class KeyNeedsPost(BadRequestError, code="key_needs_post"):
    """A request with a key must be a `POST`."""


class KeysOff(BadRequestError, code="keys_off"):
    """The server, its mode or the pool keeps no receipts, so it supports neither keys nor labels."""

    def __str__(self) -> str:
        return (
            f"{super().__str__()} Create the client with idempotent=False, and pass neither a key nor a "
            "label. A lost response then loses its numbers."
        )


class AboveBurst(BadRequestError, code="above_burst"):
    """The quota never allows this many numbers at once. Use a smaller count or part size."""


class BadNumber(BadRequestError, code="bad_number"):
    """A parameter must be a whole number."""


class LookupsOff(BadRequestError, code="lookups_off"):
    """The server keeps no index of numbers (`receipts.lookups`)."""


class AuthenticationError(ClientError, status=401):
    """The status is 401. The token is missing or not accepted."""


class Unauthorized(AuthenticationError, code="unauthorized"):
    """Send a token that has not expired."""


class PermissionDeniedError(ClientError, status=403):
    """The status is 403. The server refuses this request."""


class Forbidden(PermissionDeniedError, code="forbidden"):
    """The token lacks the scope for the request, or is for other pools."""


class Prefetch(PermissionDeniedError, code="prefetch"):
    """The request has a header that browsers send ahead of need."""


class CrossSite(PermissionDeniedError, code="cross_site"):
    """The server refuses web pages of other sites and unknown host names."""


class NotFoundError(ClientError, status=404):
    """The status is 404. There is nothing at this address."""


class NoReceipt(NotFoundError, code="no_receipt"):
    """No receipt of this caller has the number."""


class NotFound(NotFoundError, code="not_found"):
    """The server has nothing at this path. Check the base URL."""


class MethodError(ClientError, status=405):
    """The status is 405. The path does not support the method."""


class MethodNotAllowed(MethodError, code="method_not_allowed"):
    """The path does not support the method."""


class ConflictError(ClientError, status=409):
    """The status is 409. The server's state does not allow the request."""


class InFleet(ConflictError, code="in_fleet"):
    """A fleet can't import numbers."""


class GoneError(ClientError, status=410):
    """The status is 410. The numbers are used up."""


class Exhausted(GoneError, code="exhausted"):
    """The range is permanently used up, or fewer numbers are left than were requested."""


class TooLargeError(ClientError, status=413):
    """The status is 413. The body is too large."""


class BodyTooLarge(TooLargeError, code="body_too_large"):
    """The body is larger than the server allows."""


class MediaTypeError(ClientError, status=415):
    """The status is 415. The body has the wrong type."""


class NotJson(MediaTypeError, code="not_json"):
    """The body must be sent as `application/json`."""


class NotText(MediaTypeError, code="not_text"):
    """The lines of an import must be sent as text."""


class UnprocessableError(ClientError, status=422):
    """The status is 422. The request contradicts an earlier one, or its contents are not valid."""


class NotReloaded(UnprocessableError, code="not_reloaded"):
    """The server's settings were not reloaded."""


class KeyReused(UnprocessableError, code="key_reused"):
    """The key was used for another pool, count or label. Use a new key."""


class BadLines(UnprocessableError, code="bad_lines"):
    """The lines of an import are not valid, so nothing was imported."""


class RateLimitError(ClientError, status=429):
    """The status is 429. The caller sends too much. The client retries after `Retry-After`."""


class OverQuota(RateLimitError, code="over_quota"):
    """The quota is used up at the moment."""


class UnavailableError(ServerError, status=503):
    """The status is 503. The server can't serve the request now. The client retries after `Retry-After`."""


class Refilling(UnavailableError, code="refilling"):
    """Demand exceeds the refill rate."""


class ReceiptNotSaved(UnavailableError, code="receipt_not_saved"):
    """The receipt could not be saved, so no number was handed out."""


class OutOfTries(UnavailableError, code="out_of_tries"):
    """The server, in one of the simpler modes, found no unused number in its tries."""


class NotSaved(UnavailableError, code="not_saved"):
    """The server, in one of the simpler modes, could not save the number."""


class ReceiptsAway(UnavailableError, code="receipts_away"):
    """The receipts can't be read at the moment."""


class ImportFailed(UnavailableError, code="import_failed"):
    """The import is not complete."""
