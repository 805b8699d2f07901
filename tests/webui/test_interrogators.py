"""In a real WebUI: its own DeepBooru captions pictures while a job trains, and the job does not notice."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.webui.server import DEMO, WebUI
from tests.webui.snippets import DIGEST, paced
from tests.webui.test_never_lost import STEPS, weights

# Of the real layout with random weights, which can say eight of its tags: what it says is nonsense, that it is computed
# is not.
MADE = """
import torch
from pathlib import Path
from modules import deepbooru_model, paths_internal
torch.manual_seed(0)
model = deepbooru_model.DeepDanbooruModel()
last = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)][-1]
last.weight.data[:8].abs_()
last.weight.data[8:] = 0
if last.bias is not None:
    last.bias.data.zero_()
outputs = last.out_channels
place = Path(paths_internal.models_path) / "torch_deepdanbooru" / "model-resnet_custom_v3.pt"
place.parent.mkdir(parents=True, exist_ok=True)
torch.save({**model.state_dict(), "tags": [f"tag_{n}" for n in range(outputs)]}, place)
result = outputs
"""
CAPTION = """
from lora_trainer.hosts.webui.extension import extension
extension().captioning.caption({"captioner": "deepbooru", "train_data_dir": FOLDER, "threshold": 0.501})
result = None
"""
VIEW = """
from lora_trainer.hosts.webui.extension import extension
view = extension().captioning.view
result = [view.state, view.done, view.total, view.end]
"""


@pytest.fixture(scope="module")
def server(launch) -> WebUI:
    server = launch("--api")
    assert server.run(MADE) > 1000
    return server


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three without captions."""
    for path in sorted((DEMO / "twemoji").glob("*.png"))[:3]:
        shutil.copy(path, tmp_path)
    return tmp_path


def test_interrogators_do_not_disturb_a_running_job(server, pictures):
    plain, digest = server.picture(), server.run(DIGEST)
    alone = server.until(server.submit(output_name="alone", max_train_steps=STEPS)["id"])
    server.run(paced(seconds=0.5))
    job = server.submit(output_name="beside", max_train_steps=STEPS)
    server.until(job["id"], step=3)
    server.run(CAPTION.replace("FOLDER", repr(str(pictures))))
    deadline = time.monotonic() + 300
    while (seen := server.run(VIEW))[0] == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    during = server.job(job["id"])
    job = server.until(job["id"])
    server.run(paced())
    assert seen[:3] == ["done", 3, 3], seen
    captions = [path.read_text(encoding="utf-8") for path in pictures.glob("*.txt")]
    assert len(captions) == 3, seen
    assert all("tag" in caption for caption in captions)
    assert during["state"] == "training"
    assert 3 < during["step"] < STEPS
    assert job["losses"] == alone["losses"]
    assert weights(Path(job["output"][0])) == weights(Path(alone["output"][0]))
    assert server.picture() == plain
    assert server.run(DIGEST) == digest
