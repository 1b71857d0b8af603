"""diffusers' guiders in the pipelines of many families, and as the trainer's teacher."""

import json
from itertools import combinations

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from safetensors.torch import load_file

from noiserefine import draw_noise
from noiserefine.denoiser import ForwardCounter, can_guide, denoiser
from noiserefine.guidance import check_guidance, sample_latents
from noiserefine.guiders import GUIDERS, EveryKth, forwards_of
from noiserefine.noise import encode_prompt
from tests.conftest import ROOT, output
from tests.families import FAMILIES, pipeline
from tests.test_families import PROMPTS, STEPS, noise
from train import train_refiner
from train.experiments.denoiser_lora import read_targets
from train.options import parse, plan

REFUSED = {  # what their pipelines do with two predictions, no guider replaces
    "lumina2": "a way of its own",
    "qwen_image": "a way of its own",
    "z_image": "hands its network a list",
}
SCALE = 3.0
RUN = (
    "--preset emoji --validation_prompts= --num_targets 8 --target_steps 2 --steps 2 "
    "--batch_size 8 --epochs 1 --warmup_steps 0 --mixed_precision no "
    f"--prompts {ROOT}/assets/prompts/emoji.txt"
).split()


def latents(pipe, x, embeds, **guidance):
    with ForwardCounter().watch(denoiser(pipe)) as counter:
        x0 = sample_latents(pipe, x, embeds, STEPS, **guidance)
    return x0, counter.count // len(x)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_guider_takes_the_place_of_any_pipelines_guidance(name):
    """In all steps it is the pipeline's own, bit for bit, in none it is unguided, in some it
    costs what it makes; a guider that combines otherwise is followed to rounding.
    """
    pipe = pipeline(name)
    guider = ClassifierFreeGuidance(guidance_scale=SCALE)
    if not can_guide(pipe) or name in REFUSED:
        says = REFUSED.get(name, "offers no classifier-free guidance")
        with pytest.raises(ValueError, match=says):
            check_guidance(pipe, SCALE, guider=guider)
        return
    x, embeds = noise(pipe), encode_prompt(pipe, PROMPTS)
    guided, cost = latents(pipe, x, embeds, guidance_scale=SCALE)
    always, always_cost = latents(pipe, x, embeds, guider=guider)
    assert torch.equal(always, guided) and always_cost == cost

    class Reordered(AdaptiveProjectedGuidance):
        """The same sum, which the network has to be made to return."""

        def forward(self, pred_cond, pred_uncond=None):
            return ClassifierFreeGuidance.forward(self, pred_cond, pred_uncond)

        _is_cfg_enabled = AdaptiveProjectedGuidance._is_apg_enabled

    same, _ = latents(pipe, x, embeds, guider=Reordered(guidance_scale=SCALE))
    torch.testing.assert_close(same, guided, rtol=0, atol=1e-3 * float(guided.std()))

    unguided, least = latents(pipe, x, embeds)
    never = ClassifierFreeGuidance(guidance_scale=SCALE, stop=0.0)
    none, none_cost = latents(pipe, x, embeds, guider=never)
    if least == STEPS:  # a sampler of one forward a step
        assert none_cost == least == forwards_of(never, STEPS)
        torch.testing.assert_close(none, unguided, rtol=0, atol=1e-3 * float(unguided.std()))
        some, some_cost = latents(pipe, x, embeds, guider=EveryKth(SCALE, 2))
        assert some_cost == forwards_of(EveryKth(SCALE, 2), STEPS) == STEPS + 2
        assert not torch.equal(some, guided) and not torch.equal(some, unguided)


def test_named_guiders_change_the_image_in_their_own_ways(pipe):
    """And leave the pipeline as it was found."""
    before, x = output(pipe), draw_noise(pipe, 0, 2)
    embeds = encode_prompt(pipe, ["a red apple on a blue background", "sushi"])
    made = [latents(pipe, x, embeds, guidance_scale=SCALE)]
    made += [latents(pipe, x, embeds, guider=GUIDERS[name](SCALE)) for name in ("interval", "apg")]
    made += [latents(pipe, x, embeds, guider=GUIDERS["rescale"](SCALE))]
    assert [cost for _, cost in made] == [2 * STEPS, STEPS + 2, 2 * STEPS, 2 * STEPS]
    assert all(not torch.equal(a, b) for (a, _), (b, _) in combinations(made, 2))
    assert made[3][0].std() < made[0][0].std(), "rescaling lowers the contrast"
    assert torch.equal(output(pipe), before)
    for refused, says in (
        ({"guider": GUIDERS["rescale"](SCALE), "pag_scale": 2.0}, "leave pag_scale at 0"),
        ({"guider": GUIDERS["apg"](1.0)}, "guides nothing"),
    ):
        with pytest.raises(ValueError, match=says):
            sample_latents(pipe, x, embeds, STEPS, **refused)


def test_a_guider_teaches(tmp_path, tiny_folder):
    """Its name is kept with the refiner, its targets are others, and no other run's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = [*RUN, "--backbone", str(tiny_folder)]
    interval, cfg = tmp_path / "interval", tmp_path / "cfg"
    train_refiner.main([*run, "--teacher", "interval", "--output_dir", str(interval)])
    config = json.loads((interval / "refiner.json").read_text())["training"]
    assert config["teacher"] == "interval" and config["guidance_scale"] == 2
    train_refiner.main([*run, "--output_dir", str(cfg)])
    taught, usual = (
        load_file(next((folder / "targets").iterdir()))["x0"] for folder in (interval, cfg)
    )
    assert not torch.equal(taught, usual)
    cost = plan(parse([*run, "--teacher", "interval", "--output_dir", "x"]))[1]["targets"]
    assert cost == 8 * (2 + 1), "one of two steps is guided"
    with pytest.raises(ValueError, match="teacher was 'interval', now 'cfg'"):
        train_refiner.main([*run, "--targets_of", str(interval), "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="another --teacher"):
        read_targets(interval)
    for options, says in (
        (["--teacher", "magic"], "no teacher 'magic'"),
        (["--teacher", "apg", "--pag_scale", "3"], "takes the place of other guidance"),
    ):
        with pytest.raises(ValueError, match=says):
            parse([*run, *options, "--output_dir", "x"])
