"""The embedded models on a graphics card; skipped without one.

NOISEREFINE_TEST_DEVICE=cpu runs them on the processor, which tries their code.
"""

import json

import pytest
import torch

from noiserefine import Refiner, draw_noise
from noiserefine.denoiser import denoiser, precision
from noiserefine.guidance import sample_latents
from noiserefine.latents import decode
from noiserefine.models.loading import load_pipeline
from noiserefine.models.offload import offload
from noiserefine.noise import encode_prompt
from tests.conftest import DEVICE, EMOJI, EMOJI_REFINER, ROOT, script

pytestmark = pytest.mark.cuda
ON_CARD = DEVICE.type == "cuda"
PROMPT, STEPS = "a red apple on a blue background", 4
# Of a correction's root mean square, in float32.
TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.05}


@pytest.fixture(scope="module")
def exact(pipe, refiner):
    """Noise, refined noise and images of the float32 models on the CPU."""
    x_T = draw_noise(pipe, 0, 4)
    refined = refiner.refine(x_T, PROMPT)
    return x_T, refined, images(pipe, x_T), images(pipe, refined)


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def half(request):
    return load_pipeline(EMOJI, DEVICE, request.param)


def images(pipe, x_T, **guidance):
    embeds = encode_prompt(pipe, [PROMPT] * len(x_T))
    return sample_latents(pipe, x_T, embeds, STEPS, **guidance)


def rms(x):
    return x.float().cpu().square().mean().sqrt()


def test_seeds_draw_the_same_noise_everywhere(pipe, half):
    assert draw_noise(half, 7, 3).equal(draw_noise(pipe, 7, 3))


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "shared"])
def test_refining_in_half_precision(half, exact, merge):
    """Close to float32, the same twice; strength 0 is exact and the base keeps its bits."""
    x_T, expected, *_ = exact
    before = images(half, x_T)
    refiner = Refiner.from_pretrained(EMOJI_REFINER, half, merge=merge)
    refined = refiner.refine(x_T, PROMPT)
    error = rms(refined.cpu().float() - expected) / rms(expected - x_T)
    assert error < TOLERANCE[precision(denoiser(half))]
    assert refiner.refine(x_T, PROMPT).equal(refined)
    assert refiner.refine(x_T, PROMPT, strength=0).cpu().equal(x_T.to(refined.dtype))
    assert images(half, x_T).equal(before)


def test_images_in_half_precision(half, exact):
    """The image of refined noise is float32's, and refining moves it by far more than rounding."""
    x_T, refined, unguided, x0 = exact
    refiner = Refiner.from_pretrained(EMOJI_REFINER, half)
    made = images(half, refiner.refine(x_T, PROMPT))
    assert rms(made.cpu().float() - x0) < 0.2 * rms(x0 - unguided)
    assert all(len(picture.getcolors(10**6)) > 100 for picture in decode(half, made))


def test_guided_and_other_samplers_are_finite(half, exact):
    assert images(half, exact[0], guidance_scale=2.5).isfinite().all()


def test_an_interrupted_refining_pass_leaves_the_base_as_it_was(half, exact):
    before = images(half, exact[0])
    refiner = Refiner.from_pretrained(EMOJI_REFINER, half)

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = refiner.network.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        refiner(exact[0], PROMPT)
    handle.remove()
    assert images(half, exact[0]).equal(before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mode", ["model", "sequential"] if ON_CARD else ["model"])
def test_offloading_changes_no_bit(exact, mode):
    dtype = torch.float16 if ON_CARD else torch.float32
    resident = load_pipeline(EMOJI, DEVICE, dtype)
    refiner = Refiner.from_pretrained(EMOJI_REFINER, resident, merge=False)
    expected = refiner.refine(exact[0], PROMPT), images(resident, exact[0])
    moved = load_pipeline(EMOJI, "cpu", dtype)
    refiner = Refiner.from_pretrained(EMOJI_REFINER, moved, merge=False)
    offload(moved, refiner, mode, DEVICE)
    for _ in range(2):
        assert refiner.refine(exact[0], PROMPT).equal(expected[0])
        assert images(moved, exact[0]).equal(expected[1])


@pytest.mark.skipif(not ON_CARD, reason="the processor's memory is not limited")
def test_a_full_card_is_told_in_a_sentence():
    gr = pytest.importorskip("gradio")
    from noiserefine.page import events, handlers  # noqa: PLC0415 (needs gradio)
    from noiserefine.page.settings import Settings  # noqa: PLC0415

    settings = Settings(PROMPT, 7, "emoji", STEPS, 2.5, 1.0, "DDIM", 0, 0, "", "", 1.0)

    def compare():
        """Return the finished arms; how many previews come between them depends on the time."""
        made = [event for step in handlers.run_view("compare", settings, {}, {}) for event in step]
        return [event.arm for event in made if isinstance(event, events.Arm)]

    assert len(compare()) == 3
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        with pytest.raises(gr.Error, match="memory is full.*--offload model"):
            compare()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(compare()) == 3


@pytest.mark.parametrize("precision", ["fp16", "bf16"] if ON_CARD else ["bf16"])
def test_training_in_half_precision(tmp_path, precision):
    """Targets, two steps, a validation, and a refiner that loads."""
    options = {"num_targets": 64, "epochs": 1, "num_validation": 2, "validate_every": 2}
    options |= {"mixed_precision": precision, "output_dir": tmp_path}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with script("train/train_refiner.py", "--preset=emoji", *arguments) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    steps = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(0 < step["loss"] < 10 for step in steps)
    pipe = load_pipeline(str(ROOT / "assets" / "emoji"), DEVICE)
    refiner = Refiner.from_pretrained(tmp_path, pipe)
    assert refiner.refine(draw_noise(pipe, 0), PROMPT).isfinite().all()
