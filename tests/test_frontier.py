"""Comparisons of whole methods by their forwards."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from noiserefine import draw_noise
from noiserefine.denoiser import ForwardCounter
from noiserefine.guidance import sample_latents
from noiserefine.noise import encode_prompt
from tests.conftest import EMOJI, EMOJI_REFINER, ROOT
from tests.families import FAMILIES, pipeline
from tests.test_families import PROMPTS, noise
from train.emoji.render import prompt
from train.experiments import compatibility, frontier, methods, variety
from train.experiments.bench import Bench
from train.experiments.methods import families, preference, sharpen
from train.measurement import Batch
from train.metrics import load_metrics

SMALL = ["--n", "2", "--batch_size", "2", "--bootstrap", "5", "--guidance_scale", "2"]
INK = str(ROOT / "assets" / "loras" / "emoji-ink")


@pytest.fixture(scope="module")
def small(tiny_folder, tiny_refiner):
    """Return the options of a comparison on a pipeline with random weights."""
    return [*SMALL, "--backbone", str(tiny_folder), "--refiner", str(tiny_refiner)]


@pytest.fixture(scope="module")
def judge():
    return load_metrics(["judge"], None, torch.device("cpu"))[0]


def test_the_frontier_tunes_measures_and_goes_on(small, tmp_path, capsys):
    """What exists is not made again."""
    output = tmp_path / "frontier.json"
    methods = ["unguided", "every 2", "refined DDIM"]
    arguments = [*small, "--tuning_n", "2", "--tuning_budget", "3"]
    arguments += ["--budgets", "3", "5", "--output", str(output)]
    frontier.main([*arguments, "--methods", "unguided", "cfg DDIM", "--dry_run"])
    assert "2 methods" in capsys.readouterr().out and not output.exists()
    with pytest.raises(ValueError, match="no method 'magic'"):
        frontier.main([*arguments, "--methods", "magic"])
    for name, least in (("n", 1), ("batch_size", 0), ("bootstrap", 0)):
        with pytest.raises(ValueError, match="must be at least 2"):
            frontier.main([*arguments, f"--{name}", str(least)])
    arguments += ["--methods", *methods]
    frontier.main(arguments)
    result = json.loads(output.read_text())
    costs = {name: arm["forwards"] for name, arm in result["arms"].items()}
    assert costs["unguided, 5 steps"] == 5
    for key in ("object_accuracy", "frechet_distance"):
        figure = result["figures"][key]
        assert figure["curves"].keys() == set(methods)
        assert [row["budget"] for row in figure["winners"]] == [3, 5]
        for row in figure["winners"]:
            affordable = [
                point["value"]
                for curve in figure["curves"].values()
                for point in curve
                if point["forwards"] <= row["budget"]
            ]
            best = max if "↑" in figure["title"] else min
            assert row["value"] == best(affordable)
            assert row["refined_minus_winner"]["value"] == pytest.approx(
                row["refined"]["value"] - row["value"]
            )
        refined = figure["curves"]["refined DDIM"]
        assert [point["forwards"] for point in refined] == [3, 5]
    assert result["tuning"]["n"] == 2 and "| 5 |" in capsys.readouterr().out
    assert Image.open(output.with_suffix(".png")).width > 1000

    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    frontier.main([*arguments, "--budgets", "3", "5", "4"])
    assert all(path.stat().st_mtime_ns == made[path] for path in made)
    assert "unguided, 4 steps" in json.loads(output.read_text())["arms"]
    with pytest.raises(ValueError, match="holds results of other settings"):
        frontier.main([*arguments, "--mixed_precision", "bf16"])


def test_tuning_and_evaluation_share_no_prompt(pipe, judge, tmp_path):
    bench = Bench(pipe, 2.0)
    (tmp_path / "few.txt").write_text("a cat\na dog\n")
    classes = str(ROOT / "assets" / "prompts" / "emoji_objects.txt")
    for options in ([], ["--prompts", classes, "--tuning_prompts", classes]):
        args = frontier.parse([*SMALL, *options, "--n", "300", "--output", "x.json"])
        evaluation, tuning = frontier.split_prompts(args, bench)
        assert len(evaluation) == 300 and len(tuning) == 200 and not set(evaluation) & set(tuning)
        assert {*evaluation, *tuning} <= judge.pairs.keys()
    few = str(tmp_path / "few.txt")
    (tmp_path / "same.txt").write_text("a cat\na dog\n")
    same = ["--prompts", str(tmp_path / "same.txt"), "--tuning_prompts", few]
    args = frontier.parse([*SMALL, *same, "--output", "x.json"])
    with pytest.raises(ValueError, match="tune on others"):
        frontier.split_prompts(args, bench)


def test_every_method_spends_what_it_says(pipe, refiner, judge):
    bench = Bench(pipe, 2.0, refiner, distilled=pipe, few_step=pipe, metrics=[judge])
    text = "a red apple on a blue background"
    batch = Batch(0, [text], draw_noise(pipe, 10**6), encode_prompt(pipe, [text]))
    found = families(bench, ["DDIM", "Heun (EDM)"])
    assert len(found) == 14
    for name, family in found.items():
        setting = family.settings[-1]
        steps = family.steps_within(5, setting)
        if not steps:
            assert family.least == 2 and family.forwards(2, setting) > 5, name
            continue
        with ForwardCounter().watch(pipe.unet, refiner.network) as counter:
            (image,) = family.images(batch, steps, setting)
        assert counter.count == family.forwards(steps, setting) <= 5, name
        assert image.size == (128, 128)


@pytest.mark.parametrize("usual", [1.2, 4.0])
def test_every_scale_that_is_tried_guides(pipe, judge, usual):
    """The usual one is the first; there are lower and higher ones, and none is 1 or below."""
    found = families(Bench(pipe, usual, metrics=[judge]), ["DDIM"])
    for name in ("cfg DDIM", "interval", "every 2"):
        usual_one, *others = [setting["g"] for setting in found[name].settings]
        assert usual_one == pytest.approx(usual)
        assert 1 < min(others) < usual < max(others)


def test_methods_that_need_what_is_not_given_are_left_out(pipe, judge):
    assert (
        not {"refined DDIM", "distilled", "few-step"}
        & families(Bench(pipe, 2.0, metrics=[judge]), ["DDIM"]).keys()
    )


def test_a_sharpened_embedding_lies_beyond_the_prompts(pipe):
    embeds = encode_prompt(pipe, ["a cat"])
    text, empty = embeds["prompt_embeds"], embeds["negative_prompt_embeds"]
    assert torch.equal(sharpen(embeds, 1.0)["prompt_embeds"], text)
    torch.testing.assert_close(sharpen(embeds, 3.0)["prompt_embeds"], empty + 3 * (text - empty))


def test_the_judge_prefers_the_image_of_the_prompt(judge):
    """The log probability of object and background; of the object alone for a class name."""
    image = Image.open(next((ROOT / "assets" / "opening").glob("*.png"))).convert("RGB")
    found, background, features = judge.judge.judge([image])
    own, other = prompt(found[0], background[0]), prompt((found[0] + 1) % 184, background[0])
    scores = [preference(judge, [image], [text])[0] for text in (own, other)]
    assert scores[0] > scores[1]
    heads = (judge.judge.object, judge.judge.background)
    logits = [head(torch.from_numpy(features).float()).log_softmax(1) for head in heads]
    expected = float(logits[0][0, found[0]] + logits[1][0, background[0]])
    assert scores[0] == pytest.approx(expected, abs=1e-4) and np.isfinite(scores).all()


def test_prompts_of_the_object_alone_leave_the_backgrounds_accuracy_to_the_others(judge):
    """It is 1 / 2 of those two, and unknown where no prompt names one."""
    rng, (some, none) = np.random.default_rng(0), ([1, 0, np.nan, np.nan], [np.nan] * 4)
    for backgrounds, expected in ((some, 0.5), (none, np.nan)):
        rows = {"features": rng.normal(size=(4, 128)), "correct": np.c_[[1, 1, 1, 0], backgrounds]}
        found = judge.summarise(rows, [np.arange(4)])
        assert found["object_accuracy"] == 0.75
        assert found["background_accuracy"] == pytest.approx(expected, nan_ok=True)


def test_the_judge_chooses_in_the_precision_that_it_measures_in(pipe, judge, monkeypatch):
    """Where images are made under autocast, too."""
    found = families(Bench(pipe, 2.0, metrics=[judge]), ["DDIM"])["best seed, 4 steps"]
    batch = Batch(0, ["a cat"], draw_noise(pipe, 10**6), encode_prompt(pipe, ["a cat"]))
    seen = []

    def prefer(*_):
        seen.append(torch.is_autocast_enabled("cpu"))
        return np.zeros(1)

    monkeypatch.setattr(methods, "preference", prefer)
    with torch.autocast("cpu", torch.bfloat16):
        found.images(batch, 2, {})
    assert seen == [False, False]


def test_vendi_score_counts_different_images():
    """Equal ones are one, orthogonal ones are all, two kinds are two."""
    eye = np.eye(4)
    assert variety.vendi_score(np.ones((4, 3))) == pytest.approx(1)
    assert variety.vendi_score(3 * eye) == pytest.approx(4)
    assert variety.vendi_score(eye[[0, 0, 1, 1]]) == pytest.approx(2)
    rows = {"features": eye, "inception_features": np.ones((4, 3))}
    of_judge = variety.Vendi("judge", None, torch.device("cpu")).summarise(rows, [np.arange(4)])
    assert of_judge["vendi_score"] == pytest.approx(4), "of the first metric's features"


def test_variety_is_compared_at_equal_quality():
    """Half way up the guided curve, from 10 to 6 of variety, are 8; beyond its top it ends."""
    estimates = {
        name: {"q": np.array([quality] * 3), "v": np.array([width] * 3)}
        for name, quality, width in (
            ("unguided", 0, 10),
            ("g 2", 1, 6),
            ("g 9", 0.5, 1),
            ("s 1", 0.5, 9),
            ("s 2", 2, 9),
        )
    }
    curves = {"guided": {"g 2": None, "g 9": None}, "refined": {"s 1": None, "s 2": None}}
    found = variety.matched(estimates, curves, "q", ["v"], sign=1)
    assert found == {"s 1": {"v": 1.0, "v_interval": [1.0, 1.0]}}, "s 2 is beyond guidance"


def test_variety_is_measured_over_seeds(small, tmp_path):
    output = tmp_path / "variety.json"
    arguments = [*small, "--n", "4", "--seeds", "2", "--steps", "2", "--output", str(output)]
    arguments += ["--scales", "3", "--strengths", "1"]
    variety.main([*arguments, "--sampler", "Heun (EDM)"])
    result = json.loads(output.read_text())
    assert result["prompts"] == 2 and result["arms"].keys() == {
        "unguided",
        "guided, g 3",
        "refined, strength 1",
    }
    for arm in result["arms"].values():
        assert 1 <= arm["vendi_score"] <= 2 and arm["feature_variance"] > 0
    assert result["arms"]["refined, strength 1"]["forwards"] == 1 + 3, "Heun takes 2 N - 1"
    assert Image.open(output.with_suffix(".png")).width > 1000
    with pytest.raises(ValueError, match="holds results of other settings"):
        variety.main(arguments)  # DDIM
    with pytest.raises(SystemExit):
        variety.parse([*arguments, "--n", "3"])


def test_compatibility(tmp_path, capsys):
    """Each condition has a gap of its own, or says why the model does not take it."""
    output = tmp_path / "compatibility.json"
    arguments = [*SMALL, "--backbone", EMOJI, "--refiner", EMOJI_REFINER, "--steps", "1"]
    arguments += ["--output", str(output), "--sizes", "64x128", "100x128"]
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        compatibility.main([*arguments, "--lora", INK, "--lora", str(tmp_path / "none")])
    assert not output.with_suffix("").exists(), "before anything is measured"
    ink = shutil.copytree(INK, tmp_path / "ink.1")
    style = ["--lora", str(ink), f"judge={ROOT / 'train/emoji/classifier-ink.safetensors'}"]
    compatibility.main(
        [*arguments, *style, "--negative_prompt", "a blue background", "--cache", "0.1"]
    )
    found = json.loads(output.read_text())["conditions"]
    assert "is not one of them" in found["size 100x128"]["impossible"]
    assert "caches no blocks of UNet" in found["first block cache 0.1"]["impossible"]
    measured = {name: each["arms"] for name, each in found.items() if "arms" in each}
    assert list(measured) == ["as trained", "LoRA ink.1", "size 64x128", "negative prompt"]
    settings = json.loads((output.with_suffix("") / "LoRA ink.1" / "settings.json").read_text())
    assert settings["about"]["judge"] == "classifier-ink.safetensors"
    assert (settings["about"]["sampler"], settings["about"]["steps"]) == ("DDIM", 1)
    assert len(settings["about"]["lora_sha256"]) == len(settings["about"]["judge_sha256"]) == 64
    for arms in measured.values():
        assert [arm["forwards"] for arm in arms.values()] == [1, 2, 2]
    first = [arms["gaussian"]["frechet_distance"] for arms in measured.values()]
    assert len(set(first)) == 3 and first[0] == first[3], "only guidance follows a negative prompt"
    guided = [measured[name]["guided"]["frechet_distance"] for name in measured]
    assert len(set(guided)) == 4
    assert "| LoRA ink.1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compatibility.parse([*arguments, "--sizes", "64"])


def test_cached_blocks_of_a_transformer(monkeypatch):
    """The images are others, and the same again: a call leaves nothing in the cache."""
    pipe, twin = pipeline("cogview4"), FAMILIES["cogview4"]()
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            twin.components[name].load_state_dict(part.state_dict())
    monkeypatch.setattr(compatibility, "load_pipeline", lambda *_: twin)
    bench, _ = compatibility.cached(Bench(pipe, 2.0), argparse.Namespace(backbone="", cache=0.9))
    x, embeds = noise(pipe), encode_prompt(pipe, PROMPTS)
    exact, fast, again = (
        sample_latents(model, x, embeds, 6) for model in (pipe, bench.pipe, bench.pipe)
    )
    assert not torch.equal(fast, exact) and torch.equal(fast, again)
