"""The views: what they show, on the embedded backbone."""

import copy
import io
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from noiserefine import draw_noise
from noiserefine.analysis import explore
from noiserefine.analysis.attention import (
    attention,
    first_word,
    hindrance,
    watch_attention,
    word_tokens,
)
from noiserefine.analysis.compare import arms
from noiserefine.analysis.figures import difference_histogram, radial_spectrum
from noiserefine.analysis.recipe import Maker, Recipe
from noiserefine.analysis.spectrum import band, density_ratio, energy_below
from noiserefine.analysis.trajectory import evenly, film, trajectory
from noiserefine.denoiser import can_guide
from noiserefine.latents import decode, fit_preview
from noiserefine.noise import slerp
from noiserefine.page.blind import (
    LEFT,
    NEITHER,
    RIGHT,
    Vote,
    in_random_order,
    result,
    tally,
    wilson,
)
from noiserefine.page.record import KEY, contact_sheet, read_png, save_png
from noiserefine.page.settings import Settings
from noiserefine.page.stream import Worker, stream
from noiserefine.page.texts import made_with
from noiserefine.samplers import SAMPLERS, make_scheduler, predicted_x0, samplers_of
from tests.conftest import output, perturbed
from tests.families import pipeline

PROMPT = "a red apple on a blue background"
RECIPE = Recipe(PROMPT, 3, steps=3, guidance_scale=2.5, strength=1.0)


@pytest.fixture
def make(pipe, refiner):
    return Maker(pipe, refiner)


def equal(*samples) -> bool:
    return all(np.array_equal(samples[0].image, other.image) for other in samples)


def plain(pipe, prompt=PROMPT, **kwargs):
    """The image of diffusers' own call."""
    return pipe(prompt, num_inference_steps=3, **{"guidance_scale": 1.0} | kwargs).images[0]


def test_equal_images_have_equal_recipes():
    varied = replace(RECIPE, negative_prompt="blurry", refiner_scale=3.0, refining_prompt="a cat")
    assert (
        varied.gaussian == RECIPE.gaussian
        and varied.guided != RECIPE.guided
        and varied.refined != RECIPE.refined
    )
    assert replace(varied, refiner_scale=None, refining_prompt=None).refined == RECIPE.refined, (
        "unguided: the negative prompt changes nothing"
    )


def test_a_negative_prompt_is_the_pipelines_own(make, pipe):
    sample = make(replace(RECIPE, negative_prompt="a green frog").guided)
    assert np.array_equal(
        sample.image,
        plain(
            pipe, latents=draw_noise(pipe, 3), guidance_scale=2.5, negative_prompt="a green frog"
        ),
    )
    assert not equal(sample, make(RECIPE.guided))


def test_each_recipe_is_made_once(make):
    assert make(RECIPE.refined) is make(replace(RECIPE, guidance_scale=1.0, negative_prompt="x"))
    assert len(make.samples) == 1


def test_strengths(make):
    images = dict(explore.strengths(make, RECIPE, (0, 0.5, 1)))
    assert list(images) == ["strength 0", "strength 0.5", "strength 1", "guided, g = 2.5"]
    assert equal(images["strength 0"], make(RECIPE.gaussian)) and equal(
        images["strength 1"], make(RECIPE.refined)
    )
    assert images["guided, g = 2.5"] is make(RECIPE.guided) and not equal(
        images["strength 0.5"], images["strength 1"]
    )


def test_guidance_scales(pipe, make):
    with pytest.raises(ValueError, match="takes no guidance scale"):
        list(explore.guidance_scales(make, RECIPE))
    refiner = perturbed(pipe, guidance_scale_range=[1, 5])
    torch.nn.init.normal_(refiner.network.scale_input.weight)
    images = list(
        explore.guidance_scales(Maker(pipe, refiner), replace(RECIPE, refiner_scale=2.0), 3)
    )
    assert [caption for caption, _ in images] == [
        f"{what} g = {g}" for what in ("refined for", "guided,") for g in (1, 3, 5)
    ]
    assert not equal(images[0][1], images[1][1]) and equal(images[3][1], make(RECIPE.gaussian)), (
        "guided by 1 is unguided"
    )
    expected = plain(pipe, latents=refiner(draw_noise(pipe, 3), PROMPT, guidance_scale=5.0))
    assert np.array_equal(images[2][1].image, expected)
    with pytest.raises(ValueError, match="12"):  # also where the first strength needs no refiner
        next(explore.strengths(Maker(pipe, refiner), replace(RECIPE, refiner_scale=12.0)))


def test_samplers_and_steps(make):
    images = dict(explore.samplers_and_steps(make, RECIPE, (2, 3)))
    assert len(images) == 2 * 2 * len(SAMPLERS) and images["DDIM, 3 steps, refined"] is make(
        RECIPE.refined
    )
    assert (
        images["Heun (EDM), 3 steps, plain"].forwards == 5
        and images["Euler, 2 steps, refined"].forwards == 3
    )


def test_bands(make):
    for cutoff, expected in ((0, RECIPE.gaussian), (1, RECIPE.refined)):
        images = list(explore.bands(make, RECIPE, cutoff))
        assert len(images) == 7 and equal(images[2][1], make(expected))
        part = images[3][1].latents if cutoff else images[4][1].latents
        np.testing.assert_allclose(
            part, make(RECIPE.refined).latents, atol=1e-5
        )  # all of it below 1, and above 0
    x_T, mixed = draw_noise(make.pipe, 3), dict(explore.bands(make, RECIPE, 0.3))
    correction = torch.from_numpy(mixed["refined below 0.3, plain above"].latents) - x_T
    zeroed = (
        mixed["refined below 0.3, zero above"].latents
        + mixed["zero below 0.3, refined above"].latents
    )
    np.testing.assert_allclose(zeroed, make(RECIPE.refined).latents, atol=1e-5)
    redrawn = (
        mixed["refined below 0.3, redrawn above"].latents
        + mixed["redrawn below 0.3, refined above"].latents
    )
    np.testing.assert_allclose(
        redrawn, make(RECIPE.refined).latents + draw_noise(make.pipe, 4).numpy(), atol=1e-5
    )
    quarter = correction.shape[-1] // 4
    low = torch.fft.fft2(correction)[..., quarter:-quarter, quarter:-quarter].abs().max()
    assert low < 1e-4 < correction.abs().max(), "nothing of the correction is above the cutoff"


def test_two_prompts(make, pipe, refiner):
    other, x_T = "a green frog on a yellow background", draw_noise(pipe, 3)
    images = dict(explore.two_prompts(make, RECIPE, other))
    assert equal(images["one prompt for both"], make(RECIPE.refined))
    assert np.array_equal(
        images["denoised with the other"].image, plain(pipe, other, latents=refiner(x_T, PROMPT))
    )
    assert np.array_equal(
        images["denoised with the other, guided"].image,
        plain(pipe, other, latents=refiner(x_T, PROMPT), guidance_scale=2.5),
    )
    assert np.array_equal(
        images["denoised with none"].image, plain(pipe, "", latents=refiner(x_T, PROMPT))
    )
    assert np.array_equal(images["plain noise, the other"].image, plain(pipe, other, latents=x_T))


def test_interpolation(make):
    images = [sample for _, sample in explore.interpolation(make, RECIPE, 8, 4)]
    other = replace(RECIPE, seed=8)
    assert equal(images[0], make(RECIPE.gaussian)) and equal(images[3], make(other.gaussian))
    assert equal(images[4], make(RECIPE.refined)) and equal(images[7], make(other.refined))
    x, y = draw_noise(make.pipe, 3), draw_noise(make.pipe, 8)
    np.testing.assert_allclose(images[1].latents, slerp(x, y, 1 / 3), atol=1e-6)
    norms = [slerp(x, y, f).norm().item() for f in (0, 0.25, 0.5, 1)]
    assert (
        norms == pytest.approx([x.norm().item()] * 4, rel=0.1)
        and torch.equal(slerp(x, y, 0), x)
        and torch.equal(slerp(x, y, 1), y)
    )
    assert (
        0.6 < slerp(x, y, 0.5).flatten() @ x.flatten() / (x.norm() * slerp(x, y, 0.5).norm()) < 0.8
    ), "half of the angle"


def test_guided_from_refined(make, pipe, refiner):
    images = dict(explore.guided_from_refined(make, RECIPE))
    assert [sample.forwards for sample in images.values()] == [3, 6, 4, 7]
    assert np.array_equal(
        images["refined and guided"].image,
        plain(pipe, latents=refiner(draw_noise(pipe, 3), PROMPT), guidance_scale=2.5),
    )


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_predicted_x0(pipe, monkeypatch, sampler, prediction_type):
    """A perfect prediction gives x0 back, at the first step and at later ones."""
    scheduler = make_scheduler(sampler, pipe)
    scheduler.register_to_config(prediction_type=prediction_type)
    x0, noise = torch.randn(2, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(6)
    for step in (0, 3):
        t = scheduler.timesteps[step]
        if hasattr(scheduler, "sigmas"):
            scheduler._step_index = step
            sigma = scheduler.sigmas[step]
            signal, level = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        else:
            signal, level = (
                scheduler.alphas_cumprod[t].sqrt(),
                (1 - scheduler.alphas_cumprod[t]).sqrt(),
            )
        truth = {
            "epsilon": noise,
            "v_prediction": signal * noise - level * x0,
            "sample": x0,
        }[prediction_type]
        x = signal * x0 + level * noise
        sample = (
            x if torch.equal(scheduler.scale_model_input(x, t), x) else x / signal
        )  # some samplers count in sigmas
        found = predicted_x0(scheduler, truth, t, sample)
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Euler", "Heun (EDM)"])
def test_trajectory_ends_at_the_image(make, sampler):
    """Samplers that end at zero noise return the last predicted x0."""
    frames, recipe = {}, replace(RECIPE.refined, sampler=sampler, steps=5)
    trajectory(make, recipe, frames.__setitem__, 3)
    sample = make(recipe)
    forwards = sample.forwards
    assert list(frames) == [2, forwards // 2 + 1, forwards], "the first of all is the refining pass"
    difference = np.abs(np.asarray(frames[forwards], int) - np.asarray(sample.image, int))
    assert difference.max() <= 1 and not np.array_equal(frames[2], frames[forwards])


def test_views_on_sdxl(sdxl):
    """Two text encoders, pooled embeddings and time ids, in everything that views do."""
    make, recipe, frames = (
        Maker(sdxl, perturbed(sdxl)),
        Recipe("a red apple", 3, steps=2, guidance_scale=3.0, strength=1.0),
        {},
    )
    images = dict(explore.strengths(make, recipe, (0, 1)))
    assert equal(images["strength 0"], make(recipe.gaussian)) and not equal(
        images["strength 1"], make(recipe.gaussian)
    )
    assert [sample.forwards for _, sample in explore.guided_from_refined(make, recipe)] == [
        2,
        4,
        3,
        5,
    ]
    assert (
        len(list(explore.two_prompts(make, recipe, "a cat"))) == 6
        and len(list(explore.bands(make, recipe, 0.3))) == 7
    )
    trajectory(make, recipe.refined, frames.__setitem__)
    maps, sample = attention(make, recipe.guided, "apple")
    assert (
        list(frames) == [2, 3]
        and len(maps) == 2
        and maps.min() >= 0
        and equal(sample, make(recipe.guided))
    )
    assert fit_preview(sdxl)(torch.randn(1, 4, 16, 16)).size == (16, 16)


def test_evenly():
    assert (
        evenly(20, 7) == [0, 3, 6, 10, 13, 16, 19]
        and evenly(3, 7) == [0, 1, 2]
        and evenly(1, 7) == [0]
    )


def test_stopping_leaves_the_pipeline_as_it_was(make, pipe):
    before, scheduler = output(pipe), pipe.scheduler
    steps = []

    def stop(x0, _):
        steps.append(x0)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(RECIPE.refined, on_x0=stop)
    assert not make.samples and steps[0].shape == (1, 6, 32, 32)
    assert pipe.scheduler is scheduler and torch.equal(output(pipe), before)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_preview_looks_like_the_image(make, pipe):
    """It correlates with the image at its size; a constant one would with nothing."""
    preview = fit_preview(pipe)
    for seed in range(3):
        x0 = []
        recipe = replace(RECIPE.guided, seed=seed, steps=10)
        sample = make(recipe, on_x0=lambda *arguments, x0=x0: x0.append(arguments[0]))
        image = sample.image.resize((32, 32), Image.Resampling.BOX)
        rough = preview(x0[-1])
        assert (
            rough.size == (32, 32)
            and np.corrcoef(np.asarray(rough).ravel(), np.asarray(image).ravel())[0, 1] > 0.9
        )


def test_decode_is_the_pipelines_own(pipe):
    latents = output(pipe)
    expected = pipe(
        PROMPT,
        latents=draw_noise(pipe, 3),
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
    ).images
    image = pipe(
        PROMPT, latents=draw_noise(pipe, 3), num_inference_steps=2, guidance_scale=1.0
    ).images[0]
    assert np.array_equal(decode(pipe, expected)[0], image) and decode(
        pipe, latents.repeat(2, 1, 1, 1)
    )[1].size == (64, 64)


def test_attention(make, pipe):
    before = output(pipe)
    maps, sample = attention(make, RECIPE.refined, "apple")
    assert equal(sample, make(RECIPE.refined))
    maps, sample = attention(make, RECIPE.guided, "apple")
    assert maps.shape == (3, 32, 32) and not torch.allclose(
        maps, attention(make, RECIPE.guided, "background")[0]
    )
    count = pipe.tokenizer.model_max_length
    with watch_attention(pipe.unet, list(range(count)), 32, 32) as everything:
        output(pipe)
    torch.testing.assert_close(
        torch.stack(everything),
        torch.full((2, 32, 32), 1 / count),
        msg="attention to all tokens sums to one",
    )
    assert torch.equal(output(pipe), before)
    assert attention(make, replace(RECIPE.refined, height=136, width=72), "apple")[0].shape == (
        3,
        34,
        18,
    )


def test_words(pipe):
    assert [first_word(prompt) for prompt in (PROMPT, "Sailboat, at sea", "The")] == [
        "red",
        "sailboat",
        "the",
    ]
    assert word_tokens(pipe, PROMPT, "apple") == [3] and word_tokens(pipe, PROMPT, " Red ") == [2]
    assert first_word("!!!") == "!!!"
    quoted = "“a red” apple"
    assert word_tokens(pipe, quoted, "red") == word_tokens(pipe, quoted, "“Red,”")
    assert len(word_tokens(pipe, "a zxqv, on blue", "zxqv")) > 1, (
        "an unknown word is several tokens"
    )
    with pytest.raises(
        ValueError, match="no word 'pear'; choose one of a, red, apple, on, blue, background"
    ):
        word_tokens(pipe, PROMPT, "pear")


def test_figures_hold_the_noise(pipe):
    x_T, other = draw_noise(pipe, 0), draw_noise(pipe, 1)
    histogram = difference_histogram(x_T, x_T + 0.5, other).axes[0]
    assert [text.get_text() for text in histogram.get_legend().get_texts()][
        1
    ] == "to the refined noise, mean 0.50"
    flat, correction = radial_spectrum(x_T, x_T + 0.5).axes[0].lines
    assert 0.5 < np.median(flat.get_ydata()) < 2, "white noise has energy 1 everywhere"
    assert correction.get_ydata()[0] > 1e6 * correction.get_ydata()[-1], (
        "a constant has lowest frequencies only"
    )
    assert histogram.get_xlabel() and histogram.get_ylabel()
    [shaded] = radial_spectrum(x_T, x_T + 0.5, cutoff=0.6).axes[0].patches
    assert shaded.get_width() == 0.6, "the cutoff that was chosen"


def test_blind_tally():
    assert wilson(0, 0) == (0, 1) and wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    settings = Settings("p", backbone="m")
    votes = [
        Vote(replace(settings, seed=0), "refined", "guided", LEFT, NEITHER),
        Vote(replace(settings, seed=1), "guided", "refined", LEFT, RIGHT),
        Vote(replace(settings, seed=2), "guided", "refined", RIGHT, RIGHT),
        Vote(replace(settings, seed=3), "gaussian", "refined", RIGHT, NEITHER),
        Vote(replace(settings, backbone="n"), "guided", "refined", LEFT, LEFT),
        Vote(replace(settings, steps=1), "guided", "refined", LEFT, LEFT),
    ]
    rows = {(row["made_with"], row["opponent"], row["question"]): row for row in tally(votes)}
    m, n, steps = (made_with(vote.settings) for vote in votes[-3:])
    better, follows = rows[m, "guided", "better"], rows[m, "guided", "follows"]
    assert better["n"] == 3 and better["share"] == pytest.approx(2 / 3)
    assert follows["n"] == 2 and follows["undecided"] == 1 and follows["share"] == 1.0
    assert follows["interval"] == wilson(2, 2)
    assert rows[m, "gaussian", "better"]["share"] == 1.0, "opponents are not pooled"
    assert rows[n, "guided", "better"]["share"] == 0.0, "nor are models"
    assert rows[steps, "guided", "better"]["n"] == 1, "nor are other settings"
    assert "in 2 of 3 pairs" in result(votes[:3])
    weights = [replace(settings, lora=lora, lora_weight=w) for lora in ("", "l") for w in (0, 1)]
    assert len({made_with(weight) for weight in weights}) == 3, "a weight is that of a LoRA"
    assert {in_random_order("a", "b") for _ in range(64)} == {("a", "b"), ("b", "a")}


def test_a_png_holds_its_record(make, tmp_path):
    image, record = (
        make(RECIPE.refined).image,
        {"settings": {"prompt": "ein Äpfel 🍎 <b>", "seed": 3}},
    )
    save_png(image, tmp_path / "image.png", record)
    assert read_png(tmp_path / "image.png") == record and np.array_equal(
        Image.open(tmp_path / "image.png"), image
    )


def png(text=None, size=(4, 4), key=KEY):
    chunks, data = PngInfo(), io.BytesIO()
    if text is not None:
        chunks.add_itxt(key, text)
    Image.new("L", size).save(data, "PNG", pnginfo=chunks)
    return data.getvalue()


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "no PNG"),
        (b"GIF89a nonsense", "no PNG"),
        (png()[:40], "PNG"),
        (png(), "holds no settings"),
        (png("{"), "damaged"),
        (png(" ", key="parameters"), "are empty"),
        (png("[" * 10**5), "damaged"),
        (png("[]"), "not those of this page"),
        (png('{"settings": 1}'), "not those of this page"),
        (png("{}", (5000, 4000)), "pixels"),
        (png(json.dumps({"settings": {"prompt": "x" * 2**21}})), "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path, data, says):
    (tmp_path / "file.png").write_bytes(data)
    with pytest.raises(ValueError, match=says):
        read_png(tmp_path / "file.png")


def test_contact_sheet():
    sheet = contact_sheet(
        [("one", Image.new("RGB", (64, 64), "red")), ("two", Image.new("RGB", (64, 64), "blue"))],
        "a title",
    )
    assert sheet.getpixel((sheet.width // 4, sheet.height // 2)) == (255, 0, 0) and sheet.getpixel(
        (3 * sheet.width // 4, sheet.height // 2)
    ) == (0, 0, 255)


def test_stream_passes_everything_on():
    def work(report):
        for i in range(100):
            report(i)

    assert [value for values in stream(Worker(), work) for value in values] == list(range(100))
    lists = list(stream(Worker(), work, every=0.05))
    assert [value for values in lists for value in values] == list(range(100)) and len(
        lists
    ) < 20, "collected, not one by one"


def test_stream_raises_what_the_work_raises():
    def work(report):
        report(1)
        raise ValueError("broken")

    seen = []
    with pytest.raises(ValueError, match="broken"):
        for values in stream(Worker(), work):
            seen += values
    assert seen == [1]


def test_a_stream_that_is_left_stops_its_work():
    ended = threading.Event()

    def work(report):
        try:
            while True:
                report(1)
        finally:
            ended.set()

    running = stream(Worker(), work)
    next(running)
    running.close()
    assert ended.wait(10)


def test_nearness_and_variety(make):
    samples = {arm: make(recipe) for arm, recipe in arms(RECIPE).items()}
    assert explore.nearness(samples | {"refined": samples["guided"]}) == 1.0
    assert explore.nearness(samples | {"refined": samples["gaussian"]}) == 0.0
    half = (samples["gaussian"].x0 + samples["guided"].x0) / 2
    between = replace(samples["refined"], x0=half)
    assert explore.nearness(samples | {"refined": between}) == pytest.approx(0.5)
    assert explore.nearness({"gaussian": samples["gaussian"]}) is None
    assert explore.variety([samples["gaussian"]] * 2) == 0.0
    seeds = [make(replace(RECIPE, seed=seed).gaussian) for seed in range(3)]
    assert explore.variety(seeds) > 0


def test_density_ratio():
    x = torch.randn(1, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    share, ratio = density_ratio(x)
    assert share == energy_below(x) and ratio == pytest.approx(1, abs=0.2), "white noise"
    assert density_ratio(band(x, 0, 0.3) + 0.1 * x)[1] > 50
    assert density_ratio(x, 1.0) == (pytest.approx(1), None)


def test_a_film_holds_every_frame(make):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    film_ = Image.open(io.BytesIO(film([[red, blue], [blue, red]])))
    assert film_.n_frames == 2 and film_.size == (16, 8)
    assert film_.convert("RGB").getpixel((12, 4)) == (0, 0, 255)


def test_attention_needs_tokens_that_are_padded_on_the_right(pipe):
    """Kolors, whose UNet is Stable Diffusion's, pads on the left: words are elsewhere there."""
    assert hindrance(pipe) == ""
    other = copy.copy(pipe)
    vars(other)["tokenizer"] = SimpleNamespace(padding_side="left")
    for unlike_clip in (other, pipeline("kolors")):
        assert "places of a prompt's words" in hindrance(unlike_clip)


UNIVERSAL = ["sd3", "flux_dev", "sit"]  # flow matching, packed latents, classes


@pytest.mark.parametrize("name", UNIVERSAL)
def test_views_on_every_kind_of_pipeline(name):
    """What the page shows of Stable Diffusion works for the others, but for the attention."""
    pipe = pipeline(name)
    make = Maker(pipe, perturbed(pipe, 32))
    prompt, other = ("0", "1") if name == "sit" else ("a red apple", "a cat")
    recipe = Recipe(prompt, 3, steps=2, sampler=samplers_of(pipe)[0], strength=1.0)
    recipe = replace(recipe, guidance_scale=3.0 if can_guide(pipe) else 1.0)
    samples = {arm: make(each) for arm, each in arms(recipe, can_guide(pipe)).items()}
    assert samples["refined"].forwards == samples["gaussian"].forwards + 1
    assert samples["refined"].x0.shape == samples["refined"].latents.shape
    assert not equal(samples["gaussian"], samples["refined"])
    frames = {}
    trajectory(make, recipe.refined, frames.__setitem__)
    assert len(frames) == 2 and frames[2].size == samples["refined"].image.size
    assert fit_preview(pipe)(torch.from_numpy(samples["refined"].x0)).width > 1
    strengths = dict(explore.strengths(make, recipe, (0, 1)))
    assert equal(strengths["strength 0"], samples["gaussian"])
    assert len(list(explore.bands(make, recipe, 0.3))) == explore.BANDS
    assert len(list(explore.two_prompts(make, recipe, other))) >= 4
    assert len(list(explore.interpolation(make, recipe, 8, 3))) == 6
    sampled = list(explore.samplers_and_steps(make, recipe, (2,)))
    assert len(sampled) == 2 * len(samplers_of(pipe))
    assert "another form" in hindrance(pipe)
