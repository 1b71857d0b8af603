"""SiT's pipeline and converter against an implementation of the published equations of its own."""

import argparse
import json
import os
import pickle

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from noiserefine.analysis.recipe import Maker, Recipe
from noiserefine.models.sit import SiTPipeline
from train.tools.convert_sit import IMAGENET_CLASSES, build_transformer, convert, read_checkpoint

WIDTH, HEADS, DEPTH, CHANNELS, SIDE, PATCH, CLASSES = 48, 4, 2, 4, 8, 2, 6
LABELS = ["golden retriever, dog", "red panda, panda", "giant panda, panda", "missile"]
LABELS += ["projectile, missile", "hen"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block with adaLN-Zero (Peebles and Xie, 2023, section 3.2)."""

    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)}
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, 2)
        x = x + gate1 * self.attn(normalise(x) * (1 + scale1) + shift1)
        y = self.mlp["fc1"](normalise(x) * (1 + scale2) + shift2)
        return x + gate2 * self.mlp["fc2"](nn.functional.gelu(y, approximate="tanh"))


def normalise(x):
    return layer_norm(x, (WIDTH,), eps=1e-6)


def sines(position, width):
    angles = position[:, None] / 10000 ** (torch.arange(width // 2) / (width // 2))
    return angles.sin(), angles.cos()


class PublishedSiT(nn.Module):
    """The network under the published names, in the published time: 0 at noise, 1 at data."""

    def __init__(self):
        super().__init__()
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH)})
        mlp = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        table = nn.Embedding(CLASSES + 1, WIDTH)
        self.y_embedder = nn.ModuleDict({"embedding_table": table})
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.final_layer = nn.ModuleDict(
            {
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH)),
                "linear": nn.Linear(WIDTH, PATCH * PATCH * 2 * CHANNELS),
            }
        )
        rows, columns = torch.meshgrid(*[torch.arange(SIDE // PATCH).float()] * 2, indexing="ij")
        halves = [sines(places.flatten(), WIDTH // 2) for places in (columns, rows)]
        pos_embed = torch.cat([torch.cat(half, 1) for half in halves], 1)[None]
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)

    def forward(self, x, t, y):
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        sine, cosine = sines(t, 256)
        time = self.t_embedder["mlp"](torch.cat([cosine, sine], 1))
        c = time + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, 2)
        x = self.final_layer["linear"](normalise(x) * (1 + scale) + shift)
        side = SIDE // PATCH
        x = x.view(-1, side, side, PATCH, PATCH, 2 * CHANNELS).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, 2 * CHANNELS, SIDE, SIDE)[:, :CHANNELS]

    def guided(self, x, t, y, g, channels):
        """v_u + g (v_c - v_u) in the first channels."""
        conditional, unconditional = self(x, t, y), self(x, t, torch.full_like(y, CLASSES))
        velocity = conditional.clone()
        difference = conditional - unconditional
        velocity[:, :channels] = (unconditional + g * difference)[:, :channels]
        return velocity


def euler(velocity, x, times):
    for s, u in zip(times, times[1:], strict=False):
        x = x + (u - s) * velocity(x, s)
    return x


def heun(velocity, x, times):
    """Heun's method; an Euler step at the end."""
    for s, u in zip(times[:-2], times[1:-1], strict=True):
        first = velocity(x, s)
        x = x + (u - s) / 2 * (first + velocity(x + (u - s) * first, u))
    return euler(velocity, x, times[-2:])


@pytest.fixture(scope="module")
def published():
    torch.manual_seed(0)
    network = PublishedSiT()
    for name, parameter in network.named_parameters():
        if name != "pos_embed":
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network.eval()


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    """The converted folder of a training checkpoint as the published code saves it."""
    base = tmp_path_factory.mktemp("sit")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(base / "vae")
    other = {name: torch.zeros_like(tensor) for name, tensor in published.state_dict().items()}
    checkpoint = {
        "model": other,
        "ema": published.state_dict(),
        "args": argparse.Namespace(model="SiT"),
    }
    torch.save(checkpoint, base / "sit.pt")
    (base / "classes.txt").write_text("\n".join(LABELS))
    convert(
        base / "sit.pt",
        str(base / "vae"),
        base / "pipe",
        classes=base / "classes.txt",
        num_attention_heads=HEADS,
    )
    return base


@pytest.fixture(scope="module")
def sit(folder):
    pipe = SiTPipeline.from_pretrained(folder / "pipe", use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count=1):
    shape = (count, CHANNELS, SIDE, SIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_the_converted_network_is_the_published_one(published, sit):
    x, t, y = noise(3), torch.tensor([0.0, 0.37, 1.0]), torch.tensor([0, 4, CLASSES])
    converted = sit.transformer(x, timestep=t, class_labels=y).sample[:, :CHANNELS]
    expected = published(x, t, y)
    assert expected.std() > 0.1
    torch.testing.assert_close(converted, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance_scale, channels", [(1.0, None), (4.0, 3), (4.0, None)])
@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler]
)
@torch.no_grad()
def test_sampling_solves_the_published_ode(published, sit, scheduler, guidance_scale, channels):
    steps, y = 7, torch.tensor([0, 4])
    pipe = SiTPipeline(sit.transformer, sit.vae, scheduler(), guided_channels=channels)
    pipe.set_progress_bar_config(disable=True)
    sampled = pipe(
        [0, "4"],
        latents=noise(2),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images

    def velocity(x, s):
        return published.guided(x, s.float().expand(2), y, guidance_scale, channels or CHANNELS)

    if scheduler is FlowMatchEulerDiscreteScheduler:
        expected = euler(velocity, noise(2), torch.linspace(0, 1, steps + 1, dtype=torch.double))
    else:
        times = torch.linspace(0, 0.999, steps, dtype=torch.double).tolist()
        expected = heun(velocity, noise(2), torch.tensor([*times, 1.0]))
    assert (expected - noise(2)).std() > 0.1
    torch.testing.assert_close(sampled, expected.float(), rtol=1e-5, atol=2e-5)


def test_names_and_numbers(sit):
    prompts = ["Golden Retriever", " dog ", "5", 5, "hen", "missile", "giant panda", ""]
    assert sit.encode_prompt(prompts).tolist() == [0, 0, 5, 5, 5, 3, 2, CLASSES]
    assert sit.encode_prompt(["a golden retriever", "The hen"]).tolist() == [0, 5]
    assert sit.encode_prompt("hen").tolist() == sit.encode_prompt(5).tolist() == [5]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a photo of a golden retriever", "is no class.*nearest are golden retriever"),
        ("a hen on an entirely blue background", "is no class.*nearest are hen"),
        ("zzz", "No name is near"),
        ("panda", "several classes.*1 .red panda, panda.*2 .giant panda"),
        (CLASSES, f"no class {CLASSES}: this model has classes 0 to {CLASSES - 1}"),
        ("-1", "There is no class -1"),
    ],
)
def test_prompts_that_name_no_class(sit, prompt, message):
    with pytest.raises(ValueError, match=message):
        sit(prompt)


def test_a_negative_prompt_is_refused_before_any_forward(sit):
    recipe = Recipe("hen", sampler="Native", guidance_scale=2.0, negative_prompt="a fox")
    with pytest.raises(ValueError, match="SiTPipeline takes no negative prompt"):
        Maker(sit).check(recipe)


def test_without_names_a_number_is_asked_for(sit):
    unnamed = SiTPipeline(sit.transformer, sit.vae, sit.scheduler)
    with pytest.raises(ValueError, match="no class names: give a number from 0"):
        unnamed("hen")


def test_sizes_and_latents_that_do_not_fit(sit):
    with pytest.raises(ValueError, match="square images whose side is a multiple of 4"):
        sit("hen", height=16, width=20)
    with pytest.raises(ValueError, match="multiple of 4"):
        sit("hen", height=18, width=18)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 8, 8\), not \(2, 4, 8, 8\)"):
        sit(["hen", "dog"], latents=noise())


def test_another_size(sit):
    assert sit("hen", height=24, width=24, num_inference_steps=1).images[0].size == (24, 24)


def test_seeds_and_batches(sit):
    """The generator alone decides on the image; batch-mates do not."""
    kwargs = dict(num_inference_steps=2, output_type="np")
    one = sit("hen", generator=torch.Generator().manual_seed(1), **kwargs).images
    again = sit("hen", generator=torch.Generator().manual_seed(1), **kwargs).images
    assert np.array_equal(one, again) and one.shape == (1, 16, 16, 3)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    batch = sit(["dog", "hen"], generator=generators, **kwargs).images
    np.testing.assert_allclose(batch[1], one[0], atol=1e-5)


def test_the_callback_sees_replaces_and_stops(sit):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, tensors["latents"].clone()))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    kwargs = dict(latents=noise(), num_inference_steps=5, output_type="latent", guidance_scale=1)
    stopped = sit("hen", callback_on_step_end=watch, **kwargs).images
    assert [step for step, _ in seen] == [0, 1]
    assert not stopped.any() and not seen[0][1].equal(seen[1][1])


def test_the_folder_is_plain_safetensors(folder, sit):
    index = json.loads((folder / "pipe" / "model_index.json").read_text())
    assert index["_class_name"] == "SiTPipeline"
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert index["guided_channels"] == 3
    suffixes = {path.suffix for path in (folder / "pipe").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
    assert sit.config.id2label["3"] == "missile"


def test_half_precision(folder):
    convert(
        folder / "sit.pt",
        str(folder / "vae"),
        folder / "half",
        classes=folder / "classes.txt",
        dtype=torch.float16,
        num_attention_heads=HEADS,
    )
    weights = "transformer/diffusion_pytorch_model.safetensors"
    sizes = [os.path.getsize(folder / name / weights) for name in ("half", "pipe")]
    assert sizes[0] < 0.6 * sizes[1]
    half = SiTPipeline.from_pretrained(folder / "half", dtype=torch.float16)
    assert half.transformer.dtype == torch.float16


def test_other_checkpoints_are_refused(published, folder, tmp_path):
    state = published.state_dict()
    without = {name: tensor for name, tensor in state.items() if not name.startswith("y_")}
    with pytest.raises(ValueError, match="not SiT's: it lacks y_embedder"):
        build_transformer(without, HEADS)
    with pytest.raises(ValueError, match="positions"):
        build_transformer(state | {"pos_embed": state["pos_embed"] + 1}, HEADS)
    with pytest.raises(ValueError, match="(?s)not SiT's.*q_norm"):
        build_transformer(state | {"blocks.0.attn.q_norm.weight": torch.ones(12)}, HEADS)
    with pytest.raises(ValueError, match="give --num_attention_heads"):
        build_transformer(state)
    with pytest.raises(ValueError, match="names 1000 classes"):
        convert(folder / "sit.pt", str(folder / "vae"), tmp_path, num_attention_heads=HEADS)
    with pytest.raises(FileNotFoundError, match="no folder of an autoencoder"):
        convert(folder / "sit.pt", str(tmp_path), tmp_path)


class Code:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": Code()}, "evil.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_checkpoint(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_checkpoint(tmp_path / "plain.pt")
    assert not (tmp_path / "unpickled").exists()
    torch.save({"steps": 3}, "steps.pt")
    with pytest.raises(ValueError, match="no state dict"):
        read_checkpoint(tmp_path / "steps.pt")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_checkpoint(tmp_path / "none.pt")


def test_imagenet_has_a_thousand_classes(sit):
    names = IMAGENET_CLASSES.read_text(encoding="utf-8").splitlines()
    assert len(names) == len(set(names)) == 1000
    labels = {str(number): line for number, line in enumerate(names)}
    labelled = SiTPipeline(sit.transformer, sit.vae, sit.scheduler, labels).labels
    assert labelled["golden retriever"] == [207] and labelled["tench"] == [0]
    assert labelled["toilet tissue"] == [999] and labelled["crane"] == [134, 517]
    assert all(labelled[line.split(",")[0].casefold()] == [i] for i, line in enumerate(names))
