"""Only for tests: runs a snippet of Python inside the WebUI's process and returns its `result`."""

import json
import traceback

from fastapi import Body
from modules import script_callbacks

KEPT = {}


def run(code: str = Body(embed=True)) -> dict:
    scope = {"KEPT": KEPT}
    try:
        exec(code, scope)
    except Exception:
        return {"error": traceback.format_exc()}
    return {"result": json.dumps(scope.get("result"))}


script_callbacks.on_app_started(lambda _, app: app.add_api_route("/probe", run, methods=["POST"]))
