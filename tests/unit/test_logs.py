"""What the terminal is told."""

from __future__ import annotations

import io

from lora_trainer.events import Notice, Saved
from lora_trainer.logs import TerminalLog


def test_a_hostile_name_moves_no_cursor():
    stream = io.StringIO()
    log = TerminalLog(stream)
    log(Saved(path="/tmp/\x1b[2J\x1b]0;x\x07.safetensors", step=1, kind="lora"))
    log(Notice(text="one line\nand another"))
    assert stream.getvalue() == "saved /tmp/\\x1b[2J\\x1b]0;x\\x07.safetensors\none line\nand another\n"
