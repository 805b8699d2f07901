"""install.py adds what a host lacks, moves nothing that is there, and never stops the WebUI from starting."""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
A1111 = {"transformers": [], "accelerate": [], "safetensors": []}
FORGE = {
    **A1111,
    "diffusers": ["importlib-metadata", "numpy"],
    "peft": [],
    "importlib_metadata": ["zipp >=3.20"],
    "zipp": [],
}
REFORGE = {**FORGE}
del REFORGE["peft"]
DIFFUSERS = ["diffusers==0.31.0", "importlib_metadata==8.5.0", "zipp==3.20.2"]
ALL = [*DIFFUSERS, "peft==0.13.2", "msgspec==0.22.0"]


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lora_trainer_install", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def host(monkeypatch):
    """Puts the given packages, each with its requirements, and tomli in place of the installed ones."""

    def pretend(packages):
        packages = {"tomli": [], **packages}
        if packages["tomli"] is None:
            del packages["tomli"]

        def distribution(name):
            if name not in packages:
                raise importlib.metadata.PackageNotFoundError(name)
            return SimpleNamespace(requires=packages[name])

        monkeypatch.setattr(importlib.metadata, "distribution", distribution)
        monkeypatch.delenv("INDEX_URL", raising=False)

    return pretend


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: notes its calls and answers as set."""
    fake = SimpleNamespace(calls=[], returncode=0, output="")

    def run(words, **_):
        fake.calls.append(words)
        return SimpleNamespace(returncode=fake.returncode, stdout=fake.output)

    monkeypatch.setattr(subprocess, "run", run)
    return fake


@pytest.mark.parametrize(
    ("packages", "expected"),
    [
        pytest.param(A1111, ALL, id="A1111"),
        pytest.param(FORGE, ["msgspec==0.22.0"], id="Forge"),
        pytest.param(REFORGE, ["peft==0.13.2", "msgspec==0.22.0"], id="reForge"),
        pytest.param({**A1111, "zipp": []}, [ALL[0], ALL[1], *ALL[3:]], id="zipp is there"),
        pytest.param({**A1111, "importlib_metadata": ["zipp>=0.5"]}, [ALL[0], *ALL[2:]], id="only zipp is not"),
        pytest.param(
            {"diffusers": ["Importlib.Metadata; x"], "peft": [], "msgspec": []}, DIFFUSERS[1:], id="asked for"
        ),
        pytest.param({"diffusers": ["numpy"], "peft": [], "msgspec": []}, [], id="not asked for"),
        pytest.param(
            {"diffusers": ["importlib-metadata ; extra == 'x'"], "peft": [], "msgspec": []}, [], id="only an extra's"
        ),
    ],
)
def test_adds_only_what_the_host_lacks(install, host, packages, expected):
    host(packages)
    assert install.missing() == expected


@pytest.mark.parametrize(("version", "expected"), [((3, 10, 13), ["tomli==2.0.2"]), ((3, 11, 0), [])])
def test_what_reads_toml_is_added_where_python_does_not(host, monkeypatch, version, expected):
    monkeypatch.setattr(sys, "version_info", version)
    install = runpy.run_path(str(ROOT / "install.py"))
    host({**FORGE, "msgspec": [], "tomli": None})
    assert install["missing"]() == expected
    host({**FORGE, "msgspec": []})
    assert install["missing"]() == []


def test_one_pip_call_that_moves_no_other_package(install, host, pip, capsys):
    host(A1111)
    install.main()
    assert pip.calls == [[sys.executable, "-m", "pip", "install", "--no-deps", "--prefer-binary", *ALL]]
    assert "installed diffusers==0.31.0" in capsys.readouterr().out


def test_follows_the_package_mirror_of_the_webui(install, host, pip, monkeypatch):
    host(FORGE)
    monkeypatch.setenv("INDEX_URL", "https://mirror.example/simple")
    install.main()
    assert pip.calls[0][-2:] == ["--index-url", "https://mirror.example/simple"]
    assert install.command().endswith("msgspec==0.22.0 --index-url https://mirror.example/simple")


def test_a_complete_host_is_left_alone_in_silence(install, host, pip, capsys):
    host({**FORGE, "msgspec": []})
    install.main()
    assert pip.calls == []
    assert capsys.readouterr().out == ""
    assert install.command() == ""


def test_a_failure_is_one_message_with_the_reason_and_the_command(install, host, pip, capsys, monkeypatch):
    host(FORGE)
    monkeypatch.setattr(sys, "executable", "/a folder/python")
    pip.returncode, pip.output = 1, "Looking\nERROR: No matching distribution found for msgspec\n[notice] a new pip\n"
    install.main()
    out = capsys.readouterr().out
    assert "could not install msgspec==0.22.0" in out
    assert "ERROR: No matching distribution found for msgspec" in out
    assert "notice" not in out
    assert out.count(install.command()) == 1
    quote = '"' if sys.platform == "win32" else "'"
    assert install.command().startswith(f"{quote}/a folder/python{quote} -m pip install --no-deps")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", "pip gave no reason."),
        ("No module named pip\n", "No module named pip"),
        ("WARNING: Retrying after connection broken by 'X'\nERROR: No matching distribution found", "machine online?"),
    ],
)
def test_the_reason_when_pip_is_short_or_misleading(install, host, pip, capsys, output, reason):
    host(FORGE)
    pip.returncode, pip.output = 1, output
    install.main()
    out = capsys.readouterr().out
    assert reason in out
    assert "No matching" not in out


def test_loads_nothing_but_the_standard_library():
    # -S hides site-packages: at the first start there is nothing in them for us.
    result = subprocess.run([sys.executable, "-I", "-S", "-c", "import runpy; runpy.run_path('install.py')"], cwd=ROOT)
    assert result.returncode == 0


def test_metadata_is_what_the_webui_reads():
    config = configparser.ConfigParser()
    assert config.read(ROOT / "metadata.ini", encoding="utf8")
    assert config.get("Extension", "Name") == "lora-trainer"
    # The WebUI lowers a required name but not its list: a required built-in "Lora" would count as absent.
    assert not config.has_option("Extension", "Requires")
    # Callback sections must start with the folder's name, which is the user's choice.
    assert not [section for section in config.sections() if section.startswith("callbacks/")]
