"""Requests of anybody: bodies, paths, headers. No answer of 500, and the password nowhere."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from hypothesis import strategies as st

from lora_trainer.api.routes import PREFIX, ROUTES, Call, _serve, show_job, stop_job, submit
from tests.fuzz.harness import fuzz, readable
from tests.fuzz.host import JOBS, PASSWORD, USER, host
from tests.fuzz.inputs import FINE, SETTINGS, TEXT, VALUES, dumps, mutated, pieces
from tests.fuzz.watch import ARENA

WHOLE = json.dumps({**FINE, "lora_rank": 8, "sample_prompts": ["a"], "learning_rate": "1e-4"}).encode()
BODY = SETTINGS.map(lambda some: {"train_data_dir": str(ARENA.inside), **some}).map(dumps) | SETTINGS.map(dumps)
BODY |= VALUES.map(dumps) | pieces(['{"', '":', ",", "[", "}", '"lora_rank"', "1e400", "\\ud800", "\\u0000"])
BODIES = BODY.map(lambda text: text.encode("utf-8", "surrogatepass")) | mutated([WHOLE]) | st.binary(max_size=60)


def fair(status: int, body: bytes) -> None:
    """The caller's fault or none, in JSON, and readable."""
    assert status < 500
    given = json.loads(body)
    if status >= 400 and "errors" in given:
        readable("\n".join(given["errors"]))


@fuzz("api", 200, body=BODIES)
def test_any_body(body):
    given = _serve(submit, Call(host(), "", body))
    fair(given.status, given.body)


@fuzz("api", 80, id=TEXT)
def test_any_id(id):
    for handler in (show_job, stop_job):
        given = _serve(handler, Call(host(), id, b""))
        fair(given.status, given.body)


@contextlib.contextmanager
def said() -> Iterator[io.StringIO]:
    """All that is logged or printed."""
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            yield told
    finally:
        logging.getLogger().removeHandler(handler)


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode("utf-8", "replace")).decode()


LINE = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20).map(str.strip)
ORIGINS = st.sampled_from(["http://webui.example", "http://evil.example", "null", "http://[", "//", "http://a@b:c"])
HEADERS = st.fixed_dictionaries(
    {"authorization": st.sampled_from([basic(USER, PASSWORD), basic(USER, PASSWORD + "x"), "Basic", "Basic x"]) | LINE},
    optional={
        "content-type": st.sampled_from(["application/json", "text/plain", ""]) | LINE,
        "host": st.sampled_from(["webui.example", "localhost", "[", "a:b", "\xe9"]) | LINE,
        "origin": ORIGINS | LINE,
        "content-length": st.sampled_from(["2000000", "0"]),
    },
)
PATHS = st.sampled_from([path for _, path, _ in ROUTES]) | TEXT.map(lambda text: "/jobs/" + text)


@pytest.fixture(scope="module")
def client():
    fastapi = pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    from lora_trainer.api import mount

    app = fastapi.FastAPI()
    mount(app, host())
    with TestClient(app, base_url="http://webui.example", raise_server_exceptions=True) as client:
        yield client


@pytest.fixture(scope="module")
def ask(client):
    """A request as it is, and all that was said during it."""

    def send(method: str, path: str, headers: dict[str, str], body: bytes):
        encoded = quote(path.encode("utf-8", "replace")[:2000], safe="/%")
        raw = {name: value.encode("latin-1", "replace") for name, value in headers.items()}
        with said() as told:
            response = client.request(method, PREFIX + encoded, headers=raw, content=body)
        return response, told.getvalue()

    return send


METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"])


@fuzz("api", 120, method=METHODS, path=PATHS, headers=HEADERS, body=BODIES)
def test_any_request(ask, method, path, headers, body):
    response, told = ask(method, path, headers, body)
    if method != "HEAD":
        fair(response.status_code, response.content)
    assert response.status_code < 500
    if headers["authorization"] != basic(USER, PASSWORD) and response.status_code == 200:
        pytest.fail("served without the password")
    for text in (told, response.text, str(response.headers)):
        assert PASSWORD not in text
        assert basic(USER, PASSWORD) not in text


def test_the_password_is_in_no_file_of_a_job():
    assert not [path for path in JOBS.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
