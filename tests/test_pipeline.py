"""Noise, samplers, guidance, comparison and spectrum on the embedded backbone."""

import copy

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from noiserefine import draw_noise
from noiserefine.analysis.compare import compare
from noiserefine.analysis.recipe import Maker, Recipe
from noiserefine.analysis.spectrum import (
    band,
    energy_below,
    heat_map,
    low_frequency_difference,
    radius,
)
from noiserefine.guidance import sample
from noiserefine.models.catalogue import BACKBONES
from noiserefine.models.loading import load_pipeline
from noiserefine.noise import encode_prompt, image_size
from noiserefine.samplers import SAMPLERS, make_scheduler, with_sampler
from tests.conftest import output

PROMPT = "a red apple on a blue background"


def test_noise_means_the_same_alone_and_in_a_batch(pipe):
    batch = draw_noise(pipe, 3, count=2)
    assert torch.equal(batch, torch.cat([draw_noise(pipe, 3), draw_noise(pipe, 4)]))
    config, size = pipe.unet.config, image_size(pipe)[0]
    latents = config.sample_size
    assert batch.shape == (2, config.in_channels, latents, latents)
    assert batch.dtype == torch.float32
    wide = draw_noise(pipe, 0, height=size * 3 // 2, width=size * 5 // 4)
    assert wide.shape[-2:] == (latents * 3 // 2, latents * 5 // 4)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "7", None, True, float("nan")])
def test_bad_seed(pipe, seed):
    with pytest.raises(ValueError, match="seed is a whole number"):
        draw_noise(pipe, seed)


@pytest.mark.parametrize("factor", [63 / 64, 1 / 8, 16, 15 / 16, float("nan"), -1])
def test_bad_size(pipe, factor):
    size, _ = image_size(pipe)
    side = factor * size if factor != 15 / 16 else size - 4  # whole, but no multiple of 8
    with pytest.raises(ValueError, match=f"native size is {size} x {size}"):
        image_size(pipe, side, None)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_take_unit_variance_noise(pipe, sdxl, sampler):
    """The noise is scaled by init_noise_sigma exactly once, by the pipeline."""
    for p in (pipe, sdxl):
        twin, x_T, first = with_sampler(p, sampler), draw_noise(p, 0), []
        handle = p.unet.register_forward_pre_hook(
            lambda module, args, first=first: first.append(args[0])
        )
        twin("a cat", latents=x_T, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
        handle.remove()
        assert first[0].std().item() == pytest.approx(x_T.std().item(), rel=0.01)
        assert twin.scheduler.config.prediction_type == p.scheduler.config.prediction_type
        spacing = "trailing" if "trailing" in sampler else "leading"
        assert twin.scheduler.config.timestep_spacing == spacing


def test_stochastic_samplers_add_other_noise_than_x_T(pipe, monkeypatch):
    added = []

    def record(*args, **kwargs):
        added.append(randn_tensor(*args, **kwargs))
        return added[-1]

    monkeypatch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.randn_tensor", record)
    make = Maker(pipe)
    images = [
        np.asarray(
            make.sample(
                Recipe(PROMPT, seed=3, steps=3, strength=0.0, sampler="DPM++ SDE"),
                draw_noise(pipe, 3),
            ).image
        )
        for _ in range(2)
    ]
    assert np.array_equal(*images), "the seed tells it"
    assert len(added) >= 4
    for noise in added:
        both = torch.stack([noise.flatten(), draw_noise(pipe, 3).flatten()])
        assert torch.corrcoef(both)[0, 1].abs() < 0.1


def test_with_sampler_leaves_the_pipeline(pipe):
    scheduler, config = pipe.scheduler, dict(pipe.config)
    twin = with_sampler(pipe, "Euler")
    assert twin.unet is pipe.unet and pipe.scheduler is scheduler and dict(pipe.config) == config
    with pytest.raises(ValueError, match="There is no sampler"):
        make_scheduler("nonsense", pipe)


def test_samplers_agree(pipe):
    """Solvers of one equation end near each other; another noise schedule would not."""
    results = {
        name: sample(
            with_sampler(pipe, name),
            prompt=PROMPT,
            latents=draw_noise(pipe, 0),
            num_inference_steps=30,
            output_type="latent",
        ).images
        for name in SAMPLERS
        if name != "DPM++ SDE"
    }
    for name, x0 in results.items():
        assert (x0 - results["DDIM"]).pow(2).mean() < 0.15 * results["DDIM"].var(), name


@pytest.mark.parametrize(
    "cfg, pag, forwards", [(1.0, 0.0, 1), (3.0, 0.0, 2), (1.0, 2.0, 2), (3.0, 2.0, 3)]
)
def test_guidance_follows_its_equation(pipe, cfg, pag, forwards):
    """One step of guided sampling against equations 31 and 32 from plain forwards."""
    x_T, embeds, scheduler = (
        draw_noise(pipe, 0),
        encode_prompt(pipe, PROMPT),
        make_scheduler("DDIM", pipe),
    )
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    before = output(pipe)
    seen.clear()
    x = sample(
        with_sampler(pipe, "DDIM"),
        guidance_scale=cfg,
        pag_scale=pag,
        latents=x_T,
        num_inference_steps=1,
        output_type="latent",
        **embeds,
    ).images
    assert seen == [forwards]
    handle.remove()
    assert torch.equal(output(pipe), before)
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    with torch.no_grad():
        e_c = pipe.unet(x_T, t, embeds["prompt_embeds"]).sample
        e_u = pipe.unet(x_T, t, embeds["negative_prompt_embeds"]).sample
        guided = e_c + (cfg - 1) * (e_c - e_u)
        if pag:
            guided = guided + pag * (e_c - perturbed_forward(pipe, x_T, t, embeds["prompt_embeds"]))
    torch.testing.assert_close(x, scheduler.step(guided, t, x_T).prev_sample, rtol=0, atol=1e-4)


def perturbed_forward(pipe, x, t, prompt_embeds):
    """The UNet with the self-attention maps of its middle block replaced by the identity (Ahn et
    al. 2024)."""
    unet = copy.deepcopy(pipe.unet)
    for name, module in unet.mid_block.named_modules():
        if name.endswith("attn1"):
            module.forward = lambda hidden_states, m=module, **_: m.to_out[0](m.to_v(hidden_states))
    return unet(x, t, prompt_embeds).sample


def test_guidance_is_undone_after_an_interrupt(pipe):
    before = output(pipe)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(
            pipe,
            guidance_scale=2.0,
            pag_scale=2.0,
            prompt=PROMPT,
            num_inference_steps=2,
            callback_on_step_end=stop,
        )
    assert torch.equal(output(pipe), before)


def test_compare_counts_and_shares_the_noise(pipe, refiner):
    arms = dict(
        compare(Maker(pipe, refiner), Recipe(PROMPT, 3, steps=5, guidance_scale=2.5, strength=1.0))
    )
    assert {name: arm.forwards for name, arm in arms.items()} == {
        "gaussian": 5,
        "guided": 10,
        "refined": 6,
    }
    x_T = draw_noise(pipe, 3)
    assert np.array_equal(arms["gaussian"].latents, x_T) and np.array_equal(
        arms["guided"].latents, x_T
    )
    assert np.array_equal(arms["refined"].latents, refiner(x_T, PROMPT))
    assert arms["gaussian"].image.size == image_size(pipe)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_compare_at_strength_0_is_the_gaussian_column(pipe, refiner, sampler):
    arms = dict(
        compare(
            Maker(pipe, refiner), Recipe(PROMPT, 3, steps=4, guidance_scale=7.0, sampler=sampler)
        )
    )
    assert np.array_equal(arms["refined"].image, arms["gaussian"].image)
    assert not np.array_equal(arms["guided"].image, arms["gaussian"].image)


def test_compare_at_other_sizes(pipe, refiner):
    """Sizes that the UNet's downsampling does not divide included."""
    size, _ = image_size(pipe)
    for width, height in ((size + 8, size), (size * 5 // 8, size * 2)):
        arms = compare(
            Maker(pipe, refiner),
            Recipe(
                PROMPT, 0, steps=2, guidance_scale=2.0, strength=1.0, width=width, height=height
            ),
        )
        assert [arm.image.size for _, arm in arms] == [(width, height)] * 3


def test_compare_on_sdxl_without_refiner(sdxl):
    assert list(
        dict(compare(Maker(sdxl), Recipe("a cat", steps=2, guidance_scale=7.0, strength=1.0)))
    ) == ["gaussian", "guided"]


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(prompt=" "), "prompt is empty"),
        (dict(prompt="apple " * 400), "tokens long and this model reads"),
        (dict(seed=-1), "seed"),
        (dict(steps=0), "steps is a whole number"),
        (dict(steps=500), "from 1 to 150"),
        (dict(guidance_scale=float("nan")), "guidance scale"),
        (dict(strength=float("nan")), "strength"),
        (dict(sampler="x"), "no sampler"),
        (dict(width=65), "native size"),
    ],
)
def test_compare_refuses_before_any_forward(pipe, refiner, settings, says):
    def forbidden(*_):
        raise AssertionError("a forward ran")

    handle = pipe.unet.register_forward_pre_hook(forbidden)
    try:
        with pytest.raises(ValueError, match=says):
            compare(Maker(pipe, refiner), Recipe(**{"prompt": PROMPT} | settings))
    finally:
        handle.remove()


def test_unknown_words_degrade(pipe):
    image = sample(pipe, prompt="zxqv 日本 🍎 \u202e astronaut", num_inference_steps=2).images[0]
    assert image.size == image_size(pipe)


@pytest.mark.parametrize("source", ["nobody/nothing", BACKBONES["sd21"].source])
def test_a_model_that_cannot_be_reached(source):
    with pytest.raises(FileNotFoundError, match="can't be loaded"):
        load_pipeline(source)


def test_bands_add_up():
    x = torch.randn(1, 3, 16, 20)
    parts = [band(x, 0, 0.1), band(x, 0.1, 0.5), band(x, 0.5, 1)]
    torch.testing.assert_close(sum(parts), x, rtol=0, atol=1e-5)
    torch.testing.assert_close(band(x, 0, 1), x, rtol=0, atol=1e-5)
    assert not band(x, 0, 0).any() and radius(16, 20).max() == 1


def test_energy_and_difference_see_a_slow_wave():
    wave = torch.sin(2 * torch.pi * torch.arange(16) / 16).expand(1, 4, 16, 16)
    assert energy_below(wave, 0.3) == pytest.approx(1, abs=1e-5)
    noise = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(
        torch.from_numpy(low_frequency_difference(noise, noise + wave)),
        wave[0, 0].abs(),
        rtol=0,
        atol=1e-5,
    )
    picture = heat_map(np.eye(8), (64, 32))
    assert isinstance(picture, Image.Image) and picture.size == (64, 32)
