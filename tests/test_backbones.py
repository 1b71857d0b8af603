"""The big models' families without their weights: small pipelines with their blocks and conditioning, full-size UNets without data."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EMOJI, EMOJI_REFINER, output, perturbed
from diffusers import (
    DiffusionPipeline,
    EDMEulerScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from single_file import single_file
from transformers import CLIPTextConfig

from noiserefine import Refiner, draw_noise
from noiserefine.analysis.compare import compare
from noiserefine.analysis.recipe import Maker, Recipe
from noiserefine.models import loading as backbones
from noiserefine.models.loading import (
    BACKBONES,
    add_lora,
    check_weights,
    family_of,
    load_pipeline,
    refiner_for,
    training_command,
)
from noiserefine.models.offload import offload
from noiserefine.noise import encode_prompt
from noiserefine.refiner import RefinerConfig, with_lora
from noiserefine.samplers import SAMPLERS, make_scheduler, with_sampler
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
        twin = with_lora(unet, RefinerConfig(rank, rank, "epsilon", {}, "", []))
    assert sum(isinstance(layer, LoraLayer) for layer in twin.modules()) == layers
    assert sum(
        p.numel() for name, p in twin.named_parameters() if "lora_" in name
    ) / 1e6 == pytest.approx(millions, abs=0.06)
    assert not any(isinstance(layer, LoraLayer) for layer in unet.modules())


def test_every_family_refines(family, tmp_path):
    """Identity at the start, one forward, base untouched, exact after saving, at other sizes and in batches."""
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
    """Refined noise has unit variance; the pipeline alone multiplies it by init_noise_sigma (14.6 for Euler)."""
    pipe, x_T, seen = with_sampler(family, sampler), draw_noise(family, 0), []
    handle = family.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pipe(PROMPT, latents=x_T, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    handle.remove()
    assert seen[0].std().item() == pytest.approx(x_T.std().item(), rel=0.01)
    spacing = "trailing" if family.name_or_path.startswith("sd-turbo") else "leading"
    assert pipe.scheduler.config.timestep_spacing == spacing
    assert pipe.scheduler.config.prediction_type == family.scheduler.config.prediction_type


def test_turbo_starts_at_the_last_timestep():
    scheduler = make_scheduler("Euler", random_pipeline("sd-turbo", small=True))
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]


def test_unknown_architecture():
    with pytest.raises(ValueError, match="no architecture 'sd3'"):
        random_pipeline("sd3")


def test_the_guidance_scale_is_an_input(family, tmp_path):
    """Zero-initialised, in the refining pass only, exact after saving; refused outside of its range."""
    before, x_T = output(family), draw_noise(family, 0, 2)
    refiner = perturbed(family, guidance_scale_range=[1, 8])
    assert torch.equal(
        refiner(x_T, PROMPT, guidance_scale=2.0), refiner(x_T, PROMPT, guidance_scale=7.0)
    )
    torch.nn.init.normal_(refiner.unet.time_embedding.cond_proj.weight)
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
def test_sequential_offload_empties_the_device(merge, tmp_path):
    """It computes on accelerators only; here it is checked that no weight stays and none is lost."""
    torch.manual_seed(0)
    pipe = random_pipeline("sd21", small=True)
    perturbed(pipe).save_pretrained(tmp_path)
    refiner = Refiner.from_pretrained(tmp_path, pipe, merge=merge)
    offload(pipe, refiner, "sequential", "cpu")
    for unet in (pipe.unet, refiner.unet):
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
        for unet in (pipe.unet, refiner.unet)
    ]
    again = dict(compare(make, replace(recipe, strength=0.5)))
    for handle in handles:
        handle.remove()
    assert len(count) == 3, "the refining pass and two steps"
    assert again["guided"] is first["guided"] and not np.array_equal(
        again["refined"].latents, first["refined"].latents
    )


def lora_file(path, pipe, rename=None):
    """A user's LoRA for the pipeline, its layers' names changed by rename."""
    refiner = perturbed(pipe)
    refiner.save_pretrained(path.parent)
    state = load_file(path.parent / "pytorch_lora_weights.safetensors")
    save_file({rename(name) if rename else name: tensor for name, tensor in state.items()}, path)
    return str(path)


def test_a_users_lora(tmp_path):
    pipe = load_pipeline(EMOJI, "cpu")
    before = output(pipe)
    path = lora_file(tmp_path / "style.safetensors", pipe)
    assert add_lora(pipe, path) == ""
    pipe.set_adapters(["style"], [0.7])
    styled = output(pipe)
    assert not torch.equal(styled, before)
    refiner = Refiner.from_pretrained(EMOJI_REFINER, pipe)
    refiner(draw_noise(pipe, 0), PROMPT)
    assert torch.equal(output(pipe), styled)


@pytest.mark.parametrize(
    "rename, error, says",
    [
        (
            lambda name: name.replace("unet.", "unet.other."),
            ValueError,
            "another model or is damaged|matches no layer",
        ),
        (lambda name: "model." + name, ValueError, "another model or is damaged|matches no layer"),
    ],
)
def test_a_lora_of_another_model(tmp_path, rename, error, says):
    pipe = load_pipeline(EMOJI, "cpu")
    before = output(pipe)
    with pytest.raises(error, match=says):
        add_lora(pipe, lora_file(tmp_path / "style.safetensors", pipe, rename))
    assert torch.equal(output(pipe), before)


def test_a_lora_that_fits_some_layers(tmp_path):
    pipe = load_pipeline(EMOJI, "cpu")
    path = lora_file(
        tmp_path / "style.safetensors", pipe, lambda name: name.replace("mid_block", "middle_block")
    )
    assert "layers; the others belong to another model" in add_lora(pipe, path)


def test_a_lora_of_other_shapes_or_none(tmp_path, sdxl):
    pipe = load_pipeline(EMOJI, "cpu")
    before = output(pipe)
    with pytest.raises(ValueError, match="belongs to another"):
        add_lora(pipe, lora_file(tmp_path / "style.safetensors", sdxl))
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        add_lora(pipe, str(tmp_path / "nothing.safetensors"))
    (tmp_path / "text.safetensors").write_text("no tensors here, only words")
    with pytest.raises(ValueError, match="damaged"):
        add_lora(pipe, str(tmp_path / "text.safetensors"))
    assert torch.equal(output(pipe), before)


UNET_KEY, FIRST = (
    "model.diffusion_model.input_blocks." + name
    for name in ("2.1.transformer_blocks.0.attn2.to_k.weight", "0.0.weight")
)


def checkpoint(path, tensors, metadata=None):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(
    "tensors, says",
    [
        ({UNET_KEY: (4, 768), FIRST: (8, 4, 3, 3)}, "of Stable Diffusion 1"),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "another family"),
        ({UNET_KEY: (4, 1024), FIRST: (8, 9, 3, 3)}, "another family"),
        ({UNET_KEY: (4, 2048), FIRST: (8, 4, 3, 3), "v_pred": (1,)}, "another family"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 4)}, "is a LoRA"),
        ({UNET_KEY: (4, 1024), FIRST: (8, 4, 3, 3)}, "doesn't say whether it predicts v"),
    ],
)
def test_single_files_of_other_families(tmp_path, tensors, says):
    with pytest.raises(ValueError, match=says):
        load_pipeline(str(checkpoint(tmp_path / "model.safetensors", tensors)), "cpu")


@pytest.mark.parametrize(
    "width, architecture, family",
    [
        (1024, "stable-diffusion-v2-768-v", "sd21"),
        (1024, "stable-diffusion-v2-512", "sd21-base"),
        (2048, "", "sdxl"),
    ],
)
def test_single_files(tmp_path, width, architecture, family):
    path = checkpoint(
        tmp_path / "model.safetensors",
        {UNET_KEY: (4, width), FIRST: (8, 4, 3, 3)},
        {"modelspec.architecture": architecture, "optimizer": "adam_epsilon 1e-8"},
    )
    assert family_of(path) == family
    with pytest.raises(
        FileNotFoundError, match=f"configuration of {BACKBONES[family].source}"
    ):  # there is no hub here
        load_pipeline(str(path), "cpu")
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="damaged"):
        load_pipeline(str(path), "cpu")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_pipeline(str(tmp_path / "nothing.safetensors"), "cpu")


def of_original_width(name):
    """A small pipeline with the text encoders' real widths, by which a checkpoint's family is told."""
    torch.manual_seed(0)
    pipe = random_pipeline(name, small=True)
    widths = (
        {"text_encoder": 768, "text_encoder_2": 1280} if name == "sdxl" else {"text_encoder": 1024}
    )
    for part, width in widths.items():
        config = CLIPTextConfig(
            vocab_size=len(pipe.tokenizer),
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            projection_dim=width,
            max_position_embeddings=77,
            eos_token_id=pipe.tokenizer.eos_token_id,
        )
        setattr(pipe, part, type(getattr(pipe, part))(config).eval())
        pipe.register_to_config(**{part: ("transformers", type(getattr(pipe, part)).__name__)})
    added = {"projection_class_embeddings_input_dim": 6 * 8 + 1280} if name == "sdxl" else {}
    pipe.unet = UNet2DConditionModel.from_config(
        pipe.unet.config, cross_attention_dim=sum(widths.values()), **added
    ).eval()
    return pipe


@pytest.mark.parametrize(
    "name, architecture",
    [("sd21", "stable-diffusion-v2-768-v"), ("sd21-base", "stable-diffusion-v2-512"), ("sdxl", "")],
)
def test_a_single_file_is_the_model_it_holds(tmp_path, monkeypatch, name, architecture):
    """A fine-tune in one file, with the names of the original code, makes the images that its parts in a folder make, and takes a refiner."""
    pipe = of_original_width(name)
    pipe.save_pretrained(tmp_path / "base")
    path = tmp_path / "fine-tune.safetensors"
    save_file(
        {key: value.contiguous().clone() for key, value in single_file(pipe).items()},
        path,
        {"modelspec.architecture": architecture},
    )
    monkeypatch.setattr(
        DiffusionPipeline,
        "download",
        lambda source, **_: str(tmp_path / "base") if source == BACKBONES[name].source else None,
    )
    loaded = load_pipeline(str(path), "cpu")
    assert loaded.scheduler.config.prediction_type == BACKBONES[name].prediction_type
    x_T = draw_noise(pipe, 0)
    images = [
        p(PROMPT, latents=x_T, num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
        for p in (pipe, loaded)
    ]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)
    perturbed(pipe).save_pretrained(tmp_path / "refiner")
    assert Refiner.from_pretrained(tmp_path / "refiner", loaded).note == ""


@pytest.mark.parametrize(
    "damage, says",
    [
        (
            lambda folder: edit(folder / "model_index.json", _class_name="FluxPipeline"),
            "is a FluxPipeline",
        ),
        (
            lambda folder: edit(
                folder / "unet" / "diffusion_pytorch_model.safetensors.index.json",
                weight_map={"conv_in.weight": "weights.bin"},
            ),
            "no safetensors",
        ),
        (
            lambda folder: edit(
                folder / "unet" / "diffusion_pytorch_model.safetensors.index.json",
                weight_map={"a": "../../a.safetensors"},
            ),
            "no safetensors",
        ),
        (
            lambda folder: edit(
                folder / "text_encoder" / "config.json", transformers_weights="adapter_model.bin"
            ),
            "weight files of its own",
        ),
        (
            lambda folder: EDMEulerScheduler().save_pretrained(folder / "scheduler"),
            "noise schedule of EDMEulerScheduler",
        ),
        (
            lambda folder: edit(folder / "unet" / "config.json", in_channels=9),
            "incomplete or damaged|takes 9 channels",
        ),
    ],
)
def test_folders_that_are_refused(tmp_path, damage, says):
    folder = tmp_path / "model"
    shutil.copytree(EMOJI, folder)
    damage(folder)
    with pytest.raises(ValueError, match=says):
        load_pipeline(str(folder), "cpu")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_catalogue_is_true():
    """What it says of a model, against the model's architecture."""
    for name in KNOWN:
        backbone, pipe = BACKBONES[name], random_pipeline(name, small=True)
        assert (
            backbone.prediction_type == pipe.scheduler.config.prediction_type
            and backbone.size == 8 * UNETS[name]["sample_size"]
        )
        assert (backbone.family == "sdxl") == ("addition_embed_type" in UNETS[name])


@pytest.mark.parametrize("name", [name for name, backbone in BACKBONES.items() if backbone.lora])
def test_the_embedded_models_relatives(pipe, name):
    """LoRAs of this repository, folded in: other images than the base's, without any adapter, and the base's refiner for them."""
    backbone, loaded = BACKBONES[name], load_pipeline(name, "cpu")
    assert not torch.equal(output(loaded), output(pipe)) and not any(
        isinstance(layer, LoraLayer) for layer in loaded.unet.modules()
    )
    with pytest.warns(UserWarning, match="is not assets/emoji|is not .*emoji, which"):
        refiner = Refiner.from_pretrained(refiner_for(loaded, backbone), loaded)
    guided = backbone.guidance_scale is not None
    samples = dict(
        compare(
            Maker(loaded, refiner),
            Recipe(
                PROMPT, 0, backbone.steps, backbone.sampler, backbone.guidance_scale or 1.0, 1.0
            ),
            guided,
        )
    )
    assert len(samples) == 2 + guided and samples["refined"].forwards == backbone.steps + 1
    if backbone.timestep_spacing:
        scheduler = make_scheduler(backbone.sampler, loaded)
        scheduler.set_timesteps(1)
        assert scheduler.timesteps[0] == 999, "one step starts at pure noise"


def test_the_command_that_trains(family):
    name = family.name_or_path.split()[0]
    command = training_command(family, BACKBONES[name].source, BACKBONES[name])
    assert ("--preset sdxl" in command) == (name == "sdxl")
    assert "sd-turbo" not in command, (
        "Turbo takes the refiner of 2.1 base, which is trained on 2.1 base"
    )
    assert "--backbone somebody/tune" in training_command(family, "somebody/tune", None)


def test_a_mirror_with_other_weights_is_refused(monkeypatch):
    backbone = BACKBONES["sd21"]

    def serve(hashes):
        files = [
            SimpleNamespace(rfilename=name, lfs=SimpleNamespace(sha256=value))
            for name, value in hashes.items()
        ]
        monkeypatch.setattr(
            backbones.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files)
        )

    serve(backbone.sha256)
    check_weights(backbone.source, backbone)
    serve(backbone.sha256 | {"unet/diffusion_pytorch_model.safetensors": "0" * 64})
    monkeypatch.setattr(
        backbones.DiffusionPipeline,
        "load_config",
        lambda *_, **__: {"_class_name": "StableDiffusionPipeline"},
    )
    with pytest.raises(ValueError, match="not the original's 1238522"):
        load_pipeline(backbone.source, "cpu")


RESPONSE = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    "error",
    [
        RepositoryNotFoundError("401", response=RESPONSE),
        GatedRepoError("401", response=RESPONSE),
        httpx.ConnectError("no route"),
        httpx.ConnectTimeout("too long"),
    ],
)
def test_the_hub_says_no(monkeypatch, error):
    """An id that does not exist, one that asks for a login, and no network."""

    def refuse(*_, **__):
        raise error

    for kind, name in (
        (backbones.DiffusionPipeline, "load_config"),
        (backbones.HfApi, "model_info"),
        (StableDiffusionPipeline, "lora_state_dict"),
    ):
        monkeypatch.setattr(kind, name, refuse)
    with pytest.raises(FileNotFoundError, match="a wrong id, or a model that asks for a login"):
        load_pipeline("somebody/something", "cpu")
    check_weights(BACKBONES["sd21"].source, BACKBONES["sd21"])  # what is cached can still be loaded
    with pytest.raises(FileNotFoundError, match="no LoRA at somebody/style"):
        add_lora(random_pipeline("sd21", small=True), "somebody/style")


def test_a_fine_tune_takes_its_bases_refiner(pipe, sdxl, tmp_path):
    folder = tmp_path / "fine-tune"
    shutil.copytree(EMOJI, folder)
    assert refiner_for(load_pipeline(str(folder), "cpu"), None) == BACKBONES["emoji"].refiner
    assert (
        refiner_for(sdxl, None) is None and refiner_for(pipe, BACKBONES["emoji"]) == EMOJI_REFINER
    )
    assert refiner_for(pipe, BACKBONES["sdxl"]) is None


def test_conditioning_of_two_text_encoders():
    """SDXL's pooled embeddings and time ids reach the refining pass as they reach the base's first step."""
    torch.manual_seed(0)
    pipe, seen = random_pipeline("sdxl", small=True), []
    refiner = perturbed(pipe)
    handles = [
        unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        for unet in (pipe.unet, refiner.unet)
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
