"""The page through its server: as an API and in a browser."""

import pickle
import re
import shutil
import time
from dataclasses import replace

import gradio as gr
import numpy as np
import pytest
import torch
from conftest import EMOJI, perturbed, script
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

import app
from noiserefine import draw_noise, models
from noiserefine.backbones import any_model_allowed, load_pipeline
from noiserefine.recipe import Maker
from train.architectures import random_pipeline

PROMPT = "a red apple on a blue background"
# prompt, seed, backbone, steps, guidance scale, strength, sampler, width, height, refiner, LoRA, LoRA weight
GOOD = [PROMPT, 7, "emoji", 5, 2.5, 1.0, "DDIM", 0, 0, "", "", 1.0]


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
    gaussian, gaussian_cost, guided, guided_cost, refined, refined_cost, heat, layout, says, link, keep = client.predict(*GOOD, api_name="/compare")
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
    (2, "nonsense", "can't be loaded"), (2, "", "No backbone"), (9, "nonsense", "no refiner at nonsense"), (10, "nonsense", "no LoRA at nonsense"), (7, 65, "native size"), (8, 100000, "native size"),
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
        shown(*inputs)


def shown(*inputs, view="compare", extras=(), last=None):
    """What the page shows at the end."""
    state = {}
    for update in app.run(view, inputs, extras, last or {}):
        state |= pickle.loads(pickle.dumps(update))  # on ZeroGPU all of it passes between processes
    return state


def same(first, second, names=tuple(app.ARMS)):
    """Whether the columns are equal in every pixel."""
    return [np.array_equal(first[name].image, second[name].image) for name in names]


def forwards(state):
    return {name: int(re.search(r"\*\*(\d+)\*\*", state[f"{name}_cost"])[1]) for name in app.ARMS if name in state}


def test_what_changes_nothing_is_not_sampled_again(monkeypatch):
    first = shown(*GOOD)
    sampled, sample = [], Maker.sample
    monkeypatch.setattr(Maker, "sample", lambda make, recipe, x_T: sampled.append(recipe) or sample(make, recipe, x_T))
    for position, value, count in ((5, 0.5, 1), (4, 3.0, 1), (3, 4, 3), (None, None, 0)):
        inputs = list(GOOD)
        if position is not None:
            inputs[position] = value
        sampled.clear()
        again = shown(*inputs, last=first["last"])
        assert len(sampled) == count, (position, sampled)
    assert all(same(again, first))


@pytest.fixture
def turbo(tmp_path, monkeypatch):
    """A small model with SD-Turbo's architecture, scheduler and place in the catalogue."""
    random_pipeline("sd-turbo", small=True).save_pretrained(tmp_path)
    monkeypatch.setitem(app.BACKBONES, "sd-turbo", replace(app.BACKBONES["sd-turbo"], source=str(tmp_path)))
    monkeypatch.setattr(app, "MODELS", app.Models())
    return [PROMPT, 7, "sd-turbo", 1, 7.0, 1.0, "Euler", 0, 0, "", "", 1.0]


def test_turbo_has_no_guided_column_and_no_refiner_yet(turbo):
    state = shown(*turbo)
    assert "Not applicable" in state["guided_cost"] and "guided" not in state and "refined" not in state
    assert f"--backbone {app.BACKBONES['sd21-base'].source}" in state["says"] and state["gaussian"].image.size == (128, 128)


def test_a_refiner_that_the_user_names(turbo, tmp_path):
    refiner = tmp_path / "refiner"
    perturbed(load_pipeline(str(tmp_path), "cpu"), guidance_scale_range=[1, 5]).save_pretrained(refiner)
    turbo[9] = str(refiner)
    with pytest.raises(gr.Error, match="takes a guidance scale from 1 to 5"):
        shown(*turbo)
    turbo[4] = 4.0
    state = shown(*turbo)
    assert forwards(state) == {"gaussian": 1, "refined": 2} and "the slider drives" in state["says"]
    with pytest.raises(gr.Error, match="another architecture"):
        shown(*GOOD[:9], str(refiner), "", 1.0)


def test_a_users_lora_is_in_every_column(tmp_path):
    perturbed(load_pipeline(EMOJI, "cpu")).save_pretrained(tmp_path)
    plain, styled = shown(*GOOD), shown(*GOOD[:9], "", str(tmp_path), 0.8)
    assert not any(same(plain, styled)) and all(same(plain, shown(*GOOD)))


def test_out_of_memory_is_survived(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = shown(*GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(Maker, "sample", full)
        with pytest.raises(gr.Error, match="memory is full.*--offload model"):
            shown(*GOOD)
    assert all(same(before, shown(*GOOD)))


@pytest.mark.parametrize("position, value", [(2, "somebody/something"), (9, "/etc"), (10, "../secret.safetensors"), (9, "sdxl"), (10, "emoji")])
def test_a_public_space_serves_its_own_models(monkeypatch, position, value):
    monkeypatch.setattr(app, "FREE_CHOICE", False)
    inputs = list(GOOD)
    inputs[position] = value
    with pytest.raises(gr.Error, match="serves its own models only"):
        shown(*inputs)
    shown(*GOOD)


@pytest.mark.parametrize("space, variable, allowed", [(None, None, True), ("a/b", None, False), ("a/b", "1", True), (None, "0", False)])
def test_who_may_name_any_model(monkeypatch, space, variable, allowed):
    for name, value in (("SPACE_ID", space), ("NOISEREFINE_ANY_MODEL", variable)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert any_model_allowed() == allowed


def test_a_loras_weight_does_not_load_the_model_again(monkeypatch, tmp_path):
    perturbed(load_pipeline(EMOJI, "cpu")).save_pretrained(tmp_path)
    inputs = [*GOOD[:9], "", str(tmp_path), 0.8]
    strong = shown(*inputs)
    monkeypatch.setattr(models, "load_pipeline", None)
    inputs[11] = 0.0
    assert all(same(shown(*inputs), shown(*GOOD), ("gaussian", "guided")))
    inputs[11] = 0.8
    assert all(same(shown(*inputs), strong))


def test_offload_reaches_the_page(monkeypatch):
    """Model offload computes on a CPU too; the sequential one only on accelerators, but it must get as far as computing."""
    plain = shown(*GOOD)
    monkeypatch.setattr(app, "MODELS", app.Models())
    app.MODELS.offload = "model"
    assert all(same(plain, shown(*GOOD)))
    monkeypatch.setattr(app, "MODELS", app.Models())
    app.MODELS.offload = "sequential"
    loaded = app.MODELS.get(app.Model("emoji"))
    assert "guidance scale" in loaded.says
    assert loaded.refiner.unet.conv_in.weight.device.type == loaded.pipe.unet.conv_in.weight.device.type == "meta"


def test_seconds_of_gpu_fit_a_visitors_quota():
    """An anonymous visitor of ZeroGPU has about two minutes a day."""
    for name, backbone in app.BACKBONES.items():
        assert 10 <= app.seconds_of_gpu("compare", (PROMPT, 0, name, backbone.steps)) <= 30
    assert app.seconds_of_gpu("compare", (PROMPT, 0, "sd21", float("nan"))) and app.seconds_of_gpu("compare", (PROMPT, 0, None, 10**9)) < 120


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
        prompt = page.get_by_label("Prompt", exact=True)
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


def test_runs_without_the_spaces_package(tmp_path):
    code = "import sys; sys.modules['spaces'] = None; import app; print(app.ZERO_GPU, app.run.__name__)"
    with script("-c", code) as process:
        assert process.communicate()[0].strip().endswith("False run")
