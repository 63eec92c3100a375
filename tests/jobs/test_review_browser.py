"""What an annotator sees and does, in headless Chromium: the model's answer is there, is corrected, and comes back."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

import workspaces as ws
from reviewed import PARTS, TASK, Reviewed
from winnow.mask_files import read_label
from winnow_jobs.local_label_studio import USER

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from winnow_jobs.local_label_studio import LocalLabelStudio

pytestmark = [pytest.mark.browser, pytest.mark.label_studio, pytest.mark.timeout(1200)]

SUBMIT = 'button[aria-label="Submit current annotation"]'
PATIENCE_S = 90


@pytest.fixture(scope="module")
def artifacts(pytestconfig: pytest.Config) -> Path:
    """Screenshots, for people to look at: ``.pytest_cache/d/screenshots``."""
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("screenshots")


@pytest.fixture
def chrome(label_studio_server: LocalLabelStudio) -> Iterator[Chrome]:
    """A browser that is logged in."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (the extra `dev`)")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1500,1000", "disable-gpu"):
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        browser.set_page_load_timeout(PATIENCE_S)
        browser.get(f"{label_studio_server.url}/user/login/")
        find(browser, 'input[name="email"]').send_keys(USER)
        find(browser, 'input[name="password"]').send_keys(label_studio_server.password)
        find(browser, 'button[type="submit"]').click()
        wait(browser, lambda: "/user/login" not in browser.current_url, "the login")
        yield browser
    finally:
        browser.quit()


def wait(browser: Chrome, condition: Any, what: str) -> Any:
    """What the condition gives once it gives something."""
    from selenium.common.exceptions import WebDriverException

    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        try:
            found = condition()
        except WebDriverException:  # the page is being drawn anew
            found = None
        if found:
            return found
        time.sleep(0.2)
    raise TimeoutError(f"waited {PATIENCE_S} s for {what} at {browser.current_url}: {browser.page_source[:2000]}")


def find(browser: Chrome, selector: str) -> Any:
    return wait(browser, lambda: browser.find_element("css selector", selector), selector)


def open_first(browser: Chrome, reviewed: Reviewed, project: int) -> None:
    """Open the queue as an annotator does, at its first task."""
    browser.get(f"{reviewed.server.url}/projects/{project}/data?labeling=1")
    find(browser, SUBMIT)
    from selenium.webdriver import ActionChains, Keys

    modal = wait(browser, lambda: browser.find_elements("xpath", "//*[text()='Labeling Instructions']"), "instructions")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    wait(browser, lambda: not is_displayed(modal[0]), "the instructions to go away")
    drawn = "return [...document.images].some(image => image.naturalWidth > 50 && image.complete)"
    wait(browser, lambda: browser.execute_script(drawn), "the image")
    time.sleep(1.0)


def is_displayed(element: Any) -> bool:
    from selenium.common.exceptions import StaleElementReferenceException

    try:
        return bool(element.is_displayed())
    except StaleElementReferenceException:
        return False


def press(browser: Chrome, key: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(key).perform()


def checked(browser: Chrome) -> list[str]:
    """The classes that are chosen."""
    boxes = browser.find_elements("css selector", "input[type=radio], input[type=checkbox]")
    return [box.get_attribute("name") or "" for box in boxes if box.is_selected()]


def submit_and_pull(browser: Chrome, reviewed: Reviewed, task: str) -> Any:
    """Press the button, and pull until the answer has arrived."""
    find(browser, SUBMIT).click()
    found: list[Any] = []

    def pulled() -> bool:
        found[:] = reviewed.workspace.pull(task=task)
        return found[0].status == "finished"

    ws.wait_until(pulled, timeout_s=PATIENCE_S, what="the answer in Label Studio")
    return found[0]


def photograph(name: str) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(getattr(skimage.data, name)()).resize((480, 320)).save(sink, "JPEG", quality=92)
    return sink.getvalue()


def test_a_class_is_corrected_in_the_browser(reviewed: Reviewed, chrome: Chrome, artifacts: Path) -> None:
    type(reviewed).size = (480, 320)
    reviewed.add_images([photograph("coffee"), photograph("chelsea"), photograph("rocket")])
    reviewed.answer()  # ant, bee, cat
    reviewed.queue([reviewed.ids[1], reviewed.ids[0]])
    project = reviewed.push().project
    open_first(chrome, reviewed, project)
    chrome.save_screenshot(str(artifacts / "class-shown.png"))
    assert checked(chrome) == ["bee"]  # the first of the queue, the model's answer preselected
    press(chrome, "3")
    wait(chrome, lambda: checked(chrome) == ["cat"], "the other class")
    chrome.save_screenshot(str(artifacts / "class-corrected.png"))
    pulled = submit_and_pull(chrome, reviewed, TASK)
    assert (pulled.num_created, pulled.num_corrected) == (1, 1)
    (row,) = reviewed.labels()
    assert (row["number"], row["label"], row["model_label"]) == (1, "cat", "bee")
    assert (row["event"], row["changed_by_person"], row["annotator"]) == ("created", True, "winnow@localhost")
    assert row["seconds"] > 0


def test_a_mask_is_corrected_in_the_browser(reviewed: Reviewed, chrome: Chrome, artifacts: Path) -> None:
    from selenium.webdriver import ActionChains

    type(reviewed).size = (480, 320)
    reviewed.add_images([photograph("chelsea")])
    reviewed.answer()
    answer_hw = np.zeros((320, 480), dtype=np.uint8)
    answer_hw[60:260, 40:200] = 1
    answer_hw[60:260, 300:420] = 2
    reviewed.add_masks(answer_hw)
    reviewed.queue(reviewed.ids, task="parts")
    (pushed,) = reviewed.workspace.push(task="parts")
    open_first(chrome, reviewed, pushed.project)
    chrome.save_screenshot(str(artifacts / "mask-shown.png"))
    press(chrome, "1")  # the brush of the first class
    canvas = max(
        chrome.find_elements("css selector", "canvas"), key=lambda each: each.size["width"] * each.size["height"]
    )
    ActionChains(chrome).move_to_element(canvas).click_and_hold().move_by_offset(0, 40).move_by_offset(
        20, 0
    ).release().perform()
    time.sleep(1.0)
    chrome.save_screenshot(str(artifacts / "mask-corrected.png"))
    pulled = submit_and_pull(chrome, reviewed, "parts")
    assert (pulled.num_created, pulled.num_corrected, pulled.num_unreadable) == (1, 1, 0)
    (row,) = reviewed.labels()
    found = read_label(row["value"], PARTS, width=480, height=320, read=lambda uri: b"")
    stroke = found != answer_hw
    assert 50 < stroke.sum() < 20_000, json.dumps(row["value"])[:500]
    assert set(np.unique(found[stroke])) == {1}
    rows, columns = np.nonzero(stroke)
    assert 200 <= columns.mean() <= 300  # in the middle, where the model saw nothing
    assert 100 <= rows.mean() <= 260
