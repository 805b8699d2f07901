"""A real WebUI on the CPU, with a data folder of its own: WEBUI_DIR names a folder with 1.10.1 and its `venv`."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"
FLAGS = (
    "--skip-torch-cuda-test",
    "--no-half",
    "--use-cpu=all",
    "--no-download-sd-model",
    "--do-not-download-clip",
    "--disable-console-progressbars",
    "--skip-version-check",
    "--skip-prepare-environment",
)
# Passive threads, since spinning ones stall each other where other processes use the cores too.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "COMMANDLINE_ARGS": "", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
WORLD = "emoji-world"
TINY = {"width": 128, "height": 128, "steps": 4, "cfg_scale": 4, "seed": 7, "sampler_name": "DPM++ 2M"}


def python() -> str:
    """The WebUI's own."""
    return os.environ.get("WEBUI_PYTHON", str(Path(os.environ["WEBUI_DIR"]) / "venv" / "bin" / "python"))


class Refused(Exception):
    """An HTTP error: (status, body)."""


@dataclass
class WebUI:
    """One running server. `get` and `post` speak JSON and raise Refused."""

    port: int
    data: Path
    arguments: tuple[str, ...] = ("--api",)
    extension: bool = True
    process: subprocess.Popen | None = None
    starts: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    def start(self) -> WebUI:
        self._furnish()
        log = (self.data / "webui.log").open("ab")
        self.process = subprocess.Popen(
            [python(), "launch.py", "--data-dir", str(self.data), "--port", str(self.port), *FLAGS, *self.arguments],
            cwd=os.environ["WEBUI_DIR"],
            env=os.environ | ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        return self.ready()

    def ready(self, timeout: float = 120) -> WebUI:
        """Wait until everything is there, the first checkpoint too, after a start or a Reload UI.

        A request that comes earlier ends the WebUI: it cannot add its middleware any more.
        """
        self.starts += 1
        deadline = time.monotonic() + timeout
        while self.log().count("Startup time:") < self.starts or not self._answers():
            assert self.process.poll() is None, self.log()[-3000:]
            assert time.monotonic() < deadline, "the WebUI does not answer"
            time.sleep(0.25)
        return self

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def ended(self, timeout: float = 60) -> int:
        """Its exit code, once it has ended by itself."""
        return self.process.wait(timeout)

    def log(self) -> str:
        return (self.data / "webui.log").read_text(errors="replace")

    def get(self, path: str) -> Any:
        return self._call(path, None)

    def post(self, path: str, body: object = None) -> Any:
        return self._call(path, body or {})

    def page(self, path: str, login: tuple[str, str] | None = None) -> str:
        """What a browser gets at `path`, be it a refusal, logged in to gradio or not."""
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        home = f"http://127.0.0.1:{self.port}"
        if login:
            form = urllib.parse.urlencode({"username": login[0], "password": login[1]}).encode()
            opener.open(f"{home}/login", form).close()
        try:
            with opener.open(home + path) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.read().decode()

    def run(self, code: str) -> Any:
        """`result` of a snippet run inside the server's process."""
        answer = self.post("/probe", {"code": code})
        assert "error" not in answer, answer["error"]
        return json.loads(answer["result"])

    def picture(self, prompt: str = "noto emoji of red apple", **settings: object) -> bytes:
        """The pixels of a txt2img."""
        answer = self.post("/sdapi/v1/txt2img", TINY | {"prompt": prompt} | settings)
        return Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB").tobytes()

    def submit(self, **settings: object) -> dict[str, Any]:
        known = {"train_data_dir": str(DEMO / "twemoji"), "resolution": 128, "batch_size": 2, "overwrite": True}
        return self.post("/lora-trainer/v1/jobs", known | settings)

    def job(self, id: str) -> dict[str, Any]:
        return self.get(f"/lora-trainer/v1/jobs/{id}")

    def ask(self, id: str, what: str) -> dict[str, Any]:
        """stop, pause or continue."""
        return self.post(f"/lora-trainer/v1/jobs/{id}/{what}")

    def until_state(self, id: str, state: str, timeout: float = 60) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while (job := self.job(id))["state"] != state:
            assert time.monotonic() < deadline, job
            time.sleep(0.05)
        return job

    def until(self, id: str, *, step: int | None = None, timeout: float = 120) -> dict[str, Any]:
        """The job once it has ended, or reached `step`."""
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(id)
            if job["state"] in ("done", "failed", "stopped") or (step is not None and job["step"] >= step):
                return job
            assert time.monotonic() < deadline, job
            time.sleep(0.05)

    def _call(self, path: str, body: object) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json", **self.headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode()) from None

    def _answers(self) -> bool:
        try:
            return self.run("from modules import sd_models; result = sd_models.model_data.sd_model is not None")
        except (OSError, Refused):
            return False

    def _furnish(self) -> None:
        """The demo's model, another one, an embedding and the extension, in a fresh data folder."""
        models = self.data / "models" / "Stable-diffusion"
        if models.exists():
            return
        for folder in (models, self.data / "models" / "Lora", self.data / "extensions", self.data / "embeddings"):
            folder.mkdir(parents=True)
        shutil.copytree(DEMO / "clip", self.data / "models" / "clip")
        yaml = (
            (DEMO / f"{WORLD}.yaml").read_text().replace("version: clip", f"version: {self.data / 'models' / 'clip'}")
        )
        state = load_file(DEMO / f"{WORLD}.safetensors")
        width = state["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"].shape[1]
        other = {name: tensor * 1.01 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        for name, tensors in ((WORLD, state), ("other", other)):
            save_file(tensors, models / f"{name}.safetensors")
            (models / f"{name}.yaml").write_text(yaml)
        vector = torch.randn(1, width, generator=torch.Generator().manual_seed(1))
        save_file({"emb_params": vector}, self.data / "embeddings" / "inky.safetensors")
        (self.data / "extensions" / "probe").symlink_to(ROOT / "tests" / "webui" / "probe")
        if self.extension:
            (self.data / "extensions" / "lora-trainer").symlink_to(ROOT)
        settings = {"sd_model_checkpoint": f"{WORLD}.safetensors", "CLIP_stop_at_last_layers": 1}
        (self.data / "config.json").write_text(json.dumps(settings))
