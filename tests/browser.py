"""A headless Chromium on the page of demo.py, used as a person would."""

import base64
import io
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SECONDS = 60
PICTURES = """
return [...document.querySelectorAll("img[src^='data:image/png']")].filter(i => i.offsetParent).map(i => [i.src, i.alt])
"""


class Picture(NamedTuple):
    """A picture of the page: its address, which holds it, and the line below it."""

    source: str
    caption: str

    @property
    def pixels(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(self.source.split(",")[1]))))


class Browser:
    def __init__(self, webdriver: Any, address: str, folder: Path):
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,960"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.webdriver, self.address, self.folder = webdriver, address, folder
        self.driver.get(address)

    def visible(self, selector: str, text: str | None = None) -> list:
        found = [element for element in self.driver.find_elements("css selector", selector) if element.is_displayed()]
        return [element for element in found if text is None or element.text == text]

    def wait(self, condition: Callable[[], Any]) -> Any:
        """The first result that is true. The page may replace what is looked at."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                if result := condition():
                    return result
            except self.webdriver.remote.errorhandler.StaleElementReferenceException:
                pass
            time.sleep(0.02)
        self.save("timeout")
        raise TimeoutError(f"see timeout.png in {self.folder}")

    def click(self, selector: str, text: str | None = None) -> None:
        self.wait(lambda: self.visible(selector, text))[0].click()

    def tab(self, name: str) -> None:
        self.click("[role=tab]", name)
        self.wait(lambda: self.visible("[role=tab][aria-selected=true]", name) and self.visible("button.primary"))

    def fill(self, label: str, value: object) -> None:
        field = self.wait(lambda: self.visible(f"input[aria-label^='{label}']"))[0]
        field.clear()
        field.send_keys(f"{value}\t")

    def check(self, name: str) -> None:
        self.click("label", name)

    def choose(self, label: str, value: str) -> None:
        self.click(f"input[aria-label='{label}']")
        self.click("[role=option]", value)

    def pictures(self) -> list[Picture]:
        return [Picture(*pair) for pair in self.driver.execute_script(PICTURES)]

    def press(self) -> list[Picture]:
        """Press the button; all new pictures that are seen until the one of the last step."""
        old, seen = self.pictures(), []
        self.click("button.primary")

        def is_done() -> bool:
            seen.extend(picture for picture in self.pictures() if picture not in old + seen)
            return bool(seen) and is_last(seen[-1].caption)

        self.wait(is_done)
        return seen

    def complaint(self) -> str:
        """Press the button; the line with which the page answers."""
        self.click("button.primary")
        message = self.wait(lambda: self.visible("[data-testid=toast-text]"))[0].text
        self.save("complaint")
        self.click("[data-testid=toast-close]")
        self.wait(lambda: not self.visible("[data-testid=toast-text]"))
        return message

    def draw_half_a_circle(self) -> None:
        self.wait(lambda: self.visible("button[aria-label='Brush']"))
        canvas = self.wait(lambda: self.visible("canvas"))[0]
        points = [(-round(55 * math.sin(i * math.pi / 12)), -round(85 * math.cos(i * math.pi / 12))) for i in range(13)]
        pen = self.webdriver.ActionChains(self.driver, duration=20)
        pen.move_to_element_with_offset(canvas, *points[0]).click_and_hold()
        for (x, y), (next_x, next_y) in itertools.pairwise(points):
            pen.move_by_offset(next_x - x, next_y - y)
        pen.release().perform()

    def save(self, name: str) -> None:
        self.driver.save_screenshot(str(self.folder / f"{name}.png"))

    def elsewhere(self) -> set[str]:
        """The addresses of other machines that the browser asked."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        urls = [parameters["request"]["url"] for parameters in asked]
        return {url for url in urls if not url.startswith(("data:", "blob:", self.address))}


def is_last(caption: str) -> bool:
    """Whether a caption such as "step 3 of 20, 0.1 s" belongs to the last step."""
    _, number, _, steps = caption.split(",")[0].split()
    return number == steps
