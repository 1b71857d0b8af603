"""Folders, hub ids and names as people have them: what loads, and what is refused why."""

import copy
import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from noiserefine.analysis.compare import compare
from noiserefine.analysis.recipe import Maker, Recipe
from noiserefine.checkpoint import prediction_type
from noiserefine.denoiser import with_parts
from noiserefine.guidance import sample_latents
from noiserefine.models import folder as layout
from noiserefine.models import sources
from noiserefine.models.catalogue import BACKBONES, FAMILIES, table
from noiserefine.models.devices import default_dtype
from noiserefine.models.folder import check_weights
from noiserefine.models.loading import check_source, load_pipeline
from noiserefine.models.prediction_check import shown_prediction
from noiserefine.models.refiners import refiner_for, training_command
from noiserefine.models.sources import read_name
from noiserefine.models.usage import usage_of
from noiserefine.models.user_lora import add_lora
from noiserefine.noise import check_prompt_length, draw_noise, encode_prompt, image_size
from noiserefine.refiner import Refiner
from noiserefine.samplers import SAMPLERS, samplers_of, with_sampler
from tests import families
from tests.conftest import EMOJI, EMOJI_REFINER, output
from train.tools.architectures import UNETS, random_pipeline

PROMPT = "a red apple on a blue background"


# Names


@pytest.mark.parametrize(
    "typed, name",
    [
        (' "a folder/model" ', "a folder/model"),
        ("‘a/b’", "a/b"),
        ("file:///a/b/", "/a/b"),
        ("/a/b/model_index.json", "/a/b"),
        ("https://huggingface.co/somebody/model", "somebody/model"),
        ("https://huggingface.co/somebody/model/", "somebody/model"),
        ("https://hf.co/somebody/model/tree/main", "somebody/model"),
        ("https://huggingface.co/a/b/blob/main/c/d.safetensors?x=1", "a/b/c/d.safetensors"),
        ("https://huggingface.co/a/b/resolve/main/d.safetensors", "a/b/d.safetensors"),
        ("C:\\models\\sdxl.safetensors", "C:\\models\\sdxl.safetensors"),
    ],
)
def test_names_as_people_type_them(typed, name):
    assert read_name(typed) == name


def test_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_name("~/model") == f"{tmp_path}/model"


@pytest.mark.parametrize(
    "typed, says",
    [
        ("/a/old.ckpt", "is a pickle, which can run code"),
        ("model.PT", "is a pickle"),
        ("https://civitai.com/api/download/models/1", "is a web address"),
        ("https://huggingface.co/a/b/discussions/3", "is no page of a model"),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F1", "names the revision"),
        ("<lora:style:1>", "syntax of another program"),
    ],
)
def test_names_that_are_refused(typed, says):
    with pytest.raises(ValueError, match=says):
        read_name(typed)
    with pytest.raises(ValueError, match=says):
        load_pipeline(typed, "cpu")


# Folders


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small healthy pipeline of SD2.1 base in a folder, and what it makes."""
    torch.manual_seed(0)
    pipe, folder = random_pipeline("sd21-base", small=True), tmp_path_factory.mktemp("sound")
    pipe.save_pretrained(folder)
    return folder, output(pipe)


def edit(path, drop=(), **values):
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in old.items() if k not in drop} | values))


def variant(folder, name="fp16", only=""):
    for weights in folder.glob(f"{only or '*'}/*.safetensors"):
        weights.rename(weights.with_suffix(f".{name}.safetensors"))


def pickles_beside(folder):
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.bin"}}
    name = "diffusion_pytorch_model"
    (folder / "unet" / f"{name}.bin.index.json").write_text(json.dumps(index))
    (folder / "unet" / f"{name}-00001-of-00002.bin").write_bytes(b"x")


def pickles_only(folder):
    for weights in folder.glob("unet/*.safetensors"):
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()


def without_a_weight(part):
    def remove(folder):
        (weights,) = (folder / part).glob("*.safetensors")
        state = load_file(weights)
        del state[max(state)]
        save_file(state, weights, {"format": "pt"})

    return remove


MODEL_INDEX, UNET = "model_index.json", "unet/config.json"
ODD = {
    "fp16 files only": variant,
    "bf16 files only": lambda f: variant(f, "bf16"),
    "fp16 file of the UNet only": lambda f: variant(f, only="unet"),
    "pickles beside safetensors": pickles_beside,
    "sample_size as a list": lambda f: edit(f / UNET, sample_size=[16, 16]),
    "no sample_size": lambda f: edit(f / UNET, sample_size=None),
    "image-to-image": lambda f: edit(f / MODEL_INDEX, _class_name="StableDiffusionImg2ImgPipeline"),
    "class name as a list": lambda f: edit(
        f / MODEL_INDEX, _class_name=["code", "StableDiffusionPipeline"]
    ),
    "no safety checker": lambda f: edit(
        f / MODEL_INDEX, ["safety_checker", "feature_extractor", "requires_safety_checker"]
    ),
}


@pytest.mark.parametrize("oddity", ODD)
def test_odd_folders_load_as_what_they_are(sound, tmp_path, oddity):
    folder, expected = sound
    shutil.copytree(folder, tmp_path / "odd")
    ODD[oddity](tmp_path / "odd")
    pipe = load_pipeline(str(tmp_path / "odd"), "cpu")
    assert torch.equal(output(pipe), expected) and image_size(pipe) == (128, 128)


def test_a_tokenizer_without_a_length_has_its_text_encoders(sound, tmp_path):
    shutil.copytree(sound[0], tmp_path / "odd")
    edit(tmp_path / "odd/tokenizer/tokenizer_config.json", ["model_max_length"])
    pipe = load_pipeline(str(tmp_path / "odd"), "cpu")
    assert output(pipe).isfinite().all()
    with pytest.raises(ValueError, match="this model reads 77"):
        check_prompt_length(pipe, "apple " * 90)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_beta_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_lu_lambdas": True},
        {"variance_type": "learned_range"},
        {"use_karras_sigmas": True},
    ],
)
def test_odd_schedules_sample(sound, tmp_path, settings):
    """Settings of another sampler do not reach the samplers that they do not fit."""
    folder = tmp_path / "odd"
    shutil.copytree(sound[0], folder)
    edit(
        folder / "scheduler/scheduler_config.json",
        _class_name="DPMSolverMultistepScheduler",
        **settings,
    )
    pipe = load_pipeline(str(folder), "cpu")
    for name in SAMPLERS:
        images = with_sampler(pipe, name)(
            PROMPT, num_inference_steps=3, guidance_scale=1.0, output_type="latent"
        ).images
        assert images.shape[1] == 4 and images.isfinite().all()


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: edit(f / MODEL_INDEX, _class_name="MyPipeline"), "is a MyPipeline, a pipeline"),
        (
            lambda f: edit(f / MODEL_INDEX, _class_name=["my", "Mine"]),
            "code lies in the repository",
        ),
        (lambda f: edit(f / MODEL_INDEX, ["_class_name"]), "names no pipeline class"),
        (lambda f: edit(f / MODEL_INDEX, text_encoder=[None, None]), "gives no text_encoder"),
        (lambda f: edit(f / MODEL_INDEX, vae=[None, None]), "gives no vae"),
        (lambda f: edit(f / MODEL_INDEX, scheduler=[None, None]), "gives no scheduler"),
        (lambda f: edit(f / MODEL_INDEX, tokenizer=[None, None]), "gives no tokenizer"),
        (lambda f: shutil.rmtree(f / "scheduler"), "incomplete or damaged"),
        (lambda f: (f / UNET).write_text("[]"), "unet/config.json is no JSON object"),
        (lambda f: (f / MODEL_INDEX).write_text("[]"), "model_index.json is no JSON object"),
        (lambda f: (f / MODEL_INDEX).write_text("\ufeff{}"), "byte-order mark"),
        (lambda f: (f / MODEL_INDEX).unlink(), "holds no model_index.json"),
        (pickles_only, "has its unet as a pickle"),
        (without_a_weight("unet"), "unet lacks its weights"),
        (without_a_weight("vae"), "vae lacks its weights"),
        (without_a_weight("text_encoder"), "text_encoder lacks its weights"),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"conv_in.weight": "weights.bin"}})
            ),
            "no safetensors",
        ),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "../../a.safetensors"}})
            ),
            "no safetensors",
        ),
        (
            lambda f: edit(f / "text_encoder/config.json", transformers_weights="model.bin"),
            "weight files of its own",
        ),
        (lambda f: edit(f / UNET, in_channels=9), "incomplete or damaged|takes 9 channels"),
    ],
)
def test_folders_that_are_refused(sound, tmp_path, damage, says):
    folder = tmp_path / "model"
    shutil.copytree(sound[0], folder)
    damage(folder)
    with pytest.raises(ValueError, match=says) as refusal:
        load_pipeline(str(folder), "cpu")
    assert str(refusal.value).endswith((".", ").")) and "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory):
    """The embedded model, which predicts v, in a folder that says epsilon."""
    folder = tmp_path_factory.mktemp("forgotten") / "model"
    shutil.copytree(EMOJI, folder)
    edit(folder / "scheduler/scheduler_config.json", prediction_type="epsilon")
    return str(folder)


def test_a_forgotten_prediction_is_noticed(forgotten, pipe):
    with pytest.raises(ValueError, match=f"its network predicts “v_prediction”.*{forgotten}:v, or"):
        load_pipeline(forgotten, "cpu")
    assert torch.equal(output(load_pipeline(f"{forgotten}:v", "cpu")), output(pipe))
    insisted = load_pipeline(f"{forgotten}:epsilon", "cpu")
    assert prediction_type(insisted) == "epsilon"


@pytest.mark.parametrize(
    "source, says",
    [
        ("emoji:epsilon", "predicts “v_prediction”: leave “:epsilon” out"),
        ("emoji-flow:v", "predicts “flow_prediction”: leave “:v” out"),
        ("assets/emoji-flow:v", "predicts “flow_prediction”: leave “:v” out"),
    ],
)
def test_predictions_that_a_model_cannot_have(source, says):
    with pytest.raises(ValueError, match=says):
        load_pipeline(source, "cpu")


def test_predictions_that_an_unlisted_model_cannot_have(tmp_path):
    (tmp_path / "flow").symlink_to(f"{EMOJI}-flow")
    with pytest.raises(ValueError, match="predicts neither v nor epsilon"):
        load_pipeline(f"{tmp_path}/flow:v", "cpu")


def test_a_prediction_that_is_no_word(tmp_path):
    """Such a folder loads, as one with an unknown word does; sampling says what is wrong."""
    shutil.copytree(EMOJI, tmp_path / "odd")
    edit(tmp_path / "odd" / "scheduler/scheduler_config.json", prediction_type=[])
    pipe = load_pipeline(str(tmp_path / "odd"), "cpu")
    with pytest.raises(ValueError, match="prediction_type given as .* must be one of"):
        output(pipe)


def test_a_name_of_the_catalogue_may_say_its_prediction():
    check_source("emoji:v")


def test_what_a_network_predicts_shows(pipe, sound):
    """Of trained networks, whatever the configuration says; random ones show neither."""
    assert shown_prediction(pipe) == "v_prediction"
    network = copy.copy(pipe.unet)
    alphas = DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod

    def epsilon(sample, t, *args, **kwargs):
        (v,) = pipe.unet(sample, t, *args, **kwargs | {"return_dict": False})
        return (alphas[t].sqrt() * v + (1 - alphas[t]).sqrt() * sample,)

    network.forward = epsilon
    assert shown_prediction(with_parts(pipe, network)) == "epsilon"
    for stated in ("v", "epsilon"):
        assert shown_prediction(load_pipeline(f"{sound[0]}:{stated}", "cpu")) is None


def test_a_part_of_a_pipeline_is_no_pipeline(sound):
    with pytest.raises(ValueError, match="The pipeline is the folder above"):
        load_pipeline(f"{sound[0]}/unet", "cpu")


# The hub


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
def test_the_hub_says_no(monkeypatch, pipe, error):
    """An id that does not exist, one that asks for a login, and no network."""

    def refuse(*_, **__):
        raise error

    for kind, name in (
        (DiffusionPipeline, "load_config"),
        (layout.HfApi, "model_info"),
        (sources.HfApi, "list_repo_files"),
    ):
        monkeypatch.setattr(kind, name, refuse)
    with pytest.raises(FileNotFoundError, match="a wrong id, or a model that asks for a login"):
        load_pipeline("somebody/something", "cpu")
    with pytest.raises(FileNotFoundError, match="a wrong id, or a model that asks for a login"):
        check_source("https://huggingface.co/somebody/something")
    check_weights(BACKBONES["sd21"].source, BACKBONES["sd21"])  # what is cached can still be loaded
    with pytest.raises(FileNotFoundError, match="no LoRA at somebody/style"):
        add_lora(pipe, "somebody/style")


def test_a_mirror_with_other_weights_is_refused(monkeypatch):
    backbone = BACKBONES["sd21"]

    def serve(hashes):
        files = [
            SimpleNamespace(rfilename=name, lfs=SimpleNamespace(sha256=value))
            for name, value in hashes.items()
        ]
        info = SimpleNamespace(siblings=files)
        monkeypatch.setattr(layout.HfApi, "model_info", lambda *_, **__: info)

    serve(backbone.sha256)
    check_weights(backbone.source, backbone)
    serve(backbone.sha256 | {"unet/diffusion_pytorch_model.safetensors": "0" * 64})
    index = {"_class_name": "StableDiffusionPipeline"}
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: index)
    with pytest.raises(ValueError, match="not the original's 1238522"):
        load_pipeline(backbone.source, "cpu")


@pytest.mark.parametrize(
    "files, half, wanted",
    [
        (["unet/a.safetensors", "unet/a.fp16.safetensors"], True, {"variant": "fp16"}),
        (["unet/a.safetensors", "unet/a.fp16.safetensors"], False, {}),
        (["unet/a.safetensors"], True, {}),
        (
            ["unet/a.bf16.safetensors", "unet/a.bf16-00001-of-00002.safetensors"],
            False,
            {"variant": "bf16"},
        ),
        (
            ["unet/a-00001-of-00002.fp16.safetensors", "vae/a.safetensors"],
            False,
            {"variant": "fp16"},
        ),
        (["unet/a.safetensors", "other/b.fp16.safetensors", "flax_model.msgpack"], True, {}),
        (["unet/a.safetensors", "unet/a.non_ema.safetensors"], True, {}),
        (["unet/a.safetensors", "safety_checker/a.bin"], False, {}),
    ],
)
def test_half_is_downloaded_where_half_is_used(monkeypatch, files, half, wanted):
    monkeypatch.setattr(layout, "hub_files", lambda _: files)
    index = {"_class_name": "X", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}
    index["safety_checker"] = [None, None]  # taken out, and its file left behind
    assert layout._variant("somebody/model", index, prefer=half) == wanted


# The catalogue


def test_the_catalogue_is_true():
    """What it says of a model, against the model's architecture and against diffusers."""
    for name, unet in UNETS.items():
        backbone, pipe = BACKBONES[name], random_pipeline(name, small=True)
        assert backbone.pipeline == type(pipe).__name__
        assert backbone.prediction_type == prediction_type(pipe)
        assert backbone.size == 8 * unet["sample_size"]
    for name in FAMILIES:
        assert name in layout.OURS or hasattr(diffusers, name), name
    for backbone in BACKBONES.values():
        assert backbone.pipeline in FAMILIES
        assert backbone.title in table()


def test_the_precision_is_the_familys():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert default_dtype(cuda, "StableDiffusionXLPipeline") == torch.float16
    assert default_dtype(cuda, "Flux2KleinPipeline") == torch.bfloat16
    assert default_dtype(cuda, "A pipeline of next year") == torch.bfloat16
    assert {default_dtype(cpu, name) for name in FAMILIES} == {torch.float32}


@pytest.mark.parametrize("name", [name for name, backbone in BACKBONES.items() if backbone.lora])
def test_the_embedded_models_relatives(pipe, name):
    """LoRAs of this repository, folded in: other images, no adapter, the base's refiner."""
    backbone, loaded = BACKBONES[name], load_pipeline(name, "cpu")
    assert not torch.equal(output(loaded), output(pipe))
    assert not any(isinstance(layer, LoraLayer) for layer in loaded.unet.modules())
    with pytest.warns(UserWarning, match="is not assets/emoji|is not .*emoji, which"):
        refiner = Refiner.from_pretrained(refiner_for(loaded, backbone), loaded)
    scale = backbone.guidance_scale
    recipe = Recipe(PROMPT, 0, 1, backbone.sampler, scale or 1.0, 1.0)
    samples = dict(compare(Maker(loaded, refiner), recipe, scale is not None))
    assert len(samples) == 2 + (scale is not None)
    assert samples["refined"].forwards == 2


def test_the_command_that_trains(pipe, sdxl):
    def command(name, loaded=pipe):
        return training_command(loaded, BACKBONES[name].source, BACKBONES[name])

    assert "--preset sdxl" in command("sdxl")
    assert "--preset emoji" in command("emoji-clay")
    assert "--preset sd35-medium" in command("sd35-large"), "the nearest that has one"
    for distilled, base in (
        ("sd-turbo", "sd21-base"),
        ("klein-distilled", "klein"),
        ("z-image-turbo", "z-image"),
        ("sd35-large-turbo", "sd35-large"),
    ):
        assert f"--backbone {BACKBONES[base].source} " in command(distilled), "table 5"
    assert "--preset sdxl --quick --backbone somebody/tune" in training_command(
        sdxl, "somebody/tune", None
    )
    tune = training_command(pipe, "my models/a tune", None)
    assert "--preset sd" in tune and "--backbone 'my models/a tune' " in tune


def test_a_fine_tune_takes_its_bases_refiner(pipe, sdxl, tmp_path):
    folder = tmp_path / "fine-tune"
    shutil.copytree(EMOJI, folder)
    assert refiner_for(load_pipeline(str(folder), "cpu"), None) == BACKBONES["emoji"].refiner
    assert refiner_for(sdxl, None) is None
    assert refiner_for(pipe, BACKBONES["emoji"]) == EMOJI_REFINER
    assert refiner_for(pipe, BACKBONES["sdxl"]) is None


# Other families


@pytest.mark.parametrize("name", ["lcm", "pixart_sigma", "sit", "sd3", "z_image"])
def test_a_pipeline_of_any_family_loads_from_its_folder(name, tmp_path):
    """It samples what the pipeline it was saved from samples, and its usage fits it."""
    pipe = families.pipeline(name)
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path), "cpu")
    assert type(loaded).__name__ == type(pipe).__name__
    x_T, prompt = draw_noise(pipe, 0), "3" if name == "sit" else PROMPT
    made = [
        sample_latents(p, x_T, encode_prompt(p, prompt, guided=False), 2) for p in (pipe, loaded)
    ]
    torch.testing.assert_close(*made, rtol=0, atol=1e-4)
    usage = usage_of(loaded, None)
    assert usage.sampler in samplers_of(loaded)
    assert (usage.guidance_scale is None) == (name == "lcm")


@pytest.mark.parametrize(
    "kind, says",
    [
        ("DiTPipeline", "takes no `latents`"),
        ("StableVideoDiffusionPipeline", "makes videos|no `prompt`|`latents`"),
        ("WanPipeline", "makes videos"),
        ("FluxFillPipeline", "changes a given picture"),
        ("MarigoldDepthPipeline", "cannot be refined"),
    ],
)
def test_pipelines_of_other_kinds_are_refused_before_the_download(monkeypatch, kind, says):
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: {"_class_name": kind})
    with pytest.raises(ValueError, match=says):
        load_pipeline("somebody/something", "cpu")
