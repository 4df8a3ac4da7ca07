"""A client for tombola, the server that hands out unique random numbers and codes.

`Client` and `AsyncClient` draw. Each draw has an idempotency key, so a retry gets the numbers of a lost
response.
All errors of a request are in `tombola_client.errors`, with `TombolaError` as their base class.
"""

from tombola_client._async import AsyncClient
from tombola_client._protocol import Draw, Receipt, Value
from tombola_client._sync import Client
from tombola_client.errors import NoResponse, ResponseError, TombolaError, UnexpectedResponse

__all__ = [
    "AsyncClient",
    "Client",
    "Draw",
    "NoResponse",
    "Receipt",
    "ResponseError",
    "TombolaError",
    "UnexpectedResponse",
    "Value",
]
