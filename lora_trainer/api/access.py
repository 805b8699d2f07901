"""Who may call. A WebUI asks for --api-auth only on its own routes, so ours ask for themselves."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from ipaddress import ip_address
from secrets import compare_digest
from urllib.parse import SplitResult, urlsplit

from lora_trainer.api.answer import Answer, problem
from lora_trainer.api.ports import ApiHost

_CHALLENGE = {"WWW-Authenticate": 'Basic realm="LoRA Trainer", charset="UTF-8"'}
_DEFAULT_PORTS = {None, 80, 443}


def refusal(host: ApiHost, method: str, headers: Mapping[str, str]) -> Answer | None:
    """Why a request is not served, if it is not. The names in `headers` are in lower case."""
    return _stranger(host, headers) or (_foreign_page(headers) if method == "POST" else None)


def _stranger(host: ApiHost, headers: Mapping[str, str]) -> Answer | None:
    if host.credentials is not None:
        if _knows_password(host.credentials, headers.get("authorization", "")):
            return None
        return problem(401, "expected a user and password of --api-auth (HTTP Basic)", headers=_CHALLENGE)
    if host.non_local:
        return problem(
            403, "this WebUI can be reached from other computers: start it with --api-auth USER:PASSWORD to use this"
        )
    # A page elsewhere can let its own name point to this computer, and its requests are then of the same origin. They
    # still carry that name.
    if not _is_loopback(_address(headers.get("host", ""))):
        return problem(
            403,
            "without a password only http://localhost is answered: start the WebUI with --api-auth USER:PASSWORD "
            "to use another name",
        )
    return None


def _knows_password(credentials: Mapping[str, str], authorization: str) -> bool:
    scheme, _, encoded = authorization.partition(" ")
    try:
        user, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return False
    if scheme.lower() != "basic" or not colon:
        return False
    # No early way out: how long this takes tells nothing about which users there are.
    known = [
        compare_digest(user, known_user.encode()) & compare_digest(password, known_password.encode())
        for known_user, known_password in credentials.items()
    ]
    return any(known)


def _foreign_page(headers: Mapping[str, str]) -> Answer | None:
    """A browser lets any page post a form anywhere, with the password it keeps, but not JSON and not another Origin."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return problem(415, "expected the content type application/json")
    origin = headers.get("origin")
    if origin is not None and not _same_host(origin, headers.get("host", "")):
        return problem(403, "requests from pages of another host are not served")
    return None


def _same_host(origin: str, host: str) -> bool:
    theirs, ours = _split(origin), _address(host)
    return theirs is not None and ours is not None and theirs.scheme in ("http", "https") and _end(theirs) == _end(ours)


def _end(address: SplitResult) -> tuple[str | None, int | None]:
    """Name and port. A proxy may speak HTTPS for us, so that both schemes' ports count as none."""
    return address.hostname, None if address.port in _DEFAULT_PORTS else address.port


def _is_loopback(address: SplitResult | None) -> bool:
    name = (address.hostname or "") if address else ""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _address(host: str) -> SplitResult | None:
    return _split(f"//{host}")


def _split(text: str) -> SplitResult | None:
    try:
        parts = urlsplit(text)
        _ = parts.port  # read lazily, and raises for nonsense
    except ValueError:
        return None
    return parts if parts.hostname and "@" not in parts.netloc else None
