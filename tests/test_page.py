"""The page in a browser: what can be seen only there."""

import base64
import re
import shutil
import urllib.parse

import pytest
from PIL import Image

from noiserefine.models.catalogue import BACKBONES
from noiserefine.page.opening import EXAMPLES
from noiserefine.page.record import save_png
from noiserefine.page.settings import Settings
from noiserefine.page.training import plan_of
from noiserefine.page.views import ARMS, VIEWS
from train.tools.architectures import random_pipeline

SIZES = {"desktop": (1280, 900), "tablet": (768, 1024), "phone": (390, 844)}
QUICK = "?prompt=a+panda&steps=2"  # a link that opens with a comparison of two steps
SECONDS = 60_000  # milliseconds to wait for images on a busy machine

# Sums up how far the page's parts moved since navigation began.
WATCH_SHIFTS = """window.shift = 0;
new PerformanceObserver(list => list.getEntries().forEach(
    entry => window.shift += entry.hadRecentInput ? 0 : entry.value
)).observe({type: "layout-shift", buffered: true})"""


@pytest.fixture
def open_page(browser, url):
    """Return a function that opens the page in a size; fails on errors in the console."""
    errors = []

    def note(message):
        if message.type == "error":
            errors.append(message.text)

    def open_(size="desktop", query="", **options):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.add_init_script(WATCH_SHIFTS)
        page.goto(f"{url}/{query}")
        page.wait_for_selector("gradio-app.ready", timeout=SECONDS)
        return page

    yield open_
    assert not errors


def wait_for_caption(page, *texts):
    """Wait until a complete comparison of the texts is shown."""
    page.wait_for_function(
        """texts => texts.every(text => document.querySelector("#caption").innerText.includes(text))
        && document.querySelector("#card-refined .cost").innerText.includes("forwards")""",
        arg=texts,
        timeout=SECONDS,
    )


def sources(page):
    """Return the addresses of the three images."""
    return page.locator("#arms img").evaluate_all("images => images.map(image => image.src)")


@pytest.mark.parametrize("size", SIZES)
def test_the_first_screen(open_page, size):
    """Prompt, button, comparison, seed and strength, without scrolling and without moving."""
    page = open_page(size)
    width, height = SIZES[size]
    assert page.locator("#arms img").count() == len(ARMS), "there is something to see at once"
    shown = ["#prompt", "#generate", "#seed", "#strength", "#card-gaussian"]
    for part in shown if size == "phone" else [*shown, "#card-guided", "#card-refined"]:
        box = page.locator(part).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= height, part
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, part
    page.wait_for_timeout(500)
    assert page.evaluate("shift") < 0.1, "what web.dev calls good"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if size == "phone":
        page.set_viewport_size({"width": 320, "height": 640})
        for part in ("#prompt textarea", "#seed input", "#strength input[type=range]"):
            box = page.locator(part).bounding_box()
            assert box["x"] + box["width"] <= 320, f"{part} on the smallest phones"  # noqa: PLR2004
    if size == "desktop":
        for view in VIEWS.values():
            if view.title:
                assert page.get_by_role("tab", name=view.title, exact=True).is_visible()


def test_what_is_shown_is_what_was_asked_last(open_page):
    """An example clicked while another one runs; then stale images, a new seed, the history."""
    page = open_page(query=QUICK)
    wait_for_caption(page, "a panda", "2 steps")
    examples = page.locator("#examples button")
    examples.nth(1).click()
    examples.nth(3).click()
    prompt = page.locator("#prompt textarea")
    wait_for_caption(page, EXAMPLES[3])
    assert prompt.input_value() == EXAMPLES[3]
    assert not page.locator("#arms.stale").count()
    assert urllib.parse.quote_plus(EXAMPLES[3]) in page.url, "the address follows"
    prompt.fill("a panda in the s")
    page.locator("#arms.stale").wait_for(timeout=SECONDS)
    prompt.fill(EXAMPLES[3])
    page.locator("#arms:not(.stale)").wait_for(timeout=SECONDS)
    before = page.locator("#seed input").input_value()
    page.get_by_role("button", name="New seed").click()
    page.wait_for_function("s => document.querySelector('#seed input').value != s", arg=before)
    seed = page.locator("#seed input").input_value()
    wait_for_caption(page, f"seed {seed} ")
    page.locator("#seed input").fill("5")
    page.locator("#seed input").press("Enter")
    wait_for_caption(page, "seed 5 ")
    page.wait_for_function("document.querySelectorAll('#history img').length >= 3", timeout=SECONDS)
    page.locator("#history .thumbnail-item").nth(1).click()
    wait_for_caption(page, f"seed {seed} ")


def test_suggestions_and_surprise(open_page):
    page = open_page(query=QUICK)
    wait_for_caption(page, "a panda")
    prompt = page.locator("#prompt textarea")
    prompt.fill("")
    prompt.press_sequentially("pand")
    page.locator("#suggestions button", has_text="panda").click()
    assert prompt.input_value() == "a panda"
    page.get_by_role("button", name="Surprise me").click()
    page.wait_for_function(
        "document.querySelector('#prompt textarea').value.includes(' background')"
    )
    wait_for_caption(page, prompt.input_value())


def test_an_error_loses_nothing(open_page):
    page = open_page(query=QUICK)
    wait_for_caption(page, "a panda")
    images = sources(page)
    page.locator("#prompt textarea").fill("")
    page.locator("#generate").click()
    page.get_by_text("The prompt is empty").wait_for(timeout=SECONDS)
    assert sources(page) == images


def test_stop_shows_what_was_expected_then(open_page):
    """Also what was asked for while the stopped run was at work does not begin."""
    page = open_page(query="?prompt=a+panda&steps=149")
    page.wait_for_function(
        "document.querySelector('#arms').innerText.includes(' of 149')", timeout=SECONDS
    )
    page.get_by_label("number input for Steps").fill("150")
    page.locator("#generate").click()
    page.locator("#stop").click()
    said = re.compile("after .* of 150 forwards: the image it expected then")
    page.get_by_text(said).first.wait_for(timeout=SECONDS)
    assert "steps=150" in page.url, "the address follows"


def test_restoring(open_page, tmp_path):
    """A foreign file is refused; our own restores its settings, a view's also its controls."""
    page = open_page()
    Image.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    drop_on_page(page, tmp_path / "foreign.png")
    page.get_by_text("This PNG holds no settings").wait_for(timeout=SECONDS)
    settings = {"prompt": "an owl", "seed": 123, "steps": 2}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "image.png", {"settings": settings})
    drop_on_page(page, tmp_path / "image.png")
    page.wait_for_function(
        "document.querySelector('#prompt textarea').value == 'an owl'", timeout=SECONDS
    )
    record = {"view": "interpolation", "controls": {"other_seed": 55}, "settings": settings}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "view.png", record)
    drop_on_page(page, tmp_path / "view.png")
    page.get_by_text("press Show under Interpolation").wait_for(timeout=SECONDS)
    other = page.get_by_label("The other seed")
    other.wait_for(timeout=SECONDS)
    assert other.input_value() == "55"


def test_holding_a_button_shows_the_other_image(open_page):
    """In view together with the button, by mouse and by key."""
    page = open_page()
    refined, button = page.locator("#slide img").nth(1), page.locator("#flicker")
    button.scroll_into_view_if_needed()
    for hold, release in (
        (lambda: (button.hover(), page.mouse.down()), page.mouse.up),
        (lambda: (button.focus(), page.keyboard.down(" ")), lambda: page.keyboard.up(" ")),
    ):
        hold()
        assert refined.get_attribute("src").endswith("gaussian.png")
        assert refined.bounding_box()["y"] + refined.bounding_box()["height"] / 2 > 0
        release()
        assert refined.get_attribute("src").endswith("refined.png")


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_fullscreen_holds_the_whole_picture(open_page, size):
    page = open_page(size)
    card = page.locator("#card-gaussian")
    card.locator("button[title*=ullscreen], button[aria-label*=ullscreen]").first.click()
    page.wait_for_timeout(300)
    box, (width, height) = page.locator("#card-gaussian img").bounding_box(), SIZES[size]
    assert box["width"] <= width and box["height"] <= height
    assert max(box["width"] / width, box["height"] / height) > 0.95


def test_a_model_without_a_refiner_says_how_to_train_one(open_page, tmp_path):
    """In the third card, with the command; what cannot work is greyed, and says why."""
    random_pipeline("sd21-base", small=True).save_pretrained(tmp_path)
    page = open_page(query=f"?backbone={tmp_path}&steps=1")
    card = page.locator("#card-refined", has_text="No refiner exists for this model yet")
    command = card.locator("pre", has_text="train_refiner.py --preset")
    command.wait_for(timeout=SECONDS)
    assert command.evaluate("pre => pre.scrollWidth <= pre.clientWidth"), "all of it can be read"
    page.get_by_role("tab", name="Strength", exact=True).click()
    panel = page.locator("[role=tabpanel]").locator("visible=true")
    panel.get_by_text("This view needs a refiner").first.wait_for(timeout=SECONDS)
    assert not panel.get_by_role("button", name="Show", exact=True).is_enabled()


def test_a_restored_model_is_described_before_anything_is_made(open_page, tmp_path):
    """A view's image restores its settings and starts nothing: what it cannot show is greyed."""
    settings = {"prompt": "an owl", "backbone": "sd-turbo", "guidance_scale": 1}
    record = {"view": "interpolation", "controls": {}, "settings": settings}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "view.png", record)
    page = open_page()
    drop_on_page(page, tmp_path / "view.png")
    page.get_by_text(f"{BACKBONES['sd-turbo'].title}: 0.87 B parameters").wait_for(timeout=SECONDS)
    panel = page.locator("[role=tabpanel]").locator("visible=true")
    panel.get_by_text("This view needs a refiner").first.wait_for(timeout=SECONDS)
    assert not panel.get_by_role("button", name="Show", exact=True).is_enabled()


def test_a_refiner_is_trained_in_the_tab(open_page, tiny_folder):
    """The command and its cost, the curve and the pictures, and at the end the third column."""
    settings = Settings("", backbone=str(tiny_folder))
    plan = plan_of(settings, "demonstration", 16, "assets/prompts/emoji.txt")
    page = open_page(query=f"?backbone={tiny_folder}&steps=1&guidance_scale=2")
    page.locator("#card-refined", has_text="No refiner exists").wait_for(timeout=SECONDS)
    page.get_by_role("tab", name="Train", exact=True).click()
    panel = page.locator("[role=tabpanel]").locator("visible=true")
    fields = panel.get_by_role("spinbutton", name="Targets"), panel.get_by_label("Prompts")
    for field, value in zip(fields, ("16", "assets/prompts/emoji.txt"), strict=True):
        field.fill(value)
        field.blur()
    panel.locator(".cm-content", has_text=plan.folder.name).wait_for(timeout=SECONDS)
    panel.get_by_role("button", name="Cost").click()
    panel.get_by_text("16 targets, 2 steps of 16").wait_for(timeout=SECONDS)
    try:
        panel.get_by_role("button", name="Start").click()
        panel.get_by_text("The refiner is in").wait_for(timeout=2 * SECONDS)
        card = page.locator("#card-refined .cost", has_text="2 forwards").first
        card.wait_for(timeout=SECONDS)
        alts = panel.locator("img").evaluate_all("images => images.map(image => image.alt)")
        assert [alt.split()[0] for alt in alts] == ["How", "Held-out"]
        assert plan.folder.name in page.get_by_label("Refiner").input_value()
    finally:
        shutil.rmtree(plan.folder, ignore_errors=True)


def test_a_link_with_a_wrong_value_keeps_the_others(open_page):
    page = open_page(query="?prompt=a+panda&steps=2&seed=nonsense&strength=9")
    page.get_by_text("“seed” is a number").wait_for(timeout=SECONDS)
    page.get_by_text("“strength” is from 0 to 2").wait_for(timeout=SECONDS)
    wait_for_caption(page, "a panda", "2 steps")


@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_every_tab(open_page, size, tiny_folder, tiny_refiner):
    """Every view shows its images within the page's width, all of them with a text."""
    model = f"&backbone={tiny_folder}&refiner={tiny_refiner}"
    page = open_page(size, QUICK + model + "&guidance_scale=2.5")
    wait_for_caption(page, "a panda")
    for view in VIEWS.values():
        if view.title:
            panel = look_at(page, view)
            box = panel.bounding_box()
            assert box["x"] + box["width"] <= page.viewport_size["width"], view.title
            texts = panel.locator("img").evaluate_all("images => images.map(image => image.alt)")
            assert all(texts) and "undefined" not in texts, view.title


def look_at(page, view):
    """Open a tab, by the menu of those that do not fit if need be, and wait for its images."""
    tab = page.get_by_role("tab", name=view.title, exact=True)
    if tab.is_visible():
        tab.click()
    else:
        page.locator(".overflow-menu > button").first.click()
        page.locator(".overflow-dropdown button", has_text=view.title).first.click()
    panel = page.locator("[role=tabpanel]").locator("visible=true")
    panel.get_by_role("button", name=view.button, exact=True).click()
    panel.locator("img").nth(1).wait_for(timeout=SECONDS)
    if view.title == "Samplers":  # as many images as the others together
        panel.get_by_role("button", name="Stop").click()
        panel.locator(".pending, .progress-text").first.wait_for(state="hidden", timeout=SECONDS)
    page.wait_for_function("!document.querySelector('.progress-text')", timeout=SECONDS)
    return panel


def test_the_blind_test_goes_on_by_itself(open_page):
    page = open_page(query=QUICK)
    wait_for_caption(page, "a panda")
    panel = look_at(page, VIEWS["blind"])
    for opponent in ("guided", "plain"):
        if opponent == "plain":  # a new pair asks the first question again
            page.locator("body").press("ArrowLeft")
            panel.get_by_text("Which follows the prompt?", exact=True).wait_for(timeout=SECONDS)
            panel.get_by_label("plain").click()
            panel.get_by_role("button", name="New pair").click()
            panel.locator("strong", has_text="Which is better?").wait_for(timeout=SECONDS)
            page.wait_for_timeout(300)
            page.wait_for_function("!document.querySelector('.progress-text')", timeout=SECONDS)
        before = panel.locator("img").first.get_attribute("src")
        page.locator("body").press("ArrowLeft")
        panel.get_by_text("Which follows the prompt?", exact=True).wait_for(timeout=SECONDS)
        panel.get_by_text(re.compile("“.+ on an? .+ background”")).wait_for(timeout=SECONDS)
        page.locator("body").press("0")
        panel.get_by_text("Left was").wait_for(timeout=SECONDS)
        page.wait_for_function(
            "src => ![...document.querySelectorAll('[role=tabpanel] img')].some(i => i.src == src)",
            arg=before,
            timeout=SECONDS,
        )
        panel.locator("td", has_text=re.compile(f"^{opponent},")).first.wait_for(timeout=SECONDS)
    assert panel.locator("td", has_text="Which is better?").count() == len(("guided", "plain"))


def drop_on_page(page, path):
    data = base64.b64encode(path.read_bytes()).decode()
    page.locator("#restore input[type=file]").wait_for(state="attached", timeout=SECONDS)
    page.evaluate(
        """data => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
        transfer.items.add(new File([bytes], "image.png", {type: "image/png"}));
        document.querySelector("#arms").dispatchEvent(
            new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
    }""",
        data,
    )
