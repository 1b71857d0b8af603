"""The tools that make a refiner smaller, export and publish it."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from safetensors.torch import load_file

from noiserefine import Refiner, checkpoint, draw_noise
from noiserefine.checkpoint import RefinerConfig
from noiserefine.lora import ADAPTER, adapted
from noiserefine.models.lora_formats import layers_of, placed
from noiserefine.refiner import build
from tests.conftest import EMOJI, EMOJI_REFINER, ROOT, perturbed
from tests.single_file import unet_state
from train.tools import compress, export, share
from train.tools.architectures import build_denoiser


@pytest.fixture
def folder(pipe, tmp_path):
    """A refiner that does something, saved, with a sheet beside it."""
    refiner = perturbed(pipe, rank=16, guidance_scale_range=[1, 5])
    torch.nn.init.normal_(refiner.network.scale_input.weight, std=0.1)
    refiner.config.training = {"steps": 6, "guidance_scale": 2.5, "num_validation": 32}
    refiner.config.results = {"validation_gaussian": 0.5, "validation_refined": 0.2}
    refiner.save_pretrained(tmp_path / "refiner")
    (tmp_path / "refiner" / "validation").mkdir()
    (tmp_path / "refiner" / "validation" / "0000005.png").write_bytes(b"png")
    return tmp_path / "refiner"


def test_compressing(folder, pipe, tmp_path):
    """What a lower rank loses shrinks with the rank; an update of that rank loses nothing."""
    whole = Refiner.from_pretrained(folder, pipe, merge=False)
    x_T, errors, shares = draw_noise(pipe, 0, 2), [], []
    expected = whole(x_T, ["a cat", "a dog"], guidance_scale=2.0)
    for rank in (2, 12):
        small, share_left = compress.compress(whole, rank)
        refined = small(x_T, ["a cat", "a dog"], guidance_scale=2.0)
        errors.append((refined - expected).abs().mean().item())
        shares.append(share_left)
    assert errors[1] < 0.5 * errors[0] and 0 < shares[0] < shares[1] < 1
    for _, layer in adapted(whole.network):  # of rank 8 at most
        layer.lora_A[ADAPTER].weight.data[8:] = 0
    expected = whole(x_T, ["a cat", "a dog"], guidance_scale=2.0)
    small, share_left = compress.compress(whole, 8)
    small.save_pretrained(tmp_path / "small")  # in the weights' own precision
    again = Refiner.from_pretrained(tmp_path / "small", pipe, merge=False)
    torch.testing.assert_close(
        again(x_T, ["a cat", "a dog"], guidance_scale=2.0), expected, rtol=0, atol=1e-4
    )
    assert share_left == pytest.approx(1) and again.config.results == {}
    with pytest.raises(ValueError, match="choose a --rank from 1 to 15"):
        compress.compress(whole, 16)


def test_compressing_as_a_script(pipe, tmp_path, capsys):
    """The file has 16 bits a weight; rounding changes a thousandth of the correction at most."""
    arguments = ["--rank", "8", "--backbone", EMOJI, "--output_dir", str(tmp_path)]
    compress.main([EMOJI_REFINER, *arguments])
    assert "rank 8" in capsys.readouterr().out
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / checkpoint.WEIGHTS_NAME).values()}
    assert dtypes == {torch.float16}
    whole = Refiner.from_pretrained(EMOJI_REFINER, pipe, merge=False)
    exact, _ = compress.compress(whole, 8)
    stored = Refiner.from_pretrained(tmp_path, pipe, merge=False)
    x_T = draw_noise(pipe, 0)
    refined = exact(x_T, "a cat")
    change, rounding = refined - x_T, stored(x_T, "a cat") - refined
    assert rounding.norm() < 1e-3 * change.norm()


def test_kohya_export_is_exact(folder, pipe, tmp_path):
    """Every layer is there, its alpha rightly, and the biases; read back, no value changes."""
    arguments = [str(folder), "--backbone", EMOJI, "--output", str(tmp_path / "k.safetensors")]
    with pytest.raises(ValueError, match="takes a guidance scale from 1 to 5"):
        export.main(arguments)
    export.main([*arguments, "--guidance_scale", "2"])
    refiner = Refiner.from_pretrained(folder, pipe, merge=False)
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        about = file.metadata()
    assert about["modelspec.sai_model_spec"] and "destroys" in about["modelspec.description"]
    assert about["noiserefine"] and about["ss_network_dim"] == "16"
    assert about["modelspec.prediction_type"] == "v"

    layers = dict(adapted(refiner.network))
    read, _ = layers_of(load_file(tmp_path / "k.safetensors"))
    found = {name: parts for (_, name), parts in placed(pipe, {"unet": pipe.unet}, read).items()}
    assert found.keys() == layers.keys() | {"time_embedding.linear_1"}
    for name, layer in layers.items():
        parts = found[name]
        assert torch.equal(parts["lora_down"], layer.lora_A[ADAPTER].weight)
        assert torch.equal(parts["lora_up"], layer.lora_B[ADAPTER].weight)
        assert parts["alpha"].item() / len(parts["lora_down"]) == layer.scaling[ADAPTER]
    assert torch.equal(found["conv_out"]["diff_b"], -pipe.unet.conv_out.bias)

    # The bias does what the guidance scale's projection did.
    x_T = draw_noise(pipe, 0)
    expected = refiner(x_T, "a cat", guidance_scale=2.0)
    torch.nn.init.zeros_(refiner.network.scale_input.weight)
    layer = refiner.network.time_embedding.linear_1
    layer.bias = torch.nn.Parameter(layer.bias + found["time_embedding.linear_1"]["diff_b"])
    torch.testing.assert_close(refiner(x_T, "a cat", guidance_scale=2.0), expected)


def test_kohya_files_are_for_models_whose_layers_programs_find(tmp_path):
    arguments = ["assets/refiners/emoji-sit", "--output", str(tmp_path / "k.safetensors")]
    with pytest.raises(ValueError, match="no kohya names for the layers of DiTTransformer2DModel"):
        export.main(arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "count", "architecture"),
    [
        ("sd21", 226, "stable-diffusion-v2-768-v"),
        ("sdxl", 751, "stable-diffusion-xl-v1-base"),
    ],
)
def test_kohya_names_on_the_real_architectures(name, count, architecture):
    """ComfyUI finds every layer.

    For each weight in a model's single file it knows lora_unet_ and its name in diffusers, with
    underscores for dots; diffusers' own converter says which names those are.
    """
    with torch.device("meta"):
        unet = build_denoiser(name)
    kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    pipe = kind.__new__(kind)
    vars(pipe)["unet"] = unet
    config = RefinerConfig(
        rank=1,
        alpha=1,
        prediction_type="epsilon" if name == "sdxl" else "v_prediction",
        architecture=checkpoint.architecture(unet),
        base_model=name,
        base_signature=[0.0] * checkpoint.SIGNATURE,
    )
    refiner = Refiner(pipe, config, build(unet, config))
    state = export.kohya_state(refiner)

    converted = convert_ldm_unet_checkpoint(unet_state(unet), unet.config)
    weights = {
        "lora_unet_" + key.removesuffix(".weight").replace(".", "_"): tensor
        for key, tensor in converted.items()
    }
    layers = {key.partition(".")[0] for key in state}
    assert len(layers) == count and len(state) == 3 * count + 1
    for layer in layers:
        down, up = state[f"{layer}.lora_down.weight"], state[f"{layer}.lora_up.weight"]
        assert up.shape[:1] + down.shape[1:] == weights[layer].shape
    assert state["lora_unet_conv_out.diff_b"].shape == unet.conv_out.bias.shape
    assert export.metadata(refiner)["modelspec.architecture"] == f"{architecture}/lora"


class Hub:
    """A local stand-in of the hub: repositories are folders."""

    def __init__(self, root):
        self.root = root

    def create_repo(self, repo_id, exist_ok):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, repo_id, folder_path, allow_patterns):
        for name in allow_patterns:
            if (folder_path / name).exists():
                shutil.copy(folder_path / name, self.root / repo_id / name)


def test_sharing(folder, pipe, tmp_path):
    address = share.push(folder, "me/refiner", Hub(tmp_path))
    assert address == "https://huggingface.co/me/refiner"
    repository = tmp_path / "me" / "refiner"
    card = ModelCard.load(repository / "README.md")
    assert "noise-refiner" in card.data.tags and card.data.pipeline_tag == "text-to-image"
    assert card.data.base_model is None and str(ROOT) not in card.text, "a folder is no hub id"
    assert card.data.license == "apache-2.0" and "# Noise refiner for Emoji (embedded)" in card.text
    for text in ("no style LoRA", "sheet.png", "0.2000", "60 % of the way", "32 held-out prompts"):
        assert text in card.text
    assert {path.name for path in repository.iterdir()} == {
        *("README.md", "refiner.json", "sheet.png"),
        *("pytorch_lora_weights.safetensors", "guidance_embedding.safetensors"),
    }
    x_T = draw_noise(pipe, 0)
    theirs, own = (
        Refiner.from_pretrained(source, pipe)(x_T, "a cat", guidance_scale=2.0)
        for source in (repository, folder)
    )
    assert torch.equal(theirs, own)


def test_the_cards_code_runs(folder):
    """As a stranger copies it, here of a refiner that takes the guidance scale."""
    text = share.model_card(folder, str(folder)).text
    code = text.partition("```python\n")[2].partition("```")[0]
    assert "guidance_scale=1" not in code, "which is guided in pipelines that count from 0"
    found = {}
    exec(code.replace("latents=latents", "latents=latents, num_inference_steps=1"), found)
    assert found["image"].size == (128, 128)


def test_the_base_is_the_hubs(folder):
    config = json.loads((folder / "refiner.json").read_text())
    for base, licence in (
        ("stabilityai/stable-diffusion-xl-base-1.0", "openrail++"),
        ("x/y", "other"),
    ):
        (folder / "refiner.json").write_text(json.dumps(config | {"base_model": base}))
        about = share.model_card(folder, "me/x").data
        assert (about.base_model, about.base_model_relation) == (base, "adapter")
        assert about.license == licence


def test_a_hub_that_refuses_leaves_the_refiner(folder, tmp_path):
    class Closed(Hub):
        def create_repo(self, repo_id, exist_ok):
            raise OSError("You are not logged in.")

    with pytest.raises(ConnectionError, match="not logged in.*hf auth login.*is safe in"):
        share.push(folder, "me/refiner", Closed(tmp_path))
    assert issubclass(HfHubHTTPError, share.HUB_ERRORS) and (folder / "README.md").exists()
