"""Interrupt stops the running job, which saves. Reload UI interrupts too, and the job outlives it."""

from __future__ import annotations

from modules import shared

_MARK = "lora_trainer_reloading"


def watch_reloads() -> None:
    """Tell Reload UI from Interrupt from now on. To be called before the WebUI builds its buttons."""
    state = shared.state
    if hasattr(state, _MARK):
        return
    request_restart = state.request_restart

    def marked() -> None:
        setattr(state, _MARK, True)
        request_restart()

    setattr(state, _MARK, False)
    state.request_restart = marked


def interrupted() -> bool:
    """Whether the user has interrupted what runs now."""
    state = shared.state
    if state.interrupted and getattr(state, _MARK, False):
        state.interrupted = False
        setattr(state, _MARK, False)
    return state.interrupted
