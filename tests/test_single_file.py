"""Single .safetensors checkpoints: which model one is, and the images it makes."""

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from noiserefine import Refiner, draw_noise
from noiserefine.models.catalogue import BACKBONES
from noiserefine.models.loading import load_pipeline
from noiserefine.models.single_file import Prediction, identify, prediction_of
from noiserefine.models.usage import usage_by_name
from tests.conftest import perturbed
from tests.single_file import single_file
from train.tools.architectures import random_pipeline

PROMPT = "a red apple"
UNET_KEY, FIRST = (
    "model.diffusion_model.input_blocks." + name
    for name in ("2.1.transformer_blocks.0.attn2.to_k.weight", "0.0.weight")
)
SD1, SD2, XL = ({UNET_KEY: (4, width), FIRST: (8, 4, 3, 3)} for width in (768, 1024, 2048))


def checkpoint(folder, tensors, metadata=None, name="model"):
    path = folder / f"{name}.safetensors"
    tensors = {name: torch.zeros(shape) for name, shape in tensors.items()}
    save_file(tensors, path, metadata)
    return path


V, EPSILON = Prediction("v_prediction"), Prediction("epsilon")
V_ZSNR = Prediction("v_prediction", zero_snr=True)


@pytest.mark.parametrize(
    "tensors, metadata, base, prediction",
    [
        (SD1, None, "sd15", EPSILON),
        (XL, None, "sdxl", EPSILON),
        (SD1, {"ss_v_parameterization": "True"}, "sd15", V),
        (XL | {"v_pred": (0,)}, None, "sdxl", V),
        (XL | {"v_pred": (0,), "ztsnr": (0,)}, None, "sdxl", V_ZSNR),
        (XL, {"modelspec.prediction_type": "v"}, "sdxl", V),
        (XL, {"modelspec.prediction_type": "v_prediction"}, "sdxl", V),
        (XL, {"modelspec.predict_key": "v"}, "sdxl", V),
        (XL, {"modelspec.predict_key": "epsilon"}, "sdxl", EPSILON),
        (XL, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "sdxl", V_ZSNR),
        (XL, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl", EPSILON),
        (SD2, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "sd21", V),
        (SD2, {"modelspec.architecture": "stable-diffusion-v2-512"}, "sd21-base", EPSILON),
        (SD2, {"modelspec.predict_key": "v"}, "sd21", V),
        (SD2, {"modelspec.predict_key": "epsilon"}, "sd21-base", EPSILON),
        (SD2, {"ss_v2": "True", "ss_v_parameterization": "True"}, "sd21", V),
        (SD2, {"ss_base_model_version": "sd_v2_v"}, "sd21", V),
    ],
)
def test_markers_of_the_prediction(tmp_path, tensors, metadata, base, prediction):
    noise = {"optimizer": "adam_epsilon 1e-8"}
    path = checkpoint(tmp_path, tensors, (metadata or {}) | noise)
    assert identify(path) == (base, prediction)
    asked = prediction_of("epsilon" if prediction.kind == "v_prediction" else "v")
    assert identify(path, asked)[1] == asked, "the user's word counts above the file's"


def test_where_the_sliders_start(tmp_path):
    """The prediction that a name ends with counts before anything is loaded, too."""
    path = checkpoint(tmp_path, SD2)
    with pytest.raises(ValueError, match="doesn't say whether it predicts v"):
        usage_by_name(str(path))
    assert usage_by_name(f"{path}:v") == BACKBONES["sd21"].usage
    assert usage_by_name(f"{path}:epsilon") == BACKBONES["sd21-base"].usage
    assert usage_by_name("someone/something/model.safetensors") is None, "it is not downloaded"


def test_the_yaml_beside_it(tmp_path):
    path = checkpoint(tmp_path, SD2)
    for line, base in (("parameterization: v", "sd21"), ("timesteps: 1000", "sd21-base")):
        path.with_suffix(".yaml").write_text(f"model:\n  params:\n    {line}\n")
        assert identify(path)[0] == base


def test_cosxl_has_edms_noise_levels(tmp_path):
    path = tmp_path / "cosxl.safetensors"
    levels = {
        f"edm_vpred.sigma_{end}": torch.tensor(s) for end, s in (("min", 0.5), ("max", 120.0))
    }
    save_file({name: torch.zeros(shape) for name, shape in XL.items()} | levels, path)
    assert identify(path) == ("sdxl", Prediction("v_prediction", edm=(0.5, 120.0)))


@pytest.mark.parametrize(
    "tensors, metadata, name, says",
    [
        (SD2, None, "model", "doesn't say whether it predicts v.*model.safetensors:v or"),
        (XL, None, "noob-vpred-1.0", "its name points to v.*vpred-1.0.safetensors:v or"),
        (XL | {"ztsnr": (0,)}, None, "model", "zero terminal SNR points to v"),
        (
            XL | {"v_pred": (0,)},
            {"modelspec.predict_key": "epsilon"},
            "model",
            "both that it predicts v and",
        ),
        (
            XL | {"ztsnr": (0,)},
            {"modelspec.predict_key": "epsilon"},
            "model",
            "the first step cannot be made",
        ),
        (XL, {"modelspec.prediction_type": "rf"}, "model", "predicts 'rf'"),
        ({UNET_KEY: (4, 1024), FIRST: (8, 9, 3, 3)}, None, "model", "takes 9 channels"),
        (XL | {"edm_mean": (1,), "edm_std": (1,)}, None, "model", "of the kind playground"),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, None, "model", "another family"),
        (
            {"double_blocks.0.img_attn.norm.key_norm.scale": (4,)},
            None,
            "model",
            "kind flux-schnell",
        ),
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 4)}, None, "model", "is a LoRA"),
    ],
)
def test_what_is_asked_and_refused(tmp_path, tensors, metadata, name, says):
    with pytest.raises(ValueError, match=says):
        load_pipeline(str(checkpoint(tmp_path, tensors, metadata, name)), "cpu")


def test_files_that_are_not_there(tmp_path):
    path = checkpoint(tmp_path, XL)
    with pytest.raises(FileNotFoundError, match="needs the configuration of stabilityai"):
        load_pipeline(str(path), "cpu")  # there is no hub here
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="damaged"):
        load_pipeline(str(path), "cpu")
    for name in (str(tmp_path / "nothing.safetensors"), "model.SAFETENSORS", "C:\\a.safetensors"):
        with pytest.raises(FileNotFoundError, match="no file"):
            load_pipeline(name, "cpu")
    with pytest.raises(FileNotFoundError, match="the hub does not serve it"):
        load_pipeline("https://huggingface.co/a/b/blob/main/model.safetensors", "cpu")
    with pytest.raises(ValueError, match="no prediction type 'flow'; choose one of v, epsilon"):
        load_pipeline(str(path), "cpu", prediction_type="flow")


def of_original_width(name):
    """A small pipeline with the real widths of text, by which a checkpoint is identified."""
    torch.manual_seed(0)
    pipe = random_pipeline("sd21-base" if name == "sd15" else name, small=True)
    widths = {"sd15": {"text_encoder": 768}, "sdxl": {"text_encoder": 768, "text_encoder_2": 1280}}
    widths = widths.get(name, {"text_encoder": 1024})
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
        kind = CLIPTextModel if name == "sd15" else type(getattr(pipe, part))
        setattr(pipe, part, kind(config).eval())
        pipe.register_to_config(**{part: ("transformers", kind.__name__)})
    added = {"projection_class_embeddings_input_dim": 6 * 8 + 1280} if name == "sdxl" else {}
    config = {"cross_attention_dim": sum(widths.values())} | added
    if name == "sd15":
        config["use_linear_projection"] = False
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, **config).eval()
    return pipe


def write_single_file(pipe, path, metadata=None, **tensors):
    state = {key: value.contiguous().clone() for key, value in single_file(pipe).items()}
    save_file(state | tensors, path, metadata)


NAMES = ["sd15", "sd21", "sd21-base", "sdxl"]


@pytest.fixture(scope="module", params=NAMES)
def base(request, tmp_path_factory):
    """The name of a base, its small pipeline, and its folder, which stands in for the hub's."""
    pipe, folder = of_original_width(request.param), tmp_path_factory.mktemp(request.param)
    pipe.save_pretrained(folder)
    return request.param, pipe, folder


@pytest.fixture
def hub(base, monkeypatch):
    name, _, folder = base
    monkeypatch.setattr(
        DiffusionPipeline,
        "download",
        lambda source, **_: str(folder) if source == BACKBONES[name].source else None,
    )


def test_a_single_file_is_the_model_it_holds(base, hub, tmp_path):
    """A fine-tune in one file makes its folder's images, and takes a refiner."""
    name, pipe, _ = base
    path = tmp_path / "fine-tune.safetensors"
    write_single_file(pipe, path)
    asked = "v" if name == "sd21" else "epsilon"
    loaded = load_pipeline(f"{path}:{asked}", "cpu")
    assert loaded.scheduler.config.prediction_type == BACKBONES[name].prediction_type
    x_T = draw_noise(pipe, 0)
    images = [
        p(PROMPT, latents=x_T, num_inference_steps=2, guidance_scale=1.0, output_type="pt").images
        for p in (pipe, loaded)
    ]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)
    perturbed(pipe).save_pretrained(tmp_path / "refiner")
    assert Refiner.from_pretrained(tmp_path / "refiner", loaded).note == ""


@pytest.mark.parametrize("base", ["sd15", "sd21", "sdxl"], indirect=True)
def test_a_file_that_predicts_v_is_sampled_so(base, hub, tmp_path):
    """With zero terminal SNR the schedule ends in pure noise, and sampling starts there."""
    pipe = base[1]
    path = tmp_path / "fine-tune.safetensors"
    empty = torch.tensor([])
    write_single_file(pipe, path, v_pred=empty)
    assert load_pipeline(str(path), "cpu").scheduler.config.prediction_type == "v_prediction"
    write_single_file(pipe, path, v_pred=empty, ztsnr=empty)
    scheduler = load_pipeline(str(path), "cpu").scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(2)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize("base", ["sd21-base"], indirect=True)
def test_a_folder_that_says_it_wrongly(base):
    for asked, prediction in (("v", "v_prediction"), ("epsilon", "epsilon")):
        loaded = load_pipeline(f"{base[2]}:{asked}", "cpu")
        assert loaded.scheduler.config.prediction_type == prediction
