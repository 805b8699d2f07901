"""A folder spoiled in every way known: every damage is named, nothing crashes, and what is good trains."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest

from lora_trainer.cli import main
from lora_trainer.doctor import Report, examine
from lora_trainer.doctor.subject import Wanted
from tests.spoiled import FILES, spoil


@pytest.fixture
def spoiled(tmp_path, monkeypatch) -> tuple[Path, dict[str, str]]:
    folder = tmp_path / "spoiled"
    folder.mkdir()
    damage = spoil(folder)
    opened = builtins.open

    def refuse_locked(file, *arguments, **options):
        if str(file).endswith("locked.png"):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *arguments, **options)

    # Root may read everything, whatever a file's mode says.
    monkeypatch.setattr(builtins, "open", refuse_locked)
    return folder, damage


def look(folder: Path) -> Report:
    return examine(folder, wanted=Wanted(resolution=128))


def test_every_damage_is_named_and_nothing_good_is_blamed(spoiled):
    folder, damage = spoiled
    assert len(FILES) >= 40
    assert len(set(damage.values())) >= 20
    report = look(folder)
    named = {(report.name(file), finding.kind) for finding in report.findings for file in finding.files}
    assert set(damage.items()) - named == set()
    good = [name for name, (_, kind) in FILES.items() if kind is None and not name.endswith(".txt")]
    blamed = {name for name, _ in named}
    # Of two that are alike both are named; what stands between a good picture and training is its caption.
    assert blamed & set(good) <= {"good00.png", "good01.png", "no text.png", "more/good.png"}
    assert any("not Unicode" in finding.reason for finding in report.findings)


def test_the_command_tells_them_all_to_a_machine(spoiled, tmp_path, capsys):
    folder, damage = spoiled
    assert main(["check", str(folder), "--resolution", "128", "--json", "--sheet", str(tmp_path / "s.jpg")]) == 2
    told = json.loads(capsys.readouterr().out)
    assert set(damage) <= {file for finding in told["findings"] for file in finding["files"]}
    assert (tmp_path / "s.jpg").is_file()
    assert main(["check", str(folder), "--resolution", "128"]) == 2
    out = capsys.readouterr().out
    assert "Traceback" not in out
    assert all(line.isprintable() for line in out.splitlines())


def test_what_is_left_without_the_errors_trains(spoiled, settings, capsys):
    folder, _ = spoiled
    gone = [file for finding in look(folder).findings if finding.level == "error" for file in finding.files]
    # With the picture whose text was no text.
    for file in (*gone, folder / "no text.png"):
        file.unlink()
    rows = (folder / "metadata.csv").read_text(encoding="utf-8").splitlines()
    kept = [row for row in rows if (folder / row.split('"')[1]).exists()]
    (folder / "metadata.csv").write_text("\n".join(kept), encoding="utf-8")
    after = look(folder)
    assert after.count("error") == 0
    assert after.usable == len(after.pictures) >= 30
    given = settings | {"train_data_dir": str(folder), "resolution": 128, "epochs": 1, "batch_size": 8}
    assert main(["train", *(f"{key}={value}" for key, value in given.items()), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["state"] == "done"
    assert f"{after.usable} images" in captured.err
    skipped = [line for line in captured.err.splitlines() if "skipped" in line]
    assert all("not Unicode" in line or ".heic" in line for line in skipped)
