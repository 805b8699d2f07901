"""Every way out of a folder that we know of, against the API and the tab of a WebUI that others can reach."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lora_trainer.api import mount
from lora_trainer.api.routes import PREFIX, Call, _serve, submit
from lora_trainer.config.export import PATHS
from lora_trainer.hosts.roots import PATH_KEYS
from lora_trainer.ui import fields
from lora_trainer.ui.handlers import Handlers
from tests.fake_webui.install import installed

# {in}: the allowed folder, {out}: its neighbour, with a picture in it.
PLAIN = {
    "the root of all": "/",
    "elsewhere": "{out}",
    "elsewhere, with a slash": "{out}/",
    "a file elsewhere": "{out}/a.png",
    "a system file": "/etc/passwd",
    "a neighbour whose name begins alike": "{in}-of-others",
    "the folder above": "{in}/..",
    "up and down": "{in}/../outside",
    "up in the middle": "{in}/cats/../../outside",
    "up and back in": "{in}/../inside/cats",
    "relative": "../outside",
    "relative, only dots": "..",
    "many times up": "../" * 40 + "etc/passwd",
    "dots and slashes": "{in}/....//....//outside",
    "doubled slashes": "{in}//..//..//outside",
    "a dot between": "{in}/./.././outside",
    "after a space": " {out}",
    "in a home": "~root/../outside",
    "of a process": "/proc/self/root/etc",
    "the process's folder": "/proc/self/cwd/../outside",
    "a URL": "file://{out}",
    "a URL with a host": "file://nas/x/../..",
    "over-long": "{in}/" + "a" * 5000,
    "over-long by parts": "{in}/" + "a/" * 100_000,
    "over-long ups": "{in}/" + "../" * 100_000,
}
ENCODED = {
    "%2e": "{in}/%2e%2e/outside",
    "%2E": "{in}/%2E%2E/outside",
    "one dot encoded": "{in}/.%2e/outside",
    "%2f": "{in}/..%2foutside",
    "%2f alone": "%2fetc%2fpasswd",
    "%5c": "{in}\\..%5coutside",
    "all encoded": "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "twice": "{in}/%252e%252e/outside",
    "thrice": "{in}/%25252e%25252e/outside",
    "too often": "{in}/%2525252525252e",
    "overlong UTF-8": "{in}/%c0%ae%c0%ae/outside",
    "overlong slash": "{in}/..%c0%afoutside",
    "encoded NUL": "{in}/cats%00.png",
    "one dot leader": "{in}/\u2024\u2024/outside",
    "two dot leader": "{in}/\u2025/outside",
    "ellipsis": "{in}/\u2026/outside",
    "full-width dots": "{in}/\uff0e\uff0e/outside",
    "full-width slash": "{in}/..\uff0foutside",
    "full-width backslash": "..\uff3coutside",
    "small full stop": "{in}/\ufe52\ufe52/outside",
    "full-width percent": "{in}/\uff052e\uff052e/outside",
    "full-width all": "\uff0e\uff0e\uff0foutside",
}
LINKS = {
    "a link out": "{in}/out",
    "below a link out": "{in}/out/a.png",
    "what is not there yet, below a link": "{in}/out/new",
    "a link to a link": "{in}/chain",
    "a link to a link, below": "{in}/chain/a.png",
    "a relative link": "{in}/relative",
    "a loop": "{in}/loop",
    "a loop of two": "{in}/ping/x",
    "a link to a file": "{in}/passwd",
    "a link to the root of all": "{in}/slash/etc",
    "a link to a device": "{in}/zero",
}
WINDOWS = {
    "UNC": "\\\\nas\\cats",
    "UNC with slashes": "//nas/cats",
    "UNC, mixed": "\\/nas\\cats",
    "UNC with a port": "\\\\nas@8080\\DavWWWRoot\\x",
    "UNC, long": "\\\\?\\UNC\\nas\\cats",
    "long path": "\\\\?\\C:\\cats",
    "long path with slashes": "//?/C:/cats",
    "a volume": "\\\\?\\Volume{b75e2c83-0000-0000-0000-602f00000000}\\x",
    "NT object": "\\??\\C:\\..\\x",
    "GLOBALROOT": "\\\\?\\GLOBALROOT\\Device\\HarddiskVolume1",
    "a device": "\\\\.\\PhysicalDrive0",
    "a device with slashes": "//./C:",
    "a drive": "C:\\Windows",
    "a drive with slashes": "c:/Windows",
    "a drive alone": "D:",
    "relative to a drive": "C:..\\outside",
    "relative to a drive, by name": "C:cats",
    "up with backslashes": "{in}\\..\\outside",
    "up, mixed": "{in}/cats\\../..\\outside",
    "up, relative": "..\\..\\outside",
    "dots and a space": "{in}/.. /outside",
    "dots with a space between": "{in}/. ./outside",
    "three dots": "{in}/.../outside",
    "four dots": "{in}/..../outside",
    "a name that ends in a dot": "{in}/cats.",
    "a name that ends in a space": "{in}/cats /x",
    "a stream": "{in}/cats::$DATA",
    "a stream's name": "{in}/cats:x",
    "nul": "{in}/nul",
    "NUL.txt": "{in}/NUL.txt",
    "con with a space": "{in}/con .png",
    "COM1": "{in}/COM1",
    "LPT¹": "{in}/lpt¹.csv",
    "CONIN$": "{in}/CONIN$",
    "aux inside": "{in}/aux/x",
}
BYTES = {
    "NUL": "{in}/cats\0",
    "NUL before an end": "{in}/cats\0.png",
    "NUL and ups": "{in}\0/../outside",
    "a surrogate": "{in}/\ud800",
    "half a pair and ups": "{in}/\udc2e\udc2e/../outside",
}
VALUES = {"a number": 7, "a list": ["{in}"], "an object": {"path": "{in}"}, "true": True, "a file": {"name": "/etc/x"}}
PIPES = {"a pipe": "{in}/pipe", "a socket's folder": "/dev", "endless": "/dev/zero", "a terminal": "/dev/tty"}
ALL = PLAIN | ENCODED | LINKS | WINDOWS | BYTES | VALUES | PIPES


TARGETS = {
    **{"out": "{out}", "chain": "{in}/out", "relative": "../outside", "loop": "{in}/loop", "ping": "{in}/pong"},
    **{"pong": "{in}/ping", "passwd": "/etc/passwd", "slash": "/", "zero": "/dev/zero"},
}


@pytest.fixture(scope="module")
def webui(webui_checkpoints, tmp_path_factory):
    """Started with --listen, its data folder beside another one, and links that the owner left lying about."""
    inside = tmp_path_factory.mktemp("visited") / "inside"
    outside, before = inside.parent / "outside", os.getcwd()
    for folder in (inside / "models", inside / "cats", outside, inside.parent / "inside-of-others"):
        folder.mkdir(parents=True)
    (inside / "models" / "Stable-diffusion").symlink_to(webui_checkpoints)
    (outside / "a.png").write_bytes(b"canary")
    os.mkfifo(inside / "pipe")
    os.chdir(inside)
    with installed(inside) as webui:
        for name, target in TARGETS.items():
            (inside / name).symlink_to(meant(webui, target))
        webui("shared").cmd_opts.webui_is_non_local = True
        webui("shared").cmd_opts.api_auth = "ann:password"
        webui.choose("tiny")
        yield webui
    os.chdir(before)
    assert [path.name for path in outside.iterdir()] == ["a.png"]
    assert (outside / "a.png").read_bytes() == b"canary"


@pytest.fixture(scope="module")
def extension(webui):
    made = webui.host("extension").Extension()
    yield made
    made.jobs.close()


def meant(webui, value: object) -> object:
    """A row of the tables for the folders of this test."""
    if not isinstance(value, str):
        return json.loads(meant(webui, json.dumps(value)))
    return value.replace("{in}", str(webui.data)).replace("{out}", str(webui.data.parent / "outside"))


def click(extension, **changes: object) -> str:
    """What the tab says to a click on Train."""
    values = {option.key: fields.initial(option) for option in fields.shown()} | changes
    press = Handlers(extension, lambda **changes: changes).submit(tuple(values), trial=False)
    return press("", "", *values.values())[0]


def queued(extension) -> bool:
    return bool(extension.jobs.jobs()) or any((extension.home / "jobs").glob("*"))


@pytest.mark.parametrize("name", ALL)
def test_refused_by_api_and_tab(extension, webui, name):
    value = meant(webui, ALL[name])
    for key in PATH_KEYS:
        settings = {"train_data_dir": str(extension.home.parent / "cats"), key: value}
        body = json.dumps(settings).encode()
        given = _serve(submit, Call(extension, "", body))
        assert given.status == 400, (key, given.body)
        assert json.loads(given.body)["errors"]
        if key != "output_dir":  # has no control
            assert "lt-error" in click(extension, **settings), key
    assert not queued(extension)


def test_over_http(extension, webui):
    fastapi = pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()
    mount(app, extension)
    with TestClient(app) as client:
        for name, value in ALL.items():
            body = json.dumps({"train_data_dir": meant(webui, value)})
            headers = {"content-type": "application/json"}
            assert client.post(f"{PREFIX}/jobs", content=body, headers=headers).status_code == 401, name
            response = client.post(f"{PREFIX}/jobs", content=body, headers=headers, auth=("ann", "password"))
            assert response.status_code == 400, name
    assert not queued(extension)


def test_what_is_inside_is_taken(extension, monkeypatch):
    """The tables would mean little if everything was refused."""
    taken = []
    monkeypatch.setattr(extension.jobs, "submit", taken.append)
    inside = extension.home.parent
    for path in (inside / "cats", Path("cats"), inside / "猫／犬", inside / "100%25 cats", inside / "new" / "a.b"):
        body = json.dumps({"train_data_dir": str(path)}).encode()
        _serve(submit, Call(extension, "", body))
    assert [Path(config.train_data_dir).is_relative_to(inside.resolve()) for config in taken] == [True] * 5


NAMES = ["../evil", "a/b", "a\\b", "..", "C:x", "nul", "a\0", "\ud800", "a" * 300, "/etc/x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_path(extension, name):
    settings = {"train_data_dir": str(extension.home.parent / "cats"), "output_name": name}
    assert _serve(submit, Call(extension, "", json.dumps(settings).encode())).status == 400
    assert "lt-error" in click(extension, **settings)
    assert not queued(extension)


def test_every_setting_that_is_a_path_is_in_the_tables():
    assert set(PATHS) == {*PATH_KEYS, "base_model"}
