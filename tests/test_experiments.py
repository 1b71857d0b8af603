"""The experiments beside the refiner: other networks and losses, LoRAs on the denoiser, gradients,
and the report of all of them."""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file

from noiserefine import Refiner, draw_noise
from noiserefine.guidance import sample_latents
from noiserefine.inversion import ddim_inversion
from noiserefine.lora import UNET_TARGETS, matching
from noiserefine.models.catalogue import BACKBONES
from noiserefine.models.loading import load_pipeline
from noiserefine.models.user_lora import add_lora
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from tests.conftest import EMOJI, ROOT, output, perturbed
from tests.families import pipeline
from train import evaluate, train_refiner
from train.captions import held_out_prompts
from train.common import load_named
from train.emoji import style
from train.emoji.render import clay
from train.experiments import (
    compatibility,
    denoiser_lora,
    failures,
    frontier,
    inversion_error,
    latent_distance,
    noise_gradients,
    novelty,
    report,
    reproduce,
    study,
    study_figures,
    study_recipes,
    variety,
)
from train.experiments.denoiser_lora import read_targets
from train.experiments.losses import INVERSION_STEPS
from train.experiments.networks import Difference, Mlp
from train.experiments.noise_gradients import sample_with_gradient
from train.experiments.reproduce import NETWORKS, NOISE_LOSS
from train.experiments.trajectories import Trajectories
from train.metrics import load_metrics
from train.options import parse, plan

RUN = (
    "--validation_prompts= --num_targets 8 --target_steps 2 --steps 2 --batch_size 8 --epochs 1 "
    "--warmup_steps 0 --preset emoji --mixed_precision no "
    f"--prompts {ROOT}/assets/prompts/emoji.txt"
).split()


COMPARISONS = {
    f"train/experiments/{module.__name__.rpartition('.')[2]}.py": module.parse
    for module in (frontier, variety, compatibility)
} | {"train/experiments/study.py": lambda arguments: study.parse_all(arguments)[0]}


@pytest.fixture(scope="session")
def options(tiny_folder):
    """Return the options of a run of one step on a pipeline with random weights."""
    return [*RUN, "--backbone", str(tiny_folder)]


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """Return the pipeline of the run."""
    return load_pipeline(str(tiny_folder), "cpu")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate allows a process one precision."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, options):
    """A run of the trainer on inverted noise: its targets hold what every experiment here needs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("run")
    train_refiner.main([*options, "--loss", NOISE_LOSS, "--output_dir", str(folder)])
    return folder


def test_the_loss_in_noise_space_is_the_distance_to_the_inversion(run, tiny, options):
    """The refiner starts as the identity: the first loss is that of x_T itself."""
    state = load_file(next((run / "targets").iterdir()))
    first = json.loads((run / "stats.jsonl").read_text().splitlines()[0])["loss"]
    assert first == pytest.approx(
        (draw_noise(tiny, 0, 8) - state["inverted"]).pow(2).mean().item(), rel=1e-3
    )
    assert plan(parse([*options, "--loss", NOISE_LOSS, "--output_dir", "x"]))[1] == {
        "targets": (2 * 2 + INVERSION_STEPS) * 8,
        "training": 2 * 8,
    }


def test_inversion_is_undone_by_sampling(pipe):
    """Better the more steps there are; not perfectly (appendix A.11)."""
    ddim, embeds = (
        with_sampler(pipe, "DDIM"),
        encode_prompt(
            pipe, ["a red apple on a blue background", "a panda on a pink background"], guided=False
        ),
    )
    x0 = sample_latents(ddim, draw_noise(pipe, 3, 2), embeds, 20, 0)
    errors = [
        (sample_latents(ddim, ddim_inversion(pipe, x0, embeds, steps), embeds, steps, 0) - x0)
        .pow(2)
        .mean()
        for steps in (5, 40)
    ]
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.3 * x0.var()
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks(name, pipe, tmp_path):
    before, x_T, kind = output(pipe), draw_noise(pipe, 0, 2), load_named("network", NETWORKS[name])
    torch.manual_seed(0)
    network = kind.create(pipe, 8)
    start = network(x_T, ["a cat", "a dog"])
    assert ((start - x_T).abs().max() < 1e-5) == (name != "raw"), "raw alone does not start at x_T"
    pipe.unet.requires_grad_(False)
    trained = [parameter for parameter in network.network.parameters() if parameter.requires_grad]
    assert len(trained) == len(network.trained()) > 0
    for parameter in trained:
        parameter.data += 0.02 * torch.randn_like(parameter)
    refined = network(x_T, ["a cat", "a dog"])
    assert (refined - start).abs().mean() > 1e-3
    network.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, pipe)
    assert type(again) is kind and torch.equal(again(x_T, ["a cat", "a dog"]), refined)
    assert torch.equal(output(pipe), before)
    for refused in ({"guidance_scale_range": [1, 2]}, {"layers": "attn"}):
        with pytest.raises(ValueError, match=r"takes no guidance scale|leave --layers out"):
            kind.create(pipe, 8, **refused)
    with pytest.raises(FileNotFoundError, match="is not a refiner"):
        Refiner.from_pretrained(tmp_path, pipe)


def test_networks_of_a_unet_refuse_other_models(sdxl, tmp_path):
    """In words, before any target is made."""
    for name in NETWORKS.values():
        with pytest.raises(ValueError, match="UNets only; .* is a SD3Transformer2DModel"):
            load_named("network", name).create(pipeline("sd3"), 8)
    with pytest.raises(ValueError, match="network mlp takes UNets that read .* alone"):
        Mlp.create(sdxl, 8)
    options = ["--loss", "images", "--steps", "1", "--output_dir", str(tmp_path)]
    options += ["--targets", str(tmp_path), "--backbone", str(ROOT / "assets" / "emoji-sit")]
    with pytest.raises(ValueError, match="UNets only; .* is a DiTTransformer2DModel"):
        denoiser_lora.main(options)


def test_difference_takes_two_forwards(pipe):
    network, count = Difference.create(pipe, 8), []
    handles = [
        unet.register_forward_pre_hook(lambda module, inputs: count.append(1))
        for unet in (pipe.unet, network.network)
    ]
    network(draw_noise(pipe, 0), "a cat")
    for handle in handles:
        handle.remove()
    assert len(count) == 2


def test_a_network_is_trained_in_the_refiners_place(tmp_path, tiny, options):
    arguments = ["--network", NETWORKS["mlp"], "--epochs", "3", "--output_dir", str(tmp_path)]
    train_refiner.main([*options, *arguments])
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0]
    x_T = draw_noise(tiny, 0)
    assert not torch.equal(Mlp.from_pretrained(tmp_path, tiny)(x_T, "a cat"), x_T)
    with pytest.raises(ValueError, match="is a mlp, not a difference"):
        Difference.from_pretrained(tmp_path, tiny)


def test_trajectories(pipe, sdxl):
    for model in (pipe, sdxl):  # v and epsilon
        path, (x0, noise) = Trajectories(model), torch.randn(2, 3, 4, 8, 8)
        t = torch.tensor([999, 500, 1])
        found = path.x0_and_noise(t, path.at(t, x0, noise), path.truth(t, x0, noise))
        torch.testing.assert_close(found[0], x0, rtol=0, atol=1e-3)
        torch.testing.assert_close(found[1], noise, rtol=0, atol=1e-3)
        assert torch.equal(path.at(torch.tensor([-1, -1, -1]), x0, noise), x0)


@pytest.fixture
def distil(run, tiny_folder, tmp_path):
    """Return what trains a LoRA on the denoiser of the run, and returns its folder."""

    def distil(loss: str, steps: int, batch_size: int = 4, lr: float = 1e-3) -> str:
        arguments = f"--loss {loss} --steps {steps} --batch_size {batch_size} --lr {lr} --rank 8"
        folders = ["--targets", run, "--backbone", tiny_folder, "--output_dir", tmp_path / "lora"]
        denoiser_lora.main([*arguments.split(), *map(str, folders)])
        return str(tmp_path / "lora")

    return distil


@pytest.mark.parametrize("loss", denoiser_lora.EVALUATIONS)
def test_loras_on_the_denoiser(loss, distil, tiny_folder):
    pipe = load_pipeline(str(tiny_folder), "cpu")
    before = output(pipe)
    assert add_lora(pipe, distil(loss, 3)) == "" and not torch.equal(output(pipe), before)


def test_guidance_distillation_learns(run, distil, tiny_folder):
    """Unguided, the student comes nearer to what its teacher predicts guided."""
    pipe, (latents, prompts, scale) = load_pipeline(str(tiny_folder), "cpu"), read_targets(run)
    embeds, path = encode_prompt(pipe, prompts), Trajectories(pipe)
    t = torch.full((len(latents),), 800)
    x = path.at(t, latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)))

    @torch.no_grad()
    def predict(name):
        return pipe.unet(x, t, embeds[name]).sample

    teacher = predict("negative_prompt_embeds") + scale * (
        predict("prompt_embeds") - predict("negative_prompt_embeds")
    )
    unguided = (predict("prompt_embeds") - teacher).pow(2).mean()
    add_lora(pipe, distil("guidance", 25, batch_size=8))
    assert (predict("prompt_embeds") - teacher).pow(2).mean() < 0.9 * unguided


def test_denoiser_lora_refuses(run, tmp_path):
    images = ["--loss", "images", "--output_dir", str(tmp_path)]
    nothing, targets = ["--targets", str(tmp_path)], ["--targets", str(run)]
    with pytest.raises(FileNotFoundError, match="holds no targets"):
        denoiser_lora.main([*images, *nothing, "--steps", "1"])
    with pytest.raises(SystemExit):
        denoiser_lora.main([*images, *nothing])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds results of other settings"):
        denoiser_lora.main([*images, *targets, "--steps", "1"])


def test_the_full_gradient_goes_through_every_step(pipe):
    """Its x0 is the pipeline's, and its gradient that of finite differences."""
    ddim, embeds = with_sampler(pipe, "DDIM"), encode_prompt(pipe, "a cat", guided=False)
    x = draw_noise(pipe, 0).requires_grad_(True)
    x0, passed = sample_with_gradient(ddim, x, embeds, 3)
    torch.testing.assert_close(x0, sample_latents(ddim, x, embeds, 3, 0), rtol=0, atol=1e-5)
    assert len(passed) == 3
    x0.pow(2).sum().backward()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    sides = [
        sample_latents(ddim, x.detach() + step * direction, embeds, 3, 0).double().pow(2).sum()
        for step in (-1e-2, 1e-2)
    ]
    assert (x.grad * direction).sum().item() == pytest.approx(
        ((sides[1] - sides[0]) / 2e-2).item(), rel=0.02
    )


def test_scripts_write_their_figures(tmp_path, tiny_folder, capsys):
    g, i = tmp_path / "g.json", tmp_path / "i.json"
    backbone = f"--backbone {tiny_folder}"
    sizes = "--n 5 --steps 2 --iterations 8 --rows 8 --lr 0.05"
    files = f"--output {g} --plot {tmp_path / 'g.png'}"
    noise_gradients.main(f"{backbone} {sizes} {files}".split())
    result = json.loads(g.read_text())
    for name in ("msd", "full"):
        assert np.mean(result[name]["loss"][-1]) < np.mean(result[name]["loss"][0]), (
            "both gradients lead downhill"
        )
    assert len(result["jacobian"]) == 2 and all(
        row["diagonal"] > 3 * row["off_diagonal"] for row in result["jacobian"]
    )
    assert Image.open(tmp_path / "g.png").width > 500
    inversion_error.main(f"{backbone} --n 2 --steps 3 20 --output {i}".split())
    steps = json.loads(i.read_text())["steps"]
    assert steps["20"]["psnr"] > steps["3"]["psnr"] > 0
    assert "| full gradient |" in capsys.readouterr().out


def test_novelty_finds_a_copy(tmp_path):
    """Images whose features are a training picture's are at distance 0 of it."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 110), ("heldout", 6)):
        np.save(
            tmp_path / f"{name}_pictures.npy",
            rng.integers(256, size=(count, 128, 128, 3), dtype=np.uint8),
        )
    judge = load_metrics(["judge"], None, torch.device("cpu"))[0].judge
    copies = judge.judge(
        [Image.fromarray(picture) for picture in np.load(tmp_path / "train_pictures.npy")[:4]]
    )[2]
    (tmp_path / "measured").mkdir()
    np.savez(tmp_path / "measured" / "copied-000000.npz", features=copies)
    np.savez(tmp_path / "measured" / "other-000000.npz", features=copies + 1)
    folders, output = f"--pictures {tmp_path} --measured", f"--output {tmp_path / 'n.json'}"
    with pytest.raises(FileNotFoundError, match="holds no measurements"):
        novelty.main(f"{folders} {tmp_path} {output}".split())
    novelty.main(f"{folders} {tmp_path / 'measured'} {output}".split())
    result = json.loads((tmp_path / "n.json").read_text())
    assert (
        result["copied"]["distance"] == pytest.approx(0, abs=1e-2)
        and result["other"]["distance"] > 1
        and result["held-out renders"]["distance"] > 0.1
    )


def test_a_style_is_learnt(tmp_path):
    """From pictures to a LoRA that the pipeline takes; the artwork of one is a folder of images
    named after code points."""
    Image.new("RGBA", (8, 8), "red").save(tmp_path / "1f34e.webp")
    assert clay("🍎", tmp_path).size == (8, 8)
    with pytest.raises(FileNotFoundError, match="fluent-emoji-3d"):
        clay("🍎", tmp_path / "nothing")
    rng = np.random.default_rng(0)
    np.save(
        tmp_path / "train_pictures.npy", rng.integers(256, size=(8, 128, 128, 3), dtype=np.uint8)
    )
    np.save(
        tmp_path / "train_classes.npy",
        np.stack([rng.integers(184, size=8), rng.integers(12, size=8)], 1),
    )
    sizes = "--steps 2 --batch_size 4 --rank 8"
    style.main(f"--pictures {tmp_path} --output_dir {tmp_path / 'lora'} {sizes}".split())
    pipe = load_pipeline(EMOJI, "cpu")
    before = output(pipe)
    assert add_lora(pipe, str(tmp_path / "lora")) == "" and not torch.equal(output(pipe), before)


def test_a_model_of_the_catalogue_may_be_a_lora(distil, tiny_folder, tmp_path, monkeypatch):
    """It is folded into the UNet, which then has no adapter, and takes the base's refiner."""
    lora = distil("consistency", 2, lr=0.1)
    plain = load_pipeline(str(tiny_folder), "cpu")
    entry = replace(BACKBONES["emoji"], source=str(tiny_folder), lora=lora)
    monkeypatch.setitem(BACKBONES, "fast", entry)
    pipe = load_pipeline("fast", "cpu")
    perturbed(plain, rank=4).save_pretrained(tmp_path / "refiner")
    add_lora(plain, lora)
    torch.testing.assert_close(output(pipe), output(plain), rtol=0, atol=1e-4)
    assert not any(isinstance(layer, BaseTunerLayer) for layer in pipe.unet.modules())
    with pytest.warns(UserWarning, match="fine-tune"):
        Refiner.from_pretrained(tmp_path / "refiner", pipe)


def test_failures_are_shown(tiny_folder, tiny_refiner, tmp_path, monkeypatch):
    """Every failure has a sheet with its arms for rows, and a table with its figures."""
    few = {
        name: failure._replace(arms=tuple(arm._replace(steps=1) for arm in failure.arms[-2:]))
        for name, failure in failures.FAILURES.items()
    }
    for name in ("UNGUIDED", "GUIDED"):
        monkeypatch.setattr(failures, name, getattr(failures, name)._replace(steps=1))
    monkeypatch.setattr(failures, "FAILURES", few)
    page = tmp_path / "failures.md"
    models = ["--backbone", str(tiny_folder), "--refiner", str(tiny_refiner)]
    output = ["--output", str(tmp_path / "failures.json"), "--page", str(page)]
    failures.main([*models, "--guidance_scale", "2", "--n", "2", *output])
    text = page.read_text()
    for name, failure in few.items():
        assert failure.text in text
        assert all(f"| {arm.title} |" in text for arm in failure.arms)
        has_columns = not failure.right_unguided  # of a random model no image is right
        assert (f"(failures-{name}.webp)" in text) == has_columns
    sheet = Image.open(tmp_path / "failures-several-objects.webp")
    assert sheet.size == (2 * failures.SIDE, 2 * failures.SIDE)
    assert text.count("| guided | 0 of 2 | 0.000 |") == 3, "it is no way from itself"


def test_every_experiment_is_a_command_that_its_script_takes(tmp_path):
    chosen = reproduce.experiments(tmp_path)
    for name, commands in chosen.items():
        for command in commands:
            assert (ROOT / command.script).is_file(), name
            if command.script == "train/train_refiner.py":
                assert parse(list(command.options)).output_dir == str(command.result.parent)
            elif command.script == "train/evaluate.py":
                assert evaluate.parse(list(command.options)).output == command.result
            elif parse_options := COMPARISONS.get(command.script):
                assert parse_options(list(command.options)).output == command.result
    assert plan(parse(list(chosen["table1"][1].options)), 1)[1]["training"] == reproduce.BUDGET, (
        "as many evaluations as the refiner's"
    )
    files = {
        command.copy.stem
        for commands in chosen.values()
        for command in commands
        if command.copy and command.copy.suffix == ".json"
    }
    assert {file for _, files, _, _ in report.SECTIONS for file in files} == files
    made = {str(command.result) for commands in chosen.values() for command in commands}
    made |= {
        str(command.copy.relative_to(ROOT))
        for commands in chosen.values()
        for command in commands
        if command.copy
    }
    for commands in chosen.values():
        for command in (command for command in commands if command.script == "train/evaluate.py"):
            asked = evaluate.parse(list(command.options))
            assert asked.backbone in (*BACKBONES, "assets/emoji")
            judges = [
                str(ROOT / metric.removeprefix("judge="))
                for metric in asked.metrics
                if metric != "judge"
            ]
            loras = [f"{asked.lora}/pytorch_lora_weights.safetensors"] if asked.lora else []
            refiners = (
                [f"{asked.refiner}/refiner.json"]
                if asked.refiner and asked.refiner != reproduce.REFINER
                else []
            )
            assert {*judges, *loras, *refiners} <= made, command


def test_a_command_is_run_once(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "kept")
    (tmp_path / "r" / "x").mkdir(parents=True)
    (tmp_path / "r" / "x" / "refined.webp").touch()
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda words, **_: (ran.append(words), (tmp_path / "r" / "x.json").write_text("{}")),
    )
    command = reproduce.Command(
        "train/evaluate.py", ("--n", "2"), tmp_path / "r" / "x.json", tmp_path / "kept" / "x.json"
    )
    command.run()
    command.run()
    shutil.rmtree(tmp_path / "r")
    command.run()
    assert len(ran) == 1 and {path.name for path in (tmp_path / "kept").iterdir()} == {
        "x.json",
        "x-refined.webp",
    }


def test_the_kept_report_is_of_the_kept_results(tmp_path, monkeypatch):
    """Made again of them it is the same, and its pictures are there."""
    text = (reproduce.RESULTS / "report.md").read_text()
    assert all((reproduce.RESULTS / name).is_file() for name in re.findall(r"\]\(([^)]+)\)", text))
    shutil.copytree(reproduce.RESULTS, tmp_path / "kept")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "kept")
    report.main([])
    assert (tmp_path / "kept" / "report.md").read_text() == text


def test_the_report_has_a_section_for_every_experiment(tmp_path, monkeypatch, capsys):
    """Of made-up results; what is missing is named."""
    metrics = ("object_accuracy", "background_accuracy", "frechet_distance", "feature_variance")
    arm = (
        {"forwards": 20.0}
        | {metric: 0.5 for metric in metrics}
        | {f"{metric}_interval": [0.4, 0.6] for metric in metrics}
    )
    result = {
        "n": 1000,
        "prompts": 220,
        "first_seed": 10**6,
        "arms": {name: arm for name in ("gaussian", "guided", "refined", "refined_guided")},
    }
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name in {file for _, files, _, _ in report.SECTIONS for file in files}:
        (tmp_path / f"{name}.json").write_text(
            json.dumps(result | {"results": {"validation_refined": 0.25}})
        )
    value = {"value": 0.5, "interval": [0.4, 0.6]}
    point = value | {"forwards": 20.0}
    row = value | {"budget": 20, "winner": "unguided, 20 steps", "refined_minus_winner": value}
    tuning = {"n": 200, "prompts": 184, "budget": 20}
    curve = {
        "title": "object accuracy ↑",
        "curves": {"unguided": [point]},
        "winners": [row | {"refined": value | {"arm": "refined DDIM, 19 steps"}}],
    }
    methods = {"tuning": tuning, "titles": {"unguided": "unguided, DDIM"}}
    varied = arm | {"vendi_score": 2.0, "vendi_score_interval": [1.9, 2.1]}
    seeds = {
        "seeds": 16,
        "steps": 20,
        "quality": "object_accuracy",
        "varieties": ["vendi_score"],
        "titles": {"object_accuracy": "object accuracy ↑", "vendi_score": "Vendi score ↑"},
        "curves": {"guided": ["unguided"]},
        "arms": {"unguided": varied},
        "refined_minus_guided": {"refined": {"vendi_score": 0.1, "vendi_score_interval": [0, 1]}},
    }
    closed = {"object_accuracy": 0.75, "object_accuracy_interval": [0.7, 0.8]}
    timed = {"guided": {"seconds": 0.4}, "refined": {"seconds": 0.2}}
    asked = {
        "as trained": {"arms": timed, "gap_closed": closed},
        "negative prompt": {"impossible": "SiTPipeline takes no negative prompt."},
    }
    gained = {"percent_of_the_way": 40.0, "percent_of_the_way_interval": [38.0, 42.0]}
    gained |= {"object_accuracy": 0.5, "object_accuracy_interval": [0.4, 0.6]}
    trained = {"optimizer_steps": 184, "megabytes": 2.7, "seconds_of_steps": 9.0} | gained
    trained |= {"evaluations": {"targets": 1000, "training": 2000}}
    varied_recipes = {
        "base": trained | {"factor": "base", "value": None},
        "rank=4": trained | {"factor": "rank", "value": 4},
        "teacher=apg": trained | {"factor": "teacher", "value": "apg"},
    }
    base = reproduce.PRESETS["emoji"] | {"n": 512, "teacher": "cfg", "layers": None}
    studied = {"settings": base, "recipes": varied_recipes}
    for model in reproduce.MODELS:
        for name, made in (
            ("frontier", methods | {"figures": {"object_accuracy": curve}}),
            ("variety", seeds),
            ("compatibility", {"steps": 20, "conditions": asked}),
            ("study", studied),
        ):
            (tmp_path / f"{name}-{model}.json").write_text(json.dumps(result | made))
    (tmp_path / "inversion.json").write_text(
        json.dumps({"n": 2, "steps": {"10": {"psnr": 12.0, "psnr_interval": [11, 13]}}})
    )
    one = {"loss": [[1.0], [0.5]], "gradient_norm": [[1.0], [2.0]]}
    (tmp_path / "gradients.json").write_text(
        json.dumps(
            {
                "n": 1,
                "steps": 2,
                "lr": 0.1,
                "msd": one,
                "full": one,
                "jacobian": [{"t": 1, "diagonal": 1.0, "off_diagonal": 0.01}],
            }
        )
    )
    (tmp_path / "novelty.json").write_text(
        json.dumps(
            {
                "refined": {
                    "n": 2,
                    "distance": 1.0,
                    "distance_interval": [0.9, 1.1],
                    "fifth_percentile": 0.5,
                }
            }
        )
    )
    report.main([])
    text = (tmp_path / "report.md").read_text()
    assert (
        all(f"## {title}" in text for title, *_ in report.SECTIONS)
        and "Not measured yet" not in text
    )
    assert "| refined, unguided | 0.500 [0.400, 0.600] |" in text and "42.71" in text
    assert "| refined, unguided | ![refined, unguided](base-refined.webp) |" in text
    assert "| 20 | unguided, 20 steps | 0.500 [0.400, 0.600] | refined DDIM, 19 steps |" in text
    assert "| as trained | 75 [70, 80] | 0.400 / 0.200 |" in text
    assert "| negative prompt | SiTPipeline takes no negative prompt. |" in text
    assert "| rank | 4 | 184 | 3,000 | 2.7 | 9 | 40 [38, 42] | 0.500 [0.400, 0.600] |  |" in text
    drawn = ("frontier", "variety", "study")
    assert all((tmp_path / f"{name}-emoji-sit.png").is_file() for name in drawn)
    assert (tmp_path / "study.png").is_file()
    (tmp_path / "mlp.json").unlink()
    report.main([])
    text = (tmp_path / "report.md").read_text()
    assert (
        "## Not measured yet\n\nA Gaussian for every prompt (table 10)." in text
        and "217.30" not in text
    )
    assert (
        f"{len(report.SECTIONS) - 1} of {len(report.SECTIONS)} sections" in capsys.readouterr().out
    )


def test_latent_distances_by_rank_and_steps(tiny_folder, tiny, tmp_path):
    """A refiner that was compressed to almost its rank stays near it; a useless one goes no way."""
    perturbed(tiny, rank=4).save_pretrained(tmp_path / "refiner")
    models = f"--backbone {tiny_folder} --refiner {tmp_path / 'refiner'} --guidance_scale 3"
    sizes = f"--ranks 3 1 --steps 3 2 --n 4 --batch_size 3 --output {tmp_path / 'd.json'}"
    latent_distance.main(f"{models} {sizes}".split())
    rows = json.loads((tmp_path / "d.json").read_text())["results"]
    assert [(row["steps"], row["rank"]) for row in rows] == [(3, 4), (3, 3), (3, 1), (2, 4)]
    assert rows[0]["megabytes"] > rows[1]["megabytes"] > rows[2]["megabytes"] > 0
    whole, near, far = (row["refined"] for row in rows[:3])
    assert abs(near - whole) < abs(far - whole)
    assert rows[0]["percent"] == pytest.approx(100 * (1 - whole / rows[0]["gaussian"]))
    assert all(4 * row["nearer"] in range(5) for row in rows)

    # Fewer steps are compared with the same guided image.
    pipe, size = with_sampler(tiny, "DDIM"), argparse.Namespace(batch_size=4, guidance_scale=3.0)
    size.steps = [3]
    batches = latent_distance.guided_batches(pipe, held_out_prompts(4), size)
    takes_scale = {4: perturbed(tiny, rank=4, guidance_scale_range=[1, 4])}
    expected = latent_distance.distances(pipe, takes_scale, batches, 2, 3.0)["gaussian"].mean()
    assert rows[-1]["gaussian"] == pytest.approx(expected, rel=1e-3)
    equal = latent_distance.percent_of_the_way(np.ones(5), np.zeros(5))
    assert equal == (100, [100, 100])


@pytest.fixture
def study_options(tiny_folder, tmp_path):
    """Return what a study of the pipeline with random weights takes."""
    measured = f"{ROOT}/assets/prompts/emoji_heldout.txt"
    files = ["--backbone", str(tiny_folder), "--output", str(tmp_path / "s.json")]
    return [*RUN, "--validation_prompts", measured, "--rank", "2", "--n", "4", *files]


def test_a_study_measures_each_recipe_once(tmp_path, tiny, study_options, monkeypatch):
    """A later call with more factors trains and measures only what is new.

    Its refiners take the guidance scale.
    """
    study_options += ["--guidance_scale_range", "1", "8"]
    trained, run = [], train_refiner.run
    monkeypatch.setattr(study, "STEPS", 2)
    monkeypatch.setattr(
        train_refiner, "run", lambda o: (trained.append(Path(o.output_dir).name), run(o))
    )
    study.main([*study_options, "--factors", "rank=2,4", "strength=2"])
    assert trained == ["targets-8", "base", "rank=4"]
    study.main([*study_options, "--factors", "rank=4", "num_targets=4"])
    assert trained[3:] == ["num_targets=4"]
    elsewhere = ["--work_dir", str(tmp_path / "elsewhere")]
    study.main([*study_options, *elsewhere, "--factors", "rank=2,4"])
    assert trained[4:] == [] and not (tmp_path / "elsewhere" / "arms.npz").exists()
    result = json.loads((tmp_path / "s.json").read_text())
    found, settings = result["recipes"], result["settings"]
    assert all(
        study_recipes.base_value(settings, factor) is not None for factor in study_recipes.FACTORS
    )
    assert not (tmp_path / "s" / "rank=4").exists()
    assert list(found) == ["base", "strength=2.0", "rank=4", "num_targets=4"]
    assert found["base"]["megabytes"] < found["rank=4"]["megabytes"]
    assert found["num_targets=4"]["optimizer_steps"] == found["base"]["optimizer_steps"] == 1
    assert (tmp_path / "s.png").is_file() and "| rank | 4 | 1 |" in study_figures.table(result)
    with pytest.raises(ValueError, match="study of other settings"):
        study.main([*study_options, "--n", "5"])

    # The share of the distance, by the refiner that was left behind.
    refiner = Refiner.from_pretrained(tmp_path / "s" / "base", tiny)
    pipe = with_sampler(tiny, settings["sampler"])
    settings = argparse.Namespace(batch_size=4, guidance_scale=2.0, steps=[study.STEPS])
    batches = latent_distance.guided_batches(pipe, held_out_prompts(4), settings)
    distances = latent_distance.distances(pipe, {2: refiner}, batches, study.STEPS, 2.0)
    percent, _ = latent_distance.percent_of_the_way(distances["gaussian"], distances[2])
    assert found["base"]["percent_of_the_way"] == pytest.approx(percent, rel=1e-3)
    assert found["strength=2.0"]["percent_of_the_way"] != found["base"]["percent_of_the_way"]


def test_a_study_that_is_ended_ends_its_processes(monkeypatch):
    pool = SimpleNamespace(submit=lambda _: None, shutdown=lambda cancel_futures: None)
    monkeypatch.setattr(study, "Pool", lambda *_: pool)
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    with pytest.raises(KeyboardInterrupt), study.processes((argparse.Namespace(jobs=2), None, 0)):
        os.kill(os.getpid(), signal.SIGTERM)
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_other_layers_of_the_base_recipe_come_first():
    varied = {"layers=outer": {"factor": "layers", "value": "outer"}}
    result = {"settings": {"layers": "conv_in"}, "recipes": varied | {"base": {"factor": "base"}}}
    values = [value for value, _ in study_figures.points(result, "layers")]
    assert values == ["conv_in", "outer"]


def test_gap_closed_is_a_share_of_means():
    unguided, refined, guided = np.array([0, 0, 0, 0]), np.array([1, 0, 1, 0]), np.ones(4)
    percent, (low, high) = latent_distance.percent_of_the_way(unguided, refined, guided)
    assert percent == 50 and 0 <= low < 50 < high <= 100


def test_a_study_says_what_it_costs(study_options, tmp_path, capsys):
    factors = ["num_targets=4,16", "teacher=apg", "strength=2"]
    study.main([*study_options, "--factors", *factors, "--dry_run"])
    text = capsys.readouterr().out
    training, measuring = 8 * (1 + 2 + 1), 4 * (study.STEPS + 1)
    assert f"| num_targets=16 | 1 | 0 | {training} | {measuring} |" in text
    assert f"| teacher=apg | 1 | {8 * 4} | {training} | {measuring} |" in text
    arms, total = 4 * 3 * study.STEPS, 16 * 4 + 8 * 4 + 4 * training + 5 * measuring
    assert f"{total + arms:,} with 16 shared targets" in text
    assert not (tmp_path / "s").exists()
    for factor, says in (
        ("ranks=2", "no factor 'ranks'"),
        ("rank=two", "no list like rank=4,8"),
        ("rank=0", "--rank must be above 0"),
        ("strength=9", "strength is a number from 0"),
        ("teacher=cgf", "There is no teacher 'cgf'"),
        ("layers=inner", "layers is attention, or outer"),
    ):
        with pytest.raises(ValueError, match=says):
            study.main([*study_options, "--factors", factor, "--dry_run"])


def test_a_study_names_layers(pipe):
    """Attention, and the outer blocks, are some of the layers that would get a LoRA."""
    names = {"emoji": matching(pipe.unet, UNET_TARGETS, "")}
    for model in ("emoji-flow", "emoji-sit"):
        config = json.loads((ROOT / "assets" / "refiners" / model / "refiner.json").read_text())
        names[model] = config["target_modules"]
    assert names.keys() == study_recipes.LAYERS.keys()
    for model, layers in names.items():
        for pattern in (study_recipes.ATTENTION, study_recipes.LAYERS[model]):
            share = sum(bool(re.search(pattern, name)) for name in layers) / len(layers)
            assert 0.1 < share < 0.8, (model, pattern)
