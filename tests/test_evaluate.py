import argparse
import json
import os

import numpy as np
import pytest
from accelerate import PartialState
from conftest import EMOJI, EMOJI_REFINER, perturbed, script
from PIL import Image

from noiserefine import Refiner
from train import evaluate
from train.benchmark import measure
from train.emoji.captions import build_tokenizer
from train.emoji.render import BACKGROUNDS, held_out_pairs, objects, prompt
from train.evaluate import frechet_distance


def test_frechet_distance():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 3)) * [1, 2, 3] + [0, 1, 0]
    assert frechet_distance(x, x.mean(0), np.cov(x, rowvar=False)) == pytest.approx(0, abs=1e-8)
    # Between axis-aligned Gaussians it is sum (mu - mu')^2 + (sigma - sigma')^2.
    assert frechet_distance(x, np.zeros(3), np.diag([1.0, 1.0, 1.0])) == pytest.approx(1 + 1 + 4, rel=0.05)


EVALUATE = ["train/evaluate.py", "--backbone", EMOJI, "--refiner", EMOJI_REFINER, "--n", "12", "--batch_size", "6", "--steps", "4", "--bootstrap", "20"]


def run(*arguments, **kwargs) -> str:
    with script(*arguments, **kwargs) as process:
        said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


def test_evaluate_runs_and_goes_on(tmp_path):
    """Every arm with its forwards and intervals; a second run measures only what is missing, and two processes measure the same."""
    forwards = {"gaussian": 4, "guided": 8, "pag": 8, "guided_pag": 12, "refined": 5, "refined_guided": 9}
    said = run(*EVALUATE, "--arms", *forwards, "--images", tmp_path / "images", "--output", tmp_path / "all.json")
    result = json.loads((tmp_path / "all.json").read_text())
    assert {name: arm["forwards"] for name, arm in result["arms"].items()} == forwards
    for name, arm in result["arms"].items():
        assert f"| {name} | {arm['object_accuracy']:.3f} [" in said and arm["seconds"] > 0 and arm["frechet_distance"] > 0
        for metric in ("object_accuracy", "background_accuracy"):
            low, high = arm[f"{metric}_interval"]
            assert 0 <= low <= arm[metric] <= high <= 1, metric
        # The Frechet distance of few images is biased upwards; its interval, which takes the bias off, may lie below it.
        assert arm["frechet_distance_interval"][0] < arm["frechet_distance_interval"][1]
    assert result["differences"]["refined"]["object_accuracy"] == pytest.approx(
        result["arms"]["refined"]["object_accuracy"] - result["arms"]["guided"]["object_accuracy"])
    assert Image.open(tmp_path / "images" / "refined" / "00011.png").size == (64, 64)

    (tmp_path / "all" / "refined-000006.npz").unlink()
    untouched = (tmp_path / "all" / "refined-000000.npz").stat().st_mtime_ns
    two = os.environ | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29518"}  # as accelerate launch does
    with script(*EVALUATE, "--output", tmp_path / "all.json", env=two | {"RANK": "1", "LOCAL_RANK": "1"}):
        run(*EVALUATE, "--output", tmp_path / "all.json", env=two | {"RANK": "0", "LOCAL_RANK": "0"})
    again = json.loads((tmp_path / "all.json").read_text())
    assert again["arms"].keys() == {"gaussian", "guided", "refined"} and (tmp_path / "all" / "refined-000000.npz").stat().st_mtime_ns == untouched
    for metric in ("object_accuracy", "frechet_distance_interval"):
        assert again["arms"]["refined"][metric] == pytest.approx(result["arms"]["refined"][metric])
    with script(*EVALUATE, "--strength", "0.5", "--output", tmp_path / "all.json") as process:
        assert "holds measurements of other settings" in process.communicate()[0] and process.returncode == 1


def test_intervals_resample_prompts(tmp_path, monkeypatch):
    """Images of one prompt are not independent: with all of them alike, the interval is that of the prompts."""
    pairs = np.repeat(np.array([[0, 0], [1, 0], [2, 0], [3, 0]]), 50, 0)
    monkeypatch.setattr(evaluate, "held_out_prompts", lambda n: (pairs, ["x"] * n))
    args = argparse.Namespace(output=tmp_path / "r.json", n=200, batch_size=200, arms=["gaussian"], bootstrap=400)
    measurement, rng = evaluate.Measurement(args, PartialState()), np.random.default_rng(0)
    measurement.begin()
    right = np.repeat([1.0, 0.0, 1.0, 0.0], 50)
    np.savez(measurement.file("gaussian", 0), features=rng.normal(size=(200, 128)) * 2, correct=np.stack([right, right], 1), forwards=200, seconds=1.0)
    arm = measurement.results(evaluate.Judge())["arms"]["gaussian"]
    assert arm["object_accuracy"] == 0.5 and arm["object_accuracy_interval"] == [0, 1], "0.43 to 0.57 if images were drawn one by one"
    assert arm["feature_variance"] == pytest.approx(4 * 128, rel=0.1) and arm["forwards"] == 1


def test_benchmark_runs(tmp_path):
    with script("train/benchmark.py", "--backbone", EMOJI, "--refiner", EMOJI_REFINER, "--rounds", "1", "--steps", "3",
                "--json", tmp_path / "benchmark.json") as process:
        assert process.wait() == 0, process.stdout.read()
    benchmark = json.loads((tmp_path / "benchmark.json").read_text())
    assert {name: arm["forwards"] for name, arm in benchmark["arms"].items()} == {"unguided": 3, "guided": 6, "refined": 4}
    assert benchmark["refined_over_guided"] > 0 and benchmark["refined_over_unguided"] > 0


def test_guidance_scales_run(tmp_path, pipe):
    perturbed(pipe, guidance_scale_range=[1, 5]).save_pretrained(tmp_path / "refiner")
    with script("train/guidance_scales.py", "--backbone", EMOJI, "--refiner", tmp_path / "refiner", "--n", "4", "--batch_size", "2", "--steps", "2",
                "--scales", "1", "3", "--output", tmp_path / "scales.json") as process:
        assert process.wait() == 0, process.stdout.read()
    result = json.loads((tmp_path / "scales.json").read_text())
    distances = np.array(result["distance_of_refined_to_guided"])
    assert distances.shape == (2, 2) and (distances > 0).all() and len(result["guided"]) == len(result["refined"]) == 2


def test_benchmark_of_random_weights(sdxl):
    settings = dict(backbone="sdxl", random_weights=True, batch_size=2, steps=2, rounds=1, warmup=0, sampler="Euler", mode="shared")
    result = measure(sdxl, Refiner.create(sdxl, 8), argparse.Namespace(**settings))
    assert {name: arm["forwards"] for name, arm in result["arms"].items()} == {"unguided": 2, "guided": 4, "refined": 3}
    assert 0 < result["refiner_bytes"] < result["unet_bytes"] < result["arms"]["refined"]["peak_bytes"]


def test_held_out_pairs_are_a_tenth_and_in_no_training_prompt():
    mask = held_out_pairs()
    assert mask.shape == (len(objects()), len(BACKGROUNDS)) and mask.sum() == mask.size // 10
    assert len(objects()) >= 150 and len(BACKGROUNDS) >= 12
    trained = set(open("assets/prompts/emoji.txt", encoding="utf-8").read().splitlines())
    held_out = open("assets/prompts/emoji_heldout.txt", encoding="utf-8").read().splitlines()
    assert held_out == [prompt(*pair) for pair in np.argwhere(mask)] and not trained & set(held_out)


def test_every_word_is_one_token(pipe):
    for tokenizer in (pipe.tokenizer, build_tokenizer()):
        for thing in objects():
            for name in (thing.name, *thing.synonyms):
                assert len(tokenizer.tokenize(name)) == len(name.split()), name
