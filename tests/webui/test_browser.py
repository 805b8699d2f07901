"""In a real WebUI and a real browser: drop pictures, check them, write captions, undo, train, without leaving the tab.

Runs where also selenium, Chromium and its driver are installed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.webui.server import DEMO

EDITOR = "#lora_trainer_editor"
PICTURES = 8


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
        return self.one(selector).text

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


def test_from_dropped_pictures_to_a_lora_in_one_tab(page: Page, webui) -> None:
    dropped = sorted(DEMO.glob("twemoji/*.png"))[:PICTURES]
    page.one("#lora_trainer_drop input[type=file]").send_keys("\n".join(map(str, dropped)))
    folder = Path(page.until(lambda: page.value("lora_trainer_train_data_dir"), "the upload"))
    page.fill("lora_trainer_resolution", "128")
    page.click("#lora_trainer_check")
    page.until(lambda: "file names" in page.text("#lora_trainer_findings"), "what the doctor says of the captions")

    page.click("#lora_trainer_edit")
    page.until(lambda: len(page.all(f"{EDITOR} .lt-cell img[src]")) == PICTURES, "the pictures")
    # By the keyboard: the first caption, the next one, a tag for two selected ones, then back.
    page.press(page.keys.ENTER, "twemoji emoji of <b>a ticket</b>")
    page.press(page.keys.ENTER, control=True)
    page.until(lambda: dropped[1].name in page.text(f"{EDITOR} .lt-name"), "the next picture")
    page.press("twemoji emoji of a lock")
    page.press(page.keys.ENTER, control=True)
    page.until(lambda: f"Without caption ({PICTURES - 2})" in page.text(f"{EDITOR} header"), "two captions")
    page.press(page.keys.ESCAPE)
    page.press(page.keys.ARROW_RIGHT, " ", page.keys.ARROW_RIGHT, " ")
    page.until(lambda: "In 2 selected pictures" in page.text(f"{EDITOR} aside"), "two selected")
    page.one(f"{EDITOR} input[placeholder='tag, or several']").send_keys("twemoji emoji")
    page.click(f"{EDITOR} aside button", "Add")
    captions = [picture.with_suffix(".txt").name for picture in dropped]
    page.until(lambda: (folder / captions[4]).exists(), "a tag for the selected ones")
    page.click(f"{EDITOR} aside button", "select none")
    page.click(f"{EDITOR} aside button", "Add")
    page.until(lambda: "Without caption (0)" in page.text(f"{EDITOR} header"), "a tag for all")
    assert (folder / captions[0]).read_text() == "twemoji emoji of <b>a ticket</b>, twemoji emoji\n"
    page.click(f"{EDITOR} header button", "Undo")
    page.until(lambda: f"Without caption ({PICTURES - 4})" in page.text(f"{EDITOR} header"), "undone")
    assert (folder / captions[0]).read_text() == "twemoji emoji of <b>a ticket</b>\n"
    assert not (folder / captions[5]).exists()
    page.click(f"{EDITOR} aside button", "Add")
    page.until(lambda: "Without caption (0)" in page.text(f"{EDITOR} header"), "again")
    assert "<b>a ticket</b>" in page.text(f"{EDITOR} .lt-cell")
    page.click(f"{EDITOR} header button", "Close")
    page.until(lambda: not page.all(EDITOR), "closed")

    page.fill("lora_trainer_output_name", "from-the-tab")
    page.fill("lora_trainer_epochs", "1")
    page.click("#lora_trainer_train")
    page.until(lambda: page.all("#lora_trainer_panel .lt-chip.lt-done"), "the LoRA", timeout=180)
    assert (webui.data / "models" / "Lora" / "from-the-tab.safetensors").is_file()
    ours = [entry["message"] for entry in page.browser.get_log("browser") if "lora" in entry["message"].lower()]
    assert ours == []


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
