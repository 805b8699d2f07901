"""Each kind of adapter on each family, against what a real WebUI answered with the same files."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from lora_trainer.hosts.standalone import open_model
from tests.webui.adapter_table import FAMILIES, KINDS, answer_of, goldens, layout, made


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(layout of the file, what the networks answer with it, and without) by shapes of a checkpoint and kind: what a
    model predicts changes nothing of them."""
    paths = {family.shapes: family.checkpoint(tmp_path_factory.mktemp("family")) for family in FAMILIES.values()}
    plain = cache(lambda shapes: answer_of(open_model(paths[shapes], torch.device("cpu"))))

    @cache
    def answered(shapes, kind):
        data, answer = made(paths[shapes], kind)
        return layout(data), answer, plain(shapes)

    return answered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_webui_answered_the_same(answers, name, kind):
    names, answer, plain = answers(FAMILIES[name].shapes, kind)
    known = goldens()[name][kind]
    assert names == known["layout"]
    assert answer == pytest.approx(known["answer"], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(plain, known["answer"], strict=True)) > 1e-2
