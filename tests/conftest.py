"""Shared fixtures: a tiny checkpoint, a folder of pictures with captions, and a stand-in for the WebUI."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # A process a core: with several threads each they wait for one another at every small operation, and the whole
    # takes twice as long. Their child processes do likewise.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Without a GPU its kernels run in Triton's interpreter; read when Triton is first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    from tests.tiny import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Six pictures of 64 to 128 px in two shapes, captioned in metadata.csv."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for index in range(6):
        size = (64, 64) if index < 4 else (128, 64)
        values = np.random.default_rng(index).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"p{index}.png")
        rows.append(f'p{index}.png,"picture, number {index}"')
    (folder / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture
def settings(checkpoint, pictures, tmp_path) -> dict:
    """A config that trains in a second."""
    return {
        "base_model": str(checkpoint),
        "train_data_dir": str(pictures),
        "output_dir": str(tmp_path / "out"),
        "resolution": 128,
        "batch_size": 2,
        "epochs": 2,
        "lora_rank": 4,
        "output_name": "tiny",
        "cpu_threads": 1,
    }


@pytest.fixture(scope="session")
def webui_checkpoints(tmp_path_factory) -> Path:
    from tests.fake_webui.checkpoints import write_checkpoints

    return write_checkpoints(tmp_path_factory.mktemp("webui") / "Stable-diffusion")


@pytest.fixture
def fake_webui(webui_checkpoints, tmp_path):
    """A started WebUI that has `tiny` and `other`; `tiny` is chosen, and loaded when first asked for."""
    from tests.fake_webui.install import installed

    models = tmp_path / "webui" / "models"
    models.mkdir(parents=True)
    (models / "Stable-diffusion").symlink_to(webui_checkpoints)
    with installed(tmp_path / "webui") as webui:
        webui.choose("tiny")
        yield webui
