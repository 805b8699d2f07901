"""`lora-trainer resize` and the decomposition below it, beside plain float64 references."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from lora_trainer.adapters.load import read_lora
from lora_trainer.adapters.naming import Factors
from lora_trainer.adapters.svd import Rule, approximated, grown, shrunk
from lora_trainer.cli import main
from lora_trainer.errors import ModelError, OutputError
from lora_trainer.tools.resize import resize
from lora_trainer.tools.result import kohya_tensors

METADATA = {
    "ss_base_model_version": "sd_v1",
    "ss_network_dim": "8",
    "ss_network_alpha": "4",
    "ss_training_comment": "mine",
    "sshs_model_hash": "0" * 64,
    "modelspec.title": "a",
    "modelspec.trigger_phrase": "mystyle",
}
NAMES = ("lora_unet_mid_block_attentions_0_proj_in", "lora_unet_down_blocks_0_resnets_0_conv1", "lora_te_text_model_x")


def module(rank=8, kernel=(), alpha=4.0, dtype=torch.float32, seed=0) -> Factors:
    """Singular values that fall by about a half each."""
    generator = torch.Generator().manual_seed(seed)
    falling = 0.5 ** torch.arange(rank)
    down = torch.randn(rank, 10, *kernel, generator=generator)
    up = torch.randn(12, rank, generator=generator) * falling
    return Factors(down.to(dtype), up.reshape(12, rank, *[1] * len(kernel)).to(dtype), alpha)


def delta(f: Factors) -> torch.Tensor:
    return f.alpha / f.rank * (f.up.double().flatten(1) @ f.down.double().flatten(1))


def kohyas_rank(values: torch.Tensor, most: int, method: str | None, value: float) -> int:
    """networks/resize_lora.py of sd-scripts, rank_resize and its index_ functions, over all singular values of the
    whole matrix."""
    if method == "sv_ratio":
        index = int(torch.sum(values > values[0] / value).item())
    elif method == "sv_cumulative":
        index = int(torch.searchsorted(torch.cumsum(values, 0) / float(values.sum()), value)) + 1
    elif method == "sv_fro":
        index = int(torch.searchsorted(torch.cumsum(values**2, 0) / float((values**2).sum()), value**2)) + 1
    rank = most if method is None else max(1, min(index, len(values) - 1)) + 1
    return 1 if values[0] <= 1e-6 else min(rank, most)


RULES = [
    (3, None, 0.0),
    (1, None, 0.0),
    *((8, "sv_ratio", value) for value in (1.5, 3.0, 9.0, 50.0)),
    *((8, "sv_fro", value) for value in (0.5, 0.9, 0.99)),
    *((8, "sv_cumulative", value) for value in (0.3, 0.8, 0.95)),
    (3, "sv_fro", 0.99),
]


@pytest.mark.parametrize(("most", "method", "value"), RULES)
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_module_is_cut_as_kohyas_tool_cuts_it(most, method, value, kernel):
    f = module(kernel=kernel)
    u, values, v = torch.linalg.svd(delta(f) / (f.alpha / f.rank), full_matrices=False)
    rank = kohyas_rank(values, most, method, value)
    smaller, after, before = shrunk(f, Rule(most, method, value))
    assert smaller.rank == rank
    # kohya's new alpha: the old scale times the new rank.
    assert smaller.alpha == f.alpha / f.rank * rank
    assert smaller.down.shape == (rank, 10, *kernel)
    assert smaller.up.shape == (12, rank, *[1] * len(kernel))
    expected = f.alpha / f.rank * (u[:, :rank] * values[:rank]) @ v[:rank]
    torch.testing.assert_close(delta(smaller), expected, rtol=1e-5, atol=1e-5)
    assert before == pytest.approx(delta(f).square().sum().item(), rel=1e-6)
    assert after == pytest.approx(expected.square().sum().item(), rel=1e-6)


def test_a_module_of_no_higher_rank_stays_as_it_is():
    f = module(rank=3)
    assert shrunk(f, Rule(3))[0] is f
    assert shrunk(f, Rule(8, "sv_ratio", 1e6))[0] is f


def test_a_module_that_does_nothing_keeps_rank_1():
    f = Factors(torch.randn(8, 10), torch.zeros(12, 8), 4.0)
    assert shrunk(f, Rule(5))[0].rank == 1


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_the_best_approximation_of_a_matrix(shape):
    matrix = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    up, down, after, before = approximated(matrix, 5)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(up @ down, (u[:, :5] * values[:5]) @ v[:5], rtol=1e-9, atol=1e-9)
    assert (after, before) == pytest.approx(((values[:5] ** 2).sum().item(), (values**2).sum().item()))
    low = matrix[:, :3] @ matrix[:3]
    up, down, after, before = approximated(low, 5)
    torch.testing.assert_close(up @ down, low, rtol=1e-6, atol=1e-6)


def test_a_higher_rank_adds_nothing_yet_and_can_learn():
    f = module(rank=3, kernel=(3, 3))
    fresh = torch.randn(8, 10, 3, 3)
    larger = grown(f, 8, fresh)
    torch.testing.assert_close(delta(larger), delta(f), rtol=1e-12, atol=1e-12)
    assert larger.down[:3].equal(f.down)
    assert larger.down[3:].equal(fresh[3:])


@pytest.fixture
def lora(tmp_path):
    factors = {name: module(kernel=(3, 3) if "conv" in name else (), seed=n) for n, name in enumerate(NAMES)}
    save_file(kohya_tensors(factors), tmp_path / "a.safetensors", METADATA)
    return tmp_path / "a.safetensors"


def test_the_file_says_what_it_is_now(lora, tmp_path, capsys):
    out = tmp_path / "b.safetensors"
    assert main(["resize", str(lora), str(out), "--rank", "3", "--precision", "fp16"]) == 0
    before, after = read_lora(lora), read_lora(out)
    kept = [torch.linalg.svdvals(delta(f))[:3].square().sum().item() for f in before.factors.values()]
    share = math.sqrt(sum(kept) / sum(delta(f).square().sum().item() for f in before.factors.values()))
    assert capsys.readouterr().out == f"{out}: rank 8 to 3; {share:.1%} of its norm is kept\n"
    assert {f.rank for f in after.factors.values()} == {3}
    assert (after.precision, set(after.factors)) == ("F16", set(NAMES))
    said = after.metadata
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_output_name"]) == ("3", "1.5", "b")
    assert said["ss_training_comment"] == "dimension is resized from 8 to at most 3; mine"
    assert (said["modelspec.title"], said["modelspec.trigger_phrase"]) == ("b", "mystyle")
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hash_matches"] is True


def test_dynamic_ranks(lora, tmp_path, capsys):
    out = tmp_path / "b.safetensors"
    assert main(["resize", str(lora), str(out), "--rank", "8", "--dynamic", "sv_ratio", "--value", "5"]) == 0
    ranks = {f.rank for f in read_lora(out).factors.values()}
    assert len(ranks) > 1
    said = read_lora(out).metadata
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert "by sv_ratio 5" in said["ss_training_comment"]
    assert "of its norm is kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], "rank: expected a whole number of at least 1"),
        (["--rank", "8"], "no module has a rank above that, the largest is 8"),
        (["--rank", "8", "--dynamic", "sv_fro"], "expected --dynamic and --value together"),
        (["--rank", "8", "--dynamic", "sv_fro", "--value", "1.5"], "expected more than 0 to 1 for sv_fro, found 1.5"),
        (["--rank", "8", "--dynamic", "sv_ratio", "--value", "1"], "expected more than 1 for sv_ratio, found 1"),
        (["--rank", "8", "--dynamic", "sv_ratio", "--value", "nan"], "found nan"),
    ],
)
def test_what_is_refused(lora, tmp_path, capsys, arguments, words):
    assert main(["resize", str(lora), str(tmp_path / "b.safetensors"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()


def test_files_that_cannot_be_cut(lora, tmp_path):
    broken = Factors(torch.full((8, 10), math.nan), torch.ones(12, 8), 4.0)
    save_file(kohya_tensors({NAMES[0]: broken}), tmp_path / "nan.safetensors", METADATA)
    with pytest.raises(ModelError, match="proj_in holds numbers that are not finite"):
        resize(tmp_path / "nan.safetensors", tmp_path / "b.safetensors", Rule(2))
    huge = module()
    huge = Factors(huge.down * 1e12, huge.up, huge.alpha)
    save_file(kohya_tensors({NAMES[0]: huge}), tmp_path / "huge.safetensors", METADATA)
    with pytest.raises(OutputError, match="needs --precision fp32"):
        resize(tmp_path / "huge.safetensors", tmp_path / "b.safetensors", Rule(2), precision="fp16")
    with pytest.raises(OutputError, match="exists already"):
        resize(lora, lora, Rule(2))
    before = read_lora(lora).factors[NAMES[0]]
    resize(lora, lora, Rule(2), overwrite=True)
    assert (before.rank, read_lora(lora).factors[NAMES[0]].rank) == (8, 2)
