"""The page through its server: as an API and in a browser."""

import asyncio
import base64
import functools
import gc
import io
import pickle
import re
import shutil
import socket
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from conftest import EMOJI, EMOJI_REFINER, perturbed, script
from gradio_client import Client
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from PIL import Image
from safetensors.torch import load_file

from noiserefine import Refiner, draw_noise
from noiserefine.analysis.explore import INTERPOLATIONS, STEPS, STRENGTHS
from noiserefine.analysis.recipe import Maker, Recipe, Sample
from noiserefine.models import pool as models
from noiserefine.models.catalogue import BACKBONES, Model
from noiserefine.models.loading import load_pipeline
from noiserefine.page import handlers, jobs, settings
from noiserefine.page.events import Arm, Figure, Made, NoArm, Note, Pair, Picture, Progress
from noiserefine.page.record import read_png, save_png
from noiserefine.page.screen import made_from
from noiserefine.page.settings import Settings, any_model_allowed, link, restored
from noiserefine.page.stream import stream
from noiserefine.page.views import ARMS, VIEWS
from noiserefine.sampler_names import SAMPLERS
from train.tools.architectures import random_pipeline

PROMPT = "a red apple on a blue background"
# prompt, seed, backbone, steps, guidance scale, strength, sampler, width, height, refiner, LoRA, LoRA weight
LORA = "assets/loras/emoji-clay"
GOOD = [PROMPT, 7, "emoji", 5, 2.5, 1.0, "DDIM", 0, 0, "", "", 1.0]


@pytest.fixture(scope="module")
def url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with script("app.py", "--host", "127.0.0.1", "--port", port) as process:
        line = ""
        while "Running on local URL" not in line:
            line = process.stdout.readline()
            assert line, "the server ended"
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


def pixels(result):
    return np.asarray(
        Image.open(result["path"] if isinstance(result, dict) else result).convert("RGB")
    )


def test_compare_gives_the_librarys_pixels(client, pipe, refiner):
    (
        gaussian,
        gaussian_cost,
        guided,
        guided_cost,
        refined,
        refined_cost,
        heat,
        layout,
        says,
        keep,
        link,
    ) = client.predict(*GOOD, api_name="/compare")
    assert [
        re.search(r"\*\*(\d+)\*\*", cost)[1] for cost in (gaussian_cost, guided_cost, refined_cost)
    ] == ["5", "10", "6"]
    x_T = draw_noise(pipe, 7)
    expected = pipe(
        PROMPT, latents=refiner(x_T, PROMPT), guidance_scale=1.0, num_inference_steps=5
    ).images[0]
    assert np.array_equal(pixels(refined), expected) and np.array_equal(pixels(layout), expected)
    assert (
        not np.array_equal(pixels(gaussian), pixels(guided))
        and pixels(heat).shape == pixels(refined).shape
    )
    assert "of its energy" in says


@pytest.mark.parametrize(
    "position, value, says",
    [
        (0, "", "prompt is empty"),
        (0, "apple " * 60, "tokens long"),
        (1, 1.5, "whole number"),
        (1, -1, "seed is a whole number"),
        (1, None, "is a number"),
        (3, 0, "from 1 to 200"),
        (3, 500, "from 1 to 200"),
        (5, 9, "from 0 to 3"),
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
    for events in handlers.run(view, Settings(*inputs), controls, last or {}):
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
    "strength": ({}, len(STRENGTHS) + 1),
    "samplers": ({}, 2 * len(SAMPLERS) * len(STEPS)),
    "frequencies": ({"cutoff": 0.3}, 7),
    "trajectory": ({}, len(ARMS) * GOOD[3]),
    "two_prompts": ({"other": "a green frog"}, 6),
    "interpolation": ({"other_seed": 8}, 2 * INTERPOLATIONS),
    "guided_from_refined": ({}, 4),
    "attention": ({"word": "apple"}, len(ARMS) * GOOD[3]),
    "many": ({"prompts": "a cat\n\na dog", "count": 2}, 2 * 2 * len(ARMS)),
}


@pytest.mark.parametrize("view", SHOWN)
def test_every_view_shows_its_images(sampled, view):
    controls, count = SHOWN[view]
    state = shown(*GOOD, view=view, **controls)
    assert len(state["images"]) == count and all(caption for caption, _ in state["images"])
    sampled.clear()
    again = shown(*GOOD, view=view, last=state["made"], **controls)
    assert view in ("trajectory", "attention") or not sampled, "these two watch the sampling"
    for (_, first), (_, second) in zip(state["images"], again["images"], strict=True):
        assert np.array_equal(getattr(first, "image", first), getattr(second, "image", second))
    if view == "attention":
        assert shown(*GOOD, view=view, word="")["images"][0][0] == "Gaussian, “red” in forward 1", (
            "the prompt's first after the article"
        )
    if view == "frequencies":
        assert (
            state["overlay"].size == (64, 64) and state["histogram"].axes and state["spectrum"].axes
        )


def test_every_view_with_a_tab_is_tested():
    assert {name for name, view in VIEWS.items() if view.title} == SHOWN.keys() | {"guidance_scale"}
    assert all(
        view.text and set(view.controls) == set(controls_of(name)) for name, view in VIEWS.items()
    )


def controls_of(view):
    return SHOWN[view][0] if view in SHOWN else {"opponent": "guided"} if view == "blind" else {}


def test_the_slider_drives_a_refiner_that_is_told_the_scale():
    told = [*GOOD[:9], EMOJI_REFINER + "-scales", "", 1.0]
    first, second = shown(*told), shown(*told[:4], 3.5, *told[5:])
    assert same(first, second) == [True, False, False] and not all(same(first, shown(*GOOD)))
    images = shown(*told, view="guidance_scale")["images"]
    assert [caption for caption, _ in images][::5] == [
        "refined for g = 1",
        "guided, g = 1",
    ] and len(images) == 10
    with pytest.raises(gr.Error, match="takes a guidance scale from 1 to 4"):
        shown(*told[:4], 5.0, *told[5:])


@pytest.mark.parametrize(
    "view, controls, says",
    [
        ("guidance_scale", {}, "choose “Emoji, told the guidance scale”"),
        ("frequencies", {"cutoff": 1.5}, "from 0 to 1"),
        ("frequencies", {"cutoff": float("nan")}, "is a number"),
        ("interpolation", {"other_seed": 7}, "Both seeds are 7"),
        ("interpolation", {"other_seed": 1.5}, "whole number"),
        ("two_prompts", {"other": " "}, "other prompt is empty"),
        ("two_prompts", {"other": "apple " * 60}, "tokens long"),
        ("interpolation", {"other_seed": -1}, "seed is a whole"),
        ("interpolation", {"other_seed": None}, "is a number"),
        ("attention", {"word": "pear"}, "no word 'pear'"),
        ("blind", {"opponent": "nobody"}, "no 'nobody' image"),
        ("many", {"prompts": "a cat", "count": 1000}, "in one go"),
        ("many", {"prompts": "a cat", "count": 0}, "in one go"),
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


def test_a_blind_pair_is_the_two_arms():
    pair = shown(*GOOD, view="blind", opponent="guided")["pair"]
    columns = shown(PROMPT, pair.seed, *GOOD[2:])
    assert pair.prompt == PROMPT and sorted(pair.arms) == ["guided", "refined"]
    for image, arm in zip((pair.left, pair.right), pair.arms, strict=True):
        assert np.array_equal(image, columns[arm].image)


def test_stop_leaves_everything_as_it_was():
    before = shown(*GOOD)
    for updates in (1, 2, 3):
        running = handlers.run("compare", Settings(*GOOD[:3], 100, *GOOD[4:]), {}, {})
        for _ in range(updates):
            next(running)
        running.close()
        list(stream(jobs.WORKER, lambda report: None))  # free after the next step
    assert all(same(before, shown(*GOOD)))


def test_a_view_leaves_nothing_to_the_garbage_collector():
    """A full collection comes rarely in a process this large: what waits for it, tensors too, would pile up."""
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
    running, made = handlers.run("compare", Settings(*GOOD), {}, {}), {}
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
    monkeypatch.setattr(handlers, "MAX_PIXELS", 2 * 64 * 64)
    handlers.keep_newest(made)
    assert list(made) == names[1:]
    monkeypatch.setattr(handlers, "MAX_IMAGES", 1)
    handlers.keep_newest(made)
    assert list(made) == names[2:]


def test_unfinished_images_are_shown():
    previews = set()
    for events in handlers.run("compare", Settings(*GOOD[:3], 60, *GOOD[4:]), {}, {}):
        previews |= {event.arm for event in events if isinstance(event, Progress)}
    assert previews == set(ARMS)


def test_an_image_restores_the_settings_that_make_it_again(client):
    odd = [
        "a panda on a pink background",
        12,
        "emoji",
        4,
        3.5,
        0.75,
        "Euler",
        72,
        64,
        "",
        "",
        1.0,
        "a cat",
    ]
    *_, keep, link = client.predict(*odd, api_name="/compare")
    *_, strong = client.predict(*odd, api_name="/strength")[:7]
    record = read_png(strong["image"])
    assert record["settings"]["strength"] == 1.5 and record["caption"] == "strength 1.5"
    assert np.array_equal(
        shown(*restored(record["settings"]))["refined"].image, pixels(strong["image"])
    )
    for path, arm in zip(keep[1:], ARMS, strict=True):
        record = read_png(path)
        assert (
            record["arm"] == arm
            and record["backbone"] == "emoji"
            and len(record["refiner_sha256"]) == 64
            and record["versions"]["torch"]
        )
        again = restored(record["settings"])
        assert again[:9] == odd[:9] and again[12] == "a cat"
        assert np.array_equal(shown(*again)[arm].image, pixels(path))
    values = dict(urllib.parse.parse_qsl(re.search(r"\?(.*)\)", link)[1]))
    assert Settings(
        *[
            value if isinstance(value, (str, int, float)) else field.default
            for value, field in zip(restored(values), fields(Settings))
        ]
    ) == Settings(*odd)


def test_an_images_settings_are_its_own():
    """Not those of the page, from which many images of a view differ."""
    page = asdict(Settings(PROMPT))
    sample = Sample(Recipe("a cat", 3, 10, "Euler", 3.0, 0.5), None, None, 21, 0.1)
    own = dict(prompt="a cat", seed=3, steps=10, sampler="Euler", guidance_scale=3.0, strength=0.5)
    assert made_from({"settings": page}, sample)["settings"] == page | own
    unguided = replace(sample, recipe=sample.recipe.gaussian)
    assert made_from({"settings": page}, unguided)["settings"] == page | own | {
        "guidance_scale": page["guidance_scale"],
        "strength": page["strength"],
    }


@pytest.mark.parametrize(
    "values, says",
    [
        ({"seed": "x"}, "seed is a number"),
        ({"prompt": 5}, "prompt is a text"),
        ({"steps": "nan"}, "is a number"),
        ({"prompt": "x" * 10**5}, "prompt is a text"),
        ({"seed": [1]}, "seed is a number"),
    ],
)
def test_links_and_pngs_with_other_values(values, says):
    with pytest.raises(ValueError, match=says):
        restored(values)


def test_a_link_names_the_shipped_refiner_not_its_place():
    settings = Settings("a cat", refiner="emoji-scales")
    assert link(settings) == "?prompt=a+cat&refiner=emoji-scales"
    assert Refiner.from_pretrained(
        settings.model.refiner, load_pipeline(EMOJI, "cpu")
    ).takes_guidance_scale


def test_strength_zero_is_said():
    state = shown(PROMPT, 7, "emoji", 4, 2.5, 0.0)
    assert (
        "strength is 0" in state["note"]
        and "heat" not in state
        and same(state, state | {"gaussian": state["refined"]}) == [True] * 3
    )


def test_refine_gives_the_librarys_noise(client, pipe, refiner):
    noise = load_file(client.predict(*GOOD, api_name="/refine"))
    x_T = draw_noise(pipe, 7)
    assert torch.equal(noise["x_T"], x_T) and torch.equal(noise["refined"], refiner(x_T, PROMPT))


def test_endpoints_are_named_and_described(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert endpoints.keys() >= {
        f"/{view}" for view in (*SHOWN, "compare", "refine", "guidance_scale")
    }
    for view in VIEWS:
        if f"/{view}" in endpoints:
            names = [
                parameter["parameter_name"] for parameter in endpoints[f"/{view}"]["parameters"]
            ]
            assert names[:2] == ["prompt", "seed"] and endpoints[f"/{view}"]["description"]
    assert (
        client.predict("a panda", api_name="/guided_from_refined")[3]["caption"]
        == "refined, guided"
    )


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
    assert np.array_equal(Image.open(io.BytesIO(images[2])), expected)


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
    assert f"--backbone {BACKBONES['sd21-base'].source}" in state["note"] and state[
        "gaussian"
    ].image.size == (128, 128)


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
    """Model offload computes on a CPU too; the sequential one only on accelerators, but it must get as far as computing."""
    plain = shown(*GOOD)
    monkeypatch.setattr(jobs, "MODELS", models.Models())
    jobs.MODELS.offload = "model"
    assert all(same(plain, shown(*GOOD)))
    monkeypatch.setattr(jobs, "MODELS", models.Models())
    jobs.MODELS.offload = "sequential"
    loaded = jobs.MODELS.get(Model("emoji"))
    assert "guidance scale" in loaded.says
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


def test_page_goes_on_after_errors(client):
    assert pixels(client.predict(*GOOD, api_name="/compare")[0]).shape == (64, 64, 3)


def look_at(page, tab):
    """Opens a tab, by the menu of those that don't fit where it is there, and waits for its images."""
    if page.get_by_role("tab", name=tab, exact=True).is_visible():
        page.get_by_role("tab", name=tab, exact=True).click()
    else:
        page.locator(".overflow-menu > button").first.click()
        page.locator(".overflow-dropdown button", has_text=tab).first.click()
    panel = page.locator("[role=tabpanel]").locator("visible=true")
    panel.get_by_role(
        "button", name="New pair" if tab == "Blind test" else "Show", exact=True
    ).click()
    if tab == "Guidance scale":  # the embedded model's own refiner takes none
        page.get_by_text("takes no guidance scale").last.wait_for(timeout=20_000)
        return
    panel.locator(".images img, #pair img").nth(1).wait_for(timeout=60_000)
    page.wait_for_function("!document.querySelector('.progress-text')", timeout=60_000)
    box = panel.bounding_box()
    assert box["x"] + box["width"] <= page.viewport_size["width"], f"{tab} is cut off"
    assert all(
        alt for alt in panel.locator("img").evaluate_all("images => images.map(image => image.alt)")
    )


def stop_and_restore(page, url, folder):
    """Stops a long run, then restores the settings of a downloaded image and of a link."""
    page.get_by_label("Steps").first.fill("100")
    page.get_by_label("Prompt", exact=True).press("Enter")
    page.wait_for_function(
        "!document.querySelector('#arms').innerText.includes('UNet forwards')", timeout=20_000
    )  # the first preview is there
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function("!document.querySelector('.progress-text')", timeout=20_000)
    assert page.locator("#arms").inner_text().count("UNet forwards") < 3
    Image.new("RGB", (8, 8)).save(folder / "foreign.png")
    drop_on_field(page, folder / "foreign.png")
    page.get_by_text("This PNG holds no settings").wait_for(timeout=20_000)
    assert not page.locator("[data-testid=status-tracker] .error").filter(visible=True).count(), (
        "a mark over what was typed and made"
    )
    for seed, drop in (("123", drop_on_field), ("124", drop_on_page)):
        save_png(
            Image.new("RGB", (64, 64)),
            folder / "image.png",
            {"settings": {"prompt": f"an owl {seed}", "seed": int(seed), "steps": 6}},
        )
        page.locator("#restore input[type=file]").wait_for(
            state="attached", timeout=20_000
        )  # also after the first image
        drop(page, folder / "image.png")
        page.wait_for_function(
            "text => document.querySelector('#ask textarea')?.value == text",
            arg=f"an owl {seed}",
            timeout=20_000,
        )
        assert page.get_by_label("Seed", exact=True).input_value() == seed
    page = page.context.new_page()
    page.goto(f"{url}/?prompt=a+panda&seed=77&steps=9")
    page.wait_for_function(
        "document.querySelector('#ask textarea')?.value == 'a panda'", timeout=20_000
    )
    assert page.get_by_label("Seed", exact=True).input_value() == "77"
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function(
        "document.querySelector('#arms')?.innerText.includes('18 UNet forwards')", timeout=60_000
    )


def drop_on_field(page, path):
    page.locator("#restore input[type=file]").set_input_files(path)


def drop_on_page(page, path):
    data = base64.b64encode(path.read_bytes()).decode()
    page.evaluate(
        """data => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "image.png", {type: "image/png"}));
        document.querySelector("#arms").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
    }""",
        data,
    )


def vote(page):
    """Answers both questions of the blind test, which is open."""
    page.get_by_role("button", name="Vote", exact=True).click()
    page.get_by_text("Answer both questions").wait_for(timeout=20_000)
    for question in ("Which is better?", "Which follows the prompt?"):
        page.get_by_role("radiogroup", name=question).or_(
            page.locator("fieldset", has_text=question)
        ).first.get_by_label("left").click()
    page.get_by_role("button", name="Vote", exact=True).click()
    page.get_by_text(re.compile("Left was (refined|guided)")).wait_for(timeout=20_000)
    assert page.locator("td", has_text="Which is better?").count() == 1


@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)])
def test_in_a_browser(url, tmp_path, width, height):
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    assert chromium, "the browser test needs Chromium: apt-get install chromium"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        context = browser.new_context(viewport={"width": width, "height": height})
        errors = []
        context.on(
            "console",
            lambda message: errors.append(message.text) if message.type == "error" else None,
        )
        context.on("weberror", lambda error: errors.append(str(error.error)))
        page = context.new_page()
        page.goto(url)
        prompt = page.get_by_label("Prompt", exact=True)
        prompt.fill("a panda on a pink background")
        page.locator("#restore input[type=file]").wait_for(
            state="attached"
        )  # Gradio puts its parts into the page one by one
        page.wait_for_function(
            "[...document.querySelectorAll('#arms .picture, #noise .picture')].filter(each => each.clientHeight > 50).length == 5"
        )
        page.evaluate("""() => {
            window.shift = 0;
            new PerformanceObserver(list => list.getEntries().forEach(entry => window.shift += entry.hadRecentInput ? 0 : entry.value))
                .observe({type: "layout-shift"});
        }""")
        prompt.press("Enter")
        page.wait_for_function(
            "document.querySelectorAll('#arms img').length == 3 && document.querySelectorAll('#noise img').length == 2",
            timeout=120_000,
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [page.locator("#arms img").nth(i).bounding_box() for i in range(3)]
        assert (
            boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
            and len({round(box["y"]) for box in boxes}) == 1
        ), "three side by side"
        assert re.search(r"21\s+UNet forwards", page.locator("#arms").inner_text())
        assert (
            page.evaluate("""[...document.querySelectorAll('.card')].every(card => [...card.children].every(
            part => part.getBoundingClientRect().right <= card.getBoundingClientRect().right))""")
        ), "nothing sticks out of a card"
        assert page.evaluate("shift") < 0.1, "what web.dev calls good"
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
        page.wait_for_function(
            "src => { const i = document.querySelectorAll('#noise img')[1]; return i && i.src != src }",
            arg=shown,
            timeout=60_000,
        )
        assert prompt.input_value() == "a sailboat"
        page.get_by_label("Steps").first.fill("4")
        prompt.fill(PROMPT)
        for tab in [about.title for about in VIEWS.values() if about.title] + ["Blind test"]:
            look_at(page, tab)
        vote(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        stop_and_restore(page, url, tmp_path)
        assert not errors
        browser.close()


def test_runs_without_the_spaces_package(tmp_path):
    code = (
        "import sys; sys.modules['spaces'] = None; import app; "
        "from noiserefine.page.handlers import run; "
        "print(app.ZERO_GPU, run.__name__, 'torch' in sys.modules)"
    )
    with script("-c", code) as process:
        assert process.communicate()[0].strip().endswith("False run False"), (
            "torch is not imported before it is needed"
        )
