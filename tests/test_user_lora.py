"""LoRAs that people have: each format against its weights merged by hand."""

import copy
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from noiserefine import Refiner, draw_noise
from noiserefine.guidance import sample_latents
from noiserefine.models.user_lora import (
    add_lora,
    find_lora,
    remove_lora,
    set_lora_weight,
)
from noiserefine.noise import encode_prompt
from tests import families
from tests.conftest import EMOJI_REFINER, output, perturbed
from tests.single_file import unet_name

PROMPT = "a red apple"
RANK, ALPHA = 4, 2.0


@pytest.fixture(scope="module")
def pipe():
    """A tiny pipeline that predicts v, this module's own."""
    return copy.deepcopy(families.pipeline("sd2_v"))


@pytest.fixture(autouse=True)
def unchanged(pipe):
    """After every test here the shared pipeline makes what it made before, to the bit."""
    scheduler, before = pipe.scheduler, output(pipe)
    yield
    remove_lora(pipe)
    pipe.scheduler = scheduler
    assert torch.equal(output(pipe), before)
    assert not hasattr(pipe.unet, "peft_config")


def attention(network):
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    return [name for name, _ in network.named_modules() if name.endswith(ends)]


def convolutions(network):
    return [name for name, _ in network.named_modules() if name.endswith((".conv1", ".conv2"))]


def random(*shape, seed=0, std=0.2):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(weight, seed):
    outputs, inputs, *kernel = weight.shape
    ones = [1] * len(kernel)
    down = random(RANK, inputs, *kernel, seed=seed)
    return down, random(outputs, RANK, *ones, seed=seed + 1)


# Each returns the tensors of a layer as a trainer writes them, and the new weight by its
# definition.
def plain(weight, seed):
    down, up = pair(weight, seed)
    delta = ALPHA / RANK * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}
    return parts, weight + delta


def tucker(weight, seed):
    outputs, inputs, *kernel = weight.shape
    down, up = random(RANK, inputs, 1, 1, seed=seed), random(outputs, RANK, 1, 1, seed=seed + 1)
    mid = random(RANK, RANK, *kernel, seed=seed + 2)
    x = torch.eye(inputs).view(inputs, inputs, 1, 1)
    x = nn.functional.pad(x, (1, 1, 1, 1))
    # The three convolutions one after the other, on every input channel's impulse; flipped, as
    # correlation is.
    y = nn.functional.conv2d(x, down)
    y = nn.functional.conv2d(y, mid, padding=1)
    y = nn.functional.conv2d(y, up)
    delta = y.flip(-1, -2).transpose(0, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    return parts | {"alpha": torch.tensor(ALPHA)}, weight + ALPHA / RANK * delta


def loha(weight, seed, rank=RANK):
    outputs, inputs = len(weight), weight[0].numel()
    a1, a2 = (random(outputs, rank, seed=seed + i, std=0.5) for i in (0, 1))
    b1, b2 = (random(rank, inputs, seed=seed + i, std=0.5) for i in (2, 3))
    delta = ALPHA / rank * ((a1 @ b1) * (a2 @ b2)).view_as(weight)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return parts | {"alpha": torch.tensor(ALPHA)}, weight + delta


def large_loha(weight, seed):
    return loha(weight, seed, 16)  # rank 256 is more than full


def tucker_loha(weight, seed):
    outputs, inputs, *kernel = weight.shape
    a, b = ([random(RANK, n, seed=seed + i, std=0.5) for i in (0, 1)] for n in (outputs, inputs))
    t = [random(RANK, RANK, *kernel, seed=seed + i, std=0.5) for i in (2, 3)]
    first, second = (
        sum(
            a[k][i][:, None, None, None] * b[k][j][None, :, None, None] * t[k][i, j]
            for i in range(RANK)
            for j in range(RANK)
        )
        for k in (0, 1)
    )
    parts = {"hada_w1_a": a[0], "hada_w1_b": b[0], "hada_t1": t[0]}
    parts |= {"hada_w2_a": a[1], "hada_w2_b": b[1], "hada_t2": t[1]}
    return parts | {"alpha": torch.tensor(ALPHA)}, weight + ALPHA / RANK * first * second


def lokr(weight, seed):
    outputs, inputs, *kernel = weight.shape
    w1, w2 = random(4, 4, seed=seed), random(outputs // 4, inputs // 4, *kernel, seed=seed + 1)
    delta = torch.zeros_like(weight)
    for i in range(4):
        for j in range(4):
            rows, columns = (
                slice(k * n // 4, (k + 1) * n // 4) for k, n in ((i, outputs), (j, inputs))
            )
            delta[rows, columns] = w1[i, j] * w2
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(ALPHA)}, weight + delta


def factored_lokr(weight, seed):
    outputs, inputs, *kernel = weight.shape
    columns = inputs // 4 * weight[0, 0].numel()
    a, b = random(outputs // 4, RANK, seed=seed), random(RANK, columns, seed=seed + 1)
    w1 = random(4, 4, seed=seed + 2)
    delta = torch.kron(w1, a @ b).view_as(weight) * ALPHA / RANK
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return parts, weight + delta


def full(weight, seed):
    delta = random(*weight.shape, seed=seed, std=0.02)
    return {"diff": delta}, weight + delta


def dora(weight, seed):
    parts, moved = plain(weight, seed)
    norm = moved.flatten(1).norm(dim=1)
    magnitude = 1.2 * weight.flatten(1).norm(dim=1)
    ones = [1] * (weight.ndim - 1)
    parts["dora_scale"] = magnitude.view(-1, *ones)
    return parts, moved * (magnitude / norm).view(-1, *ones)


KINDS = {
    "plain": (plain, plain),
    "Tucker": (plain, tucker),
    "LoHa": (loha, loha),
    "LoHa of high rank": (large_loha, large_loha),
    "LoHa, Tucker": (loha, tucker_loha),
    "LoKr": (lokr, lokr),
    "LoKr, factored": (factored_lokr, factored_lokr),
    "full": (full, full),
    "DoRA": (dora, dora),
    "DoRA beside plain": (dora, plain),
}


def merged(pipe, makers):
    """Return a kohya file, and a pipeline with what it means in its weights."""
    by_hand = copy.copy(pipe)
    by_hand.unet = copy.deepcopy(pipe.unet)
    state = {}
    layers = (attention(pipe.unet), convolutions(pipe.unet))
    for make, names in zip(makers, layers, strict=True):
        for seed, name in enumerate(names):
            layer = by_hand.unet.get_submodule(name)
            parts, layer.weight.data = make(layer.weight.data, 10 * seed)
            key = f"lora_unet_{name.replace('.', '_')}"
            state |= {f"{key}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    return state, by_hand


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_what_its_format_says(pipe, tmp_path, kind):
    state, by_hand = merged(pipe, KINDS[kind])
    save_file(state, tmp_path / "style.safetensors")
    before, expected = output(pipe), output(by_hand)
    assert add_lora(pipe, str(tmp_path / "style.safetensors")) == ""
    torch.testing.assert_close(output(pipe), expected, rtol=0, atol=2e-4)
    assert (expected - before).abs().mean() > 0.05
    set_lora_weight(pipe, 0.0)
    assert torch.equal(output(pipe), before)


def renamed(kind, name, down, up):
    """The same pair in the naming of another program."""
    block, _, layer = name.rpartition(".to_")
    return {
        "peft": {
            f"base_model.model.{name}.lora_A.weight": down,
            f"base_model.model.{name}.lora_B.weight": up,
        },
        "peft, adapter named": {
            f"{name}.lora_A.default.weight": down,
            f"{name}.lora_B.default.weight": up,
        },
        "diffusers": {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up},
        "compiled": {
            f"unet._orig_mod.{name}.lora_A.weight": down,
            f"unet._orig_mod.{name}.lora_B.weight": up,
        },
        "old diffusers": {
            f"{block}.processor.to_{layer.split('.')[0]}_lora.down.weight": down,
            f"{block}.processor.to_{layer.split('.')[0]}_lora.up.weight": up,
        },
    }[kind]


@pytest.mark.parametrize(
    "kind", ["peft", "peft, adapter named", "diffusers", "compiled", "old diffusers"]
)
def test_other_programs_names(pipe, tmp_path, kind):
    state, by_hand = {}, copy.copy(pipe)
    by_hand.unet = copy.deepcopy(pipe.unet)
    for seed, name in enumerate(attention(pipe.unet)):
        layer = by_hand.unet.get_submodule(name)
        down, up = pair(layer.weight, 10 * seed)
        layer.weight.data += up @ down
        state |= renamed(kind, name, down, up)
    save_file(state, tmp_path / "style.safetensors")
    assert add_lora(pipe, str(tmp_path / "style.safetensors")) == ""
    torch.testing.assert_close(output(pipe), output(by_hand), rtol=0, atol=2e-4)


def test_the_alpha_of_pefts_configuration(pipe, tmp_path):
    """adapter_config.json with a pattern and rank-stabilised scaling is read."""
    first, second = attention(pipe.unet)[:2]
    state, by_hand = {}, copy.copy(pipe)
    by_hand.unet = copy.deepcopy(pipe.unet)
    for seed, (name, scale) in enumerate({first: 8.0 / 2, second: 3.0 / 2}.items()):
        layer = by_hand.unet.get_submodule(name)
        down, up = pair(layer.weight, 10 * seed)
        layer.weight.data += scale * up @ down
        state |= renamed("peft", name, down, up)
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = {"lora_alpha": 8, "r": RANK, "use_rslora": True, "alpha_pattern": {second: 3}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    add_lora(pipe, str(tmp_path))
    torch.testing.assert_close(output(pipe), output(by_hand), rtol=0, atol=2e-4)


def test_the_original_unets_names(sdxl, tmp_path):
    """kohya's SDXL files: one layer of each kind, under input_blocks, label_emb and so on."""
    state, by_hand = {}, copy.copy(sdxl)
    by_hand.unet = copy.deepcopy(sdxl.unet)
    layers, kinds = sdxl.unet.config.layers_per_block, set()
    for seed, (name, layer) in enumerate(by_hand.unet.named_modules()):
        kind = re.sub(r"\d", "", name)
        weighted = isinstance(layer, nn.Linear | nn.Conv2d)
        if weighted and kind not in kinds and "upsamplers" not in name:
            kinds.add(kind)
            parts, layer.weight.data = plain(layer.weight.data, 10 * seed)
            theirs = unet_name(f"{name}.weight", layers).removesuffix(".weight").replace(".", "_")
            state |= {f"lora_unet_{theirs}.{part}": tensor for part, tensor in parts.items()}
    save_file(state, tmp_path / "style.safetensors")
    try:
        assert add_lora(sdxl, str(tmp_path)) == ""
        torch.testing.assert_close(output(sdxl), output(by_hand), rtol=1e-3, atol=1e-3)
    finally:
        remove_lora(sdxl)


def test_text_encoders(sdxl, tmp_path):
    """kohya's lora_te1_ and lora_te2_, with OneTrainer's text_projection."""
    state, by_hand = {}, copy.copy(sdxl)
    for part, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        setattr(by_hand, part, copy.deepcopy(getattr(sdxl, part)))
        for seed, (name, layer) in enumerate(getattr(by_hand, part).named_modules()):
            if isinstance(layer, nn.Linear):
                tensors, layer.weight.data = plain(layer.weight.data, 10 * seed)
                full_name = name if name.startswith("text_") else f"text_model.{name}"
                key = f"{prefix}{full_name.replace('.', '_')}"
                state |= {f"{key}.{each}": tensor for each, tensor in tensors.items()}
    save_file(state, tmp_path / "style.safetensors")
    try:
        assert add_lora(sdxl, str(tmp_path)) == ""
        torch.testing.assert_close(output(sdxl), output(by_hand), rtol=0, atol=1e-4)
    finally:
        remove_lora(sdxl)


def kohya(pipe, names=None, make=plain):
    return {
        f"lora_unet_{name.replace('.', '_')}.{part}": tensor
        for seed, name in enumerate(names or attention(pipe.unet))
        for part, tensor in make(pipe.unet.get_submodule(name).weight.data, 10 * seed)[0].items()
    }


def old_dora(weight, seed):
    return plain(weight, seed)[0] | {"dora_scale": weight.norm(dim=0, keepdim=True)}, weight


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda state, pipe: kohya(pipe, make=old_dora), "a DoRA with one magnitude per input"),
        (lambda state, pipe: state | {"lora_unet_norm1.w_norm": torch.ones(4)}, "normalisation"),
        (lambda state, pipe: state | {"lora_unet_norm1.diff": torch.ones(4)}, "normalisation"),
        (lambda state, pipe: {"lora_unet_a.oft_blocks": torch.ones(4)}, "is an OFT, which"),
        (lambda state, pipe: {"lora_unet_a.boft_blocks": torch.ones(4)}, "is a BOFT, which"),
        (lambda state, pipe: {"lora_unet_a.a1.weight": torch.ones(4)}, "is a GLoRA, which"),
        (lambda state, pipe: {"lora_unet_a.on_input": torch.ones(4)}, "is an .IA.³, which"),
        (lambda state, pipe: {"emb_params": torch.ones(2, 4)}, "is a textual inversion"),
        (lambda state, pipe: {"nothing": torch.ones(1)}, "no LoRA that is known"),
        (lambda state, pipe: {}, "holds nothing"),
        (lambda state, pipe: {"model.diffusion_model.a": torch.ones(1)}, "whole model"),
        (
            lambda state, pipe: {k: v for k, v in state.items() if "lora_up" not in k},
            "lacks the tensor",
        ),
        (lambda state, pipe: {k: v[:3] if v.ndim else v for k, v in state.items()}, "other sizes"),
        (lambda state, pipe: {k: v * float("nan") for k, v in state.items()}, "not finite"),
        (lambda state, pipe: {k: v / 0 for k, v in state.items()}, "not finite"),
        (lambda state, pipe: {k.replace("attn", "at"): v for k, v in state.items()}, "matches no"),
    ],
)
def test_what_is_refused_says_why(pipe, tmp_path, change, says):
    save_file(change(kohya(pipe), pipe), tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=says) as refusal:
        add_lora(pipe, str(tmp_path / "style.safetensors"))
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


def test_parts_that_are_left_out_are_named(pipe, tmp_path):
    state = kohya(pipe) | {"bundle_emb.mytoken.string_to_param.*": torch.ones(1, 64)}
    state |= {
        f"lora_te2_text_projection.lora_{part}.weight": torch.ones(4, 4) for part in ("up", "down")
    }
    save_file(state, tmp_path / "style.safetensors")
    says = add_lora(pipe, str(tmp_path))
    assert "“mytoken” is left out" in says
    layers = len(attention(pipe.unet))
    assert f"matches {layers} of its {layers + 1} layers" in says


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_other_precisions(pipe, tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in kohya(pipe).items()}
    save_file(state, tmp_path / "style.safetensors")
    before = output(pipe)
    assert add_lora(pipe, str(tmp_path)) == ""
    assert not torch.equal(output(pipe), before)
    assert all(p.dtype == torch.float32 for p in pipe.unet.parameters())


def test_a_negative_weight_is_the_other_direction(pipe, tmp_path):
    """Slider LoRAs: weight -1 subtracts what weight 1 adds."""
    state, by_hand = merged(pipe, KINDS["plain"])
    for name in (*attention(pipe.unet), *convolutions(pipe.unet)):
        base, moved = pipe.unet.get_submodule(name), by_hand.unet.get_submodule(name)
        moved.weight.data = 2 * base.weight.data - moved.weight.data
    save_file(state, tmp_path / "style.safetensors")
    add_lora(pipe, str(tmp_path))
    set_lora_weight(pipe, -1.0)
    torch.testing.assert_close(output(pipe), output(by_hand), rtol=0, atol=2e-4)


def test_which_of_several_files(tmp_path):
    def folder(name, *files):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
        return str(tmp_path / name)

    kohya_run = folder(
        "run", "style-000002.safetensors", "style.safetensors", "style-000004.safetensors"
    )
    path, says = find_lora(kohya_run)
    assert path.name == "style.safetensors" and "Of 3 files" in says and "style.safetensors" in says
    path, says = find_lora(
        folder("ours", "a.safetensors", "pytorch_lora_weights.safetensors", "z.safetensors")
    )
    assert path.name == "pytorch_lora_weights.safetensors" and says
    path, says = find_lora(folder("one", "my-checkpoint-lora.safetensors"))
    assert path.name == "my-checkpoint-lora.safetensors" and not says
    with pytest.raises(
        ValueError, match="holds 2 LoRA files: cat.safetensors, dog.safetensors. Name"
    ):
        find_lora(folder("choice", "dog.safetensors", "cat.safetensors"))
    with pytest.raises(FileNotFoundError, match="a.bin, a pickle"):
        find_lora(folder("old", "a.bin"))
    assert find_lora(f"{tmp_path}/run/style")[0].name == "style.safetensors"
    assert find_lora(f'"{tmp_path}/run/style.safetensors"')[0].name == "style.safetensors"
    for name in (
        "nothing",
        str(tmp_path / "nothing.safetensors"),
        "a/b",
        "x" * 5000,
        "a\0",
        "/dev/null",
    ):
        with pytest.raises(FileNotFoundError, match="There is no"):
            find_lora(name)
    with pytest.raises(ValueError, match="syntax of another program"):
        find_lora("<lora:style:1>")


def test_one_lora_at_a_time(pipe, tmp_path):
    """A second one would find its layers taken; the first one stays as it is."""
    for name, layers in (("first", attention(pipe.unet)), ("second", convolutions(pipe.unet))):
        save_file(kohya(pipe, layers), tmp_path / f"{name}.safetensors")
    add_lora(pipe, str(tmp_path / "first.safetensors"))
    styled = output(pipe)
    for name in ("first", "second"):
        with pytest.raises(ValueError, match="has a LoRA already"):
            add_lora(pipe, str(tmp_path / f"{name}.safetensors"))
    assert torch.equal(output(pipe), styled)


def test_a_refiner_is_no_lora(pipe, tmp_path):
    with pytest.raises(ValueError, match="is a refiner"):
        add_lora(pipe, EMOJI_REFINER)
    with pytest.raises(ValueError, match="is a refiner"):
        add_lora(pipe, f"{EMOJI_REFINER}/pytorch_lora_weights.safetensors")
    perturbed(pipe).save_pretrained(tmp_path)
    save_file(kohya(pipe), tmp_path / "style.safetensors")
    assert add_lora(pipe, str(tmp_path / "style.safetensors")) == "", "a LoRA beside a refiner"
    remove_lora(pipe)
    shutil.move(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "alone.safetensors")
    (tmp_path / "refiner.json").unlink()
    with pytest.raises(ValueError, match="as a refiner does|is a refiner"):
        add_lora(pipe, str(tmp_path / "alone.safetensors"))


def test_a_refiner_beside_a_lora(pipe, tmp_path):
    """The refining pass is the base's, and leaves the styled pipeline as it is."""
    perturbed(pipe).save_pretrained(tmp_path / "refiner")
    refiner = Refiner.from_pretrained(tmp_path / "refiner", pipe)
    x_T = draw_noise(pipe, 0)
    refined = refiner(x_T, PROMPT)
    save_file(kohya(pipe), tmp_path / "style.safetensors")
    add_lora(pipe, str(tmp_path))
    set_lora_weight(pipe, 0.7)
    styled = output(pipe)
    assert torch.equal(refiner(x_T, PROMPT), refined)
    again = Refiner.from_pretrained(tmp_path / "refiner", pipe)
    torch.testing.assert_close(again(x_T, PROMPT), refined, rtol=0, atol=1e-5)
    assert torch.equal(output(pipe), styled)


@pytest.mark.parametrize(
    "folder, scheduler",
    [
        ("lcm-lora-sdv1-5", "LCMScheduler"),
        ("Hyper-SD15-8steps", "DDIMScheduler"),
        ("TCD-SDXL-LoRA", "TCDScheduler"),
        ("sd_lightning_4step", "EulerDiscreteScheduler"),
        ("hyperrealistic", None),
    ],
)
def test_few_step_loras_by_name(pipe, tmp_path, folder, scheduler):
    before = pipe.scheduler
    (tmp_path / folder).mkdir()
    save_file(kohya(pipe), tmp_path / folder / "pytorch_lora_weights.safetensors")
    says = add_lora(pipe, str(tmp_path / folder))
    if scheduler is None:
        assert pipe.scheduler is before and says == ""
        return
    assert type(pipe.scheduler).__name__ == scheduler and "few steps" in says
    assert pipe.scheduler.config.prediction_type == before.config.prediction_type
    assert pipe.scheduler.config.trained_betas is None
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps[0] == 999


def test_a_few_step_lora_brings_its_scheduler(pipe, tmp_path):
    config = {"_class_name": "LCMScheduler", "original_inference_steps": 25}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    save_file(kohya(pipe), tmp_path / "style.safetensors")
    add_lora(pipe, str(tmp_path))
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    assert pipe.scheduler.config.original_inference_steps == 25
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "Popen"}))
    remove_lora(pipe)
    with pytest.raises(ValueError, match="names no scheduler"):
        add_lora(pipe, str(tmp_path))


def test_a_transformers_lora(tmp_path):
    """As diffusers names it, on the whole and merged by hand; then taken off again."""
    pipe = families.pipeline("sd3")
    x_T = draw_noise(pipe, 0)
    embeds = encode_prompt(pipe, PROMPT, guided=False)
    before = sample_latents(pipe, x_T, embeds, 2)
    by_hand, state = copy.copy(pipe), {}
    by_hand.transformer = copy.deepcopy(pipe.transformer)
    for seed, name in enumerate(attention(pipe.transformer)):
        layer = by_hand.transformer.get_submodule(name)
        down, up = pair(layer.weight, 10 * seed)
        layer.weight.data += up @ down
        state[f"transformer.{name}.lora_A.weight"] = down
        state[f"transformer.{name}.lora_B.weight"] = up
    save_file(state, tmp_path / "style.safetensors")
    try:
        assert add_lora(pipe, str(tmp_path)) == ""
        made = [sample_latents(p, x_T, embeds, 2) for p in (pipe, by_hand)]
        torch.testing.assert_close(*made, rtol=0, atol=1e-4)
        assert (made[0] - before).abs().mean() > 1e-3
    finally:
        remove_lora(pipe)
    assert torch.equal(sample_latents(pipe, x_T, embeds, 2), before)
    with pytest.raises(ValueError, match="of other sizes than this model's"):
        add_lora(families.pipeline("pixart_sigma"), str(tmp_path))
