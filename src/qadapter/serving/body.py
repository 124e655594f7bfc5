"""The body of a request as a JSON object, read within limits of size and time."""

import asyncio
import json
from typing import Any, NoReturn

from fastapi import Request

from qadapter.serving.api_errors import ApiError, bad_request

BODY_SECONDS = 30.0


async def json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body.

    Raises:
        ApiError: 400 no JSON object, 408 too slow, 413 too large, 415 another type of content. The last one also
            keeps web pages of other origins out: browsers ask before they send JSON, and get no permission.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the body as Content-Type: application/json.", "unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        message = f"Content-Encoding {coding[:40]!r} is not read by this server: send the body uncompressed."
        raise ApiError(415, message, "unsupported_media_type")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            raw = await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s.", "body_timeout") from None
    return parsed_object(raw)


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    received = bytearray()
    too_large = declared.isdecimal() and int(declared) > max_bytes
    if not too_large:
        async for chunk in request.stream():
            received += chunk
            too_large = len(received) > max_bytes
            if too_large:
                break
    if too_large:
        message = f"the body is larger than this server's limit of {max_bytes} bytes."
        raise ApiError(413, message, "body_too_large", headers={"Connection": "close"})
    return bytes(received)


def parsed_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`; NaN, Infinity and halves of surrogate pairs are refused, as the standard wants.

    Raises:
        ApiError: 400.
    """
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # lone surrogates have no UTF-8
    except (ValueError, RecursionError) as error:  # JSON, UTF-8 and too many digits are ValueErrors
        raise bad_request(f"the body is not valid JSON: {_reason(error)}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object.", code="invalid_json")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number, all numbers must be finite")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "it is not UTF-8 text"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if "int_max_str_digits" in str(error):  # Python's own words advise whoever wrote the server
        return "it has a number of too many digits"
    return str(error)[:200]
