"""The refiner on pipelines of many families, tiny and random: nothing in the root of noiserefine
names one of them.
"""

import copy
import functools
from contextlib import nullcontext

import diffusers as d
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from noiserefine import Refiner
from noiserefine.checkpoint import is_refiner_file
from noiserefine.denoiser import (
    ForwardCounter,
    can_guide,
    canvas,
    canvas_like,
    check_class,
    denoiser,
    guidance_arguments,
    size_arguments,
    with_parts,
)
from noiserefine.guidance import check_guidance, sample, sample_latents
from noiserefine.latents import decode, fit_preview
from noiserefine.lora import save_lora
from noiserefine.models.offload import offload
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import encode_prompt
from noiserefine.samplers import is_flow, samplers_of, watch_x0, with_sampler
from tests.families import FAMILIES, pipeline, unet

PROMPTS = ["a red apple", "two cats on a roof"]
STEPS = 3
NO_SCALE = {"chroma", "krea2"}  # no layer of theirs reads a vector
NO_GRADIENT = {"sana_sprint"}  # its sampler replaces the noise at every step
NO_PICTURE = {"cascade_prior"}  # its latents are decoded by a second model


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    return pipeline(name)


@pytest.fixture(scope="module")
def embeds(pipe):
    return encode_prompt(pipe, PROMPTS)


@pytest.fixture(scope="module")
def refiner(pipe):
    """One that does something, without training."""
    torch.manual_seed(1)
    refiner = Refiner.create(pipe, 8)
    for name, parameter in refiner.network.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return refiner


def side(pipe):
    """A small size in pixels that the model makes."""
    return 384 if pipe.name_or_path == "cascade_prior" else 64


def noise(pipe, count=2):
    shape = canvas(pipe, side(pipe), side(pipe)).shape
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def call(pipe, x, **kwargs):
    """The pipeline called by its user, unguided."""
    size = canvas_like(pipe, x)
    settings = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0)}
    settings |= size_arguments(pipe, size.height, size.width) | guidance_arguments(pipe)
    return pipe(**settings | {"prompt": PROMPTS[: len(x)], "latents": size.to_latents(x)} | kwargs)


def raw(pipe, x):
    made = call(pipe, x, output_type="latent", return_dict=False)[0]
    return made if torch.is_tensor(made) else torch.stack(list(made))


def test_untrained_is_the_identity(pipe):
    x = noise(pipe)
    x_hat = Refiner.create(pipe, 8).refine(x, PROMPTS)
    torch.testing.assert_close(x_hat, x, rtol=0, atol=1e-5)


def test_strength_is_linear(pipe, refiner, embeds):
    x = noise(pipe)
    assert torch.equal(refiner.refine(x, embeds, strength=0), x)
    full, half = (refiner.refine(x, embeds, strength) - x for strength in (1, 0.5))
    assert full.abs().mean() > 1e-3
    torch.testing.assert_close(2 * half, full, rtol=0, atol=1e-5)
    assert torch.equal(
        refiner(x, PROMPTS), canvas_like(pipe, x).to_latents(refiner.refine(x, embeds))
    ), "prompts and what is encoded of them are the same"


def test_forwards(pipe, refiner, embeds):
    """One forward refines; refined sampling makes N + 1, guided sampling 2 N."""
    x, counter = noise(pipe), ForwardCounter()
    settings = size_arguments(pipe, side(pipe), side(pipe)) | {"num_inference_steps": STEPS}
    with counter.watch(denoiser(pipe), refiner.network):
        latents = refiner(x, embeds)
        assert counter.count == 2
        sample(pipe, latents=latents, output_type="latent", **settings | embeds)
        unguided = counter.count - 2
        if can_guide(pipe):
            counter.count = 0
            sample(
                pipe, latents=latents, output_type="latent", guidance_scale=3, **settings | embeds
            )
            assert counter.count == 2 * unguided
    multistep = pipe.scheduler.config.get("skip_prk_steps") is not None  # one step more
    assert unguided == 2 * (STEPS + multistep)


def test_each_alone_is_the_batch(name, pipe, refiner):
    if name == "cogview4":
        pytest.skip("it pads prompts without a mask, so that one sees the length of the others")
    x = noise(pipe)
    alone = [refiner.refine(x[i : i + 1], PROMPTS[i]) for i in range(2)]
    torch.testing.assert_close(refiner.refine(x, PROMPTS), torch.cat(alone), rtol=0, atol=2e-5)
    for_all = refiner.refine(x, PROMPTS[:1])
    torch.testing.assert_close(for_all[:1], alone[0], rtol=0, atol=2e-5)


def test_another_prompt_is_another_correction(pipe, refiner):
    x = noise(pipe)
    change = refiner.refine(x, PROMPTS) - refiner.refine(x, PROMPTS[::-1])
    assert change.abs().flatten(1).amax(1).min() > 1e-6


def test_base_is_untouched(pipe, refiner):
    x = noise(pipe)
    before, parameters = raw(pipe, x), [(p, p.requires_grad) for p in denoiser(pipe).parameters()]
    Refiner.create(pipe, 8)
    refiner(x, PROMPTS)

    def cancel(*_):
        raise KeyboardInterrupt

    handle = refiner.network.get_submodule(refiner.config.head).register_forward_pre_hook(cancel)
    with pytest.raises(KeyboardInterrupt):
        refiner(x, PROMPTS)
    handle.remove()
    with pytest.raises(ValueError, match="x_T has shape"):
        refiner(x[:, :1], PROMPTS)
    assert torch.is_grad_enabled()
    assert torch.equal(raw(pipe, x), before)
    for now, (then, flag) in zip(denoiser(pipe).parameters(), parameters, strict=True):
        assert now is then and now.requires_grad == flag


def test_files_are_exact(name, pipe, refiner, embeds, tmp_path):
    x, refined = noise(pipe), refiner.refine(noise(pipe), embeds)
    refiner.save_pretrained(tmp_path)
    loaded = Refiner.from_pretrained(tmp_path, pipe, merge=False)
    assert torch.equal(loaded.refine(x, embeds), refined) and loaded.config == refiner.config
    merged = Refiner.from_pretrained(tmp_path, pipe, merge=True)
    torch.testing.assert_close(merged.refine(x, embeds), refined, rtol=0, atol=5e-5)
    if not hasattr(pipe, "load_lora_weights"):
        return
    # As an ordinary LoRA on a pipeline of its own weights; there the head has its bias still.
    network = copy.deepcopy(denoiser(pipe))
    plain = with_parts(pipe, network)
    plain.load_lora_weights(tmp_path)
    head = network.get_submodule(refiner.config.head)
    head.get_base_layer().bias = None
    twin = Refiner(pipe, refiner.config, network)
    torch.testing.assert_close(twin.refine(x, embeds), refined, rtol=0, atol=1e-5)


def test_encoding_is_the_pipelines_own(pipe, embeds):
    """Embeddings encoded once make what the pipeline's own call with prompts makes."""
    x = noise(pipe)
    settings = size_arguments(pipe, side(pipe), side(pipe)) | {
        "num_inference_steps": STEPS,
        "latents": canvas_like(pipe, x).to_latents(x),
        "output_type": "latent",
        "return_dict": False,
    }
    for scale in (1.0, 3.0) if can_guide(pipe) else (1.0,):
        ours, theirs = (
            sample(
                pipe,
                guidance_scale=scale,
                generator=torch.Generator().manual_seed(0),
                **settings | prompt,
            )[0]
            for prompt in (embeds, {"prompt": PROMPTS})
        )
        assert all(map(torch.equal, ours, theirs))


def test_latents_are_the_pipelines_own(pipe):
    """What the pipeline draws itself from a seed is what x_T, (B, C, h, w), gives it."""
    native = canvas(pipe)
    assert canvas(pipe, native.height, native.width) is native, "it is measured once"
    size = canvas(pipe, side(pipe), side(pipe))
    drawn = torch.randn(1, *size.shape, generator=torch.Generator().manual_seed(3))
    seen = []
    for latents in ({}, {"latents": size.to_latents(drawn)}):
        twin = with_parts(pipe, scheduler=copy.deepcopy(pipe.scheduler))
        step = twin.scheduler.step

        @functools.wraps(step)
        def note(model_output, timestep, sample, *args, step=step, **kwargs):
            seen.append(sample)
            return step(model_output, timestep, sample, *args, **kwargs)

        twin.scheduler.step = note
        generator = torch.Generator().manual_seed(3)
        call(twin, drawn, **latents | {"generator": generator, "output_type": "latent"})
    first, given = seen[0], seen[len(seen) // 2]
    torch.testing.assert_close(first, given)
    sigma = float(first.flatten().norm() / drawn.norm())  # the schedulers' own unit
    torch.testing.assert_close(size.from_sample(first), sigma * drawn)


def detached(pipe, x):
    """x0 with gradient, by the pipeline's own call with its denoiser's output detached (eq. 5)."""
    network, scheduler, last = denoiser(pipe), copy.deepcopy(pipe.scheduler), []
    graded = with_parts(pipe, scheduler=scheduler)
    step, prepare_latents = scheduler.step, graded.prepare_latents

    @functools.wraps(step)
    def keep(*args, **kwargs):
        made = step(*args, **kwargs)
        last[:] = [made[0] if isinstance(made, tuple) else made.prev_sample]
        return made

    @functools.wraps(prepare_latents)
    def enable(*args, **kwargs):
        torch.set_grad_enabled(True)  # until the pipeline's no_grad ends
        return prepare_latents(*args, **kwargs)

    def detach(module, args, output):
        torch.set_grad_enabled(True)
        return tree_map(torch.Tensor.detach, output)

    def disable(module, args):
        torch.set_grad_enabled(False)

    scheduler.step, graded.prepare_latents = keep, enable
    handles = [network.register_forward_pre_hook(disable), network.register_forward_hook(detach)]
    try:
        call(graded, x, output_type="latent")
    finally:
        for handle in handles:
            handle.remove()
    return canvas_like(pipe, x).from_sample(last[0])


def test_gain_is_that_of_autograd(name, pipe):
    """Equation 4 through the pipeline's own sampling: x0 depends on x_T by a scalar, which the
    gain is.
    """
    if name in NO_GRADIENT:
        with pytest.raises(ValueError, match="replaces it"):
            sampler_gain(pipe.scheduler, STEPS)
        return
    x = noise(pipe, 1).requires_grad_()
    x0 = detached(pipe, x)
    direction = torch.randn_like(x0)
    (gradient,) = torch.autograd.grad((x0 * direction).sum(), x)
    gain = float((gradient / direction).median())
    torch.testing.assert_close(gradient, gain * direction, rtol=1e-4, atol=1e-5)
    if pipe.scheduler.config.get("prediction_type") != "v_prediction":  # there e is held, not v
        assert sampler_gain(pipe.scheduler, STEPS) == pytest.approx(gain, rel=1e-4)


def test_two_steps_lower_the_loss(name, pipe, embeds):
    if name in NO_GRADIENT:
        return
    x, gain = noise(pipe), sampler_gain(pipe.scheduler, STEPS)
    torch.manual_seed(0)
    refiner = Refiner.create(pipe, 8)
    trained = [p for p in refiner.network.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=1.0), []
    twin = with_parts(pipe, scheduler=copy.deepcopy(pipe.scheduler))
    with torch.no_grad():
        target = sample_latents(twin, x + 0.3 * noise(pipe).flip(0), embeds, STEPS)
    for _ in range(3):
        x_hat = x + refiner.correction(x, embeds)
        loss = msd_loss(sample_latents(twin, x_hat, embeds, STEPS), x_hat, target, gain)
        loss.backward()
        assert all(p.grad is not None for p in trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1e-2 / gain)
        assert norm.isfinite() and norm > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0], losses


def test_decoding_is_the_pipelines_own(name, pipe):
    """Whichever prompt the decoding call is given."""
    x = noise(pipe, 1)
    if name in NO_PICTURE:
        with pytest.raises(ValueError, match="no vae"):
            decode(pipe, x)
        return
    embeds = encode_prompt(pipe, PROMPTS[0])
    x0 = sample_latents(pipe, x, embeds, STEPS, seed=5)
    generator = torch.Generator().manual_seed(~5)
    theirs = call(pipe, x, generator=generator).images[0]
    for ours in decode(pipe, x0) + decode(pipe, x0, embeds):
        assert ours.size == theirs.size and ours.tobytes() == theirs.tobytes()


def test_a_decoder_in_single_precision_beside_half_precision(name, pipe):
    """As training has them, for decoders that overflow in half precision."""
    if name in NO_PICTURE:
        return
    x0, half = noise(pipe, 1), copy.deepcopy(pipe)
    for part, network in half.components.items():
        if part != "vae" and isinstance(network, torch.nn.Module):
            network.to(torch.bfloat16)
    theirs, ours = (np.asarray(decode(x, x0)[0], dtype=int) for x in (pipe, half))
    assert np.abs(ours - theirs).max() <= 1  # some pipelines round the latents


def test_guidance_scale_as_an_input(name, pipe):
    if name in NO_SCALE:
        with pytest.raises(ValueError, match="reads a vector"):
            Refiner.create(pipe, 8, guidance_scale_range=[1, 8])
        return
    x, embeds = noise(pipe), encode_prompt(pipe, PROMPTS, guided=False)
    refiner = Refiner.create(pipe, 8, guidance_scale_range=[1, 8])
    refiner.network.get_submodule(refiner.config.head).lora_B["refiner"].weight.data.mul_(0.5)
    scales = torch.tensor([[2.0, 7.0], [5.0, 7.0]])
    assert torch.equal(*(refiner.correction(x, embeds, each) for each in scales)), "it starts at 0"
    torch.nn.init.normal_(refiner.network.scale_input.weight)
    one, other = (refiner.correction(x, embeds, each) for each in scales)
    assert (one - other)[0].abs().max() > 1e-6
    torch.testing.assert_close(one[1], other[1])


def test_samplers(pipe):
    """All make finite latents; flow matching's have the gain 1 and end in the x0 they predict."""
    x, embeds = noise(pipe, 1), encode_prompt(pipe, PROMPTS[:1])
    for sampler in samplers_of(pipe):
        twin, predicted = with_sampler(pipe, sampler), []
        with watch_x0(twin.scheduler, predicted.append) if has_x0(twin) else nullcontext():
            x0 = sample_latents(twin, x, embeds, STEPS)
        assert x0.isfinite().all(), sampler
        if is_flow(twin.scheduler):
            assert sampler_gain(twin.scheduler, STEPS) == pytest.approx(1, rel=1e-4), sampler
            last = canvas_like(pipe, x).from_sample(predicted[-1])
            torch.testing.assert_close(last, x0, rtol=1e-3, atol=1e-3)


def has_x0(pipe):
    return hasattr(pipe.scheduler, "sigmas") or hasattr(pipe.scheduler, "alphas_cumprod")


@pytest.mark.parametrize("name", ["sdxl", "sd3", "pixart_sigma", "sana"])
def test_perturbed_attention_guidance(name):
    """It leaves the network's attention processors as they were, after an exception too."""
    pipe = pipeline(name)
    x, embeds = noise(pipe, 1), encode_prompt(pipe, PROMPTS[0])
    before, processors = raw(pipe, x), list(denoiser(pipe).attn_processors.values())
    plain = sample_latents(pipe, x, embeds, STEPS)
    assert not torch.equal(plain, sample_latents(pipe, x, embeds, STEPS, pag_scale=3.0))
    with pytest.raises(TypeError):
        sample(pipe, pag_scale=3.0, no_such_argument=1, **embeds)
    assert list(denoiser(pipe).attn_processors.values()) == processors
    assert torch.equal(raw(pipe, x), before)


@pytest.mark.parametrize("middle", [None, "UNetMidBlock2D"])
def test_perturbed_attention_needs_attention_in_the_middle(middle):
    """Small distilled UNets have none there."""
    pipe = with_parts(pipeline("sd15"), unet(mid_block_type=middle))
    for call in (
        lambda: check_guidance(pipe, 1.0, 3.0),
        lambda: sample(pipe, prompt="a cat", pag_scale=3.0),
    ):
        with pytest.raises(ValueError, match="no self-attention in its mid"):
            call()


def test_guidance_that_a_pipeline_lacks():
    with pytest.raises(ValueError, match="no perturbed-attention guidance for FluxPipeline"):
        sample(pipeline("flux_dev"), prompt="a cat", pag_scale=3.0)
    for name in ("lcm", "flux2_dev", "sana_sprint"):
        with pytest.raises(ValueError, match="no classifier-free guidance"):
            sample(pipeline(name), prompt="a cat", guidance_scale=3.0)


def test_a_prompt_alone_is_guided():
    """A string is one prompt, where the pipeline wants as many negative ones."""
    pipe = pipeline("qwen_image")
    one, listed = (
        sample(
            pipe,
            prompt=prompt,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=2,
            output_type="latent",
            **size_arguments(pipe, 64, 64),
        ).images
        for prompt in (PROMPTS[0], PROMPTS[:1])
    )
    assert torch.equal(one, listed)


@pytest.mark.parametrize("name", ["sd15", "flux_dev", "qwen_image"])  # kinds of latents
def test_preview(name):
    pipe = pipeline(name)
    x = noise(pipe, 1)
    picture = fit_preview(pipe)(x)
    assert picture.size == (x.shape[3], x.shape[2]) and len(picture.getcolors(10**6)) > 1


@pytest.mark.parametrize(
    "kind, says",
    [
        (d.StableDiffusionImg2ImgPipeline, "changes a given picture"),
        (d.FluxInpaintPipeline, "changes a given picture"),
        (d.WanPipeline, "makes videos"),
        (d.AnimateDiffPipeline, "makes videos"),
        (d.DiTPipeline, "takes no `latents`"),
        (d.DDPMPipeline, "takes no `latents`"),
    ],
)
def test_pipelines_that_cannot_be_refined(kind, says):
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot be refined: it.*{says}"):
        check_class(kind)


class Restless(d.StableDiffusionPipeline):
    """Guides whatever it is asked for."""

    do_classifier_free_guidance = True


def test_guidance_that_cannot_be_switched_off():
    restless = Restless(**pipeline("sd15").components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="cannot be switched off"):
        Refiner.create(restless, 8)


def test_refiners_of_other_models(tmp_path):
    Refiner.create(pipeline("sd3"), 8).save_pretrained(tmp_path)
    for name, says in (
        ("sd15", "a UNet2DConditionModel and its base's a SD3Transformer2DModel"),
        ("sana", "a SanaTransformer2DModel and its base's"),
    ):
        with pytest.raises(ValueError, match=says):
            Refiner.from_pretrained(tmp_path, pipeline(name))
    Refiner.create(pipeline("sd15"), 8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="predicts “v_prediction” and its base “epsilon”|another"):
        Refiner.from_pretrained(tmp_path, pipeline("sd2_v"))
    with pytest.raises(ValueError, match="a FluxTransformer2DModel and its base's a UNet2D"):
        Refiner.from_pretrained(tmp_path, pipeline("flux_dev"))


def test_files_say_that_they_are_refiners(tmp_path):
    pipe = pipeline("sd3")
    refiner = Refiner.create(pipe, 8)
    refiner.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert is_refiner_file(file)
    assert is_refiner_file(file.rename(tmp_path / "downloaded.safetensors")), "by its metadata"
    save_lora(pipe, refiner.network, tmp_path / "style.safetensors")
    assert not is_refiner_file(tmp_path / "style.safetensors")


@pytest.mark.parametrize("name", ["sd3", "flux_dev", "z_image"])
def test_offloading_changes_nothing(name, tmp_path):
    pipe = copy.copy(pipeline(name))
    parts = {key: copy.deepcopy(part) for key, part in pipe.components.items()}
    offloaded = type(pipe)(**parts)
    offloaded.set_progress_bar_config(disable=True)
    x = noise(pipe, 1)
    torch.manual_seed(0)
    Refiner.create(pipe, 8).save_pretrained(tmp_path)
    expected = call(pipe, x, latents=Refiner.from_pretrained(tmp_path, pipe)(x, PROMPTS[0]))
    refiner = Refiner.from_pretrained(tmp_path, offloaded)
    offload(offloaded, refiner, "model", "cpu")
    for _ in range(2):
        made = call(offloaded, x, latents=refiner(x, PROMPTS[0]))
        assert made.images[0].tobytes() == expected.images[0].tobytes()
