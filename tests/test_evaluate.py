import argparse
import json
import os
import pickle
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from noiserefine import Refiner
from noiserefine.models.catalogue import BACKBONES
from noiserefine.models.loading import load_pipeline
from tests import families
from tests.conftest import EMOJI, EMOJI_REFINER, ROOT, free_port, perturbed, script
from train import evaluate, measurement
from train.captions import HELD_OUT, chosen_prompts
from train.emoji.captions import build_tokenizer
from train.emoji.judge import EmojiJudge
from train.emoji.render import BACKGROUNDS, held_out_pairs, objects, prompt
from train.experiments import guidance_scales
from train.metrics import METRICS, Moments, frechet_distance, load_metrics
from train.tools.benchmark import main as benchmark_main
from train.tools.benchmark import measure


def test_frechet_distance():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 3)) * [1, 2, 3] + [0, 1, 0]
    assert frechet_distance(x, Moments.fitted(x)) == pytest.approx(0, abs=1e-8)
    # Between axis-aligned Gaussians it is sum (mu - mu')^2 + (sigma - sigma')^2.
    unit = Moments(np.zeros(3), np.diag([1.0, 1.0, 1.0]))
    assert frechet_distance(x, unit) == pytest.approx(1 + 1 + 4, rel=0.05)


EVALUATE = (
    f"--backbone {EMOJI} --refiner {EMOJI_REFINER} --n 4 --batch_size 2 --steps 2 --bootstrap 20"
).split()


def run(*arguments, **kwargs) -> str:
    with script(*arguments, **kwargs) as process:
        said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


def test_evaluate_runs_and_goes_on(tmp_path, capsys):
    """Every arm has its forwards and intervals; a second run measures only what is missing."""
    forwards = dict(gaussian=2, guided=4, pag=4, guided_pag=6, refined=3, refined_guided=5)
    images, output = tmp_path / "images", tmp_path / "all.json"
    arguments = [*EVALUATE, "--output", str(output)]
    evaluate.main([*arguments, "--arms", *forwards, "--images", str(images)])
    said, result = capsys.readouterr().out, json.loads(output.read_text())
    assert float(result["settings"]["guidance_scale"]) == BACKBONES["emoji"].guidance_scale
    assert {name: arm["forwards"] for name, arm in result["arms"].items()} == forwards
    for name, arm in result["arms"].items():
        assert f"| {name} | {arm['object_accuracy']:.3f} [" in said and arm["seconds"] > 0
        for metric in ("object_accuracy", "background_accuracy"):
            low, high = arm[f"{metric}_interval"]
            assert 0 <= low <= arm[metric] <= high <= 1, metric
        low, high = arm["frechet_distance_interval"]
        assert arm["frechet_distance"] > 0 and low < high
    accuracy = {name: arm["object_accuracy"] for name, arm in result["arms"].items()}
    difference = result["differences"]["refined"]["object_accuracy"]
    assert difference == pytest.approx(accuracy["refined"] - accuracy["guided"])
    first = Image.open(images / "guided" / "00000.png")
    row = Image.open(tmp_path / "all" / "guided.webp").convert("RGB")
    side = row.height
    assert row.width == 2 * side and (images / "refined" / "00003.png").exists()
    shown = np.int16(row.crop((0, 0, side, side)))
    assert np.abs(np.int16(first.resize((side, side))) - shown).mean() < 5

    # Another run makes what is missing, and nothing else; other settings are refused.
    (tmp_path / "all" / "refined-000002.npz").unlink()
    (images / "gaussian" / "00001.png").unlink()
    untouched = (tmp_path / "all" / "refined-000000.npz").stat().st_mtime_ns
    evaluate.main([*arguments, "--images", str(images)])
    again = json.loads(output.read_text())
    assert again["arms"].keys() == {"gaussian", "guided", "refined"}
    assert (tmp_path / "all" / "refined-000000.npz").stat().st_mtime_ns == untouched
    assert (images / "gaussian" / "00001.png").is_file()
    for metric in ("object_accuracy", "frechet_distance_interval"):
        assert again["arms"]["refined"][metric] == pytest.approx(result["arms"]["refined"][metric])
    with pytest.raises(ValueError, match="holds results of other settings"):
        evaluate.main([*arguments, "--strength", "0.5"])


def test_bf16_changes_images_little(tmp_path):
    for precision in ("no", "bf16"):
        folder, images = tmp_path / precision, tmp_path / "images" / precision
        options = ["--mixed_precision", precision, "--images", str(images), "--arms", "refined"]
        evaluate.main([*EVALUATE, *options, "--output", f"{folder}.json"])
    exact, rounded = (
        np.int16(Image.open(tmp_path / "images" / precision / "refined" / "00001.png"))
        for precision in ("no", "bf16")
    )
    assert 0 < np.abs(exact - rounded).mean() < 5


def test_processes_share_the_measuring(tmp_path):
    """Each of two processes makes one of the two batches, and one of them writes the results."""
    arguments = [*EVALUATE, "--arms", "gaussian", "--output", tmp_path / "two.json"]
    both = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # as accelerate launch does
    second = both | {"RANK": "1", "LOCAL_RANK": "1"}
    with script("train/evaluate.py", *arguments, env=second):
        said = run("train/evaluate.py", *arguments, env=both | {"RANK": "0", "LOCAL_RANK": "0"})
    assert "| 1/1 [" in said and json.loads((tmp_path / "two.json").read_text())["n"] == 4


def test_guided_arms_need_guidance(tmp_path):
    """Also where a model is usually sampled without it."""
    lcm = tmp_path / "lcm"
    families.pipeline("lcm").save_pretrained(lcm)
    options = ["--arms", "gaussian", "guided", "--output", str(tmp_path / "r.json")]
    for chosen in (["--backbone", str(lcm)], ["--backbone", EMOJI, "--guidance_scale", "1"]):
        with pytest.raises(ValueError, match="the guided arms are unguided: leave them out"):
            evaluate.main([*chosen, *options])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--backbone assets/emoji-sit --arms gaussian pag", "no perturbed-attention"),
        ("--backbone {tiny} --arms gaussian --sampler UniPC", "no sampler 'UniPC'"),
        (
            "--backbone {tiny} --refiner {refiner} --arms gaussian refined --guidance_scale 7",
            "takes a guidance scale from 1 to 4",
        ),
    ],
)
def test_what_cannot_be_made_is_said_before_any_image(
    options, says, tiny_folder, tiny_refiner, tmp_path
):
    models = options.format(tiny=tiny_folder, refiner=tiny_refiner)
    with pytest.raises(ValueError, match=says):
        evaluate.main([*models.split(), "--output", str(tmp_path / "r.json")])
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_fit_is_said(tmp_path, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(measurement, "sample", exhausted)
    arguments = [*EVALUATE, "--arms", "gaussian", "--output", str(tmp_path / "r.json")]
    for size, says in (("2", "with --batch_size 1, and another --output"), ("1", "one image")):
        with pytest.raises(MemoryError, match=says):
            evaluate.main([*arguments, "--batch_size", size])
        shutil.rmtree(tmp_path / "r")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--output results", "--output is a .json file"),
        ("--output r.json --n 1", "--n must be at least 2"),
        ("--output r.json --arms refined", "--refiner is missing"),
        ("--output r.json --arms pag --pag_scale 0", "--pag_scale must be above 0"),
    ],
)
def test_options_that_cannot_work(options, says):
    with pytest.raises(ValueError, match=says):
        evaluate.parse(["--arms", "gaussian", *options.split()])


def test_intervals_resample_prompts(tmp_path):
    """Images of one prompt are not independent: with all of them alike, the interval is that of the
    prompts."""
    prompts = [text for text in ("a", "b", "c", "d") for _ in range(50)]
    args = argparse.Namespace(
        output=tmp_path / "r.json",
        n=200,
        batch_size=200,
        arms=["gaussian"],
        bootstrap=400,
        reference="guided",
        images=None,
    )
    session, rng, metrics = (
        measurement.Measurement(args, PartialState()),
        np.random.default_rng(0),
        load_metrics(["judge"], None, torch.device("cpu")),
    )
    session.begin({})
    right = np.repeat([1.0, 0.0, 1.0, 0.0], 50)
    np.savez(
        session.file("gaussian", 0),
        features=rng.normal(size=(200, 128)) * 2,
        correct=np.stack([right, right], 1),
        forwards=200,
        seconds=1.0,
    )
    arm = session.results(prompts, metrics)["arms"]["gaussian"]
    assert arm["object_accuracy"] == 0.5 and arm["object_accuracy_interval"] == [0, 1], (
        "0.43 to 0.57 if images were drawn one by one"
    )
    assert arm["feature_variance"] == pytest.approx(4 * 128, rel=0.1) and arm["forwards"] == 1


def test_a_resample_without_a_gap_does_not_move_the_gaps_interval(tmp_path, monkeypatch):
    """All resamples are 6 too high and close half of the gap; in one the gap is nearly 0."""
    args = argparse.Namespace(output=tmp_path / "r.json", n=2, batch_size=2, reference="guided")
    session = measurement.Measurement(args, PartialState())
    spread = np.append(0, 6 + np.linspace(-1, 1, 99))
    arms = {"gaussian": 18 + spread, "refined": 14 + spread, "guided": 10 + spread}
    arms["guided"][-1] = arms["gaussian"][-1] - 1e-6
    estimates = {name: {"frechet_distance": values} for name, values in arms.items()}
    monkeypatch.setattr(session, "estimates", lambda *_: estimates)
    monkeypatch.setattr(session, "head", lambda _: {"arms": {}, "differences": {}})
    monkeypatch.setattr(session, "cost", lambda _: {})
    closed = session.results([], [EmojiJudge])["gap_closed"]
    assert closed["frechet_distance"] == 0.5
    assert closed["frechet_distance_interval"] == pytest.approx([0.5, 0.5], abs=0.01)


def small_clip(folder, tokenizer, head=False):
    """A CLIP of PickScore's format, or an aesthetic predictor, a thousandth of its size."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=8,
        max_position_embeddings=32,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=8,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    torch.manual_seed(0)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    if not head:
        CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
        ).save_pretrained(folder)
        return
    model = CLIPVisionModelWithProjection(vision)
    model.save_pretrained(folder)
    layers = {
        f"layers.{i}.{name}": torch.randn(shape)
        for i, b in ((0, 6), (2, 1))
        for name, shape in (("weight", (b, 8 if i == 0 else 6)), ("bias", (b,)))
    }
    save_file(
        load_file(folder / "model.safetensors") | layers,
        folder / "model.safetensors",
        {"format": "pt"},
    )


def test_metrics_of_the_big_models(tmp_path, pipe):
    """By local models of the hub's format, against the formula on the models themselves."""
    small_clip(tmp_path / "clip", pipe.tokenizer)
    small_clip(tmp_path / "aesthetic", pipe.tokenizer, head=True)
    images = [
        Image.fromarray(np.random.default_rng(i).integers(256, size=(64, 64, 3), dtype=np.uint8))
        for i in range(3)
    ]
    prompts = ["a cat", "a red apple on a blue background", "sushi"]
    names = [
        f"clip_score={tmp_path}/clip",
        f"pick_score={tmp_path}/clip",
        f"hpsv2={tmp_path}/clip",
        f"aesthetic={tmp_path}/aesthetic",
    ]
    metrics = load_metrics(names, None, torch.device("cpu"))
    rows = {
        key: value for metric in metrics for key, value in metric.measure(images, prompts).items()
    }

    clip, processor = (
        CLIPModel.from_pretrained(tmp_path / "clip").eval(),
        CLIPProcessor.from_pretrained(tmp_path / "clip"),
    )
    batch = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip(**batch)
        cosines = (output.text_embeds * output.image_embeds).sum(1)
        scale = clip.logit_scale.exp()
        theirs = (
            CLIPVisionModelWithProjection.from_pretrained(tmp_path / "aesthetic")
            .eval()(batch.pixel_values)
            .image_embeds
        )
    state = load_file(tmp_path / "aesthetic" / "model.safetensors")
    hidden = (
        torch.nn.functional.normalize(theirs, dim=1) @ state["layers.0.weight"].T
        + state["layers.0.bias"]
    )
    expected = {
        "clip_score": 100 * cosines.clamp(min=0),
        "pick_score": scale * cosines,
        "hpsv2": scale * cosines,
        "aesthetic": (hidden @ state["layers.2.weight"].T + state["layers.2.bias"])[:, 0],
    }
    for (name, values), metric in zip(expected.items(), metrics, strict=True):
        np.testing.assert_allclose(rows[name], values, rtol=1e-4, atol=1e-4)
        assert (
            metric.summarise(rows, [])
            == {name: pytest.approx(float(values.mean()), rel=1e-4, abs=1e-4)}
            and metric.about[name] == f"{tmp_path}/{'aesthetic' if name == 'aesthetic' else 'clip'}"
        )
    with pytest.raises(ValueError, match="no linear layers"):
        load_metrics([f"aesthetic={tmp_path}/clip"], None, torch.device("cpu"))


class FakeInception(torch.nn.Module):
    """The interface of torch-fidelity's network, which needs a torchvision that the CPU build of
    torch does not have."""

    def __init__(self, name, features, feature_extractor_weights_path):
        super().__init__()
        assert torch.load(feature_extractor_weights_path, weights_only=True)["layer"].shape == (3,)
        assert (name, features) == ("inception-v3-compat", ["2048", "logits_unbiased"])

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[:2] == (1, 3)
        mean = x.float().mean((2, 3)) / 64
        return mean, mean.repeat(1, 2)


def test_inception(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        load_metrics(["inception"], tmp_path, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(
        sys.modules,
        "torch_fidelity.feature_extractor_inceptionv3",
        SimpleNamespace(FeatureExtractorInceptionV3=FakeInception),
    )
    with pytest.raises(ValueError, match="needs --real_images"):
        load_metrics(["inception"], tmp_path, torch.device("cpu"))
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(np.full((8, 8, 3), rng.integers(256, size=3), np.uint8)) for _ in range(100)
    ]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")

    class Payload:
        def __reduce__(self):
            return (tmp_path / "executed").write_text, ("x",)

    torch.save(Payload(), tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_metrics([f"inception={tmp_path}/evil.pth"], tmp_path, torch.device("cpu"))
    assert not (tmp_path / "executed").exists()
    torch.save({"layer": torch.zeros(3)}, tmp_path / "inception.pth")
    (metric,) = load_metrics([f"inception={tmp_path}/inception.pth"], tmp_path, torch.device("cpu"))
    figures = metric.summarise(metric.measure(images, [""] * len(images)), [])
    assert figures["fid"] == pytest.approx(0, abs=1e-6), "the images are the real ones"
    colours = np.array([np.asarray(image)[0, 0] for image in images]) / 64
    p = np.exp(np.tile(colours, 2))
    p /= p.sum(1, keepdims=True)

    def score(order):
        return np.mean(
            [
                np.exp((part * np.log(part / part.mean(0))).sum(1).mean())
                for part in np.split(p[order], 10)
            ]
        )

    assert figures["inception_score"] == pytest.approx(
        score(np.random.default_rng(0).permutation(100)), rel=1e-5
    )
    alike = metric.summarise(
        metric.measure(
            sorted(images, key=lambda image: image.getpixel((0, 0))), [""] * len(images)
        ),
        [],
    )
    assert alike["inception_score"] == pytest.approx(
        np.mean([score(np.random.default_rng(i).permutation(100)) for i in range(20)]), rel=0.02
    ), "whatever the order"
    shifted = [Image.fromarray((np.asarray(image) // 2).astype(np.uint8)) for image in images]
    assert metric.summarise(metric.measure(shifted, [""] * len(shifted)), [])["fid"] > 1


def test_dinov2(tmp_path):
    """The distance of images to themselves is none, whatever their size; of others it is one."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=224)
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    name = [f"dinov2={tmp_path}/dinov2"]
    with pytest.raises(ValueError, match="dinov2 needs --real_images"):
        load_metrics(name, None, torch.device("cpu"))
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(256, size=(8, 16, 3), dtype=np.uint8)).resize((64, 32))
        for _ in range(12)
    ]
    (tmp_path / "real").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / "real" / f"{i:02d}.png")
    (metric,) = load_metrics(name, tmp_path / "real", torch.device("cpu"))
    rows = metric.measure(images, [""] * 12)
    assert rows["dinov2_features"].shape == (12, 8)
    assert metric.summarise(rows, [])["fd_dinov2"] == pytest.approx(0, abs=1e-6)
    dark = [Image.fromarray(np.asarray(image) // 4) for image in images]
    assert metric.summarise(metric.measure(dark, [""] * 12), [])["fd_dinov2"] > 0.01
    assert metric.about["dinov2"] == f"{tmp_path}/dinov2" and metric.about["real_images"] == 12


@pytest.mark.parametrize(
    "names, says",
    [
        (["nonsense"], "no metric 'nonsense'"),
        (["hpsv2.1"], "OpenCLIP's names"),
        (["image_reward"], "does not import"),
        (["clip_score=nowhere/at-all"], "can't be loaded"),
    ],
)
def test_metrics_that_cannot_run_say_why(names, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        load_metrics(names, None, torch.device("cpu"))


def test_prompts_of_files(tmp_path, pipe):
    (tmp_path / "prompts.txt").write_text("a quasar\na theorem\n")
    (tmp_path / "coco.json").write_text(
        json.dumps(
            {
                "annotations": [
                    {"image_id": 1, "caption": "a bird"},
                    {"image_id": 1, "caption": "a second one"},
                    {"image_id": 2, "caption": "long " * 50},
                ]
            }
        )
    )
    assert sorted(chosen_prompts(str(tmp_path / "prompts.txt"), 4, pipe)) == [
        "a quasar",
        "a quasar",
        "a theorem",
        "a theorem",
    ]
    assert chosen_prompts(str(tmp_path / "coco.json"), 2, pipe) == ["a bird", "a bird"]
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--arms", "gaussian"]
    with pytest.raises(ValueError, match="judge of the embedded model knows prompts such as"):
        evaluate.main([*EVALUATE, *arguments, "--output", str(tmp_path / "r.json")])
    assert list(METRICS) == [
        "judge",
        "inception",
        "dinov2",
        "clip_score",
        "pick_score",
        "hpsv2",
        "aesthetic",
    ]


@pytest.mark.parametrize("model", ["emoji", "emoji-sit"])
def test_benchmark_runs(model, tmp_path):
    models = f"--backbone assets/{model} --refiner assets/refiners/{model}"
    arguments = f"{models} --rounds 1 --warmup 0 --steps 3"
    benchmark_main([*arguments.split(), "--output", str(tmp_path / "benchmark.json")])
    benchmark = json.loads((tmp_path / "benchmark.json").read_text())
    assert {name: arm["forwards"] for name, arm in benchmark["arms"].items()} == {
        "unguided": 3,
        "guided": 6,
        "refined": 4,
    }
    assert benchmark["refined_over_guided"] > 0 and benchmark["refined_over_unguided"] > 0


def test_guidance_scales_run(tmp_path):
    flow = str(ROOT / "assets" / "emoji-flow")
    refiner = perturbed(load_pipeline(flow, "cpu"), guidance_scale_range=[1, 5])
    refiner.save_pretrained(tmp_path / "refiner")
    arguments = f"--backbone {flow} --n 2 --batch_size 1 --steps 2 --scales 1 3".split()
    output = ["--mixed_precision", "bf16", "--output", str(tmp_path / "scales.json")]
    guidance_scales.main([*arguments, "--refiner", str(tmp_path / "refiner"), *output])
    result = json.loads((tmp_path / "scales.json").read_text())
    distances = np.array(result["distance_of_refined_to_guided"])
    assert (
        distances.shape == (2, 2)
        and (distances > 0).all()
        and len(result["guided"]) == len(result["refined"]) == 2
    )


@pytest.mark.parametrize(
    ("name", "sampler", "forwards"),
    [
        ("sdxl", "Euler", {"unguided": 2, "guided": 4, "refined": 3}),
        ("lcm", "Native", {"unguided": 2, "refined": 3}),
    ],
)
def test_benchmark_of_random_weights(name, sampler, forwards, sdxl):
    """A model that cannot be guided has two arms."""
    settings = dict(
        backbone=name,
        random_weights=True,
        batch_size=2,
        steps=2,
        rounds=1,
        warmup=0,
        sampler=sampler,
        mode="shared",
    )
    pipe = sdxl if name == "sdxl" else families.pipeline(name)
    result = measure(pipe, Refiner.create(pipe, 8), argparse.Namespace(**settings))
    assert {name: arm["forwards"] for name, arm in result["arms"].items()} == forwards
    assert ("refined_over_guided" in result) == ("guided" in forwards)
    assert (
        0
        < result["refiner_bytes"]
        < result["denoiser_bytes"]
        < result["arms"]["refined"]["peak_bytes"]
    )


def test_held_out_pairs_are_a_tenth_and_in_no_training_prompt():
    mask = held_out_pairs()
    assert mask.shape == (len(objects()), len(BACKGROUNDS)) and mask.sum() == mask.size // 10
    assert len(objects()) >= 150 and len(BACKGROUNDS) >= 12
    trained = set((ROOT / "assets/prompts/emoji.txt").read_text(encoding="utf-8").splitlines())
    held_out = (ROOT / HELD_OUT).read_text(encoding="utf-8").splitlines()
    assert held_out == [prompt(*pair) for pair in np.argwhere(mask)] and not trained & set(held_out)


def test_every_word_is_one_token(pipe):
    for tokenizer in (pipe.tokenizer, build_tokenizer()):
        for thing in objects():
            for name in (thing.name, *thing.synonyms):
                assert len(tokenizer.tokenize(name)) == len(name.split()), name


def test_a_flow_model_is_measured_with_a_sampler_of_its_own(tmp_path):
    """By class names, whose background the judge does not judge."""
    prompts = str(ROOT / "assets" / "prompts" / "emoji_objects.txt")
    options = ["--n", "2", "--steps", "1", "--arms", "gaussian", "--bootstrap", "5"]
    options += ["--prompts", prompts, "--output", str(tmp_path / "sit.json")]
    evaluate.main(["--backbone", str(ROOT / "assets" / "emoji-sit"), *options])
    result = json.loads((tmp_path / "sit.json").read_text())
    assert result["settings"]["sampler"] == "Native"
    assert "background_accuracy" not in result["arms"]["gaussian"]


def test_a_few_step_lora_is_measured_with_its_scheduler(tmp_path):
    lora = tmp_path / "ink-lcm.safetensors"
    shutil.copy(ROOT / "assets/loras/emoji-ink/pytorch_lora_weights.safetensors", lora)
    options = ["--n", "2", "--steps", "1", "--arms", "gaussian", "--bootstrap", "5"]
    options += ["--lora", str(lora), "--output", str(tmp_path / "lcm.json")]
    evaluate.main(["--backbone", EMOJI, *options])
    assert json.loads((tmp_path / "lcm.json").read_text())["settings"]["sampler"] == "Native"
