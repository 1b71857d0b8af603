"""The models in memory: what is loaded again, what is exchanged, and what a wrong name costs."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from noiserefine.models import pool as module
from noiserefine.models.catalogue import BACKBONES, Model, backbone_of
from noiserefine.models.pool import Models
from noiserefine.models.usage import usage_by_name, usage_of
from tests import families
from tests.conftest import EMOJI, EMOJI_REFINER, output, perturbed
from train.tools.architectures import random_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small SD2.1 base with two refiners and two LoRAs."""
    torch.manual_seed(0)
    pipe, folder = random_pipeline("sd21-base", small=True), tmp_path_factory.mktemp("models")
    pipe.save_pretrained(folder / "base")
    for i, name in enumerate(("refiner", "other-refiner")):
        perturbed(pipe, rank=8 + i).save_pretrained(folder / name)
    for seed, name in enumerate(("style", "other-lcm")):
        generator = torch.Generator().manual_seed(seed)
        state = {
            f"unet.{layer}.{part}.weight": 0.2 * torch.randn(shape, generator=generator)
            for layer, linear in pipe.unet.named_modules()
            if layer.endswith("to_q")
            for part, shape in (
                ("lora_A", (4, linear.in_features)),
                ("lora_B", (linear.out_features, 4)),
            )
        }
        save_file(state, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def loads(monkeypatch):
    """The names that were loaded from files, in order."""
    names = []

    def counted(name, *args, **kwargs):
        names.append(name)
        return load(name, *args, **kwargs)

    load = module.load_pipeline
    monkeypatch.setattr(module, "load_pipeline", counted)
    return names


def test_lora_and_refiner_are_exchanged_on_the_loaded_pipeline(folder, loads):
    models, base = Models(), str(folder / "base")
    plain = models.get(Model(base))
    pipe, before, scheduler = plain.pipe, output(plain.pipe), plain.pipe.scheduler
    assert plain.refiner is None and "This trains one" in plain.notes

    styled = models.get(Model(base, lora=str(folder / "style.safetensors")))
    in_style = output(pipe)
    assert styled.pipe is pipe and not torch.equal(in_style, before)

    both = models.get(
        Model(base, str(folder / "refiner"), str(folder / "style.safetensors"), lora_weight=-0.5)
    )
    assert both.pipe is pipe and both.refiner.config.rank == 8 and "trains one" not in both.notes
    assert not torch.equal(output(pipe), in_style)

    few = models.get(
        Model(base, str(folder / "other-refiner"), str(folder / "other-lcm.safetensors"))
    )
    assert few.refiner.config.rank == 9 and "few steps" in few.notes
    assert type(pipe.scheduler).__name__ == "LCMScheduler"

    again = models.get(Model(base))
    assert again.pipe is pipe and pipe.scheduler is scheduler and again.refiner is None
    assert "few steps" not in again.notes and torch.equal(output(pipe), before)
    assert loads == [base]


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"lora": "nonsense"}, "no LoRA at nonsense"),
        ({"lora": EMOJI_REFINER}, "is a refiner"),
        ({"refiner": "nonsense"}, "no refiner at nonsense"),
        ({"refiner": "assets/loras/emoji-clay"}, "no refiner.json"),
        ({"backbone": "nonsense"}, "no folder or file here"),
        ({"backbone": "old.ckpt"}, "is a pickle"),
        ({"backbone": "assets/emoji/unet"}, "The pipeline is the folder above"),
    ],
)
def test_a_wrong_name_costs_nothing_that_is_loaded(folder, loads, wrong, says):
    models, base = Models(), Model(str(folder / "base"))
    pipe = models.get(base).pipe
    values = {"backbone": base.backbone, "refiner": "", "lora": ""} | wrong
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        models.get(Model(**values))
    assert models.get(base).pipe is pipe and loads == [base.backbone]


def test_a_lora_that_does_not_fit_leaves_the_plain_model(folder, loads, tmp_path):
    models, base = Models(), str(folder / "base")
    pipe = models.get(Model(base, lora=str(folder / "style.safetensors"))).pipe
    other = tmp_path / "other.safetensors"
    save_file({f"unet.nowhere.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}, other)
    with pytest.raises(ValueError, match="matches no layer"):
        models.get(Model(base, lora=str(other)))
    assert models.get(Model(base)).pipe is pipe
    assert not hasattr(pipe.unet, "peft_config") and loads == [base]


@pytest.mark.parametrize("name", ["sdxl", BACKBONES["sdxl"].source])
def test_a_card_that_is_too_small_is_said_before_loading(monkeypatch, loads, name):
    card = SimpleNamespace(total_memory=2**30)
    monkeypatch.setattr(module, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    with pytest.raises(ValueError, match="needs about 10 GiB.*--offload model"):
        Models().load(Model(name))
    assert not loads


def test_the_embedded_model_stays(folder, loads):
    models = Models()
    embedded = models.get(Model("emoji"))
    models.get(Model(str(folder / "base")))
    styled = models.get(Model("emoji", lora="assets/loras/emoji-clay"))
    assert styled.pipe is not embedded.pipe and models.get(Model("emoji")) is embedded
    assert not models.find(Model(str(folder / "base"))), "one other model at a time"


def test_where_the_sliders_start(pipe, sdxl, folder):
    """Of the catalogue's entry, else of the family, else as the pipeline's own call has it."""
    emoji = usage_of(pipe, backbone_of("emoji"))
    assert (emoji.guidance_scale, emoji.steps, emoji.sampler) == (2.0, 20, "DDIM")
    assert usage_of(pipe, None).guidance_scale == 7.0
    assert usage_of(sdxl, None).title == "Stable Diffusion XL"

    for name in ("emoji:v", "assets/emoji", "assets/emoji:v", EMOJI):
        assert usage_by_name(name) == BACKBONES["emoji"].usage
    assert usage_by_name(f"{folder / 'base'}:v").guidance_scale == 7.0
    assert Models().load(Model("assets/emoji:v")).usage.guidance_scale == 2.0

    usage = usage_of(families.pipeline("cogview4"), None)
    assert (usage.title, usage.guidance_scale, usage.steps) == ("CogView4", 5.0, 50)
    assert usage_of(families.pipeline("lcm"), None).guidance_scale is None
