"""The YAML beside a checkpoint is a stranger's file."""

from __future__ import annotations

import pytest

from lora_trainer.errors import ModelError
from lora_trainer.models.ldm_yaml import MAX_FILE_BYTES, LdmConfig, read_beside

WHOLE = "model: {params: {scale_factor: 0.18215, timesteps: 1000, unet_config: {params: {num_heads: 4}}}}"


def read(folder, text):
    (folder / "model.yaml").write_text(text, encoding="utf-8")
    return read_beside(folder / "model.safetensors")


def test_the_facts_are_read(tmp_path):
    assert read(tmp_path, WHOLE) == LdmConfig(num_heads=4, scale_factor=0.18215, timesteps=1000)


def test_without_one_there_are_no_facts(tmp_path):
    assert read_beside(tmp_path / "model.safetensors") == LdmConfig()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (WHOLE.replace("4", "four"), "num_heads"),
        (WHOLE.replace("1000", "-1"), "timesteps"),
        (WHOLE.replace("0.18215", "[1]"), "scale_factor"),
        (WHOLE.replace("0.18215", ".nan"), "scale_factor"),
        ("model: [1]", "model.params"),
        ("a: &a [x, x]\nmodel: [*a, *a]", "reference"),
        ("model: " + "[" * 1000, "levels deep"),
        ("x: " + "y" * MAX_FILE_BYTES, "KiB"),
    ],
)
def test_what_is_no_such_config_is_refused_by_name(tmp_path, text, said):
    with pytest.raises(ModelError, match=said) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "model.yaml") in str(caught.value)


def test_a_folder_in_its_place_is_passed_over(tmp_path):
    (tmp_path / "model.yaml").mkdir()
    assert read_beside(tmp_path / "model.safetensors") == LdmConfig()
