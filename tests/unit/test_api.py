"""The API: who may call, what comes back, and nothing more than that."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from lora_trainer.api import mount
from lora_trainer.api.access import refusal
from lora_trainer.api.routes import MAX_BODY, PREFIX, ROUTES, Call, read_body, submit
from lora_trainer.config.build import build
from lora_trainer.config.options import options
from lora_trainer.config.schema import GROUPS, TRUSTED
from lora_trainer.errors import DataError, ModelError
from lora_trainer.hosts.roots import Roots

LOCAL = "http://127.0.0.1:7860"
PATHS = [(method, PREFIX + path.replace("{id}", "j1")) for method, path, _ in ROUTES]
USERS = {"ann": "pässword", "bob": "b:o:b"}


@dataclasses.dataclass(frozen=True)
class FakeJob:
    id: str
    state: str = "queued"
    eta: float | None = None
    loss: float | None = float("nan")
    losses: tuple[tuple[int, float], ...] = ((1, 0.5), (2, 0.25))
    validations: tuple[tuple[int, float, float], ...] = ((2, 0.5, 0.4),)
    log: tuple[str, ...] = ("waiting",)
    settings: Mapping[str, object] = dataclasses.field(default_factory=lambda: MappingProxyType({"lora_rank": 8}))


class FakeJobs:
    def __init__(self) -> None:
        self.known = {"j1": FakeJob("j1")}
        self.asked: list[str] = []
        self.thread: int | None = None

    def jobs(self) -> list[FakeJob]:
        self.thread = threading.get_ident()
        return list(self.known.values())

    def job(self, id: str) -> FakeJob:
        self.asked.append(id)
        if id not in self.known:
            raise DataError(f"{id}: no such job in /secret/folder")
        return self.known[id]

    def stop(self, id: str) -> FakeJob:
        return self._become(id, "stopped")

    def pause(self, id: str) -> FakeJob:
        return self._become(id, "paused")

    def go_on(self, id: str) -> FakeJob:
        return self._become(id, "training")

    def _become(self, id: str, state: str) -> FakeJob:
        self.known[id] = dataclasses.replace(self.job(id), state=state)
        return self.known[id]


class FakeHost:
    """As the real one: paths checked, base model and output folder filled in, then built."""

    def __init__(self, roots: Roots, credentials: Mapping[str, str] | None = None, non_local: bool = False) -> None:
        self.jobs = FakeJobs()
        self.credentials = credentials
        self.non_local = non_local
        self.submitted: list[object] = []
        self.searched: list[FakeJob] = []
        self._roots = roots

    def submit(self, settings: Mapping[str, object]) -> FakeJob:
        config = build(self._roots.settings(settings), {"base_model": "loaded.safetensors", "output_dir": "out"})
        self.submitted.append(config)
        self.jobs.known["j2"] = FakeJob("j2")
        return self.jobs.known["j2"]

    def find_rate(self, settings: Mapping[str, object]) -> FakeJob:
        self.searched.append(self.submit(settings))
        return self.searched[-1]


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(Roots([tmp_path], True))


@pytest.fixture
def client(host: FakeHost):
    fastapi = pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()
    mount(app, host)
    return TestClient(app, base_url=LOCAL)


def basic(user: str, password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def errors(response) -> str:
    assert set(response.json()) == {"errors"}
    return "\n".join(response.json()["errors"])


def status(host: FakeHost, method: str = "GET", /, **headers: str) -> int:
    given = {"host": "localhost:7860", "content-type": "application/json"}
    given.update({name.replace("_", "-"): value for name, value in headers.items()})
    refused = refusal(host, method, given)
    return refused.status if refused else 200


# Who may call


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST:7860", "127.0.0.1:7860", "127.8.8.8", "[::1]:7860"])
def test_a_local_webui_without_credentials_is_open(host: FakeHost, name: str) -> None:
    assert status(host, host=name) == 200


@pytest.mark.parametrize(
    "name", ["", "evil.example:7860", "127.0.0.1.evil.example", "10.0.0.5", "a@localhost", "[", "x:y"]
)
def test_it_answers_to_no_other_name(host: FakeHost, name: str) -> None:
    """A page can let its own name point to this computer; then only the name tells."""
    assert status(host, host=name) == 403


def test_the_right_password_opens(host: FakeHost) -> None:
    host.credentials, host.non_local = USERS, True
    for user, password in USERS.items():
        assert status(host, host="webui.example", **basic(user, password)) == 200


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Basic",
        "Basic !!!",
        "Basic é",
        "Bearer " + base64.b64encode(b"bob:b:o:b").decode(),
        "Basic " + base64.b64encode(b"bob").decode(),
        basic("bob", "wrong")["authorization"],
        basic("bob", "pässword")["authorization"],
        basic("eve", "b:o:b")["authorization"],
        basic("", "")["authorization"],
    ],
)
def test_anything_else_does_not(host: FakeHost, authorization: str) -> None:
    for non_local in (True, False):
        host.credentials, host.non_local = USERS, non_local
        assert status(host, authorization=authorization) == 401


def test_credentials_of_nobody_open_nothing(host: FakeHost) -> None:
    host.credentials = {}
    assert status(host, **basic("", "")) == 401


@pytest.mark.parametrize(
    ("origin", "name", "expected"),
    [
        ("http://localhost:7860", "localhost:7860", 200),
        ("http://LocalHost", "localhost:80", 200),
        ("https://localhost", "localhost", 200),
        ("http://127.0.0.1:7860", "localhost:7860", 403),
        ("http://localhost:3000", "localhost:7860", 403),
        ("https://evil.example", "localhost:7860", 403),
        ("http://localhost:7860.evil.example", "localhost:7860", 403),
        ("http://evil@localhost:7860", "localhost:7860", 403),
        ("file://localhost:7860", "localhost:7860", 403),
        ("null", "localhost:7860", 403),
        ("", "localhost:7860", 403),
    ],
)
def test_only_pages_of_the_same_host_may_post(host: FakeHost, origin: str, name: str, expected: int) -> None:
    assert status(host, "POST", origin=origin, host=name) == expected
    host.credentials = USERS  # the browser sends the password by itself
    assert status(host, "POST", origin=origin, host=name, **basic("bob", "b:o:b")) == expected


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_what_a_form_can_send_is_not_taken(host: FakeHost, kind: str) -> None:
    assert status(host, "POST", content_type=kind) == 415
    assert status(host, "GET", content_type=kind) == 200


def test_json_with_a_charset_is_json(host: FakeHost) -> None:
    assert status(host, "POST", content_type="Application/JSON; charset=utf-8") == 200


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_route_is_guarded(client, host: FakeHost, method: str, path: str) -> None:
    host.non_local = True
    response = client.request(method, path, json={})
    assert response.status_code == 403
    assert "--api-auth" in errors(response)

    host.credentials = USERS
    response = client.request(method, path, json={})
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Basic ")
    assert not host.submitted
    assert not host.jobs.asked

    response = client.request(method, path, json={"train_data_dir": "x"}, headers=basic("bob", "b:o:b"))
    assert response.status_code in (200, 400)


# What comes back


def test_a_job_is_submitted(client, host: FakeHost, tmp_path: Path) -> None:
    response = client.post(f"{PREFIX}/jobs", json={"train_data_dir": str(tmp_path), "learning_rate": "1e-4"})
    assert (response.status_code, response.json()["id"]) == (200, "j2")
    (config,) = host.submitted
    assert (config.train_data_dir, config.learning_rate) == (str(tmp_path.resolve()), 1e-4)


def test_all_problems_come_back_together(client, host: FakeHost, tmp_path: Path) -> None:
    response = client.post(
        f"{PREFIX}/jobs", json={"train_data_dir": str(tmp_path), "lora_rang": 8, "epochs": 0, "batch_size": None}
    )
    assert response.status_code == 400
    assert [line.split(":")[0] for line in response.json()["errors"]] == ["lora_rang", "batch_size", "epochs"]
    assert not host.submitted


def test_a_path_outside_the_roots_names_the_rule(client, tmp_path: Path) -> None:
    response = client.post(f"{PREFIX}/jobs", json={"train_data_dir": str(tmp_path.parent)})
    assert response.status_code == 400
    assert "stays inside the allowed folders" in errors(response)


def test_another_error_of_the_user_is_one_line(client, host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(settings: Mapping[str, object]) -> FakeJob:
        raise ModelError("no checkpoint is loaded")

    monkeypatch.setattr(host, "submit", submit)
    response = client.post(f"{PREFIX}/jobs", json={})
    assert (response.status_code, response.json()) == (400, {"errors": ["no checkpoint is loaded"]})


def test_a_learning_rate_is_looked_for(client, host: FakeHost, tmp_path: Path) -> None:
    response = client.post(f"{PREFIX}/find-lr", json={"train_data_dir": str(tmp_path), "lora_rank": 4})
    assert (response.status_code, response.json()["id"]) == (200, "j2")
    assert (len(host.searched), host.submitted[0].lora_rank) == (1, 4)
    for body in ({"lora_rank": 0}, [1], {"train_data_dir": "/etc"}):
        refused = client.post(f"{PREFIX}/find-lr", json=body)
        assert (refused.status_code, bool(errors(refused))) == (400, True)
    assert len(host.searched) == 1


BAD_BODIES = {
    "nothing": b"",
    "no JSON": b"train_data_dir: x",
    "cut off": b'{"train_data_dir": "x',
    "a list": b"[1]",
    "null": b"null",
    "text": b'"x"',
    "no UTF-8": b'{"a": "\xff"}',
    "half a character": b'{"a": "\\ud800"}',
    "too deep": b"[" * 100_000,
    "too deep inside": b'{"lora_rank": ' + b"[" * 900 + b"]" * 900 + b"}",
    "too long a number": b'{"lora_rank": ' + b"9" * 5000 + b"}",
    "too large a number": b'{"lora_rank": 1e999}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_the_callers_problem(client, host: FakeHost, body: bytes) -> None:
    response = client.post(f"{PREFIX}/jobs", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert errors(response)
    assert not host.submitted


def test_too_many_keys_are_counted_only(client) -> None:
    """Looking for the nearest known key of a megabyte of them would take minutes."""
    response = client.post(f"{PREFIX}/jobs", json=dict.fromkeys(map(str, range(len(options()) + 1))))
    assert response.status_code == 400
    assert len(response.json()["errors"]) == 1


def test_a_body_is_at_most_a_mebibyte(client, host: FakeHost) -> None:
    filler = b" " * (MAX_BODY - 2)
    for body, expected in ((b"{" + filler + b"}", 400), (b"{" + filler + b" }", 413)):
        response = client.post(f"{PREFIX}/jobs", content=body, headers={"content-type": "application/json"})
        assert response.status_code == expected
    assert not host.submitted


def test_reading_ends_where_a_body_is_too_long() -> None:
    """A request may announce no length, and go on for ever."""
    sent = []

    async def stream():
        while True:
            sent.append(1)
            yield bytes(MAX_BODY // 2)

    assert asyncio.run(read_body(stream())) is None
    assert len(sent) == 3


def test_jobs_are_listed_without_their_details(client, host: FakeHost) -> None:
    response = client.get(f"{PREFIX}/jobs")
    assert response.json() == {"jobs": [{"id": "j1", "state": "queued", "eta": None, "loss": None}]}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"


def test_a_job_is_shown_whole(client) -> None:
    assert client.get(f"{PREFIX}/jobs/j1").json() == {
        "id": "j1",
        "state": "queued",
        "eta": None,
        "loss": None,
        "losses": [[1, 0.5], [2, 0.25]],
        "validations": [[2, 0.5, 0.4]],
        "log": ["waiting"],
        "settings": {"lora_rank": 8},
    }


def test_a_job_is_stopped(client, host: FakeHost) -> None:
    headers = {"content-type": "application/json"}
    assert client.post(f"{PREFIX}/jobs/j1/stop", headers=headers).json()["state"] == "stopped"
    assert host.jobs.known["j1"].state == "stopped"


@pytest.mark.parametrize("id", ["j9", "..", "%2e%2e", "j1%00", "j1%0a", "-j1", "x" * 101, "j%5c1", "ä", "*"])
def test_an_unknown_job(client, host: FakeHost, id: str) -> None:
    for response in (client.get(f"{PREFIX}/jobs/{id}"), client.post(f"{PREFIX}/jobs/{id}/stop", json={})):
        assert response.status_code == 404
        assert "secret" not in response.text
    assert set(host.jobs.asked) <= {"j9"}


def test_a_defect_of_ours_tells_nothing(client, host: FakeHost, monkeypatch, caplog) -> None:
    def jobs() -> list[FakeJob]:
        raise RuntimeError("token 1234 at /secret/folder")

    monkeypatch.setattr(host.jobs, "jobs", jobs)
    with caplog.at_level(logging.ERROR):
        response = client.get(f"{PREFIX}/jobs")
    assert response.status_code == 500
    assert "inside the LoRA Trainer" in errors(response)
    assert "1234" not in response.text
    assert "1234" in caplog.text


def test_what_cannot_be_encoded_tells_nothing_either(client, host: FakeHost) -> None:
    host.jobs.known["j1"] = FakeJob("j1", log=(object(),))  # type: ignore[arg-type]
    assert client.get(f"{PREFIX}/jobs/j1").status_code == 500


def test_work_is_done_outside_the_event_loop(client, host: FakeHost) -> None:
    seen: list[int] = []

    @client.app.get("/loop")
    async def loop() -> int:
        seen.append(threading.get_ident())
        return 0

    with client:  # one event loop for both requests
        client.get("/loop")
        client.get(f"{PREFIX}/jobs")
    assert seen
    assert host.jobs.thread not in seen


def test_other_routes_stay_as_they_are(client, host: FakeHost) -> None:
    host.non_local = True

    @client.app.get("/sdapi/v1/progress")
    def progress() -> dict:
        return {"progress": 0}

    assert client.get("/sdapi/v1/progress").json() == {"progress": 0}
    assert client.get("/openapi.json").status_code == 200
    assert client.delete(f"{PREFIX}/jobs").status_code == 405


def test_the_schema_says_what_the_declaration_says(client) -> None:
    schema = client.get(f"{PREFIX}/schema").json()
    assert schema["groups"] == list(GROUPS)
    declared = {key: option for key, option in options().items() if key not in TRUSTED}
    assert list(schema["properties"]) == list(declared)
    assert schema["required"] == ["train_data_dir"]
    assert schema["additionalProperties"] is False
    for key, option in declared.items():
        property = schema["properties"][key]
        assert (property["description"], property["group"]) == (option.help, option.group)
        if not option.required:
            assert property["default"] == option.default
    assert schema["properties"]["lora_rank"]["maximum"] == 1024
    assert schema["properties"]["output_format"]["enum"] == sorted(["webui", "diffusers", "both"])
    assert "$ref" not in json.dumps(schema)


def test_handlers_need_no_framework(host: FakeHost, tmp_path: Path) -> None:
    body = json.dumps({"train_data_dir": str(tmp_path)}).encode()
    assert json.loads(submit(Call(host, "", body)).body)["id"] == "j2"
