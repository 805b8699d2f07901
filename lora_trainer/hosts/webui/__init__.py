"""The WebUI as a host. Only this room imports its `modules`."""
