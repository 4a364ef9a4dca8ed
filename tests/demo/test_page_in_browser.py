"""The demo page in a real browser: an upload, a painted map, a caption, errors; nothing is loaded from elsewhere."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.demo_server import DemoServer
from helpers.hostile_images import encoded, gradient

from regvq_fast.demo.uploads import MAX_BYTES
from regvq_fast.scenes import CLASSES

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), "")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def page(server: DemoServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page, opened; fails at the end if it asked for anything from elsewhere or had an error of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    foreign: list[str] = []
    broken: list[str] = []

    def failed(url: str) -> None:
        if "upload_progress" not in url:  # which is asked for of a file that is too large to be sent, too
            broken.append(url)

    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=BROWSER,
            args=FLAGS,
            viewport={"width": 1280, "height": 900},
        )
        opened = context.new_page()
        opened.set_default_timeout(60_000)
        local = (server.url, "data:", "blob:")
        opened.on("request", lambda request: request.url.startswith(local) or foreign.append(request.url))
        opened.on("pageerror", lambda error: broken.append(str(error)))
        opened.on("response", lambda answer: answer.status >= 400 and failed(answer.url))
        opened.goto(server.url)
        yield opened
        context.close()
    assert foreign == []
    assert broken == []


def open_tab(page: Any, name: str) -> None:
    """Open a tab, out of the menu of those that a narrow window has no room for."""
    page.wait_for_timeout(500)  # it looks for room after each change
    label = re.compile(f"^{name}$")
    tab = page.locator("[role=tab]:visible", has_text=label)
    if tab.count():
        tab.click()
    else:
        page.get_by_label("More tabs").click()
        page.locator(".overflow-dropdown button", has_text=label).click()


def wait_for_others(page: Any, place: str, images: list[str]) -> None:
    """Wait until images have taken the place of others."""
    page.wait_for_function(
        "([place, images]) => [...document.querySelectorAll(`${place} figure img`)].some((image) => "
        "!images.includes(image.src))",
        arg=[place, images],
    )


def choose_file(page: Any, path: Path) -> None:
    """Give the upload a file, in place of the one it has."""
    page.get_by_role("tab", name="Reconstruct").click()
    if page.locator("#upload button[aria-label='Clear'], #upload button[aria-label='Remove Image']").count():
        page.locator("#upload button[aria-label='Clear'], #upload button[aria-label='Remove Image']").first.click()
    page.set_input_files("#upload input[type=file]", path)


def sources(page: Any, area: str) -> list[str]:
    """Return the addresses of the images in a part of the page, all of which are decoded."""
    page.wait_for_selector(f"{area} figure img")
    images = page.locator(f"{area} .rv-figures img")
    assert images.evaluate_all("all => all.every((image) => image.complete && image.naturalWidth > 0)")
    return images.evaluate_all("all => all.map((image) => image.src)")


def see_error(page: Any, text: str) -> None:
    """Wait for a message, and close it."""
    message = page.locator(".toast-body", has_text=text)
    message.wait_for()
    message.get_by_role("button", name="Close").last.click()
    message.wait_for(state="hidden")


def test_the_page_opens_with_an_example(page: Any) -> None:
    assert len(sources(page, "#reconstruction")) == 3
    assert "An example of the embedded scenes" in page.inner_text("#reconstruction")


def test_an_upload_is_reconstructed(page: Any, tmp_path: Path) -> None:
    before = sources(page, "#reconstruction")
    (tmp_path / "photo.jpg").write_bytes(encoded(gradient(64, 48), "JPEG"))
    choose_file(page, tmp_path / "photo.jpg")
    page.get_by_text("64 x 48 pixels; its central square of 48 x 48").wait_for()
    after = sources(page, "#reconstruction")
    assert len(after) == 3
    assert not set(before) & set(after)
    shown = page.inner_text("#reconstruction")
    assert "dB" in shown
    assert "of 32" in shown
    assert page.locator("#reconstruction .rv-codes img").count() >= 1


def test_what_is_no_image_is_an_error_in_words(page: Any, tmp_path: Path) -> None:
    for name, content, message in (
        ("text.png", b"no image", "The file is not a PNG"),
        ("broken.png", encoded(gradient(300, 300))[:2000], "The image is damaged"),
        ("large.png", bytes(MAX_BYTES + 1), "exceed the maximum"),
    ):
        (tmp_path / name).write_bytes(content)
        choose_file(page, tmp_path / name)
        see_error(page, message)
    page.click("#example")
    page.get_by_text("An example of the embedded scenes").wait_for()


def test_a_map_is_painted_and_sampled(page: Any) -> None:
    page.get_by_role("tab", name="Paint a map").click()
    board = page.locator(".rv-board")
    board.wait_for()
    assert page.locator(".rv-legend button").all_inner_texts() == list(CLASSES)
    page.click("#sample-map")
    first = sources(page, "#map-images")
    assert len(first) == 4

    pixels = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data].join()"
    before = board.evaluate(pixels)
    page.get_by_role("button", name="galaxies").click()
    box = board.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 380, box["y"] + 350, steps=5)
    page.mouse.up()
    painted = board.evaluate(pixels)
    assert painted != before
    page.click("#sample-map")
    wait_for_others(page, "#map-images", first)

    page.get_by_role("button", name="Undo").click()
    assert board.evaluate(pixels) == before
    page.get_by_role("button", name="Fill").click()
    assert len(set(board.evaluate(pixels).split(","))) <= 4
    page.get_by_role("button", name="Start from this map").nth(0).click()
    assert board.evaluate(pixels) == before


def test_a_caption_is_sampled_and_unknown_words_are_named(page: Any) -> None:
    page.get_by_role("tab", name="Type a caption").click()
    page.fill("#caption textarea", "a dragon on the left and bricks on the right")
    page.click("#sample-caption")
    assert len(sources(page, "#caption-images")) == 4
    assert "Not in any training caption: dragon." in page.inner_text("#caption-images")
    page.fill("#caption textarea", "a cat in a circle on grass")
    page.click("#sample-caption")
    page.get_by_text("Not in any training caption").wait_for(state="hidden")


def test_a_label_is_chosen_and_a_prior_without_a_condition_sampled(page: Any) -> None:
    page.get_by_role("tab", name="Choose a label").click()
    page.click("#sample-label")
    first = sources(page, "#label-images")
    assert len(first) == 4
    page.click("#label input")
    page.get_by_role("option", name="red fox").click()
    page.click("#sample-label")
    wait_for_others(page, "#label-images", first)
    page.get_by_text("red fox", exact=True).first.wait_for()

    page.get_by_role("tab", name="Sample", exact=True).click()
    page.click("#sample-any")
    assert len(sources(page, "#any-images")) == 4


def test_errors_of_a_caption_are_words(page: Any) -> None:
    page.get_by_role("tab", name="Type a caption").click()
    for caption, message in (("", "No caption"), ("so " * 30, "30 words, over the encoder's 24")):
        page.fill("#caption textarea", caption)
        page.click("#sample-caption")
        see_error(page, message)


def test_a_narrow_window_needs_no_sideways_scrolling(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 860})
    try:
        for name in ("Reconstruct", "Paint a map", "Type a caption", "Choose a label", "Sample"):
            open_tab(page, name)
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 400, name
    finally:
        page.set_viewport_size({"width": 1280, "height": 900})
