"""The path rule, against the ways out of a folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lora_trainer.config.options import options
from lora_trainer.errors import ConfigError
from lora_trainer.hosts.roots import PATH_KEYS, Roots


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data" / "cats").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    return tmp_path / "data"


def refused(roots: Roots, text: object) -> str:
    with pytest.raises(ConfigError) as caught:
        roots.check("train_data_dir", text)
    (line,) = caught.value.problems
    assert line.startswith("train_data_dir: expected ")
    assert repr(text) in line
    return line


def test_a_path_inside_is_resolved(root: Path) -> None:
    assert Roots([root], True).check("train_data_dir", str(root / "cats")) == (root / "cats").resolve()


def test_the_root_itself_and_what_is_not_there_yet_are_inside(root: Path) -> None:
    roots = Roots([root], True)
    assert roots.check("output_dir", str(root)) == root.resolve()
    assert roots.check("output_dir", str(root / "new" / "folder")) == root.resolve() / "new" / "folder"


def test_a_relative_path_starts_at_the_current_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert Roots([root], True).check("train_data_dir", "cats") == (root / "cats").resolve()
    monkeypatch.chdir(root.parent)
    assert "stays inside" in refused(Roots([root], True), "secret")


def test_outside_names_rule_and_roots(root: Path) -> None:
    line = refused(Roots([root, root.parent / "models"], True), str(root.parent / "secret"))
    assert "stays inside the allowed folders" in line
    assert f"allowed folders: {root}, {root.parent / 'models'}" in line


def test_a_name_that_only_begins_like_the_root_is_outside(root: Path) -> None:
    (root.parent / "data-of-others").mkdir()
    assert "stays inside" in refused(Roots([root], True), str(root.parent / "data-of-others"))


def test_what_is_outside_does_not_say_whether_it_exists(root: Path) -> None:
    roots = Roots([root], True)
    there, missing = str(root.parent / "secret"), str(root.parent / "absent")
    assert refused(roots, there).replace(there, "") == refused(roots, missing).replace(missing, "")


@pytest.mark.parametrize("step", ["..", "../data/cats", "cats/../cats", "cats\\..\\cats", "...", ".. /cats"])
def test_no_dots(root: Path, step: str) -> None:
    assert "a path without .." in refused(Roots([root], True), f"{root}/{step}")


@pytest.mark.parametrize("text", ["\\\\nas\\cats", "//nas/cats", "\\\\?\\C:\\cats", "//?/C:/cats", "/\\nas\\cats"])
def test_no_network_path(root: Path, text: str) -> None:
    assert "no network or \\\\?\\ path" in refused(Roots([root], True), text)


@pytest.mark.parametrize("text", ["C:cats", "c:", "Z:cats\\x"])
def test_no_path_relative_to_a_drive(root: Path, text: str) -> None:
    assert "no drive of Windows" in refused(Roots([root], True), text)


@pytest.mark.skipif(os.name == "nt", reason="there the drive of the root is fine")
def test_no_drive_where_there_are_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert "no drive of Windows" in refused(Roots([root], True), "D:\\cats")


@pytest.mark.parametrize("name", ["nul", "COM1.txt", "aux .png", "x:stream"])
def test_no_names_that_are_devices_or_streams_on_windows(root: Path, name: str) -> None:
    assert "none that Windows keeps" in refused(Roots([root], True), str(root / name))


def test_names_of_the_root_itself_are_not_judged(tmp_path: Path) -> None:
    root = tmp_path / "aux"
    root.mkdir()
    assert Roots([root], True).check("output_dir", str(root / "auxiliary")) == root.resolve() / "auxiliary"


@pytest.mark.parametrize("enforced", [True, False])
@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("cats\0.png", "NUL"),
        ("cats\ud800", "Unicode"),
        ("\\\\.\\PhysicalDrive0", "no device"),
        ("", "expected a path"),
        ("  ", "expected a path"),
        (7, "expected a path"),
        (["cats"], "expected a path"),
    ],
)
def test_malformed_is_refused_everywhere(
    root: Path, text: object, rule: str, enforced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    assert rule in refused(Roots([root], enforced), text)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
class TestLinks:
    def test_a_link_out_is_refused(self, root: Path) -> None:
        (root / "out").symlink_to(root.parent / "secret")
        assert "links followed" in refused(Roots([root], True), str(root / "out"))
        assert "links followed" in refused(Roots([root], True), str(root / "out" / "new"))

    def test_a_link_that_stays_inside_is_followed(self, root: Path) -> None:
        (root / "pets").symlink_to(root / "cats")
        assert Roots([root], True).check("train_data_dir", str(root / "pets")) == (root / "cats").resolve()

    def test_a_link_into_another_root_is_followed(self, root: Path) -> None:
        (root / "out").symlink_to(root.parent / "secret")
        roots = Roots([root, root.parent / "secret"], True)
        assert roots.check("train_data_dir", str(root / "out")) == (root.parent / "secret").resolve()

    def test_a_root_may_be_a_link_and_be_named_either_way(self, root: Path) -> None:
        link = root.parent / "link"
        link.symlink_to(root)
        for name in (link, root):
            assert Roots([link], True).check("train_data_dir", str(name / "cats")) == (root / "cats").resolve()

    @pytest.mark.parametrize("enforced", [True, False])
    def test_a_loop_of_links_is_refused(self, root: Path, enforced: bool) -> None:
        (root / "loop").symlink_to(root / "loop")
        assert "can be opened" in refused(Roots([root], enforced), str(root / "loop"))

    @pytest.mark.parametrize("enforced", [True, False])
    def test_pipes_and_sockets_are_refused(self, root: Path, enforced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(root)  # the name of a socket has to be short
        os.mkfifo("pipe")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
            assert "no device" in refused(Roots([root], enforced), "pipe")
            assert "no device" in refused(Roots([root], enforced), "socket")

    def test_devices_are_refused_without_roots_too(self) -> None:
        assert "no device" in refused(Roots([], False), "/dev/zero")
        assert "no device" in refused(Roots([Path("/dev")], True), "/dev/zero")


def test_a_local_webui_takes_any_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert Roots([root], False).check("train_data_dir", "../secret") == (root.parent / "secret").resolve()


def test_no_roots_allow_nothing(root: Path) -> None:
    assert "allowed folders: none" in refused(Roots([], True), str(root))


def test_settings_are_checked_together(root: Path) -> None:
    outside = str(root.parent / "secret")
    with pytest.raises(ConfigError) as caught:
        Roots([root], True).settings({"lora_rank": 8, **dict.fromkeys(PATH_KEYS, outside)})
    assert [line.split(":")[0] for line in caught.value.problems] == list(PATH_KEYS)


def test_settings_keep_what_names_no_path(root: Path) -> None:
    given = {"train_data_dir": str(root / "cats"), "metadata_path": None, "training_comment": "../x", "lora_rank": 4}
    checked = Roots([root], True).settings(given)
    assert checked == {**given, "train_data_dir": str((root / "cats").resolve())}


def test_every_setting_that_names_a_path_is_checked() -> None:
    # base_model is not among them: the WebUI trains on the checkpoint it has loaded.
    named = {key for key in options() if key.endswith(("_dir", "_path"))}
    assert named | {"initial_lora"} == set(PATH_KEYS)


@pytest.mark.parametrize(
    "step",
    ["%2e%2e", ".%2E", "%252e%252e", "．．", "‥", "..%2fsecret", "%c0%ae%c0%ae", "a%00", "%2525252525252e", "cats."],
)
def test_what_another_program_would_read_as_a_way_out(root: Path, step: str) -> None:
    refused(Roots([root], True), f"{root}/{step}")


@pytest.mark.parametrize("name", ["100%25 cats", "猫／犬", "50% off", "①"])
def test_names_that_only_look_encoded_are_fine(root: Path, name: str) -> None:
    assert Roots([root], True).check("train_data_dir", str(root / name)) == root.resolve() / name


@pytest.mark.parametrize("enforced", [True, False])
def test_an_over_long_path_is_refused_at_once(root: Path, enforced: bool) -> None:
    with pytest.raises(ConfigError, match="at most 4,096 characters"):
        Roots([root], enforced).check("train_data_dir", f"{root}/" + "a/" * 500_000)
