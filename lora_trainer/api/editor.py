"""The routes of the caption editor: for the page of the tab, which knows the pass, and for nobody else.

They ask neither for --api nor for its password: whoever may use the tab may use them, behind gradio's login, a proxy or
a shared address too. The pass comes with the tab, and a page elsewhere can neither read it nor send its header.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from secrets import compare_digest
from typing import TYPE_CHECKING

import msgspec

from lora_trainer.api.answer import Answer, answer, problem
from lora_trainer.api.routes import MAX_BODY, read_body, served
from lora_trainer.editing.actions import Action
from lora_trainer.editing.album import Album, Picture, Search, common
from lora_trainer.editing.editor import Opened
from lora_trainer.editing.thumbnails import SIZES
from lora_trainer.errors import DataError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

    from lora_trainer.api.ports import EditorHost

PREFIX = "/lora-trainer/editor"
HEADER = "x-lora-trainer-pass"
PAGE = 60
TAGS = 200


class Look(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A folder, as the tab names it, and what of it is on show."""

    folder: str
    metadata: str = ""
    words: str = ""
    tags: tuple[str, ...] = ()
    without: bool = False
    rare: bool = False
    page: int = 0
    fresh: bool = False

    @property
    def search(self) -> Search:
        return Search(self.words, self.tags, self.without)


class Edit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An action on the pictures `names`, or on all that `look` finds; `version` is that of what the page shows."""

    look: Look
    version: str
    action: Action
    names: tuple[str, ...] | None = None


class Undo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    look: Look
    version: str


def look(host: EditorHost, body: bytes) -> Answer:
    asked = _decoded(body, Look)
    if asked.fresh:
        host.thumbnails.trim()
    return answer(_view(_opened(host, asked, fresh=asked.fresh), asked))


def edit(host: EditorHost, body: bytes) -> Answer:
    asked = _decoded(body, Edit)
    opened = _opened(host, asked.look)
    album = opened.album
    if asked.names is None:
        pictures = album.found(asked.look.search)
    else:
        pictures = [_picture(album, name) for name in asked.names]
    changed = host.editor.edit(opened, asked.version, pictures, asked.action)
    return answer({**_view(opened, asked.look), "changed": changed})


def undo(host: EditorHost, body: bytes) -> Answer:
    asked = _decoded(body, Undo)
    opened = _opened(host, asked.look)
    undone = host.editor.undo(opened, asked.version)
    return answer({**_view(opened, asked.look), "undone": undone})


def picture(host: EditorHost, query: Mapping[str, str]) -> Answer:
    """A thumbnail: of the folder's pictures only, whatever the name."""
    opened = _opened(host, Look(query.get("folder", ""), query.get("metadata", "")))
    size = query.get("size", "small")
    if size not in SIZES:
        return problem(400, f"expected a size of {' or '.join(SIZES)}")
    found = _picture(opened.album, query.get("name", ""))
    return Answer(200, host.thumbnails.get(found.path, size), {"Content-Type": "image/jpeg"})


ACTIONS: dict[str, Callable[[EditorHost, bytes], Answer]] = {"look": look, "edit": edit, "undo": undo}


def mount_editor(app: FastAPI, host: EditorHost) -> None:
    """Add the editor's routes to `app`."""
    for name, action in ACTIONS.items():
        app.add_route(f"{PREFIX}/{name}", _posted(host, action), methods=["POST"], include_in_schema=False)
    app.add_route(f"{PREFIX}/picture", _asked(host), methods=["GET"], include_in_schema=False)


def refused(host: EditorHost, headers: Mapping[str, str]) -> Answer | None:
    """Why a request is not served, if it is not."""
    given = headers.get(HEADER, "")
    if given.isascii() and compare_digest(given, host.editor_pass):
        return None
    return problem(403, "the WebUI was started again since this page was loaded; load the page again")


def _posted(host: EditorHost, action: Callable[[EditorHost, bytes], Answer]) -> Callable:
    from fastapi.concurrency import run_in_threadpool

    async def endpoint(request: Request) -> Response:
        denied = refused(host, request.headers)
        body = None if denied else await read_body(request.stream())
        if denied or body is None:
            return _response(denied or problem(413, f"expected a body of at most {MAX_BODY} bytes"))
        return _response(await run_in_threadpool(served, lambda: action(host, body)))

    return endpoint


def _asked(host: EditorHost) -> Callable:
    from fastapi.concurrency import run_in_threadpool

    async def endpoint(request: Request) -> Response:
        denied = refused(host, request.headers)
        query = dict(request.query_params)
        return _response(denied or await run_in_threadpool(served, lambda: picture(host, query)))

    return endpoint


def _response(given: Answer) -> Response:
    from fastapi import Response

    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **given.headers}
    return Response(given.body, given.status, headers, headers.pop("Content-Type", "application/json"))


def _decoded(body: bytes, kind: type) -> object:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError(f"expected a request of the caption editor: {error}") from None


def _opened(host: EditorHost, asked: Look, *, fresh: bool = False) -> Opened:
    """Raises UserError, also for a folder that this visitor may not name."""
    given = {"train_data_dir": asked.folder, "metadata_path": asked.metadata}
    # "Copy as path" on Windows puts quotes around it.
    paths = {key: text.strip().strip('"').strip() for key, text in given.items()}
    if not paths["metadata_path"]:
        del paths["metadata_path"]
    checked = host.allowed(paths)
    metadata = checked.get("metadata_path")
    return host.editor.open(Path(checked["train_data_dir"]), Path(metadata) if metadata else None, fresh=fresh)


def _picture(album: Album, name: str) -> Picture:
    try:
        return album.pictures[name]
    except KeyError:
        raise DataError(f"{name}: no such picture in {album.folder}") from None


def _view(opened: Opened, asked: Look) -> dict[str, object]:
    """What the page shows."""
    album = opened.album
    found = album.found(asked.search)
    pages = max(1, -(-len(found) // PAGE))
    page = min(max(asked.page, 0), pages - 1)
    return {
        "version": opened.version,
        "folder": album.folder.name,
        "total": len(album.pictures),
        "found": len(found),
        "without": sum(not picture.caption for picture in album.pictures.values()),
        "page": page,
        "pages": pages,
        "pictures": [_shown(album, picture) for picture in found[page * PAGE : (page + 1) * PAGE]],
        "tags": common(found, TAGS, rare=asked.rare),
        "undo": opened.steps[-1].label if opened.steps else None,
        "notes": album.notes,
        "from_names": album.from_names,
    }


def _shown(album: Album, picture: Picture) -> dict[str, object]:
    home = album.new_home(picture)
    return {
        "name": picture.name,
        "caption": picture.caption,
        "home": home.relative_to(album.folder).as_posix() if home.is_relative_to(album.folder) else home.name,
    }
