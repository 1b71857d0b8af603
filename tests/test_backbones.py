"""The big models' families without their weights: small pipelines with their blocks and
conditioning, full-size UNets without data."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from noiserefine import Refiner, draw_noise
from noiserefine.analysis.compare import compare
from noiserefine.analysis.recipe import Maker, Recipe
from noiserefine.denoiser import denoiser
from noiserefine.guidance import sample_latents
from noiserefine.lora import UNET_TARGETS, store_in_8_bits, with_lora
from noiserefine.models.catalogue import BACKBONES
from noiserefine.models.offload import offload
from noiserefine.models.user_lora import add_lora
from noiserefine.noise import encode_prompt
from noiserefine.samplers import SAMPLERS, make_scheduler, samplers_of, with_sampler
from tests import families
from tests.conftest import output, perturbed
from train.tools.architectures import UNETS, build_denoiser, random_pipeline

PROMPT = "a red apple on a blue background"
KNOWN = [name for name in UNETS if name in BACKBONES]


@pytest.fixture(scope="module", params=KNOWN)
def family(request):
    torch.manual_seed(0)
    return random_pipeline(request.param, small=True)


@pytest.mark.parametrize(
    "name, rank, layers, millions", [("sd21", 128, 226, 123.4), ("sdxl", 256, 751, 767.6)]
)
def test_lora_of_the_full_size_unets(name, rank, layers, millions):
    with torch.device("meta"):
        unet = build_denoiser(name)
        twin = with_lora(unet, rank, rank, UNET_TARGETS, "conv_out")
    assert sum(isinstance(layer, LoraLayer) for layer in twin.modules()) == layers
    assert sum(
        p.numel() for name, p in twin.named_parameters() if "lora_" in name
    ) / 1e6 == pytest.approx(millions, abs=0.06)
    assert not any(isinstance(layer, LoraLayer) for layer in unet.modules())


def test_every_family_refines(family, tmp_path):
    """Identity at the start, one forward, base untouched, exact after saving, at other sizes and in
    batches."""
    before, refiner = output(family), Refiner.create(family, 8)
    x_T = draw_noise(family, 0, 2, height=128, width=192)
    torch.testing.assert_close(refiner(x_T, PROMPT), x_T, rtol=0, atol=1e-5)
    refiner = perturbed(family)
    refined = refiner(x_T, [PROMPT, "a cat"])
    assert refined.shape == x_T.shape and (refined - x_T).abs().mean() > 1e-3
    torch.testing.assert_close(refined[:1], refiner(x_T[:1], PROMPT), rtol=0, atol=1e-5)
    refiner.save_pretrained(tmp_path)
    assert torch.equal(
        Refiner.from_pretrained(tmp_path, family, merge=False)(x_T, [PROMPT, "a cat"]), refined
    )
    assert torch.equal(output(family), before)


def test_every_family_compares(family):
    turbo = family.name_or_path.startswith("sd-turbo")
    arms = compare(
        Maker(family, perturbed(family)),
        Recipe(PROMPT, steps=2, guidance_scale=3.0, strength=1.0),
        guided=not turbo,
    )
    assert {name: arm.forwards for name, arm in arms} == {"gaussian": 2, "refined": 3} | (
        {} if turbo else {"guided": 4}
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_family_scales_the_noise_once(family, sampler):
    """Refined noise has unit variance; the pipeline alone multiplies it by init_noise_sigma (14.6
    for Euler)."""
    pipe, x_T, seen = with_sampler(family, sampler), draw_noise(family, 0), []
    handle = family.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pipe(PROMPT, latents=x_T, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    handle.remove()
    assert seen[0].std().item() == pytest.approx(x_T.std().item(), rel=0.01)
    turbo = family.name_or_path.startswith("sd-turbo")
    spacing = "trailing" if turbo or "trailing" in sampler else "leading"
    assert pipe.scheduler.config.timestep_spacing == spacing
    assert pipe.scheduler.config.prediction_type == family.scheduler.config.prediction_type


def test_turbo_starts_at_the_last_timestep():
    scheduler = make_scheduler("Euler", random_pipeline("sd-turbo", small=True))
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]


def test_a_sampler_is_offered_once():
    """Turbo's DDIM has trailing timesteps in any case."""
    assert samplers_of(random_pipeline("sd21", small=True)) == list(SAMPLERS)
    turbo = random_pipeline("sd-turbo", small=True)
    assert [*SAMPLERS.keys() - samplers_of(turbo)] == ["DDIM (trailing)"]
    timesteps = []
    for sampler in ("DDIM", "DDIM (trailing)"):
        scheduler = make_scheduler(sampler, turbo)
        scheduler.set_timesteps(4)
        timesteps.append(scheduler.timesteps.tolist())
    assert timesteps[0] == timesteps[1]


def test_unknown_architecture():
    with pytest.raises(ValueError, match="no architecture 'sd3'"):
        random_pipeline("sd3")


def test_the_guidance_scale_is_an_input(family, tmp_path):
    """Zero-initialised, in the refining pass only, exact after saving; refused outside of its
    range."""
    before, x_T = output(family), draw_noise(family, 0, 2)
    refiner = perturbed(family, guidance_scale_range=[1, 8])
    assert torch.equal(
        refiner(x_T, PROMPT, guidance_scale=2.0), refiner(x_T, PROMPT, guidance_scale=7.0)
    )
    torch.nn.init.normal_(refiner.network.scale_input.weight)
    at_2, at_7 = (refiner(x_T, PROMPT, guidance_scale=scale) for scale in (2.0, 7.0))
    assert (at_2 - at_7).abs().max() > 1e-4
    assert (
        family.unet.time_embedding.cond_proj is None
        and family.unet.config.time_cond_proj_dim is None
    )
    assert torch.equal(output(family), before)
    assert (
        family(PROMPT, num_inference_steps=1, guidance_scale=3.0, output_type="latent")
        .images.isfinite()
        .all()
    )
    refiner.save_pretrained(tmp_path)
    for merge in (False, True):
        loaded = Refiner.from_pretrained(tmp_path, family, merge=merge)
        torch.testing.assert_close(
            loaded(x_T, PROMPT, guidance_scale=7.0), at_7, rtol=0, atol=2e-5 if merge else 0
        )
    for scale in (None, 0.9, 8.1, float("nan")):
        with pytest.raises(ValueError, match="takes a guidance scale from 1 to 8"):
            refiner(x_T, PROMPT, guidance_scale=scale)
    with pytest.raises(ValueError, match="takes no guidance scale"):
        perturbed(family)(x_T, PROMPT, guidance_scale=2.0)
    (tmp_path / "guidance_embedding.safetensors").unlink()
    with pytest.raises(ValueError, match="guidance_embedding"):
        Refiner.from_pretrained(tmp_path, family)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_model_offload_changes_no_pixel(name, merge, tmp_path):
    def arms(mode):
        torch.manual_seed(0)
        pipe = random_pipeline(name, small=True)
        perturbed(pipe).save_pretrained(tmp_path)
        refiner = Refiner.from_pretrained(tmp_path, pipe, merge=merge)
        offload(pipe, refiner, mode, "cpu")
        return list(
            compare(Maker(pipe, refiner), Recipe(PROMPT, steps=2, guidance_scale=7.0, strength=1.0))
        )

    for (_, plain), (_, spared) in zip(arms("none"), arms("model"), strict=True):
        assert np.array_equal(plain.image, spared.image)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name, prompt", [("sd3", PROMPT), ("sit", "3"), ("flux_schnell", PROMPT)])
def test_transformers_are_offloaded_too(name, prompt, merge, tmp_path):
    """Every picture is the same; the sequential mode leaves no weight on the device."""

    def build():
        pipe = copy.deepcopy(families.pipeline(name))
        return pipe, Refiner.from_pretrained(tmp_path, pipe, merge=merge)

    def arms(mode):
        pipe, refiner = build()
        offload(pipe, refiner, mode, "cpu")
        recipe = Recipe(prompt, steps=2, sampler="Native", strength=1.0)
        return [Maker(pipe, refiner)(variant).image for variant in (recipe.gaussian, recipe)]

    perturbed(families.pipeline(name)).save_pretrained(tmp_path)
    for plain, spared in zip(arms("none"), arms("model"), strict=True):
        assert np.array_equal(plain, spared)
    pipe, refiner = build()
    offload(pipe, refiner, "sequential", "cpu")
    for network in (pipe.transformer, refiner.network):
        assert all(p.device.type == "meta" for p in network.parameters())


def test_compiled_denoisers_are_refined(tmp_path):
    """torch.compile wraps the network in a module with other names."""
    plain, pipe = families.pipeline("sd15"), copy.deepcopy(families.pipeline("sd15"))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    perturbed(plain).save_pretrained(tmp_path / "refiner")
    x_T = draw_noise(plain, 0)
    refined = [Refiner.from_pretrained(tmp_path / "refiner", p)(x_T, PROMPT) for p in (plain, pipe)]
    assert torch.equal(*refined)
    Refiner.create(pipe, 8).save_pretrained(tmp_path / "new")
    Refiner.from_pretrained(tmp_path / "new", plain)
    add_lora(pipe, lora_of(plain.unet, tmp_path / "style.safetensors"))
    assert Maker(pipe)(Recipe(PROMPT, steps=1)).forwards == 1


def lora_of(network, path):
    """Write a LoRA of the network's queries."""
    layers = [name for name, _ in network.named_modules() if name.endswith("to_q")]
    width = {name: network.get_submodule(name).weight.shape for name in layers}
    state = {f"{name}.lora_A.weight": torch.ones(4, width[name][1]) for name in layers}
    state |= {f"{name}.lora_B.weight": torch.ones(width[name][0], 4) for name in layers}
    save_file(state, path)
    return str(path)


@pytest.mark.parametrize("merge", [True, False])
def test_denoisers_stored_in_8_bits_are_refined(tmp_path, merge):
    """They refine as the same rounded weights in single precision do: nothing more is lost."""
    pipe, rounded = (copy.deepcopy(families.pipeline("sd15")) for _ in range(2))
    perturbed(rounded).save_pretrained(tmp_path / "refiner")
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    for weight, stored in zip(rounded.unet.parameters(), pipe.unet.parameters(), strict=True):
        weight.data = stored.data.float()
    x_T, embeds = draw_noise(pipe, 0), encode_prompt(pipe, PROMPT, guided=False)
    before = sample_latents(pipe, x_T, embeds, 1)
    fresh = Refiner.create(pipe, 8)
    torch.testing.assert_close(fresh(x_T, PROMPT), x_T, rtol=0, atol=2e-6)
    refiners = [
        Refiner.from_pretrained(tmp_path / "refiner", p, merge=merge) for p in (pipe, rounded)
    ]
    refined, expected = (refiner(x_T, PROMPT) for refiner in refiners)
    torch.testing.assert_close(refined, expected, rtol=0, atol=1e-6)
    assert (expected - x_T).abs().max() > 1e-3
    shared = set(refiners[0].network.parameters()) & set(pipe.unet.parameters())
    eight_bits = {p for p in shared if p.dtype.itemsize == 1}
    assert (
        eight_bits
        if merge
        else eight_bits == {p for p in pipe.unet.parameters() if p.dtype.itemsize == 1}
    )
    assert refiners[0].note == "", "a rounded base is still the base"
    assert torch.equal(sample_latents(pipe, x_T, embeds, 1), before)
    add_lora(pipe, lora_of(rounded.unet, tmp_path / "style.safetensors"))
    assert sample_latents(pipe, x_T, embeds, 1).isfinite().all()


@pytest.mark.parametrize("name", ["sd15", "flux2_klein"])
def test_gradients_with_weights_of_8_bits(name):
    """They are exactly those of the same rounded weights in single precision."""
    gradients = []
    for rounded in (False, True):
        pipe = copy.deepcopy(families.pipeline(name))
        refiner, network = perturbed(pipe), denoiser(pipe).requires_grad_(False)
        trained = [p for p in refiner.network.parameters() if p.requires_grad]
        refiner.network.enable_gradient_checkpointing()
        store_in_8_bits(network, refiner.network)
        stored = [p for p in refiner.network.parameters() if p.dtype.itemsize == 1]
        assert len(stored) > len(list(network.parameters())) / 3 and not {*stored} & {*trained}
        for weight in network.parameters() if rounded else ():
            weight.data = weight.data.float()
        embeds = encode_prompt(pipe, PROMPT, guided=False)
        refiner.correction(draw_noise(pipe, 0), embeds).pow(2).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    assert torch.equal(*gradients) and gradients[0].any()


def test_untrained_is_the_identity_in_half_precision(tmp_path):
    """Merged, the last layer is cancelled more exactly than half precision holds its weight."""
    pipe = copy.deepcopy(families.pipeline("sd15")).to(torch.bfloat16)
    Refiner.create(pipe, 8).save_pretrained(tmp_path)
    refiner = Refiner.from_pretrained(tmp_path, pipe, merge=True)
    correction = refiner.correction(
        draw_noise(pipe, 0), encode_prompt(pipe, PROMPT, guided=False)
    ).detach()
    assert correction.abs().max() < 1e-6


@pytest.mark.parametrize("part, says", [("unet", "denoising diverged"), ("vae", "overflows")])
def test_a_picture_of_nan_is_said(part, says):
    """It would look like plain black."""
    pipe = copy.deepcopy(families.pipeline("sd15"))
    layer = pipe.unet.conv_out if part == "unet" else pipe.vae.decoder.conv_out
    layer.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=f"not finite.*{says}"):
        Maker(pipe)(Recipe(PROMPT, steps=1))


@pytest.mark.parametrize("merge", [True, False])
def test_sequential_offload_empties_the_device(merge, tmp_path):
    """It computes on accelerators only; here it is checked that no weight stays and none is
    lost."""
    torch.manual_seed(0)
    pipe = random_pipeline("sd21", small=True)
    perturbed(pipe).save_pretrained(tmp_path)
    refiner = Refiner.from_pretrained(tmp_path, pipe, merge=merge)
    offload(pipe, refiner, "sequential", "cpu")
    for unet in (pipe.unet, refiner.network):
        assert all(p.device.type == "meta" for p in unet.parameters())
        assert any(hasattr(layer, "_hf_hook") for layer in unet.conv_in.modules())


def test_known_arms_are_not_sampled_again(pipe, refiner):
    make, recipe, count = (
        Maker(pipe, refiner),
        Recipe(PROMPT, 3, steps=2, guidance_scale=7.0, strength=1.0),
        [],
    )
    first = dict(compare(make, recipe))
    handles = [
        unet.register_forward_pre_hook(lambda module, args: count.append(1))
        for unet in (pipe.unet, refiner.network)
    ]
    again = dict(compare(make, replace(recipe, strength=0.5)))
    for handle in handles:
        handle.remove()
    assert len(count) == 3, "the refining pass and two steps"
    assert again["guided"] is first["guided"] and not np.array_equal(
        again["refined"].latents, first["refined"].latents
    )


def test_conditioning_of_two_text_encoders():
    """SDXL's pooled embeddings and time ids reach the refining pass as they reach the base's first
    step."""
    torch.manual_seed(0)
    pipe, seen = random_pipeline("sdxl", small=True), []
    refiner = perturbed(pipe)
    handles = [
        unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        for unet in (pipe.unet, refiner.network)
    ]
    embeds = encode_prompt(pipe, PROMPT, guided=False)
    pipe(
        latents=refiner(draw_noise(pipe, 0), embeds),
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="latent",
        **embeds,
    )
    for handle in handles:
        handle.remove()
    refining, base = seen
    assert torch.equal(refining["encoder_hidden_states"], base["encoder_hidden_states"])
    for name in ("text_embeds", "time_ids"):
        assert torch.equal(refining["added_cond_kwargs"][name], base["added_cond_kwargs"][name])
