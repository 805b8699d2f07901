"""The undisturbed run, made once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.chaos.world import World, forked


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, checkpoint) -> World:
    """A world in which the job has ended well."""
    if not hasattr(os, "fork"):
        pytest.skip("children are forked")
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("chaos")
    world = World(folder / "undisturbed", _settings(folder, checkpoint))
    world.folder.mkdir()
    assert forked(world.begin) == 0
    assert world.lora is not None
    assert world.leftovers() == []
    return world


def _settings(folder: Path, checkpoint: Path) -> dict:
    pictures = folder / "pictures"
    pictures.mkdir()
    rows = []
    for index in range(6):
        values = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(pictures / f"p{index}.png")
        rows.append(f"p{index}.png,picture {index}")
    (pictures / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    return {
        "base_model": str(checkpoint),
        "train_data_dir": str(pictures),
        "output_name": "tiny",
        "resolution": 64,
        "batch_size": 2,
        "epochs": 3,
        "lora_rank": 2,
        "cpu_threads": 1,
        "checkpoint_every": 2,
        "save_steps": 4,
        "validation_split": 0.2,
        "validate_every": 4,
    }
