"""The page: what its views make, and its server as an API. test_page.py has the browser's tests."""

import asyncio
import base64
import functools
import gc
import io
import itertools
import pickle
import re
import socket
import types
import urllib.parse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, replace
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from gradio_client import Client
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, PreTrainedTokenizerBase

from noiserefine import Refiner, draw_noise
from noiserefine.analysis.explore import INTERPOLATIONS, SCALES, STEPS, STRENGTHS
from noiserefine.analysis.recipe import Maker, Recipe, Sample
from noiserefine.latents import fit_preview
from noiserefine.limits import MAX_SEED
from noiserefine.models import pool as models
from noiserefine.models.catalogue import ASSETS, BACKBONES, Model
from noiserefine.models.loading import load_pipeline
from noiserefine.page import a1111, handlers, jobs, restoring, settings, texts, wiring
from noiserefine.page.events import (
    Arm,
    Download,
    Figure,
    Made,
    NoArm,
    Note,
    Pair,
    Picture,
    Progress,
)
from noiserefine.page.layout import build_components
from noiserefine.page.opening import EXAMPLES, default_settings, example_for, opening
from noiserefine.page.record import read_png
from noiserefine.page.screen import made_from
from noiserefine.page.settings import Settings, any_model_allowed, link, restored
from noiserefine.page.stream import stream
from noiserefine.page.views import ARMS, VIEWS
from noiserefine.page.vocabulary import random_prompt
from noiserefine.sampler_names import SAMPLERS
from tests.conftest import EMOJI, EMOJI_REFINER, ROOT, output, perturbed, script
from train.tools.architectures import random_pipeline

PROMPT = "a red apple on a blue background"
# prompt, seed, backbone, steps, guidance, strength, sampler, width, height, refiner, LoRA, weight
LORA = "assets/loras/emoji-clay"
GOOD = [PROMPT, 7, "emoji", 5, 2.5, 1.0, "DDIM", 0, 0, "", "", 1.0]


@pytest.fixture(scope="session")
def tiny(tiny_folder, tiny_refiner):
    """Return the settings for a model with random weights and its refiner: the quickest images."""
    return [*GOOD[:2], str(tiny_folder), *GOOD[3:9], str(tiny_refiner), *GOOD[10:]]


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


def pixels(result):
    return np.asarray(
        Image.open(result["path"] if isinstance(result, dict) else result).convert("RGB")
    )


def predict(client, view, *values, **controls):
    """Return a view's outputs by name."""
    returns = client.view_api(print_info=False, return_format="dict")["named_endpoints"][
        f"/{view}"
    ]["returns"]
    names = [output["label"] for output in returns]
    given = dict(zip(Settings.names(), values, strict=False)) | controls
    result = client.predict(**given, api_name=f"/{view}")
    return dict(zip(names, result if len(names) > 1 else [result], strict=True))


def test_compare_gives_the_librarys_pixels(client, pipe, refiner):
    result = predict(client, "compare", *GOOD)
    costs = [re.match(r"\*\*(\d+)\*\*", result[f"{arm}_cost"])[1] for arm in ARMS]
    assert costs == ["5", "10", "6"] and "% of guided" in result["refined_cost"]
    assert "nearer to" in result["refined_cost"] and "seed 7" in result["caption"]
    x_T = draw_noise(pipe, 7)
    latents = refiner(x_T, PROMPT)
    expected = pipe(PROMPT, latents=latents, guidance_scale=1.0, num_inference_steps=5).images[0]
    assert np.array_equal(pixels(result["refined"]), expected)
    assert not np.array_equal(pixels(result["gaussian"]), pixels(result["guided"]))


@pytest.mark.parametrize(
    "values",
    [
        [PROMPT, 3, "emoji", 3, 2.5, 0.5, "DPM++ SDE", 136, 128],
        [PROMPT, 3, "emoji", 1, 2.5, 1.0, "DDIM", 0, 0, "emoji-scales", LORA, 0.6, "a cat"],
        [PROMPT, 3, "emoji", 1, 2.5, 0.0, "DDIM", 0, 0, "emoji-scales"],
    ],
)
def test_the_code_makes_the_picture(client, values):
    """Everything the picture depends on is in it; run as a user would paste it."""
    result = predict(client, "compare", *values)
    code, names = result["code"].replace("'assets", f"'{ROOT}/assets"), {}
    exec(code, names)
    assert np.array_equal(pixels(result["refined"]), names["image"])
    call = re.search(r"# Client\(address\)\.predict(.*), api_name='/compare'\)", result["code"])
    assert eval(f"dict{call[1]})") == {
        name: value
        for name, value in zip(Settings.names(), values, strict=False)
        if value != getattr(Settings(""), name)
    }


def test_files_have_speaking_names_and_an_enlarged_copy(client):
    files = [Path(path).name for path in predict(client, "compare", *GOOD)["keep"]]
    assert "red-apple-blue-background-seed7-refined.png" in files
    assert sum(name.endswith("-enlarged.png") for name in files) == len(ARMS)


def test_arms_of_a_prompt_without_spaces_have_files_of_their_own():
    settings = asdict(Settings("猫" * 200))
    assert len({texts.file_name(settings, arm) for arm in ARMS}) == len(ARMS)


def test_opening_is_the_default_comparison():
    """Made anew by tests/tools/opening.py when the default model changes."""
    first, state = opening(), shown(*astuple(default_settings()))
    assert first is not None, "the shipped comparison is not one of the default settings"
    for arm, path in first.arms.items():
        difference = np.abs(pixels(path).astype(int) - np.asarray(state[arm].image))
        assert difference.max() <= 2, "another number of threads rounds otherwise, no more"
    assert all(Path(path).is_file() for path in first.thumbnails.values())


@pytest.mark.parametrize(
    "position, value, says",
    [
        (0, "", "prompt is empty"),
        (0, "apple " * 60, "tokens long"),
        (1, 1.5, "whole number"),
        (1, -1, "seed is a whole number"),
        (0, None, "prompt is empty"),
        (1, None, "is a number"),
        (3, None, "is a number"),
        (4, "2", "is a number"),
        (2, None, "No backbone"),
        (3, 0, "from 1 to 150"),
        (3, 500, "from 1 to 150"),
        (5, 9, "from 0 to 2"),
        (3, 2.5, "whole number"),
        (6, "nonsense", "no sampler 'nonsense'"),
        (2, "nonsense", "can't be loaded"),
        (2, "", "No backbone"),
        (9, "nonsense", "no refiner at nonsense"),
        (10, "nonsense", "no LoRA at nonsense"),
        (7, 65, "native size"),
        (8, 100000, "native size"),
        (2, "sd21", "can't be loaded"),
    ],
)
def test_bad_input_is_answered_with_a_sentence(client, position, value, says):
    inputs = list(GOOD)
    inputs[position] = value
    with pytest.raises((AppError, ValueError)) as error:
        client.predict(*inputs, api_name="/compare")
    assert says in str(error.value) and "verbose error reporting" not in str(error.value), (
        "Gradio's words for an exception nobody foresaw"
    )


@pytest.mark.parametrize("position", [1, 3, 4, 5, 7])
def test_nan_is_refused(position):
    inputs = list(GOOD)
    inputs[position] = float("nan")
    with pytest.raises(gr.Error, match="is a number; got nan"):
        shown(*inputs)


def shown(*inputs, view="compare", last=None, **controls):
    """Return what a view reports, by name; the pictures of its gallery as "images"."""
    state = {"images": [], "made": {}, "absent": {}}
    for events in handlers.run_view(view, Settings(*inputs), controls, last or {}):
        for event in pickle.loads(pickle.dumps(events)):  # ZeroGPU passes them between processes
            match event:
                case Made():
                    state["made"][event.model, event.sample.recipe] = event.sample
                case Arm():
                    state[event.arm] = event.sample
                case NoArm():
                    state["absent"][event.arm] = event.reason
                case Picture():
                    state["images"].append((event.caption, event.image))
                    state["total"] = event.total
                case Figure():
                    state[event.output] = event.figure
                case Note():
                    state["note"] = event.text
                case Pair():
                    state["pair"] = event
    return state


@pytest.fixture
def sampled(monkeypatch):
    """The recipes that are sampled, as they are."""
    recipes, sample = [], Maker.sample

    def sample_and_note(make, recipe, *args):
        recipes.append(recipe)
        return sample(make, recipe, *args)

    monkeypatch.setattr(Maker, "sample", sample_and_note)
    return recipes


def same(first, second, names=tuple(ARMS)):
    """Whether the columns are equal in every pixel."""
    return [np.array_equal(first[name].image, second[name].image) for name in names]


def forwards(state):
    return {arm: state[arm].forwards for arm in ARMS if arm in state}


def test_what_changes_nothing_is_not_sampled_again(sampled):
    first = shown(*GOOD)
    for position, value, count in ((5, 0.5, 1), (4, 3.0, 1), (3, 4, 3), (None, None, 0)):
        inputs = list(GOOD)
        if position is not None:
            inputs[position] = value
        sampled.clear()
        again = shown(*inputs, last=first["made"])
        assert len(sampled) == count, (position, sampled)
    assert all(same(again, first))


SHOWN = {
    "seeds": ({"count": 3}, 3 * len(ARMS)),
    "strength": ({}, len(STRENGTHS) + 1),
    "samplers": ({}, 2 * len(SAMPLERS) * len(STEPS)),
    "frequencies": ({"cutoff": 0.3}, 7),
    "trajectory": ({}, len(ARMS) * GOOD[3]),
    "two_prompts": ({"other": "a green frog"}, 6),
    "interpolation": ({"other_seed": 8}, 2 * INTERPOLATIONS),
    "guided_from_refined": ({}, 4),
    "attention": ({"word": "apple"}, len(ARMS) * GOOD[3]),
    "many": ({"prompts": "a cat\n\na dog\na cat", "count": 2}, 2 * 2 * len(ARMS)),
}


@pytest.mark.parametrize("view", SHOWN)
def test_every_view_shows_its_images(sampled, tiny, view):
    controls, count = SHOWN[view]
    state = shown(*tiny, view=view, **controls)
    assert len(state["images"]) == state["total"] == count
    assert all(caption for caption, _ in state["images"])
    sampled.clear()
    again = shown(*tiny, view=view, last=state["made"], **controls)
    assert view in ("trajectory", "attention") or not sampled, "these two watch the sampling"
    for (_, first), (_, second) in zip(state["images"], again["images"], strict=True):
        assert np.array_equal(getattr(first, "image", first), getattr(second, "image", second))
    if view == "attention":
        assert shown(*tiny, view=view, word="")["images"][0][0] == "Plain, “red” in forward 1", (
            "the prompt's first after the article"
        )
    if view == "frequencies":
        assert state["overlay"].size == (128, 128) and "times the energy of" in state["note"]
        assert state["histogram"].width > state["overlay"].width < state["spectrum"].width


def test_strengths_without_guidance_are_counted(tiny):
    state = shown(*tiny[:3], 1, 1.0, *tiny[5:], view="strength")
    assert len(state["images"]) == state["total"] == len(STRENGTHS)


def test_scale_1_has_no_guided_arm(tiny):
    """It would be the plain image: it is not shown as guided, nor compared as such."""
    inputs = [*tiny[:3], 1, 1.0, *tiny[5:]]
    state = shown(*inputs)
    assert "guided" not in state and "scale is 1" in state["absent"]["guided"]
    assert jobs.number_of_arms(Settings(*inputs)) == len(ARMS) - 1
    with pytest.raises(
        gr.Error, match="no 'guided' image to compare with: the guidance scale is 1"
    ):
        shown(*inputs, view="blind", **SPECIAL["blind"])
    with pytest.raises(gr.Error, match="does not apply: the guidance scale is 1"):
        shown(*inputs, view="guided_from_refined")


def test_every_view_with_a_tab_is_tested():
    assert {name for name, view in VIEWS.items() if view.title} == {*SHOWN, *SPECIAL}
    for name, view in VIEWS.items():
        assert view.text and set(view.controls) == set(controls_of(name))


SPECIAL = {"guidance_scale": {}, "blind": {"opponent": "guided", "prompts": "current"}}


def controls_of(view):
    return SHOWN[view][0] if view in SHOWN else SPECIAL.get(view, {})


@pytest.mark.parametrize("slider", [1.0, 12.0])
def test_the_scales_are_the_refiners_whatever_the_slider_says(tiny, slider):
    inputs = [*tiny[:3], 1, slider, *tiny[5:]]
    state = shown(*inputs, view="guidance_scale")
    assert len(state["images"]) == state["total"] == 2 * SCALES
    assert not jobs.hindrances(Settings(*inputs), ["guidance_scale"])


def test_the_slider_drives_a_refiner_that_is_told_the_scale():
    values = [*GOOD[:9], EMOJI_REFINER + "-scales", "", 1.0]
    first, second = shown(*values), shown(*values[:4], 3.5, *values[5:])
    assert same(first, second) == [True, False, False] and not all(same(first, shown(*GOOD)))
    images = shown(*GOOD, view="guidance_scale")["images"]  # it takes that refiner by itself
    assert [caption for caption, _ in images][::SCALES] == ["refined for g = 1", "guided, g = 1"]
    with pytest.raises(gr.Error, match="takes a guidance scale from 1 to 4"):
        shown(*values[:4], 5.0, *values[5:])


@pytest.mark.parametrize(
    "view, controls, says",
    [
        ("seeds", {"count": 1}, "from 2 to"),
        ("frequencies", {"cutoff": 1.5}, "from 0 to 1"),
        ("frequencies", {"cutoff": float("nan")}, "is a number"),
        ("interpolation", {"other_seed": 7}, "Both seeds are 7"),
        ("interpolation", {"other_seed": 1.5}, "whole number"),
        ("two_prompts", {"other": " "}, "other prompt is empty"),
        ("two_prompts", {"other": "apple " * 60}, "tokens long"),
        ("interpolation", {"other_seed": -1}, "seed is a whole"),
        ("interpolation", {"other_seed": None}, "is a number"),
        ("attention", {"word": "pear"}, "no word 'pear'"),
        ("blind", {"opponent": "nobody", "prompts": "current"}, "no 'nobody' image"),
        ("many", {"prompts": "a cat", "count": 10**12}, "in one go"),
        ("many", {"prompts": "a cat", "count": 0}, "in one go"),
        ("many", {"prompts": "a cat", "count": 40}, "1 prompt with 40 images each are 120 images"),
        ("many", {"prompts": "a cat", "count": 1.5}, "whole number"),
    ],
)
def test_views_refuse_with_a_sentence(view, controls, says):
    def forbidden(*_):
        raise AssertionError("a forward ran")

    handle = jobs.MODELS.get(Model("emoji")).pipe.unet.register_forward_pre_hook(forbidden)
    try:
        with pytest.raises(gr.Error, match=says):
            shown(*GOOD, view=view, **controls)
        with pytest.raises(gr.Error, match="tokens long"):
            shown(*GOOD, "blurry " * 60, view=view, **controls)
    finally:
        handle.remove()


@pytest.mark.parametrize("view", ["seeds", "many"])
def test_seeds_that_count_past_the_largest_are_refused_before_any_image(sampled, view):
    inputs = [PROMPT, MAX_SEED - 1, *GOOD[2:]]
    with pytest.raises(gr.Error, match=f"start at {MAX_SEED - 2} or below"):
        shown(*inputs, view=view, **controls_of(view) | {"count": 3})
    assert not sampled


def test_an_unforeseen_error_is_a_sentence_too(monkeypatch, caplog):
    def broken(*_):
        raise ZeroDivisionError("a secret of the program")

    monkeypatch.setattr(jobs, "work", broken)
    with pytest.raises(gr.Error, match="see the server's log") as error:
        shown(*GOOD)
    assert "secret" not in str(error.value) and "a secret of the program" in caplog.text


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with script("app.py", "--host", "127.0.0.1", "--port", port) as process:
            output = process.communicate(timeout=120)[0]
    assert f"Port {port} is taken" in output and "Traceback" not in output
    assert process.returncode == 1


@pytest.mark.parametrize(
    "view",
    ["samplers", "frequencies", "two_prompts", "interpolation", "guided_from_refined", "blind"],
)
def test_views_that_show_refining_refuse_strength_0(view):
    with pytest.raises(gr.Error, match="strength is 0"):
        shown(*GOOD[:5], 0, *GOOD[6:], view=view, **controls_of(view))
    assert len(shown(*GOOD[:5], 0, *GOOD[6:], view="strength")["images"]) == 8


def test_views_of_a_model_without_refiner_or_guidance(turbo):
    for view in (
        "strength",
        "samplers",
        "frequencies",
        "interpolation",
        "guided_from_refined",
        "refine",
    ):
        with pytest.raises(gr.Error, match="needs a refiner"):
            shown(*turbo, view=view, **controls_of(view))
    assert (
        len(shown(*turbo, view="trajectory")["images"]) == 1
        and len(shown(*turbo, view="attention", word="apple")["images"]) == 1
    )


def test_random_prompts_are_those_a_model_reads():
    files = (ASSETS / "prompts" / f"{name}.txt" for name in ("emoji", "emoji_heldout"))
    known = {line for file in files for line in file.read_text().splitlines()}
    assert {random_prompt("emoji") for _ in range(100)} <= known
    classes = load_pipeline(str(ASSETS / "emoji-sit"), "cpu")
    classes.encode_prompt([random_prompt("emoji-sit") for _ in range(100)])


def test_examples_are_named_as_a_class_conditional_model_takes_them():
    """The visitor's own words stay, and a link without a prompt shows the first example."""
    classes = load_pipeline(str(ASSETS / "emoji-sit"), "cpu")
    classes.encode_prompt([example_for("emoji-sit", prompt) for prompt in EXAMPLES])
    for prompt in (PROMPT, "an owl"):
        assert example_for("emoji-sit", prompt) == prompt
    assert example_for("emoji-flow", EXAMPLES[0]) == EXAMPLES[0]
    assert wiring._defaults_of("emoji-sit", EXAMPLES[1])[0] == "strawberry"
    with gr.Blocks():
        page = build_components()
    for query, prompt in (({}, "rocket"), ({"prompt": "an owl"}, "an owl")):
        assert restoring.from_address(page, {"backbone": "emoji-sit"} | query)[0] == prompt


def test_a_blind_pair_is_the_two_arms():
    pair = shown(*GOOD, view="blind", **SPECIAL["blind"])["pair"]
    columns = shown(PROMPT, pair.seed, *GOOD[2:])
    assert pair.prompt == PROMPT and sorted(pair.arms) == ["guided", "refined"]
    for image, arm in zip((pair.left, pair.right), pair.arms, strict=True):
        assert np.array_equal(image, columns[arm].image)


def test_stop_leaves_everything_as_it_was():
    before = shown(*GOOD)
    for updates in (1, 2, 3):
        running = handlers.run_view("compare", Settings(*GOOD[:3], 100, *GOOD[4:]), {}, {})
        for _ in range(updates):
            next(running)
        running.close()
        list(stream(jobs.WORKER, lambda report: None))  # free after the next step
    assert all(same(before, shown(*GOOD)))


def test_a_view_leaves_nothing_to_the_garbage_collector():
    """A full collection comes rarely in a process this large: tensors would pile up until then."""
    gc.collect()
    gc.disable()
    try:
        for view in ("compare", "strength", "trajectory"):
            shown(*GOOD, view=view)
        list(stream(jobs.WORKER, lambda report: None))  # the last job's frame is gone
        assert not [thing for thing in gc.get_objects() if isinstance(thing, (Maker, jobs.Job))]
    finally:
        gc.enable()


def test_two_at_once_do_not_disturb_each_other():
    other = [*GOOD[:1], 8, *GOOD[2:]]
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda inputs: shown(*inputs), (GOOD, other))
    assert forwards(first) == forwards(second) == {"gaussian": 5, "guided": 10, "refined": 6}
    assert all(same(first, shown(*GOOD))) and all(same(second, shown(*other)))


def test_what_was_finished_before_a_stop_is_kept(sampled):
    running, made = handlers.run_view("compare", Settings(*GOOD), {}, {}), {}
    while not made:
        made = {
            (event.model, event.sample.recipe): event.sample
            for event in next(running)
            if isinstance(event, Made)
        }
    running.close()
    sampled.clear()
    shown(*GOOD, last=made)
    assert len(sampled) == 3 - len(made)


def test_the_newest_images_are_kept(monkeypatch):
    made = shown(*GOOD)["made"]
    names = list(made)
    monkeypatch.setattr(handlers, "MAX_PIXELS", 2 * 128 * 128)
    handlers.keep_newest(made)
    assert list(made) == names[1:]
    monkeypatch.setattr(handlers, "MAX_IMAGES", 1)
    handlers.keep_newest(made)
    assert list(made) == names[2:]


def test_unfinished_images_are_shown():
    previews = set()
    for events in handlers.run_view("compare", Settings(*GOOD[:3], 60, *GOOD[4:]), {}, {}):
        previews |= {event.arm for event in events if isinstance(event, Progress)}
    assert previews == set(ARMS)


ODD = ["a panda", 12, "emoji", 4, 3.5, 0.75, "Euler", 136, 128, "", "", 1.0, "a cat"]


def restored_values(record):
    """Return the settings of a record, all of which are right."""
    values, problems = restored(record["settings"])
    assert not problems
    return values


def test_an_arm_restores_the_settings_that_make_it_again(client):
    result = predict(client, "compare", *ODD)
    for arm in ARMS:
        path = next(path for path in result["keep"] if path.endswith(f"{arm}.png"))
        record = read_png(path)
        assert record["arm"] == arm and record["view"] == "compare"
        assert record["refiner"] == "assets/refiners/emoji", "not where the page runs"
        assert len(record["refiner_sha256"]) == 64 and record["versions"]["torch"]
        assert ("nearness" in record) == (arm == "refined")
        assert np.array_equal(shown(*restored_values(record))[arm].image, pixels(path))
    values = dict(urllib.parse.parse_qsl(result["link"].removeprefix("?")))
    assert restored(values) == (ODD, [])


@pytest.mark.parametrize(
    "view",
    [
        "strength",
        "trajectory",
        "two_prompts",
        "interpolation",
        "frequencies",
        "attention",
        "guided_from_refined",
        "seeds",
    ],
)
def test_a_views_image_restores_the_view_that_makes_it_again(client, tiny, view):
    controls = controls_of(view) | ({"word": "panda"} if view == "attention" else {})
    odd = [*ODD[:2], tiny[2], *ODD[3:9], tiny[9], *ODD[10:]]
    images = predict(client, view, *odd, **controls)["images"]
    for shown_image in (images[1], images[-1]):
        record = read_png(shown_image["image"])
        again = restored_values(record)
        if record["view"] == "compare":
            made = [sample.image for arm, sample in shown(*again).items() if arm in ARMS]
        else:
            assert record["view"] == view and record["controls"] == controls
            state = shown(*again, view=view, **record["controls"])["images"]
            made = [getattr(image, "image", image) for _, image in state]
        assert any(np.array_equal(image, pixels(shown_image["image"])) for image in made)


def test_other_programs_settings(tmp_path):
    """The text of AUTOMATIC1111's web UI is read; ComfyUI's graph is refused by name."""
    text = (
        'a cat, "quoted", on two\nlines\nNegative prompt: blurry, bad\n'
        "Steps: 25, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 42, Size: 512x768, Model: x"
    )
    for key, value in (("parameters", text), ("workflow", "{}")):
        chunks = PngInfo()
        chunks.add_text(key, value)
        Image.new("RGB", (8, 8)).save(tmp_path / f"{key}.png", pnginfo=chunks)
    values, problems = restored(read_png(tmp_path / "parameters.png")["settings"])
    found = dict(zip(Settings.names(), values, strict=True))
    assert not problems and found["prompt"] == 'a cat, "quoted", on two\nlines'
    assert found["negative_prompt"] == "blurry, bad" and found["sampler"] == "DPM++ 2M"
    assert [found[name] for name in ("steps", "guidance_scale", "seed", "width", "height")] == [
        *(25, 6.5, 42, 512, 768)
    ]
    with pytest.raises(ValueError, match="made by ComfyUI"):
        read_png(tmp_path / "workflow.png")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_samplers_name_is_read_as_it_is_written(sampler):
    """In the PNG's text for other programs, and in a link."""
    chosen = Settings(PROMPT, sampler=sampler)
    assert a1111.read(a1111.write(asdict(chosen), "refined"))["sampler"] == sampler
    query = dict(urllib.parse.parse_qsl(link(chosen).removeprefix("?")))
    assert restored(query)[0][Settings.names().index("sampler")] == sampler


def test_an_arm_holds_its_parameters_for_other_programs(client):
    for path in predict(client, "compare", *ODD)["keep"]:
        text = Image.open(path).info.get("parameters")
        if path.endswith("guided.png"):
            assert "Negative prompt: a cat" in text and "CFG scale: 3.5" in text
        elif path.endswith("refined.png"):
            assert "CFG scale: 1, Seed: 12" in text and "strength: 0.75" in text


def test_an_images_settings_are_its_own():
    """Not those of the page, from which many images of a view differ."""
    page = asdict(Settings(PROMPT))
    record = {"settings": page, "view": "many", "controls": {"count": 3}}
    sample = Sample(Recipe("a cat", 3, 10, "Euler", 3.0, 0.0), None, None, None, 20, 0.1)
    own = {"prompt": "a cat", "seed": 3, "steps": 10, "sampler": "Euler"}
    made = made_from(record, sample)
    assert made["settings"] == page | own | {"guidance_scale": 3.0}
    assert made["view"] == "compare" and not made["controls"]
    both = made_from(record, replace(sample, recipe=replace(sample.recipe, strength=0.5)))
    assert {name: both[name] for name in record} == record, "no arm is guided from refined noise"
    scaled = replace(sample, recipe=Recipe("a cat", 3, 10, "Euler", 1.0, 1.0, 4.0))
    made = made_from(record | {"refiner": "assets/refiners/emoji-scales"}, scaled)
    assert made["settings"]["refiner"] == "emoji-scales", "a view takes it by itself"


@pytest.mark.parametrize(
    "values, says",
    [
        ({"seed": "x"}, "“seed” is a number"),
        ({"prompt": 5}, "“prompt” is a text"),
        ({"steps": "nan"}, "“steps” is a number"),
        ({"prompt": "x" * 10**5}, "“prompt” is a text"),
        ({"seed": [1]}, "“seed” is a number"),
        ({"strength": 9}, "“strength” is from 0 to 2; got 9. The default is taken instead."),
        ({"seed": "-1"}, "“seed” is from 0 to"),
        ({"steps": 2.5}, "“steps” is a whole number"),
    ],
)
def test_links_and_pngs_with_a_wrong_value_keep_the_others(values, says):
    restored_settings, problems = restored({"sampler": "Euler"} | values)
    assert len(problems) == 1 and says in problems[0] and "Euler" in restored_settings
    found = dict(zip(Settings.names(), restored_settings, strict=True))
    assert found | {"prompt": ""} == asdict(Settings("", sampler="Euler"))
    assert restored({"sampler": "Euler b"})[0][6] == Settings("").sampler


@pytest.mark.parametrize(
    "query, own",
    [
        ({"backbone": "emoji-sit"}, (4.0, 20, "Native")),  # no flow model takes DDIM
        ({"backbone": "Tongyi-MAI/Z-Image"}, (5.0, 28, "Native")),
        ({"backbone": "emoji-flow", "sampler": "Euler", "steps": "7"}, (3.0, 7, "Euler")),
        ({"backbone": "sd-turbo"}, (2.0, 1, BACKBONES["sd-turbo"].sampler)),  # takes no guidance
        ({"backbone": "somebody/model"}, (2.0, 20, "DDIM")),
        ({"backbone": ["emoji-sit"]}, (2.0, 20, "DDIM")),
    ],
)
def test_what_a_link_leaves_out_is_the_models_own(query, own):
    found = dict(zip(Settings.names(), restored(query)[0], strict=True))
    assert tuple(found[name] for name in ("guidance_scale", "steps", "sampler")) == own


@pytest.mark.parametrize("backbone", ["emoji", "emoji-sit", "sd-turbo", "somebody/model"])
def test_a_link_restores_the_usual_settings_of_another_model(backbone):
    """With which a link that left out the page's defaults would be one to other images."""
    query = dict(urllib.parse.parse_qsl(link(Settings("a cat", backbone=backbone))[1:]))
    assert restored(query) == (list(astuple(Settings("a cat", backbone=backbone))), [])


def test_a_link_names_the_shipped_refiner_not_its_place():
    settings = Settings("a cat", refiner="emoji-scales")
    assert link(settings) == "?prompt=a+cat&refiner=emoji-scales"
    assert Refiner.from_pretrained(
        settings.model.refiner, load_pipeline(EMOJI, "cpu")
    ).takes_guidance_scale


def test_strength_zero_is_said():
    state = shown(PROMPT, 7, "emoji", 4, 2.5, 0.0)
    assert "strength is 0" in state["note"]
    assert same(state, state | {"gaussian": state["refined"]}) == [True] * 3


def test_figures_in_words():
    assert texts.cost(1, None, None, None) == "**1** forward"
    assert "1 step, DDIM" in texts.caption(Settings(PROMPT, steps=1))
    assert "**30%** further from the guided" in texts.nearness([-0.4, -0.2])
    assert "**10%** nearer to the guided" in texts.nearness([0.4, -0.2])
    assert texts.variety({"plain": 2.0, "guided": 3.0}).endswith("plain 1.00, guided 1.50")


@pytest.mark.parametrize(
    "prompt, says",
    [
        ("(red:1.3) apple", "read as plain text"),
        ("an apple <lora:x:1>", "read as plain text"),
        ("a cathedral in fog", "knows no object"),
    ],
)
def test_hints_on_prompts(prompt, says):
    assert says in shown(prompt, *GOOD[1:3], 1)["note"] and says not in shown(*GOOD)["note"]


def test_what_the_safety_checker_flags_is_black_everywhere(tiny, tmp_path, monkeypatch):
    """In images, previews, trajectory, film, maps and after Stop; the page says why."""
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"intermediate_size": 8, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=4))
    checker.concept_embeds_weights.data.fill_(2.0)  # thresholds of cosines: nothing is flagged
    pipe = load_pipeline(tiny[2], "cpu")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    pipe.register_modules(safety_checker=checker, feature_extractor=processor)
    pipe.save_pretrained(tmp_path)
    monkeypatch.setattr(jobs, "MODELS", models.Models())
    inputs, notes = Settings(*tiny[:2], str(tmp_path), 2, *tiny[4:]), []
    captions = []

    def pictures(view, **controls):
        """Yield every picture that a view shows, and what is shown where Stop is pressed."""
        for event in itertools.chain(*handlers.run_view(view, inputs, controls, {})):
            match event:
                case Progress():
                    yield event.preview
                    yield jobs.decoded(inputs.model, event.x0)
                case Arm():
                    yield event.sample.image
                case Picture():
                    captions.append(event.caption)
                    yield event.image
                case Figure():
                    yield Image.open(io.BytesIO(event.figure))
                case Note():
                    notes.append(event.text)

    assert all(image.getbbox() for image in pictures("compare"))
    loaded = jobs.MODELS.find(inputs.model)
    loaded.pipe.safety_checker.concept_embeds_weights.data.fill_(-2.0)  # everything is flagged
    x0 = torch.randn(1, 4, 8, 8)
    assert np.array_equal(fit_preview(loaded.pipe)(x0), loaded.preview(x0)), "fitted to colours"
    black = [not image.getbbox() for view in ("compare", "trajectory") for image in pictures(view)]
    assert black == [True] * (len(ARMS) * (2 * 2 + 1) + len(ARMS) * 2 + 1)
    assert [text.count("blacked out by the model's safety checker") for text in notes] == [0, 1]
    assert not any(image.getbbox() for image in pictures("attention", word=""))
    assert all("blacked out" in caption for caption in captions)
    with pytest.raises(gr.Error, match="safety checker blacked out"):
        shown(*astuple(inputs), view="blind", opponent="guided", prompts="current")


def test_refine_gives_the_librarys_noise(client, pipe, refiner):
    noise = load_file(predict(client, "refine", *GOOD)["noise"])
    x_T = draw_noise(pipe, 7)
    assert torch.equal(noise["x_T"], x_T) and torch.equal(noise["refined"], refiner(x_T, PROMPT))


def test_endpoints_are_named_and_described(client):
    endpoints = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
    assert endpoints.keys() >= {
        f"/{view}" for view in (*SHOWN, "compare", "refine", "guidance_scale")
    }
    for view in VIEWS.keys() & {name.removeprefix("/") for name in endpoints}:
        endpoint = endpoints[f"/{view}"]
        names = [parameter["parameter_name"] for parameter in endpoint["parameters"]]
        assert names == [*Settings.names(), *VIEWS[view].controls] and endpoint["description"]
        outputs = [output["label"] for output in endpoint["returns"]]
        assert not any(re.match("value_|parameter_", name) for name in outputs), outputs
    images = predict(client, "guided_from_refined", "a panda")["images"]
    assert images[3]["caption"] == "refined and guided", "the list that is declared"


def test_the_card_of_a_shared_link(url):
    """One title and one picture, at an address that other machines reach behind a proxy too."""
    proxy = {"x-forwarded-host": "example.org", "x-forwarded-proto": "https"}
    for headers, address in (({}, url), (proxy, "https://example.org")):
        page = httpx.get(f"{url}/?seed=7", headers=headers).text
        cards = re.findall(r'<meta[^>]*"og:(title|image)"\s+content="([^"]*)"', page)
        assert dict(cards) == {"title": "NoiseRefine", "image": f"{address}/card.png"}
        assert len(cards) == 2
    picture = httpx.get(f"{url}/card.png")
    assert Image.open(io.BytesIO(picture.content)).size[0] > 600


def test_endpoints_are_tools(url):
    tools = httpx.get(f"{url}/gradio_api/mcp/schema").json()
    names = {tool["name"].removeprefix("app_"): tool for tool in tools}
    assert (
        names.keys() >= {"compare", "refine", *SHOWN}
        and "prompt" in names["compare"]["inputSchema"]["properties"]
    )


@pytest.mark.parametrize("progress", [True, False])
def test_tools_can_be_called(url, pipe, refiner, progress):
    async def call():
        async with (
            streamable_http_client(f"{url}/gradio_api/mcp/") as streams,
            ClientSession(*streams[:2]) as session,
        ):
            await session.initialize()
            return await session.call_tool(
                "compare",
                {"prompt": PROMPT, "seed": 9, "steps": 5},
                progress_callback=note if progress else None,
            )

    async def note(*_):
        pass

    answer = asyncio.run(call())
    assert not answer.isError, answer
    if (
        progress
    ):  # Gradio sends pictures to a client that asks for progress, to others their addresses
        images = [base64.b64decode(part.data) for part in answer.content if part.type == "image"]
    else:
        images = [
            httpx.get(address).content
            for address in re.findall(r"'url': '([^']*\.png)'", answer.content[0].text)
        ]
    expected = pipe(
        PROMPT,
        latents=refiner(draw_noise(pipe, 9), PROMPT),
        guidance_scale=1.0,
        num_inference_steps=5,
    ).images[0]
    assert any(np.array_equal(Image.open(io.BytesIO(image)), expected) for image in images)


def test_compiled_blocks_make_the_same_images(monkeypatch):
    plain = shown(*GOOD)
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="eager")
    )  # the real one takes minutes
    monkeypatch.setattr(jobs, "MODELS", models.Models())
    jobs.MODELS.compiled = True
    state = shown(*GOOD)
    blocks = [
        module
        for module in jobs.MODELS.get(Model("emoji")).pipe.unet.modules()
        if module._compiled_call_impl
    ]
    assert blocks and all(same(plain, state)) and forwards(state) == forwards(plain)
    assert len(shown(*GOOD, view="attention", word="apple")["images"]) == 15


@pytest.fixture
def turbo(tmp_path, monkeypatch):
    """A small model with SD-Turbo's architecture, scheduler and place in the catalogue."""
    random_pipeline("sd-turbo", small=True).save_pretrained(tmp_path)
    monkeypatch.setitem(BACKBONES, "sd-turbo", replace(BACKBONES["sd-turbo"], source=str(tmp_path)))
    monkeypatch.setattr(jobs, "MODELS", models.Models())
    return [PROMPT, 7, "sd-turbo", 1, 7.0, 1.0, "Euler", 0, 0, "", "", 1.0]


def test_turbo_has_no_guided_column_and_no_refiner_yet(turbo):
    state = shown(*turbo)
    assert (
        "Not applicable" in state["absent"]["guided"]
        and "guided" not in state
        and "refined" not in state
    )
    assert f"--backbone {BACKBONES['sd21-base'].source}" in state["absent"]["refined"]
    assert state["gaussian"].image.size == (128, 128)


def test_a_refiner_that_the_user_names(turbo, tmp_path):
    refiner = tmp_path / "refiner"
    perturbed(load_pipeline(str(tmp_path), "cpu"), guidance_scale_range=[1, 5]).save_pretrained(
        refiner
    )
    turbo[9] = str(refiner)
    with pytest.raises(gr.Error, match="takes a guidance scale from 1 to 5"):
        shown(*turbo)
    turbo[4] = 4.0
    state = shown(*turbo)
    assert forwards(state) == {"gaussian": 1, "refined": 2} and "the slider drives" in state["note"]
    with pytest.raises(gr.Error, match="another architecture"):
        shown(*GOOD[:9], str(refiner), "", 1.0)


def test_a_users_lora_is_in_every_column():
    plain, styled = shown(*GOOD), shown(*GOOD[:9], "", LORA, 0.8)
    assert not any(same(plain, styled)) and all(same(plain, shown(*GOOD)))


def test_asking_what_hinders_a_view_changes_no_picture(monkeypatch):
    """It is asked while another visitor's picture may be sampled with the same LoRA.

    A tokenizer that two threads use may forget the padding of one, and offloaded networks move.
    """
    inputs = [*GOOD[:5], 0.0, *GOOD[6:9], "", LORA, 0.8]
    shown(*inputs)
    loaded = jobs.MODELS.find(Settings(*inputs).model)
    before = output(loaded.pipe)
    with monkeypatch.context() as patch:
        patch.delattr(PreTrainedTokenizerBase, "__call__")
        patch.delattr(torch.nn.Module, "__call__")
        reasons = jobs.hindrances(Settings(*inputs[:11], -0.5), ["compare", "samplers"])
    assert list(reasons) == ["samplers"] and "strength is 0" in reasons["samplers"]
    assert torch.equal(output(loaded.pipe), before)


@pytest.mark.parametrize(
    "chosen, hindered",
    [
        ({}, []),
        ({"guidance_scale": 1}, ["guided_from_refined"]),
        ({"backbone": "sd-turbo"}, ["strength", "guidance_scale", "guided_from_refined"]),
        ({"backbone": "sd-turbo", "refiner": "x/y"}, ["guidance_scale", "guided_from_refined"]),
        ({"backbone": "emoji-sit"}, ["guidance_scale"]),
        ({"backbone": "a/b"}, []),
        ({"strength": 9}, []),
    ],
)
def test_what_hinders_a_view_is_known_before_a_model_is_loaded(monkeypatch, chosen, hindered):
    """A link or a choice names a model that a comparison loads later, if at all."""
    monkeypatch.setattr(jobs, "MODELS", models.Models())
    views = ["compare", "strength", "guidance_scale", "guided_from_refined", "attention"]
    assert list(jobs.hindrances(Settings(PROMPT, **chosen), views)) == hindered
    assert not jobs.MODELS.loaded


def test_out_of_memory_is_survived(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = shown(*GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(Maker, "sample", full)
        with pytest.raises(gr.Error, match="memory is full.*--offload model"):
            shown(*GOOD)
    assert all(same(before, shown(*GOOD)))


@pytest.mark.parametrize(
    "position, value",
    [
        (2, "somebody/something"),
        (9, "/etc"),
        (10, "../secret.safetensors"),
        (9, "sdxl"),
        (10, "emoji"),
    ],
)
def test_a_public_space_serves_its_own_models(monkeypatch, position, value):
    monkeypatch.setattr(settings, "FREE_CHOICE", False)
    inputs = list(GOOD)
    inputs[position] = value
    with pytest.raises(gr.Error, match="serves its own models only"):
        shown(*inputs)
    shown(*GOOD)


@pytest.mark.parametrize(
    "space, variable, allowed",
    [(None, None, True), ("a/b", None, False), ("a/b", "1", True), (None, "0", False)],
)
def test_who_may_name_any_model(monkeypatch, space, variable, allowed):
    for name, value in (("SPACE_ID", space), ("NOISEREFINE_ANY_MODEL", variable)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    assert any_model_allowed() == allowed


def test_a_loras_weight_does_not_load_the_model_again(monkeypatch):
    inputs = [*GOOD[:9], "", LORA, 0.8]
    strong = shown(*inputs)
    monkeypatch.setattr(models, "load_pipeline", None)
    inputs[11] = 0.0
    assert all(same(shown(*inputs), shown(*GOOD), ("gaussian", "guided")))
    inputs[11] = 0.8
    assert all(same(shown(*inputs), strong))


def test_offload_reaches_the_page(monkeypatch):
    """Model offload computes on a CPU too, the sequential one on accelerators only."""
    plain = shown(*GOOD)
    monkeypatch.setattr(jobs, "MODELS", models.Models())
    jobs.MODELS.offload = "model"
    assert all(same(plain, shown(*GOOD)))
    monkeypatch.setattr(jobs, "MODELS", models.Models())
    jobs.MODELS.offload = "sequential"
    loaded = jobs.MODELS.get(Model("emoji"))
    assert "guidance scale" in loaded.notes
    assert (
        loaded.refiner.network.conv_in.weight.device.type
        == loaded.pipe.unet.conv_in.weight.device.type
        == "meta"
    )


def test_seconds_of_gpu_fit_a_visitors_quota():
    """An anonymous visitor of ZeroGPU has about two minutes a day."""

    def seconds(view, *values, **controls):
        return handlers.seconds_of_gpu(view, Settings(PROMPT, 0, *values), controls, {})

    for name, backbone in BACKBONES.items():
        assert 10 <= seconds("compare", name, backbone.steps) <= 30
        for view in VIEWS:
            assert 10 <= seconds(view, name, backbone.steps, prompts="", count=4) <= 120, view
    assert seconds("compare", "sd21", float("nan")) and seconds("compare", None, 10**9) < 120
    assert seconds("many", "sd21", 20, prompts=None, count=float("nan"))
    heun = Settings(PROMPT, sampler="Heun (EDM)")  # 39, 78 and 40 forwards
    assert VIEWS["compare"].cost(heun, {}) >= 157


@pytest.mark.parametrize(
    "event, note, messages",
    [
        (Download(100, 2 * 10**6), gr.skip(), ["Stopped after 1 of 2 MB."]),
        (Picture("one", Image.new("RGB", (8, 8)), 3), "**Stopped** after 1 of 3 images.", []),
    ],
)
def test_a_run_stopped_before_it_showed_anything_changes_nothing(
    monkeypatch, event, note, messages
):
    said, outputs = [], {"images": gr.Gallery(), "note": gr.Markdown()}
    monkeypatch.setattr(handlers, "run_view", lambda *_: (batch for batch in [[event], [event]]))
    monkeypatch.setattr(handlers, "STOPPED", {("a session", "strength")})
    monkeypatch.setattr(gr, "Info", said.append)
    request = types.SimpleNamespace(session_hash="a session", headers={})
    handler = handlers.handler_of("strength", outputs, {})
    [values] = handler(*astuple(Settings(PROMPT)), {}, request, lambda *_, **__: None)
    assert values[outputs["note"]] == note and said == messages
    assert not handlers.STOPPED and not handlers.RUNNING


def test_stop_spares_what_another_button_starts_after_it(monkeypatch):
    """It ends the run of its session, and that view's next one."""
    asked = []

    class Asked(set):
        def add(self, run):
            asked.append(run)

    request = types.SimpleNamespace(session_hash="a")
    monkeypatch.setattr(handlers, "NEXT_RUN_SECONDS", 0)
    monkeypatch.setattr(handlers, "STOP_SECONDS", 0)
    monkeypatch.setattr(handlers, "STOPPED", Asked())
    monkeypatch.setattr(handlers, "RUNNING", Counter({("a", "many"): 1, ("b", "compare"): 1}))
    assert handlers.request_stop(request) == ["many"] and asked == [("a", "many")]
    handlers.RUNNING["a", "compare"] += 1
    handlers.stop_next(["many"], request)
    assert asked == 2 * [("a", "many")]


def test_old_files_are_deleted_but_not_those_the_page_opens_with():
    blocks = wiring.build_page()
    assert blocks.delete_cache
    kept = {path for block in blocks.blocks.values() for path in block.keep_in_cache}
    assert set().union(*blocks.temp_file_sets) <= kept


def test_page_goes_on_after_errors(client):
    assert pixels(predict(client, "compare", *GOOD)["refined"]).shape == (128, 128, 3)


@pytest.mark.parametrize(
    "backbone, refiner, arms",
    [
        ("emoji", "", 3),
        ("sd21", "", 2),
        ("sd-turbo", "", 1),
        ("sd-turbo", "x/y", 2),
        ("a/b", "", 3),
    ],
)
def test_a_comparisons_arms_are_counted_before_it_is_made(backbone, refiner, arms):
    assert jobs.number_of_arms(Settings(PROMPT, backbone=backbone, refiner=refiner)) == arms


def test_every_arm_has_a_row_or_column_of_its_own():
    settings = Settings(PROMPT, steps=3)
    columns = {name: view.per_row for name, view in VIEWS.items() if view.per_row}
    assert columns["many"](settings, {}, 2) == 2
    assert columns["seeds"](settings, {"count": 5}, 3) == 5
    assert columns["trajectory"](settings, {}, 3) == columns["attention"](settings, {}, 3) == 3


def test_what_importing_the_app_imports():
    """It takes no spaces package, no PyTorch before that is needed, and downloads without Xet."""
    code = (
        "import sys; sys.modules['spaces'] = None; import app; "
        "from noiserefine.page.handlers import run_view; "
        "from noiserefine.page.settings import ZERO_GPU; "
        "from huggingface_hub.constants import HF_HUB_DISABLE_XET; "
        "print(ZERO_GPU, run_view.__name__, 'torch' in sys.modules, HF_HUB_DISABLE_XET)"
    )
    with script("-c", code) as process:
        assert process.communicate()[0].strip().endswith("False run_view False True")
