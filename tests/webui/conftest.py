from __future__ import annotations

import os
import socket

import pytest

from tests.webui.server import WebUI


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """Starts WebUIs, each with a data folder of its own."""
    if not os.environ.get("WEBUI_DIR"):
        pytest.skip("WEBUI_DIR names no WebUI")
    running: list[WebUI] = []

    def start(*arguments: str, extension: bool = True) -> WebUI:
        server = WebUI(free_port(), tmp_path_factory.mktemp("webui"), arguments, extension)
        running.append(server)
        return server.start()

    yield start
    for server in running:
        if server.process is not None:
            server.close()


@pytest.fixture(scope="session")
def webui(launch):
    return launch("--api")
