"""The page through its server: as an API and in a browser."""

import re
import shutil
import time

import gradio as gr
import numpy as np
import pytest
from conftest import script
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

import app
from noiserefine import draw_noise

PROMPT = "a red apple on a blue background"
# prompt, seed, backbone, steps, guidance scale, strength, sampler, width, height
GOOD = [PROMPT, 7, "emoji", 5, 2.5, 1.0, "DDIM", 0, 0]


@pytest.fixture(scope="module")
def url():
    with script("app.py", "--host", "127.0.0.1", "--port", "7871") as process:
        line = ""
        while "Running on local URL" not in line:
            line = process.stdout.readline()
            assert line, "the server ended"
        import threading
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield "http://127.0.0.1:7871"


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


def pixels(result):
    return np.asarray(Image.open(result["path"] if isinstance(result, dict) else result).convert("RGB"))


def test_compare_gives_the_librarys_pixels(client, pipe, refiner):
    gaussian, gaussian_cost, guided, guided_cost, refined, refined_cost, heat, layout, says = client.predict(*GOOD, api_name="/compare")
    assert [re.search(r"\*\*(\d+)\*\*", cost)[1] for cost in (gaussian_cost, guided_cost, refined_cost)] == ["5", "10", "6"]
    x_T = draw_noise(pipe, 7)
    expected = pipe(PROMPT, latents=refiner(x_T, PROMPT), guidance_scale=1.0, num_inference_steps=5).images[0]
    assert np.array_equal(pixels(refined), expected) and np.array_equal(pixels(layout), expected)
    assert not np.array_equal(pixels(gaussian), pixels(guided)) and pixels(heat).shape == pixels(refined).shape
    assert "of its energy" in says


@pytest.mark.parametrize("position, value, says", [
    (0, "", "prompt is empty"), (0, "apple " * 60, "tokens long"), (1, 1.5, "whole number"), (1, -1, "seed is a whole number"), (1, None, "is a number"),
    (3, 0, "less than minimum value"), (3, 500, "greater than maximum value"), (5, 9, "greater than maximum value"),
    (3, 2.5, "whole number"), (6, "nonsense", "not in the list of choices"),
    (2, "nonsense", "not in the list of choices"), (7, 65, "native size"), (8, 100000, "native size"),
    (2, "sd21", "can't be loaded"),
])
def test_bad_input_is_answered_with_a_sentence(client, position, value, says):
    inputs = list(GOOD)
    inputs[position] = value
    with pytest.raises((AppError, ValueError)) as error:
        client.predict(*inputs, api_name="/compare")
    assert says in str(error.value) and "verbose error reporting" not in str(error.value), "Gradio's words for an exception nobody foresaw"


@pytest.mark.parametrize("position", [1, 3, 4, 5, 7])
def test_nan_is_refused(position):
    inputs = list(GOOD)
    inputs[position] = float("nan")
    with pytest.raises(gr.Error, match="is a number; got nan"):
        list(app.run(*inputs))


def test_page_goes_on_after_errors(client):
    assert pixels(client.predict(*GOOD, api_name="/compare")[0]).shape == (64, 64, 3)


@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)])
def test_in_a_browser(url, width, height):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "the browser test needs Chromium: apt-get install chromium"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        page = browser.new_page(viewport={"width": width, "height": height})
        errors = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(url)
        prompt = page.get_by_label("Prompt")
        prompt.fill("a panda on a pink background")
        prompt.press("Enter")
        page.wait_for_function("document.querySelectorAll('#arms img').length == 3 && document.querySelectorAll('#noise img').length == 2", timeout=120_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [page.locator("#arms img").nth(i).bounding_box() for i in range(3)]
        assert boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"] and len({round(box["y"]) for box in boxes}) == 1, "three side by side"
        assert re.search(r"21\s+UNet forwards", page.locator("#arms").inner_text())
        seed = page.get_by_label("Seed", exact=True)
        before = seed.input_value()
        page.get_by_role("button", name="New seed").click()
        for _ in range(50):
            if seed.input_value() != before:
                break
            time.sleep(0.1)
        assert seed.input_value() != before
        prompt.fill("")
        page.get_by_role("button", name="Generate").click()
        page.get_by_text("The prompt is empty").wait_for(timeout=20_000)
        assert page.locator("#arms img").count() == 3, "nothing is lost"
        shown = page.locator("#noise img").nth(1).get_attribute("src")
        page.get_by_text("a sailboat", exact=True).click()  # an example runs at once
        page.wait_for_function("src => { const i = document.querySelectorAll('#noise img')[1]; return i && i.src != src }", arg=shown, timeout=60_000)
        assert prompt.input_value() == "a sailboat"
        assert not errors
        browser.close()
