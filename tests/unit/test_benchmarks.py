"""What is made of measured steps: the plot, the tables, the estimate. What measures them needs a GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import (
    drift,
    estimate,
    figures,
    perceptual,
    pictures,
    plot,
    plot_quality,
    presets,
    quality,
    step,
    stopping,
)
from benchmarks.styles import STYLES, folders
from lora_trainer.adapters.kinds import KINDS
from lora_trainer.config.presets import preset_values
from lora_trainer.models.single_file import model_of, place
from lora_trainer.models.storage import STORAGES
from lora_trainer.models.stored import Stored

ROOT = Path(__file__).parents[2]
NEWEST = sorted((ROOT / "benchmarks" / "results").glob("*-h100.jsonl"))[-1]


def test_the_page_and_the_plot_are_fresh():
    lines = plot.read([NEWEST])
    text = plot.PAGE.read_text(encoding="utf-8")
    again = f"run: python -m benchmarks.plot {NEWEST.relative_to(ROOT)}"
    assert text == plot.page(text, lines), again
    assert plot.PICTURE.read_text(encoding="utf-8") == plot.svg(lines), again


def test_a_plot_has_a_bar_as_long_as_each_step():
    lines = [{**plot.read([NEWEST])[0], "median_ms": ms, "card": "a <card>"} for ms in (10.0, 20.0)]
    lines[1] |= {"what": "kohya", "peak_reserved_bytes": None}
    root = ElementTree.fromstring(plot.svg(lines))
    bars = [float(rect.get("width")) for rect in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert bars[1] == pytest.approx(2 * bars[0])
    words = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a <card>" in words[0]
    assert words[-2].startswith("kohya, SD1.5")
    assert words[-1] == "20.0 ms"


def test_an_estimate_is_of_the_measured_step():
    h100 = estimate.MEASURED[0]
    half = estimate.Card("half", 8, h100.tflops / 2, h100.bandwidth / 2)
    least, most = estimate.scaled(10.0, h100, half)
    assert most == pytest.approx(20.0)
    assert least == pytest.approx((8.3 / 2 + 1.7) * 2)


def test_a_measured_step_can_be_plotted(tmp_path, monkeypatch, capsys):
    """The line that `benchmarks.step` adds to a file has what the plot reads."""
    report = {"median_ms": 12.5, "steps": 100, "peak_reserved_bytes": 2**31, "told": []}
    monkeypatch.setattr(step, "measure", lambda work, **given: dict(report))
    out = tmp_path / "new.jsonl"
    for _ in range(2):
        step.main(["sdxl", "batch=2", "resolution=1024", "checkpointing=1", "kernels=plain", f"out={out}"])
    first, second = plot.read([out])
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == first
    assert plot.label(second) == "SDXL, 1024², batch 2, no dropout, checkpointing, plain torch"
    row = plot.table([first]).splitlines()[2]
    assert row == "| SDXL, 1024², batch 2, no dropout, checkpointing, plain torch | 12.5 | 160 | 2.00 |"


def test_every_kind_of_adapter_is_measured_by_one_command(tmp_path, monkeypatch):
    report = {"median_ms": 12.5, "steps": 100, "peak_reserved_bytes": 2**31, "told": []}
    monkeypatch.setattr(step, "measure", lambda work, **given: dict(report))
    out = tmp_path / "kinds.jsonl"
    step.main(["sd15", "batch=4", "adapter=all", f"out={out}"])
    lines = plot.read([out])
    assert [line["adapter"] for line in lines] == list(KINDS)
    assert plot.label(lines[-1]) == "SD1.5, 512², batch 4, no dropout, oft"


def test_figures_are_the_same_every_time_and_never_alone(tmp_path):
    captions: set[str] = set()
    for name in figures.FIGURES:
        learned, held_out = figures.write_figure(name, tmp_path)
        again = figures.write_figure(name, tmp_path / "again")[0]
        rows = [(folder / "metadata.csv").read_text().splitlines() for folder in (learned, held_out)]
        assert len(rows[0]) == figures.TRAINED
        assert len(rows[1]) >= 64
        found = {row.partition(",")[2] for part in rows for row in part}
        assert len(found) == sum(map(len, rows))
        assert all(f"noto emoji of {name} and " in caption for caption in found)
        assert (learned / "003.png").read_bytes() == (again / "003.png").read_bytes()
        picture = np.asarray(Image.open(learned / "003.png").convert("L"))
        left, right = (picture[:, part] < 240 for part in (slice(0, 40), slice(-30, None)))
        assert left.any()
        assert right.any()
        captions |= found
    assert len(captions) > 300


def test_each_style_draws_the_same_subjects_in_its_own_colours(tmp_path):
    seen = {}
    for style in STYLES:
        learned, held_out = folders(style, tmp_path)
        names = sorted(path.name for path in learned.glob("*.png"))
        assert len(names) == 120
        assert len(list(held_out.glob("*.png"))) == 64
        assert (learned / "metadata.csv").read_text(encoding="utf-8").count("\n") >= 119
        seen[style] = np.asarray(Image.open(learned / names[0]).convert("RGB"), float).mean((0, 1))
    colours = list(seen.values())
    assert all(np.abs(a - b).max() > 20 for i, a in enumerate(colours) for b in colours[:i])


ASKED = {"visits": 1200, "pictures": 24, "held_out": 8, "validations": 10, "overrides": []}
ASKED |= {"base": None, "family": "sd15"}


@pytest.mark.parametrize("name", quality.SETTINGS)
def test_all_settings_see_as_many_pictures(name, tmp_path):
    config = quality.config_of(name, "ink", 3, tmp_path, argparse.Namespace(**ASKED))
    assert config.max_train_steps * config.batch_size * config.gradient_accumulation_steps == 1200
    assert config.validate_every == config.max_train_steps // 10
    assert config.seed == 3
    assert len(list(Path(config.train_data_dir).glob("*.png"))) == 24
    assert len(list(Path(config.validation_data_dir).glob("*.png"))) == 8


@pytest.mark.parametrize("name", sorted(quality.SETTINGS.keys() - {"default", *quality.PRESETS}))
def test_what_others_do_not_have_is_not_given_to_them(name, tmp_path):
    config = quality.config_of(name, "ink", 3, tmp_path, argparse.Namespace(**ASKED))
    assert config.ema_decay == 0
    assert config.loraplus_lr_ratio == 1
    assert config.lora_dropout == 0


def test_a_preset_is_measured_as_it_is_for_the_family_of_the_base(tmp_path):
    asked = argparse.Namespace(**ASKED | {"base": tmp_path / "xl.safetensors", "family": "sdxl"})
    config = quality.config_of("character", "ink", 3, tmp_path, asked)
    assert Path(config.base_model) == asked.base
    told = {key: getattr(config, key) for key in preset_values("character", "sdxl") if key != "epochs"}
    assert told == {key: value for key, value in preset_values("character", "sdxl").items() if key != "epochs"}
    assert config.max_train_steps * config.batch_size * config.gradient_accumulation_steps == 1200


def test_the_page_of_the_defaults_is_fresh():
    (results,) = sorted((ROOT / "benchmarks" / "results").glob("*-defaults.jsonl"))
    lines, text = plot.read([results]), plot_quality.PAGE.read_text(encoding="utf-8")
    again = f"run: python -m benchmarks.plot_quality {results.relative_to(ROOT)}"
    assert text == plot_quality.page(text, plot_quality.table(lines)), again
    assert plot_quality.PICTURE.read_text(encoding="utf-8") == plot_quality.svg(lines), again


def test_settings_are_compared_by_seeds_that_saw_all_styles():
    def line(settings: str, style: str, seed: int, final: float) -> dict:
        return {"settings": settings, "style": style, "seed": seed, "base": 0.5, "final": final}

    whole = [line(s, t, q, f) for s, f in (("default", 0.2), ("peer", 0.3)) for t in ("ink", "chalk") for q in (1, 2)]
    rows = plot_quality.table([*whole, line("peer", "ink", 3, 0.01)]).splitlines()
    assert rows[2] == "| default | 0.4000 |  | 4 |"
    assert rows[3] == "| peer | 0.6000 | +0.2000 ± 0.0000 | 4 |"


def test_a_replayed_run_ends_when_its_curve_stands_still():
    losses = [1.0, 0.6, 0.5, 0.49, 0.49, 0.495, 0.48, 0.4]
    line = {"base": 1.0, "curve": [(10 * at, loss, loss) for at, loss in enumerate(losses)]}
    points = stopping.curve(line, 1)
    best, end = stopping.picked(points, 3)
    assert (best.lora, end.step) == (0.49, 50)
    assert stopping.picked(points, 100) == (points[-1], points[-1])
    assert [point.step for point in stopping.curve(line, 2)] == [0, 20, 40, 60]


def test_ranks_agree_or_not():
    assert stopping.spearman([1, 5, 9], [0.1, 0.2, 0.9]) == pytest.approx(1)
    assert stopping.spearman([1, 5, 9], [3, 2, 1]) == pytest.approx(-1)
    assert stopping.ranks([2, 1, 2]) == [1.5, 0, 1.5]


def test_a_runs_row_says_how_score_loss_and_pictures_agree():
    line = {"style": "ink", "seed": 1, "base": 1.0, "steps": 30}
    line |= {"curve": [(0, 1.0, 1.0), (10, 0.6, 0.6), (20, 0.5, 0.5), (30, 0.4, 0.4)]}
    line |= {"compared": [(0, 0, 0, 0), *((step, step / 60, 0.1, 0) for step in (10, 20, 30))]}
    far = {10: [0.3, 0.1, 0.3], 20: [0.2, 0.2, 0.2], None: [0.1, 0.3, 0.1]}
    seen = [
        {"style": "ink", "seed": 1, "step": step, "distance": sum(draws) / 3, "distance_draws": draws}
        for step, draws in far.items()
    ]
    *_, row, total = stopping.correlations([line], seen)
    assert row == "| ink 1 | 3 | 1.00 | 1.00 | 1.00 | -1.00 |"
    assert total == "| mean | | 1.00 | 1.00 | 1.00 | -1.00 |"
    for each in seen:
        del each["distance_draws"]
    assert list(stopping.correlations([line], seen))[2] == "| ink 1 | 3 | 1.00 | 1.00 | 1.00 |  |"


def test_drawings_are_as_far_as_their_thumbnails_differ(tmp_path):
    real = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert pictures.distance(real, real) == 0
    assert pictures.distance(real + 0.5, real) == pytest.approx(0.25)
    for name in ("a.safetensors", "a-step00000020.safetensors", "a-step00000003.safetensors"):
        (tmp_path / name).touch()
    files = pictures.loras(tmp_path)
    assert [pictures.step(path) for path in files] == [3, 20, None]
    assert pictures.chosen(files, [], last=False) == files
    assert pictures.chosen(files, [20], last=False) == files[1:2]
    assert pictures.chosen(files, [3], last=True) == [files[0], files[2]]
    lines = pictures.measured([real, real + 0.5], real, {"distance": pictures.distance})
    assert lines == {"distance": 0.125, "distance_draws": [0.0, 0.25]}


def test_another_network_tells_pictures_apart():
    torch.manual_seed(0)
    judge = torch.nn.Module()
    judge._conv_stem, judge._bn0, judge._swish = torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Identity(), torch.nn.ReLU()
    judge._blocks = torch.nn.ModuleList([torch.nn.Conv2d(8, 8, 3, 1, 1), torch.nn.Conv2d(8, 4, 3, 2, 1)])
    real = torch.rand(18, 3, 32, 32) * 2 - 1
    assert [level.shape[1:] for level in perceptual.levels(judge, real)] == [(8, 112, 112), (4, 56, 56)]
    nearer, farther = (perceptual.perceptual(judge, real + by * torch.randn_like(real), real) for by in (0.1, 1))
    assert perceptual.perceptual(judge, real, real) == 0 < nearer < farther < 4
    each = [
        perceptual.perceptual(judge, one, other) for one, other in zip(real[:-1, None], real[1:, None], strict=True)
    ]
    assert perceptual.perceptual(judge, real[:-1], real[1:]) == pytest.approx(sum(each) / len(each))


def test_a_measured_base_is_stored_as_a_runs_is(checkpoint):
    def opened(storage):
        family, state = place(checkpoint, torch.device("cpu"), torch.float32, storage=storage)
        return model_of(state, family, checkpoint, device=torch.device("cpu"), hashes=lambda: None).unet

    theirs, mine, whole = opened(STORAGES["fp8"]), opened(None), opened(None)
    step.store(mine, STORAGES["fp8"])
    names = [
        {name for name, weight in unet.named_parameters() if isinstance(weight, Stored)} for unet in (theirs, mine)
    ]
    assert names[0] == names[1] != set()
    saved = sum(3 * weight.numel() for weight in mine.parameters() if isinstance(weight, Stored))
    assert step.bytes_of(mine) == step.bytes_of(theirs) == step.bytes_of(whole) - saved


def test_settings_are_ranked_by_their_best_and_told_after_so_many_epochs():
    line = {"pictures": 16, "visits": 640, "steps": 160, "base": 0.5}
    good, bad = [[0, 0.5, 0.5], [40, 0.4, 0.4], [80, 0.2, 0.1], [160, 0.3, 0.1]], [[0, 0.5, 0.5], [160, 0.45, 0.4]]
    lines = [{**line, "settings": name, "curve": curve} for name, curve in (("bad", bad), ("good", good))]
    assert list(presets.rows(lines, [10, 30])) == [
        "| settings | 10 epochs | 30 epochs | best | at step | runs |",
        "|---|---|---|---|---|---|",
        "| good | 0.800 | 0.400 | 0.400 | 80 | 1 |",
        "| bad | 1.000 | 1.000 | 0.900 | 160 | 1 |",
    ]


def test_drift_is_compared_where_the_held_out_loss_is_the_same():
    def saved(run, *points):
        return [{"seed": 1, "run": run, "held_out": loss, "drift": drift} for loss, drift in points]

    plain = saved("base", (0.5, 0.0)) + saved("plain", (0.4, 0.1), (0.3, 0.2))
    kept = saved("output", (0.45, 0.02), (0.35, 0.03), (0.2, 0.04))
    *_, row = drift.rows(plain + kept)
    assert row == "| output | 1 | 0.3500 | 0.1500 | 0.0300 | 80% | 60% to 60% |"
    assert drift.drift_at(0.2, plain) is None
