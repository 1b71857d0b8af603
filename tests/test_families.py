"""The refiner on pipelines of many families, tiny and random: nothing in the root of noiserefine
names one of them.
"""

import copy
import functools
import inspect

import pytest
import torch
from families import FAMILIES, pipeline
from torch.utils._pytree import tree_map

from noiserefine import Refiner
from noiserefine.denoiser import (
    ForwardCounter,
    can_guide,
    canvas,
    canvas_like,
    denoiser,
    guidance_arguments,
    guidance_kind,
    size_arguments,
    with_parts,
)
from noiserefine.guidance import sample, sample_latents
from noiserefine.latents import decode
from noiserefine.msd import msd_loss, sampler_gain
from noiserefine.noise import encode_prompt
from noiserefine.samplers import make_scheduler, samplers_of

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


def detached(pipe, x, generator):
    """x0 with gradient, by the pipeline's own call with all outputs of its denoiser detached
    (equation 5).
    """
    network, scheduler = denoiser(pipe), copy.deepcopy(pipe.scheduler)
    step, set_timesteps, last = scheduler.step, scheduler.set_timesteps, []

    @functools.wraps(step)
    def keep(*args, **kwargs):
        made = step(*args, **kwargs)
        last[:] = [made[0] if isinstance(made, tuple) else made.prev_sample]
        return made

    @functools.wraps(set_timesteps)
    def enable(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        torch.set_grad_enabled(True)

    def cut(module, args, output):
        torch.set_grad_enabled(True)
        return tree_map(torch.Tensor.detach, output)

    def off(module, args):
        torch.set_grad_enabled(False)

    scheduler.step, scheduler.set_timesteps = keep, enable
    handles = [network.register_forward_pre_hook(off), network.register_forward_hook(cut)]
    graded = with_parts(pipe, scheduler=scheduler)
    try:
        with without_no_grad(graded):
            call(graded, x, output_type="latent", generator=generator)
    finally:
        torch.set_grad_enabled(True)
        for handle in handles:
            handle.remove()
    return canvas_like(pipe, x).from_sample(last[0].float())


class without_no_grad:
    """While open, the pipeline's call is not under no_grad: what that decorator wraps is called."""

    def __init__(self, pipe):
        self.pipe, self.kind = pipe, type(pipe)

    def __enter__(self):
        wrapped = inspect.unwrap(self.kind.__call__)
        defaults = {}
        for function in (self.kind.__call__,):
            for cell in function.__closure__ or ():
                if isinstance(cell.cell_contents, dict):
                    defaults |= cell.cell_contents

        @functools.wraps(wrapped)
        def plain(pipe, *args, **kwargs):
            return wrapped(pipe, *args, **defaults | kwargs)

        self.pipe.__class__ = type(
            self.kind.__name__,
            (self.kind,),
            {"__call__": plain, "__module__": self.kind.__module__},
        )

    def __exit__(self, *_):
        self.pipe.__class__ = self.kind


def test_gain_is_that_of_autograd(name, pipe):
    """Equation 4 through the pipeline's own sampling: x0 depends on x_T by a scalar, which the
    gain is.
    """
    if name in NO_GRADIENT:
        with pytest.raises(ValueError, match="replaces it"):
            sampler_gain(pipe.scheduler, STEPS)
        return
    x = noise(pipe, 1).requires_grad_()
    x0 = detached(pipe, x, torch.Generator().manual_seed(0))
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


def test_decoding_is_the_pipelines_own(name, pipe, embeds):
    x = noise(pipe, 1)
    if name in NO_PICTURE:
        with pytest.raises(ValueError, match="no vae"):
            decode(pipe, x)
        return
    x0 = sample_latents(pipe, x, encode_prompt(pipe, PROMPTS[0]), STEPS, seed=5)
    generator = torch.Generator().manual_seed(~5)
    theirs = call(pipe, x, generator=generator).images[0]
    (ours,) = decode(pipe, x0)
    assert ours.size == theirs.size and ours.tobytes() == theirs.tobytes()


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
    """All that the family takes make finite latents, and flow matching's have the gain 1."""
    x, embeds = noise(pipe, 1), encode_prompt(pipe, PROMPTS[:1])
    for sampler in samplers_of(pipe):
        twin = with_parts(pipe, scheduler=make_scheduler(sampler, pipe))
        assert sample_latents(twin, x, embeds, STEPS).isfinite().all(), sampler
        if guidance_kind(pipe) == "cfg" and "Flow" in type(pipe.scheduler).__name__:
            assert sampler_gain(twin.scheduler, STEPS) == pytest.approx(1, rel=1e-4), sampler
