"""What no input may make us do: write outside the allowed folder, start a program, call the network, unpickle."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.startfile"}
_NEVER |= {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "pickle.find_class"}


class Arena:
    """A folder that may be written in, beside one with canaries, which is also the current folder of every case."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        root = Path(self._folder.name).resolve()
        self.inside, self.outside = root / "inside", root / "outside"
        for folder in (self.inside, self.outside / "pictures"):
            folder.mkdir(parents=True)
        for name in ("secret.txt", "settings.yaml", "pictures/a.png", "pictures/metadata.csv"):
            (self.outside / name).write_text("canary", encoding="utf-8")
        self._seen: list[str] = []
        self._on = False
        # It cannot be taken away again, so it is switched.
        sys.addaudithook(self._notice)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Fails when what runs in it has reached out of `inside`."""
        here, before = os.getcwd(), self._canaries()
        os.chdir(self.outside)
        self._seen, self._on = [], True
        try:
            yield
        finally:
            self._on = False
            os.chdir(here)
        assert self._seen == []
        assert self._canaries() == before

    def _canaries(self) -> list[tuple[str, int, int]]:
        found = sorted(self.outside.rglob("*"))
        return [(str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in found]

    def _notice(self, event: str, arguments: tuple) -> None:
        if not self._on:
            return
        if event in _NEVER:
            self._seen.append(f"{event} {arguments}")
        elif event in _CHANGES:
            self._judge(event, arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1])
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            self._judge(event, arguments[:1])

    def _judge(self, event: str, paths: tuple) -> None:
        for path in paths:
            # Numbers are open files; names without a folder are relative to an open one, as rmtree removes them.
            if isinstance(path, (str, bytes, os.PathLike)) and os.path.dirname(os.fsdecode(path)):
                real = Path(os.path.realpath(os.fsdecode(path)))
                if (
                    not real.is_relative_to(self.inside)
                    and "__pycache__" not in real.parts
                    and real != Path("/dev/null")
                ):
                    self._seen.append(f"{event} {real}")


ARENA = Arena()
