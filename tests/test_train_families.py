"""The trainer on other families of pipelines, with their own samplers and guidance."""

import copy
import functools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from noiserefine import Refiner, draw_noise
from noiserefine.denoiser import denoiser
from noiserefine.guidance import check_guidance
from noiserefine.models.catalogue import BACKBONES
from noiserefine.noise import encode_prompt
from tests import families
from train import embeds, placement, presets, targets, train_refiner, validation
from train.embeds import Embeds
from train.options import default_options, describe, parse, plan
from train.presets import FORWARDS, PRESETS
from train.run import stage_advice
from train.tools import cost, cuda_table, tiers
from train.tools.architectures import random_pipeline
from train.tools.meta import autocast_as_on_cuda
from train.tools.readme_table import RESULTS


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Return what trains a family's tiny pipeline for two steps, in the preset's precision."""
    shared = families.pipeline
    copies = functools.cache(lambda name: copy.deepcopy(shared(name)))
    monkeypatch.setattr(families, "pipeline", copies)

    def run(name: str, *arguments: str) -> tuple[Refiner, list[dict]]:
        AcceleratorState._reset_state(reset_partial_state=True)
        pipe = families.pipeline(name)
        monkeypatch.setattr(
            train_refiner,
            "load_pipeline",
            lambda _, device, dtype, place: place(pipe.to(dtype), device),
        )
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("1\n2\n" if name == "sit" else "a cat\na dog\n")
        options = (
            "--preset sd35-medium --pag_scale 0 --num_validation 1 --num_targets 4 "
            "--target_steps 2 --steps 2 --batch_size 2 --gradient_accumulation_steps 1 "
            "--epochs 1 --rank 4 --lr 1e-3 --warmup_steps 0 "
            f"--gradient_checkpointing False --prompts {prompts} --validation_prompts {prompts}"
        )
        train_refiner.main([*options.split(), "--output_dir", str(tmp_path / name), *arguments])
        lines = (tmp_path / name / "stats.jsonl").read_text().splitlines()
        refiner = Refiner.from_pretrained(tmp_path / name, pipe, merge=False)
        return refiner, [json.loads(line) for line in lines]

    return run


@pytest.mark.parametrize("name", ["sd3", "flux2_klein", "sit", "pixart_sigma", "sana", "z_image"])
def test_a_family_is_trained_and_loaded(train, name):
    refiner, log = train(name)
    assert len(log) == 2 and all(line["loss"] > 0 and not line["skipped"] for line in log)
    x_T = draw_noise(refiner.pipe, 0)
    assert (refiner.refine(x_T, "1") - x_T).abs().mean() > 1e-4, "two steps move it"
    sampler = refiner.config.training["sampler"]
    assert sampler == ("DDIM" if name == "pixart_sigma" else "Native")


@pytest.mark.parametrize(
    ("name", "stored"),
    [("sdxl", True), ("z_image", True), ("hidream", True), ("lumina_next", False)],
)
def test_stored_prompts_are_those_of_a_batch(tmp_path, name, stored):
    """Lumina pads them to the longest of a batch: its batches are encoded as they come."""
    pipe, texts = families.pipeline(name), ["a cat", "a red apple on a blue background", "a cat"]
    prompts = Embeds(pipe, tmp_path)
    prompts.make(texts, Accelerator(cpu=True))
    assert prompts.stored == stored and len(list(tmp_path.rglob("*.safetensors"))) == 2 * stored
    read = prompts.read(texts, torch.device("cpu"))
    batch = encode_prompt(pipe, texts, guided=False)
    assert {key for key in batch if not key.startswith("negative")} == read.keys()
    for argument, value in read.items():
        torch.testing.assert_close(value, batch[argument], rtol=0, atol=1e-5)


class Card:
    """A card as the trainer sees it, on the CPU: which networks are on it, and which may run."""

    def __init__(self, name, monkeypatch):
        self.pipe, self.holds, self.turns = families.pipeline(name), set(), 0
        self.encoders = placement.encoding_parts(self.pipe)
        monkeypatch.setattr(placement, "CPU", torch.device("meta"))  # anything that isn't the card
        monkeypatch.setattr(placement, "_is_on", lambda part, device: part in self.holds)
        for module in (placement, targets):
            monkeypatch.setattr(module, "move", self.move)

    def move(self, parts, device):
        (self.holds.difference_update if device.type == "meta" else self.holds.update)(parts)
        self.turns += device.type != "meta" and parts == self.encoders

    def watch(self, network, running):
        """Record in `running` what is on the card whenever a network runs."""
        return network.register_forward_pre_hook(lambda *_: running.append({*self.holds}))


@pytest.mark.parametrize(("name", "stored"), [("sd3", True), ("lumina_next", False)])
def test_text_encoders_and_denoiser_take_turns(train, monkeypatch, name, stored):
    """What runs is on the card; text encoders share it with the denoiser in training at most."""
    card = Card(name, monkeypatch)
    network, vae = denoiser(card.pipe), card.pipe.vae
    encoding, denoising, decoding = [], [], []
    handles = [card.watch(encoder, encoding) for encoder in card.encoders]
    handles += [card.watch(network, denoising), card.watch(vae.decoder, decoding)]
    try:
        train(name, "--target_batch_size", "1")
    finally:
        for handle in handles:
            handle.remove()
    assert encoding and denoising and decoding
    assert all(vae in holds and network in holds for holds in decoding)
    assert all({*card.encoders} <= holds for holds in encoding)
    assert all(network in holds for holds in denoising)
    shared = [holds for holds in encoding + denoising if {network, *card.encoders} <= holds]
    assert bool(shared) != stored
    assert card.turns <= 10, "all targets are encoded in one turn, and no sampling takes any"


def test_a_pipeline_that_reads_prompts_while_it_samples_stays_on_the_card(monkeypatch):
    card = Card("sd15", monkeypatch)
    pipe = SimpleNamespace(unet=card.pipe.unet, components=card.pipe.components)
    placement.taking_turns(pipe, torch.device("cpu"))
    assert card.holds == {card.pipe.unet, *card.encoders}


def test_a_full_card_is_no_full_disk(tmp_path, monkeypatch):
    """Running out of memory while prompts are encoded is told as what it is."""
    prompts = Embeds(families.pipeline("sd15"), tmp_path)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(embeds, "encode_prompt", full)
    with pytest.raises(torch.OutOfMemoryError):
        prompts.make(["a cat"], Accelerator(cpu=True))


def test_other_samplers_of_a_family(train):
    refiner, _ = train("sd3", "--sampler", "Heun", "--num_validation", "5")
    assert refiner.config.training["sampler"] == "Heun"
    assert refiner.config.training["num_validation"] == 2, "there are no more prompts"


def test_guidance_that_a_pipeline_lacks_is_refused_first(train, tmp_path):
    with pytest.raises(ValueError, match="no perturbed-attention guidance for Flux2KleinPipeline"):
        train("flux2_klein", "--pag_scale", "3")
    with pytest.raises(ValueError, match="no classifier-free guidance"):
        check_guidance(families.pipeline("lcm"), 4.0)
    assert not (tmp_path / "flux2_klein").exists()


@pytest.mark.parametrize(
    "name, arguments, says",
    [
        ("hunyuan_dit", (), "HunyuanDiT2DModel offers no gradient checkpointing"),
        ("chroma", (), "gives ChromaTransformer2DModel wrong gradients"),
        (
            "sd15",
            ("--network", "train.experiments.networks:Mlp"),
            "GaussianOfPrompt offers no gradient checkpointing",
        ),
    ],
)
def test_checkpointing_that_a_network_lacks_is_refused_first(
    train, tmp_path, name, arguments, says
):
    with pytest.raises(ValueError, match=f"{says}.*--gradient_checkpointing False"):
        train(name, "--gradient_checkpointing", "True", *arguments)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_a_cost(preset):
    """Every preset's options can be parsed; its cost is known, and quick means quick."""
    arguments = ["--preset", preset, "--output_dir", "x"]
    options, quick = parse(arguments), parse([*arguments, "--quick"])
    evaluations, fewer = (sum(plan(chosen)[1].values()) for chosen in (options, quick))
    assert fewer <= evaluations / 1.9 and (preset.startswith("emoji") or fewer <= 60_000)
    assert ("hours at" in describe(options)) == (preset in FORWARDS)
    if preset in FORWARDS:
        fitted = parse([*arguments, "--hours", "2"])
        hours = sum(plan(fitted)[1].values()) * FORWARDS[preset].teraflop / 200 / 3600
        assert hours == pytest.approx(min(2, hours), rel=0.02) and hours > 1.9


def test_hours_that_are_too_few():
    with pytest.raises(ValueError, match="too short: it is enough for"):
        parse(["--preset", "z-image", "--hours", "0.1", "--output_dir", "x"])


def test_costs_are_those_of_the_architectures():
    assert cost.count("sit") == FORWARDS["sit"]
    assert cost.count("sd21") == FORWARDS["sd21"]
    table = cost.cost("sd21", 200.0)
    assert table[0] == "sd21" and float(table[7]) == pytest.approx(19.7, abs=0.1)


def test_models_without_a_preset_have_no_cost(capsys):
    with pytest.raises(SystemExit):
        cost.main(["--models", "sd-turbo"])
    assert "invalid choice: 'sd-turbo'" in capsys.readouterr().err


def test_checkpointing_and_a_small_batch_need_less_memory():
    few, many = (
        tiers.activations("sit", batch, 4, checkpointing)
        for batch, checkpointing in ((1, True), (2, False))
    )
    assert 0 < few < many / 2


def test_normalised_queries_reach_attention_in_16_bits():
    """As under CUDA's autocast: attention takes one precision only, in the backward pass too."""
    assert tiers.activations("klein", 1, 4, True) > 0


def test_cards_with_the_same_options_share_a_row():
    nothing = {"preset": "sit", "options": {}, "peaks": None}
    peaks = {"encoding": 0.3, "sampling": 2.2, "training": 8.7}
    found = [
        nothing | {"card": 8},
        *(nothing | {"card": card, "peaks": peaks} for card in (12, 16)),
    ]
    assert cost.memory(found) == [
        ["sit, 8 GB", "does not fit", *["–"] * 3],
        ["sit, 12 to 16 GB", "`--preset sit`", "0.3", "2.2", "8.7"],
    ]


def test_options_for_a_card_are_the_first_that_fit(monkeypatch):
    """A card with room for the preset needs no options; a smaller one needs some that save."""
    monkeypatch.setattr(
        tiers, "activations", lambda _, batch, rank, checkpointing: batch / (1 + 9 * checkpointing)
    )
    for function in ("sampling_activations", "decoding_activations"):
        monkeypatch.setattr(tiers, function, lambda _: 0.1)
    assert tiers.fitting("sit", 24)["options"] == {}
    small = tiers.fitting("sit", 7)
    assert small["options"] == {"gradient_checkpointing": True, "target_batch_size": 16}
    assert max(small["peaks"].values()) < 6
    assert small["peaks"]["encoding"] < tiers.frozen_size("sit", False), "the denoiser is away then"
    assert tiers.fitting("sit", 1)["peaks"] is None
    assert tiers.frozen_size("sit", True) < 0.75 * tiers.frozen_size("sit", False)


def test_encoding_takes_more_for_more_prompts(monkeypatch):
    small = random_pipeline("sd21", "meta", torch.float16, small=True)
    monkeypatch.setattr(tiers, "meta_pipeline", lambda name: small)
    one, eight = (tiers.encoding_activations("a small SD2.1", prompts) for prompts in (1, 8))
    assert 0 < one < eight <= 8 * one


def test_every_preset_has_the_general_recipe():
    """What the paper fixed stays: N = 10 unguided steps in the loss, six or more epochs."""
    for preset in FORWARDS:
        options = default_options(preset)
        assert options.steps == 10 and options.epochs >= 6 and options.guidance_scale > 1
        assert options.mixed_precision != "no"


@pytest.mark.parametrize(
    ("module", "exhausting", "says"),
    [
        (validation, "encode_prompt", "to encode prompts .*with --target_batch_size 4, or "),
        (targets, "encode_prompt", "to encode prompts .*with --target_batch_size 4, or "),
        (targets, "sample_latents", "to sample targets .*with --target_batch_size 4, or "),
        (train_refiner, "msd_loss", "to train .*--gradient_checkpointing True, or --batch_size 1"),
    ],
)
def test_out_of_memory_names_what_helps(train, monkeypatch, module, exhausting, says):
    """In the stage in which it happens."""

    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(module, exhausting, exhausted)
    with pytest.raises(MemoryError, match=says):
        train("sd3")


def test_advice_on_memory_names_only_what_helps():
    """In that stage, with these options and this network."""
    sd3, chroma = (families.pipeline(name).transformer for name in ("sd3", "chroma"))
    training, calls = {"batch_size", "rank", "optimizer"}, {"target_batch_size", "rank"}
    checkpointing = {"gradient_checkpointing": True}
    for stage, network, changed, advised in (
        ("training", sd3, {}, {"gradient_checkpointing", *training}),
        ("training", chroma, {}, training),
        ("training", sd3, checkpointing, {"fp8", *training}),
        ("training", sd3, checkpointing | {"batch_size": 1}, {"fp8", "rank", "optimizer"}),
        ("training", chroma, {"mixed_precision": "no"}, {"mixed_precision", *training}),
        ("encoding", None, {}, calls),
        ("sampling", None, {}, calls),
        ("sampling", None, {"target_batch_size": 1}, {"rank"}),
        ("sampling", None, {"guidance_scale_range": [1.0, 8.0]}, {"rank"}),
        ("loading", None, {}, set()),
        ("loading", None, {"mixed_precision": "no"}, {"mixed_precision"}),
    ):
        options = parse(["--preset", "sd35-medium", "--output_dir", "x"])
        options = replace(options, **{"gradient_checkpointing": False} | changed)
        with pytest.raises(MemoryError) as raised, stage_advice(options, stage, network):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        named = {*re.findall(r"--(\w+)", str(raised.value))}
        named -= {"output_dir", "targets_of", "gradient_accumulation_steps"}
        assert named == advised, (stage, changed)


@pytest.mark.parametrize(
    ("accelerated", "abilities", "precision"),
    [
        (False, {"avx512_bf16": True}, "bf16"),
        (False, {"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        (False, {"avx512_f": True}, "no"),
        (True, {"avx512_bf16": True}, "no"),
    ],
)
def test_embedded_presets_take_the_quick_precision(monkeypatch, accelerated, abilities, precision):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerated)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    assert presets._quick_precision() == precision


def test_every_model_of_the_catalogue_has_a_preset():
    """A model that is converted here is trained from the folder that it is converted to."""
    for name, backbone in BACKBONES.items():
        assert backbone.preset in PRESETS, name
        if backbone.made_by:
            folder = backbone.made_by.split()[-1]
            assert backbone.source.endswith(folder)
            assert PRESETS[backbone.preset]["backbone"] == folder


def test_norms_are_counted_in_single_precision():
    """As CUDA's autocast runs them: a backward pass keeps their inputs."""
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1))
    network = autocast_as_on_cuda(network.to("meta", torch.float16))
    outputs = []
    for layer in network:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output.dtype))
    network(torch.empty(1, 4, 8, 8, device="meta", dtype=torch.float16))
    half, single = torch.float16, torch.float32
    assert outputs == [half, single, single, half]


def test_counted_peaks_are_near_those_measured_on_a_card():
    counted = {
        f"{row['preset']}, {row['card']} GB": row["peaks"]
        for row in json.loads((RESULTS / "tiers.json").read_text())
    }
    measured = cuda_table.results(json.loads((RESULTS / "cuda-h200.json").read_text()))
    found = [name for name, figures in measured.items() if "training_gib" in figures]
    assert found
    for name in found:
        for phase in ("sampling", "training"):  # prompts were encoded with every part on the card
            peak = counted[name][phase]
            assert abs(peak - measured[name][f"{phase}_gib"]) < 0.8, (name, phase)
