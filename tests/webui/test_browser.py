"""In a real WebUI and a real browser: drop pictures, check, caption, edit and train, without leaving the tab.

Runs where also selenium, Chromium and its driver are installed.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.captioners import KINDS, drawing, sentence
from tests.webui.server import DEMO, ROOT, python

EDITOR = "#lora_trainer_editor"


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("selenium")
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium with a chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


class Page:
    """The tab. Elements are looked up anew for each act, since gradio replaces them."""

    def __init__(self, browser) -> None:
        from selenium.webdriver.common.keys import Keys

        self.browser, self.keys = browser, Keys

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.until(lambda: self.all(selector)[0], selector)

    def text(self, selector: str) -> str:
        # It may be drawn anew between finding and reading it.
        return self.until(lambda: [self.all(selector)[0].text], selector)[0]

    def findings(self) -> str:
        """What the doctor says, the folded parts too."""
        return self.one("#lora_trainer_findings").get_attribute("textContent")

    def value(self, id: str) -> str:
        return self.one(f"#{id} textarea, #{id} input").get_attribute("value")

    def click(self, selector: str, words: str = "") -> None:
        """On the element that is, or begins with these words."""
        script = "return [...document.querySelectorAll(arguments[0])].find((e) => e.innerText.startsWith(arguments[1]))"
        self.until(lambda: self.browser.execute_script(script, selector, words), f"{selector} {words}").click()

    def fill(self, id: str, text: str) -> None:
        field = self.one(f"#{id} textarea, #{id} input")
        field.send_keys(self.keys.CONTROL, "a")
        field.send_keys(text)

    def press(self, *keys: str, control: bool = False) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        actions = ActionChains(self.browser)
        if control:
            actions.key_down(self.keys.CONTROL)
        actions.send_keys(*keys)
        if control:
            actions.key_up(self.keys.CONTROL)
        actions.perform()

    def until(self, found: Callable, what: str, timeout: float = 60):
        deadline = time.monotonic() + timeout
        while True:
            try:
                if result := found():
                    return result
            except Exception as error:  # not there yet, or replaced meanwhile
                last = error
            else:
                last = None
            assert time.monotonic() < deadline, (what, last)
            time.sleep(0.1)


@pytest.fixture
def page(browser, webui) -> Page:
    browser.get(f"http://127.0.0.1:{webui.port}")
    opened = Page(browser)
    opened.click("#tabs > .tab-nav button", "Train LoRA")
    opened.until(lambda: opened.one("#lora_trainer_edit").is_displayed(), "the tab")
    return opened


@pytest.fixture(scope="module")
def captioner(launch, tmp_path_factory) -> Path:
    """A small BLIP that knows the drawings, made by the WebUI's own transformers."""
    folder = tmp_path_factory.mktemp("blip")
    script = f"from pathlib import Path; from tests.captioners import train_blip; train_blip(Path({str(folder)!r}))"
    subprocess.run([python(), "-c", script], cwd=ROOT, check=True, capture_output=True)
    return folder


def test_from_dropped_pictures_to_a_lora_in_one_tab(page: Page, webui, captioner: Path, tmp_path: Path) -> None:
    dropped = [tmp_path / f"IMG_{number:04}.png" for number in range(len(KINDS))]
    for number, (path, kind) in enumerate(zip(dropped, KINDS, strict=True)):
        drawing(*kind, seed=1000 + number, size=128).save(path)
    page.one("#lora_trainer_drop input[type=file]").send_keys("\n".join(map(str, dropped)))
    folder = Path(page.until(lambda: page.value("lora_trainer_train_data_dir"), "the upload"))
    page.fill("lora_trainer_resolution", "128")
    page.click("#lora_trainer_check")
    page.until(lambda: "no captions were found" in page.findings(), "what the doctor says")

    page.click("#lora_trainer_captioning .label-wrap")
    page.click("#lora_trainer_captioner input")
    page.click("#lora_trainer_captioner li", "A captioner or tagger in a folder")
    page.until(lambda: page.one("#lora_trainer_captioner_folder").is_displayed(), "where the captioner is asked for")
    page.fill("lora_trainer_captioner_folder", str(captioner))
    page.click("#lora_trainer_caption_begin")
    page.until(lambda: page.all("#lora_trainer_captions .lt-done"), "the captions", timeout=120)

    page.click("#lora_trainer_edit")
    page.until(lambda: len(page.all(f"{EDITOR} .lt-cell img[src]")) == len(KINDS), "the pictures")
    shown = [cell.text for cell in page.all(f"{EDITOR} .lt-words")]
    assert sum(words == sentence(*kind) for words, kind in zip(shown, KINDS, strict=True)) >= len(KINDS) - 2, shown
    edit(page, folder, [path.with_suffix(".txt").name for path in dropped])
    page.click("#lora_trainer_check")
    page.until(lambda: "no captions were found" not in page.findings(), "another finding")

    page.fill("lora_trainer_output_name", "from-the-tab")
    page.fill("lora_trainer_epochs", "1")
    page.click("#lora_trainer_train")
    page.until(lambda: page.all("#lora_trainer_panel .lt-chip.lt-done"), "the LoRA", timeout=180)
    assert (webui.data / "models" / "Lora" / "from-the-tab.safetensors").is_file()
    ours = [entry["message"] for entry in page.browser.get_log("browser") if "lora" in entry["message"].lower()]
    assert ours == []


def edit(page: Page, folder: Path, files: list[str]) -> None:
    """By the keyboard: two captions anew, a tag for two selected ones; then for all, taken back, and again."""

    def caption(number: int) -> str:
        return (folder / files[number]).read_text().strip()

    first, third = caption(0), caption(2)
    page.press(page.keys.ENTER, ", <b>shiny</b>")
    page.press(page.keys.ENTER, control=True)
    page.until(lambda: files[1][:8] in page.text(f"{EDITOR} .lt-name"), "the next picture")
    page.press("a", control=True)
    page.press("a second one")
    page.press(page.keys.ENTER, control=True)
    page.until(lambda: caption(1) == "a second one", "the second caption")
    assert caption(0) == f"{first}, <b>shiny</b>"
    assert page.text(f"{EDITOR} .lt-words") == f"{first}, <b>shiny</b>"
    page.press(page.keys.ESCAPE)
    page.press(" ", page.keys.ARROW_RIGHT, " ")
    page.until(lambda: "In 2 selected pictures" in page.text(f"{EDITOR} aside"), "two selected")
    page.one(f"{EDITOR} input[placeholder='tag, or several']").send_keys("painted")
    page.click(f"{EDITOR} aside button", "Add")
    page.until(lambda: caption(2) == f"{third}, painted" and caption(3).endswith(", painted"), "a tag for two")
    assert [number for number in range(len(files)) if caption(number).endswith(", painted")] == [2, 3]
    page.click(f"{EDITOR} aside button", "select none")
    page.click(f"{EDITOR} aside button", "In front")
    page.until(lambda: caption(1) == "painted, a second one", "a tag for all")
    page.click(f"{EDITOR} header button", "Undo")
    page.until(lambda: caption(1) == "a second one", "undone")
    page.click(f"{EDITOR} aside button", "In front")
    page.until(lambda: caption(1) == "painted, a second one", "done again")
    page.click(f"{EDITOR} header button", "Close")
    page.until(lambda: not page.all(EDITOR), "closed")


def test_what_another_program_writes_is_shown_and_kept(page: Page, webui, tmp_path: Path) -> None:
    shutil.copy(DEMO / "twemoji" / "001-ticket.png", tmp_path)
    (tmp_path / "001-ticket.txt").write_text("before")
    page.fill("lora_trainer_train_data_dir", str(tmp_path))
    page.click("#lora_trainer_edit")
    page.until(lambda: page.text(f"{EDITOR} .lt-words") == "before", "the caption")
    (tmp_path / "001-ticket.txt").write_text("theirs")
    page.press(page.keys.ENTER, ", mine")
    page.press(page.keys.ENTER, control=True)
    page.until(lambda: "changed by another program" in page.text(f"{EDITOR} .lt-error"), "the warning")
    page.until(lambda: page.text(f"{EDITOR} .lt-words") == "theirs", "what is there now")
    assert (tmp_path / "001-ticket.txt").read_text() == "theirs"
    # What was typed is still there, to be saved knowingly.
    assert page.one(f"{EDITOR} textarea").get_attribute("value") == "before, mine"
    page.press(page.keys.ENTER, control=True)
    page.until(lambda: (tmp_path / "001-ticket.txt").read_text() == "before, mine", "saved")


def test_a_learning_rate_is_found_drawn_and_taken(page: Page, webui, tmp_path: Path) -> None:
    for path in sorted((DEMO / "twemoji").glob("00[1-4]*.png")):
        shutil.copy(path, tmp_path)
        (tmp_path / path.with_suffix(".txt").name).write_text(f"twemoji emoji of {path.stem[4:].replace('-', ' ')}")
    page.fill("lora_trainer_train_data_dir", str(tmp_path))
    page.fill("lora_trainer_resolution", "128")
    page.fill("lora_trainer_batch_size", "1")
    page.click("#lora_trainer .lt-group .label-wrap", "Training")
    page.until(lambda: page.one("#lora_trainer_find_rate").is_displayed(), "the button")
    page.click("#lora_trainer_find_rate")
    page.until(lambda: page.all("#lora_trainer_panel .lt-ticks"), "a curve", timeout=180)
    (job,) = (job for job in webui.get("/lora-trainer/v1/jobs")["jobs"] if job["kind"] == "find-lr")

    # A new page finds it where it was.
    page.browser.refresh()
    page.click("#tabs > .tab-nav button", "Train LoRA")
    page.until(lambda: page.one("#lora_trainer_use_rate").is_displayed(), "a suggestion", timeout=600)
    found = webui.job(job["id"])
    assert found["state"] == "done"
    assert f"Learning rate {found['suggested']:g}: {found['why']}" in page.text("#lora_trainer_panel")
    assert page.all("#lora_trainer_panel polyline.lt-mark")
    assert page.value("lora_trainer_learning_rate") != f"{found['suggested']:g}"
    page.click("#lora_trainer_use_rate")
    page.until(lambda: float(page.value("lora_trainer_learning_rate")) == found["suggested"], "the rate in its field")
    assert "is now" in page.text("#lora_trainer_message")
