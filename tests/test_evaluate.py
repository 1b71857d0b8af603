import argparse
import json

import numpy as np
import pytest
from conftest import EMOJI, EMOJI_REFINER, perturbed, script
from PIL import Image

from noiserefine import Refiner
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


def test_evaluate_and_benchmark_run(tmp_path):
    with script("train/evaluate.py", "--backbone", EMOJI, "--refiner", EMOJI_REFINER, "--n", "12", "--batch_size", "6", "--steps", "4",
                "--bootstrap", "20", "--output", tmp_path / "results.json", "--images", tmp_path / "images") as process:
        assert process.wait() == 0, process.stdout.read()
    result = json.loads((tmp_path / "results.json").read_text())
    assert [result["arms"][arm]["forwards"] for arm in ("gaussian", "guided", "refined")] == [4, 8, 5]
    for arm in result["arms"].values():
        for name in ("object_accuracy", "background_accuracy"):
            low, high = arm[f"{name}_interval"]
            assert low <= arm[name] <= high, name
        # The Frechet distance of few images is biased upwards; its interval, which takes the bias off, may lie below it.
        assert arm["frechet_distance_interval"][0] < arm["frechet_distance_interval"][1]
        assert 0 <= arm["object_accuracy"] <= 1 and arm["frechet_distance"] > 0
        assert arm["seconds"] > 0
    assert Image.open(tmp_path / "images" / "refined" / "00011.png").size == (64, 64)
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
