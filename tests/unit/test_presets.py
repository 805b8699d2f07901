"""Presets: what each sets, for which model, what wins over it, and the tab's choice of them."""

from __future__ import annotations

import json
import struct

import pytest
import yaml

from lora_trainer.api.schema import settings_schema
from lora_trainer.cli import config_of, main
from lora_trainer.config import build, replace
from lora_trainer.config import presets as declared
from lora_trainer.config.export import preset_table, template, to_header, to_yaml
from lora_trainer.config.options import options
from lora_trainer.config.presets import FAMILIES, NONE, PRESETS, Preset
from lora_trainer.config.sources import HEADER_KEY, family_of, read_file
from lora_trainer.errors import ConfigError
from lora_trainer.events import Notice
from lora_trainer.training.resume import FREE
from lora_trainer.ui import fields
from lora_trainer.ui.handlers import Handlers as Events
from lora_trainer.ui.ports import Checkpoint
from lora_trainer.ui.presets import Handlers, reason, touched
from tests.unit.test_run import of, train
from tests.unit.test_ui import FakeHost, changes, defaults

NEEDED = {"base_model": "m", "train_data_dir": "d"}
SD2_KEY = "cond_stage_model.model.token_embedding.weight"
SDXL_KEY = "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRESETS)
def test_each_is_valid_and_holds_only_what_differs_from_the_defaults(name, family):
    values = PRESETS[name].of(family)
    config = build(NEEDED, {"preset": name}, family=family)
    plain = build(NEEDED)
    assert config == replace(plain, preset=name, **values)
    assert values
    for key in values:
        assert getattr(config, key) != getattr(plain, key), key
    why = PRESETS[name].why
    assert why.endswith(".")
    assert ". " not in why


def test_the_ones_that_people_ask_for_are_there():
    assert list(PRESETS) == ["style", "character", "object", "trial", "low-memory"]
    assert options()["preset"].choices == (NONE, *PRESETS)
    assert settings_schema()["properties"]["preset"]["enum"] == sorted((NONE, *PRESETS))
    assert build(NEEDED, {"preset": NONE}) == build(NEEDED)


def test_any_setting_beside_it_wins_wherever_it_stands(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: object\ntrain_data_dir: d\nbase_model: m\nepochs: 3\n", encoding="utf-8")
    found = config_of(path, ["lora_rank=12"])
    assert (found.preset, found.epochs, found.lora_rank, found.crop) == ("object", 3, 12, "focus")
    for written in (["preset=character"], ["--preset", "Character"], ["--preset=character"]):
        found = config_of(path, written)
        assert (found.preset, found.epochs, found.train_text_encoder) == ("character", 3, True)


def test_sdxl_has_values_of_its_own_and_sd2_those_of_sd15(tmp_path):
    names = {"xl": SDXL_KEY, "sd": "cond_stage_model.transformer.text_model.final_layer_norm.weight", "sd2": SD2_KEY}
    found = {}
    for name, key in names.items():
        header = json.dumps({key: {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}}).encode()
        path = tmp_path / f"{name}.SafeTensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        found[name] = config_of(None, ["preset=character", "train_data_dir=d", f"base_model={path}"])
    for family in ("sd", "sd2"):
        assert (found[family].train_text_encoder, found[family].batch_size) == (True, 4)
    assert "SD1.5 and SD2: `train_text_encoder=true`;" in preset_table()
    assert (found["xl"].train_text_encoder, found["xl"].batch_size) == (False, 2)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for unread in ("torn.safetensors", "missing.safetensors", "a.ckpt"):
        assert family_of({"base_model": str(tmp_path / unread)}) == "sd15"
    assert family_of({}, {"base_model": 7}) == "sd15"


def test_an_unknown_one_is_refused_with_the_nearest():
    for given, near in {"stlye": "style", "low_memory": "low-memory", "charakter": "character"}.items():
        with pytest.raises(ConfigError, match=f"preset: expected none, style,.* found '{given}'; did you mean {near}"):
            build(NEEDED, {"preset": given})
    for given in (7, None, ["style"], {}, "x" * 1000):
        with pytest.raises(ConfigError, match=r"preset: expected none, style, .* or low-memory, found [^;]*$"):
            build(NEEDED, {"preset": given})


def test_a_contradiction_names_the_preset(monkeypatch):
    monkeypatch.setitem(declared.PRESETS, "character", Preset("Other.", {"epochs": 40, "min_snr_gamma": 5.0}))
    with pytest.raises(ConfigError, match=r"min_snr_gamma and debiased.*\(preset character gives min_snr_gamma=5\)"):
        build(NEEDED, {"preset": "character", "debiased_estimation_loss": True})
    with pytest.raises(ConfigError) as error:
        build(NEEDED, {"preset": "character", "min_snr_gamma": 4, "debiased_estimation_loss": True})
    assert "preset" not in str(error.value)


def header_of(tmp_path, config):
    header = json.dumps({"__metadata__": {HEADER_KEY: to_header(config)}}).encode()
    path = tmp_path / "made.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def test_a_run_is_repeated_with_its_preset_and_its_changes(tmp_path, monkeypatch):
    config = build(NEEDED, {"preset": "character", "train_text_encoder": False, "epochs": 3})
    path = header_of(tmp_path, config)
    (tmp_path / "made.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert build(read_file(path)) == build(read_file(tmp_path / "made.yaml")) == config
    # Also when the preset has become another one since.
    monkeypatch.setitem(declared.PRESETS, "character", Preset("Other.", {"train_text_encoder": True, "epochs": 99}))
    assert build(read_file(path)) == config
    assert "preset" in FREE


def test_one_that_would_only_lend_its_name_is_refused(tmp_path):
    path = header_of(tmp_path, build(NEEDED))
    with pytest.raises(ConfigError, match="preset: style changes nothing, since lora_rank, epochs are"):
        config_of(path, ["preset=style"])
    assert config_of(header_of(tmp_path, build(NEEDED, {"preset": "style"})), ["preset=style"]).lora_rank == 16
    copied = {**yaml.safe_load(template()), "preset": "trial"}
    with pytest.raises(ConfigError, match="preset: trial changes nothing, since trial is given too"):
        build(copied)


def test_options_prints_them(capsys):
    assert main(["options"]) == 0
    out = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert f"| `{name}` | {preset.why} |" in out
    assert "SDXL: `learning_rate=0.0002` `batch_size=2`" in out


def test_the_trial_preset_is_a_trial(settings):
    del settings["epochs"]
    events, _ = train(settings, resolution=64, preset="trial")
    assert any("trial passed: the full run has" in event.text for event in of(events, Notice))


# In the tab


def controls(**shown):
    values = defaults() | shown
    return [values[key] for key in touched()]


def chosen(host, before, name, **shown):
    current, why, *updates = Handlers(host, changes).choose(before, name, *controls(**shown))
    assert current == name
    assert why == reason(name)
    return {key: update["value"] for key, update in zip(touched(), updates, strict=True) if update}


def test_choosing_one_sets_its_controls_and_says_why():
    host = FakeHost(model=Checkpoint("base", ()))
    assert chosen(host, NONE, "style") == {"lora_rank": 16, "epochs": 15}
    assert PRESETS["style"].why in reason("style")
    assert "none" in reason(NONE)
    host.model = Checkpoint("base", (), "sdxl")
    assert chosen(host, NONE, "style")["learning_rate"] == 2e-4
    assert set(touched()) <= {option.key for option in fields.shown()}


def test_another_one_takes_back_what_was_not_changed_by_hand():
    host = FakeHost()
    after = {"lora_rank": 16, "epochs": 40.0, "crop": "focus"}
    assert chosen(host, "object", NONE, **after) == {"lora_rank": 8, "epochs": 10, "crop": "center"}
    by_hand = after | {"lora_rank": 12, "epochs": None}
    assert chosen(host, "object", NONE, **by_hand) == {"crop": "center"}
    assert chosen(host, "object", "object", **by_hand) == {"lora_rank": 16, "epochs": 40, "crop": "focus"}
    swapped = chosen(host, "object", "style", **after)
    assert (swapped["lora_rank"], swapped["epochs"], swapped["crop"]) == (16, 15, "center")


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "trial"])
def test_what_the_tab_submits_is_the_preset(name):
    host = FakeHost()
    values = defaults() | {"preset": name, "train_data_dir": "d"} | chosen(host, NONE, name)
    Events(host, changes).submit(tuple(values), trial=False)("", "", *values.values())
    (given,) = host.submitted
    assert build(given, {"base_model": "m"}) == build(NEEDED, {"preset": name})


def test_train_with_the_trial_preset_is_a_trial():
    host = FakeHost()
    values = defaults() | {"preset": "trial", "train_data_dir": "d"}
    Events(host, changes).submit(tuple(values), trial=False)("", "", *values.values())
    assert build(host.submitted[0], {"base_model": "m"}).trial


def test_a_control_that_was_emptied_by_hand_stays_empty(monkeypatch):
    monkeypatch.setitem(declared.PRESETS, "style", Preset("Sharp.", {"lora_alpha": 4.0, "resolution": 768}))
    host = FakeHost()
    assert chosen(host, NONE, "style") == {"lora_alpha": "4.0", "resolution": "768"}
    assert chosen(host, "style", NONE, lora_alpha="4", resolution="512") == {"lora_alpha": ""}
    given = fields.settings(defaults() | {"preset": "style", "train_data_dir": "d", "resolution": "640"})
    found = build(given, {"base_model": "m"})
    assert (found.lora_alpha, found.resolution) == (None, 640)
