"""The routes: first plain functions from a call to an answer, then mounted on an app.

Nothing here is a pydantic model, since WebUIs pin different major versions of it.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from lora_trainer.api.access import refusal
from lora_trainer.api.answer import Answer, answer, problem
from lora_trainer.api.ports import ApiHost
from lora_trainer.api.schema import settings_schema
from lora_trainer.config.options import options
from lora_trainer.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

    from lora_trainer.jobs.view import JobView

PREFIX = "/lora-trainer/v1"
MAX_BODY = 1024 * 1024
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_DETAILS = {"losses", "validations", "comparisons", "sweep", "log", "settings", "details"}
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """A request that may be served."""

    host: ApiHost
    id: str
    body: bytes


def submit(call: Call) -> Answer:
    return _queued(call.host.submit, call.body)


def find_rate(call: Call) -> Answer:
    return _queued(call.host.find_rate, call.body)


def _queued(queue: Callable[[dict[str, object]], JobView], body: bytes) -> Answer:
    wanted = "expected the settings as a JSON object"
    try:
        settings = msgspec.json.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return problem(400, f"{wanted}, found something that is not JSON")
    if not isinstance(settings, dict):
        return problem(400, f"{wanted}, found {'nothing' if settings is None else type(settings).__name__}")
    # A near name is searched for each unknown key, which for a megabyte of them takes minutes.
    if len(settings) > len(options()):
        return problem(400, f"{wanted} with at most {len(options())} keys, found {len(settings)}")
    return answer(queue(settings))


def list_jobs(call: Call) -> Answer:
    return answer({"jobs": [_summary(job) for job in call.host.jobs.jobs()]})


def show_job(call: Call) -> Answer:
    return _of_job(call.host.jobs.job, call.id)


def stop_job(call: Call) -> Answer:
    return _of_job(call.host.jobs.stop, call.id)


def pause_job(call: Call) -> Answer:
    return _of_job(call.host.jobs.pause, call.id)


def continue_job(call: Call) -> Answer:
    return _of_job(call.host.jobs.go_on, call.id)


def show_schema(call: Call) -> Answer:
    return answer(settings_schema())


Handler = Callable[[Call], Answer]
ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/jobs", submit),
    ("POST", "/find-lr", find_rate),
    ("GET", "/jobs", list_jobs),
    ("GET", "/jobs/{id}", show_job),
    ("POST", "/jobs/{id}/stop", stop_job),
    ("POST", "/jobs/{id}/pause", pause_job),
    ("POST", "/jobs/{id}/continue", continue_job),
    ("GET", "/schema", show_schema),
)


def mount(app: FastAPI, host: ApiHost) -> None:
    """Add the API's routes to `app`."""
    for method, path, handler in ROUTES:
        app.add_route(PREFIX + path, _endpoint(host, handler), methods=[method], include_in_schema=False)


def _endpoint(host: ApiHost, handler: Handler) -> Callable:
    # Imported only here: without an API the package needs no web framework.
    from fastapi import Response
    from fastapi.concurrency import run_in_threadpool

    async def reply(request: Request) -> Answer:
        refused = refusal(host, request.method, request.headers)
        if refused:
            return refused
        body = await read_body(request.stream())
        if body is None:
            return problem(413, f"expected a body of at most {MAX_BODY} bytes")
        return await run_in_threadpool(_serve, handler, Call(host, request.path_params.get("id", ""), body))

    async def endpoint(request: Request) -> Response:
        given = await reply(request)
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **given.headers}
        return Response(given.body, given.status, headers, "application/json")

    return endpoint


async def read_body(stream: AsyncIterator[bytes]) -> bytes | None:
    """The whole body, or None when it is too long; the rest is then not even read."""
    body = bytearray()
    async for chunk in stream:
        body += chunk
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


def _serve(handler: Handler, call: Call) -> Answer:
    return served(lambda: handler(call))


def served(work: Callable[[], Answer]) -> Answer:
    """The answer of `work`, or what went wrong; a defect's own words stay in the console."""
    try:
        return work()
    except ConfigError as error:
        return problem(400, *error.problems)
    except UserError as error:
        return problem(400, str(error))
    except Exception:  # the WebUI would answer with the exception's text, which may hold anything
        _LOGGER.exception("LoRA Trainer: an API request failed")
        return problem(500, "an error inside the LoRA Trainer; the WebUI's console has the details")


def _of_job(find: Callable[[str], JobView], id: str) -> Answer:
    if not _ID.fullmatch(id):
        return problem(404, "no such job")
    try:
        return answer(find(id))
    except DataError:
        return problem(404, f"no such job: {id}")


def _summary(job: JobView) -> dict[str, object]:
    """A job without what grows long."""
    return {field.name: getattr(job, field.name) for field in dataclasses.fields(job) if field.name not in _DETAILS}
