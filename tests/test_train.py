"""The trainer as a process: it learns, and a killed run ends where an uninterrupted one does."""

import json
import os
import resource
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pandas
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from noiserefine import Refiner
from noiserefine.guidance import sample_latents
from noiserefine.models.loading import load_pipeline
from noiserefine.msd import msd_loss
from noiserefine.noise import encode_prompt
from noiserefine.samplers import with_sampler
from tests.conftest import EMOJI, ROOT, free_port, script
from train import embeds, prompts, train_refiner
from train.captions import read_prompts
from train.common import UNFINISHED, WAIT, atomic
from train.options import PRESETS, Options, parse, plan
from train.run import Checkpoint, has_converged
from train.settings import check_targets_of
from train.targets import Targets
from train.train_refiner import main

SMALL = (
    "--num_targets 16 --target_batch_size 8 --target_steps 4 --steps 2 --batch_size 4 --epochs 4 "
    "--rank 8 --guidance_scale 5 --validate_every 8 --num_validation 4 --save_every 3"
)
TINY = (
    "--num_targets 4 --target_steps 2 --steps 2 --batch_size 4 --epochs 1 --warmup_steps 0 --rank 8"
)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory, tiny_folder):
    """Return options for a pipeline with random weights, and for prompts."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    things = ("cat", "dog", "apple", "house")
    prompts.write_text("".join(f"a {c} {t}\n" for c in ("red", "blue", "green") for t in things))
    # bf16, the preset's on some processors, rounds another batch otherwise.
    options = f"--preset emoji --backbone {tiny_folder} --prompts {prompts} --mixed_precision no"
    return options.split()


@pytest.fixture
def tiny(backbone):
    """Return the options of a run of one step, without validation."""
    return [*backbone, "--validation_prompts", "", *TINY.split()]


@pytest.fixture
def small(backbone):
    """Return the options of a run of 16 steps that learns something."""
    return [*backbone, "--validation_prompts", backbone[5], *SMALL.split()]


@pytest.fixture
def tiny_pipe(backbone):
    """Return the pipeline of the backbone."""
    return load_pipeline(backbone[3], "cpu")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate allows a process one precision."""
    AcceleratorState._reset_state(reset_partial_state=True)


def stats(folder):
    path = folder / "stats.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_learns_and_resumes_exactly(tmp_path, tiny_pipe, small):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main([*small, "--output_dir", str(whole)])
    curve = stats(whole)
    assert [line["step"] for line in curve] == list(range(1, 17))
    assert curve[-1]["validation_refined"] < 0.9 * curve[-1]["validation_gaussian"]
    assert {"config.json", "refiner.json", "tensorboard", "validation"} <= {
        path.name for path in whole.iterdir()
    }
    assert Refiner.from_pretrained(whole, tiny_pipe).config.training["steps"] == 2

    for stop in (
        lambda: len(list((broken / "targets").glob("*.safetensors"))) >= 1,
        lambda: len(stats(broken)) >= 5,
    ):
        with script("train/train_refiner.py", *small, "--output_dir", broken) as process:
            while not stop():
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGKILL)
    assert 3 <= len(stats(broken)) < 16
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*small, "--output_dir", str(broken)])
    names = ("step", "loss", "grad_norm", "lr", "validation_refined")
    assert [[line.get(name) for name in names] for line in stats(broken)] == [
        [line.get(name) for name in names] for line in curve
    ]
    ours, theirs = (
        load_file(folder / "pytorch_lora_weights.safetensors") for folder in (broken, whole)
    )
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def lora(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_accumulation_is_a_larger_batch(tmp_path, tiny):
    main([*tiny, "--output_dir", str(tmp_path / "a")])
    main(
        [
            *tiny,
            "--output_dir",
            str(tmp_path / "b"),
            "--batch_size",
            "1",
            "--gradient_accumulation_steps",
            "4",
        ]
    )
    a, b = stats(tmp_path / "a"), stats(tmp_path / "b")
    assert len(a) == len(b) == 1 and b[0]["loss"] == pytest.approx(a[0]["loss"], rel=1e-4)
    assert b[0]["grad_norm"] == pytest.approx(a[0]["grad_norm"], rel=1e-3)


def test_clipping_clips(tmp_path, tiny):
    """AdamW hides a factor on all gradients, until it takes them far below its epsilon of 1e-8."""
    main([*tiny, "--output_dir", str(tmp_path), "--max_grad_norm", "1e-9", "--weight_decay", "0"])
    moved = [
        value.abs().max().item()
        for name, value in lora(tmp_path).items()
        if "lora_B" in name and "conv_out" not in name
    ]  # from zero
    assert 0 < max(moved) < 1e-8  # 1e-4 where nothing is clipped


def test_every_path_trains(tmp_path, tiny_pipe, tiny):
    main(
        [
            *tiny,
            "--output_dir",
            str(tmp_path),
            "--pag_scale",
            "2",
            "--mixed_precision",
            "bf16",
            "--gradient_checkpointing",
            "True",
            "--fp8",
            "True",
            "--layers",
            "attn1",
            "--epochs",
            "2",
            "--validation_prompts",
            tiny[5],
            "--num_validation",
            "2",
            "--sampler",
            "Euler",
        ]
    )
    assert [line["loss"] > 0 for line in stats(tmp_path)] == [
        True,
        True,
    ] and "validation_refined" in stats(tmp_path)[-1]
    training = Refiner.from_pretrained(tmp_path, tiny_pipe).config.training
    assert (training["pag_scale"], training["fp8"], training["layers"]) == (2, True, "attn1")


def test_stored_prompts_train_alike(tmp_path, monkeypatch, tiny):
    """Bit for bit as encoding every batch does, also where an earlier version stored none."""
    longer = [*tiny, "--lr_schedule", "constant", "--batch_size", "2", "--epochs"]
    main([*longer, "1", "--output_dir", str(tmp_path / "stored")])
    (stored,) = (tmp_path / "stored" / "targets" / "prompts").iterdir()  # of one precision
    count = len(list(stored.iterdir()))
    shutil.rmtree(stored)
    main([*longer, "2", "--output_dir", str(tmp_path / "stored")])
    assert len(list(stored.iterdir())) == count == 4
    monkeypatch.setattr(embeds, "_have_one_size", lambda pipe: False)
    main([*longer, "2", "--output_dir", str(tmp_path / "anew")])
    losses = [[line["loss"] for line in stats(tmp_path / name)] for name in ("stored", "anew")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert not (tmp_path / "anew" / "targets" / "prompts").exists()


def test_processes_share_the_work(tmp_path, tiny):
    """Two processes with half the batch each take the step that one takes."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]  # what accelerate launch starts
    main([*tiny, "--output_dir", str(tmp_path / "one"), "--target_batch_size", "2"])
    with script(
        *launcher,
        "train/train_refiner.py",
        *tiny,
        "--output_dir",
        tmp_path / "two",
        "--target_batch_size",
        "2",
        "--batch_size",
        "2",
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    ) as process:
        said = process.communicate()[0]
    assert process.returncode == 0, said
    (one,), (two,) = stats(tmp_path / "one"), stats(tmp_path / "two")
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4) and two[
        "grad_norm"
    ] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_processes_may_wait_for_a_slower_one():
    accelerator = train_refiner._accelerator(Options(mixed_precision="no"))
    assert accelerator.init_handler.timeout == WAIT, "and not the ten minutes of NCCL"


def brightness(images, prompts):
    return [sum(image.convert("L").resize((1, 1)).getdata()) for image in images]


def test_targets_are_kept_and_filtered(tmp_path, tiny_pipe):
    options = parse(
        [
            "--preset",
            "emoji",
            "--output_dir",
            str(tmp_path),
            "--num_targets",
            "6",
            "--target_batch_size",
            "4",
            "--target_steps",
            "2",
            "--keep_top",
            "2",
            "--score",
            "tests.test_train:brightness",
            "--sampler",
            "DDIM",
        ]
    )

    targets = Targets(options, tiny_pipe, ["a cat", "a dog on a red background"])
    targets.make(Accelerator())
    files = sorted(targets.folder.glob("*.safetensors"))
    assert [path.name for path in files] == ["00000000.safetensors", "00000004.safetensors"]
    before = [path.stat().st_mtime_ns for path in files]
    targets.make(Accelerator())
    assert [path.stat().st_mtime_ns for path in files] == before
    selected = targets.selected
    scores = torch.cat([load_file(path)["scores"] for path in files])
    assert torch.equal(
        targets.read([5, 0])["x0"],
        torch.stack([load_file(files[1])["x0"][1], load_file(files[0])["x0"][0]]),
    )
    assert selected == sorted(scores.topk(2).indices.tolist())
    assert torch.cat([load_file(path)["seeds"] for path in files]).tolist() == list(range(6))


@pytest.mark.parametrize("values", [[1.0, float("nan")], [1.0]])
def test_a_score_is_a_number_for_each_image(tmp_path, tiny_pipe, values):
    """The highest would be a NaN, and one too few would move all that follow."""
    run = ["--output_dir", str(tmp_path), "--prompts", "x", "--sampler", "DDIM", *TINY.split()]
    run += ["--num_targets", "2", "--keep_top", "1", "--score", "tests.test_train:brightness"]
    targets = Targets(parse(run), tiny_pipe, ["a cat"])
    targets.score = lambda images, prompts: values
    with pytest.raises(ValueError, match="brightness gave .* for 2 images"):
        targets.make(Accelerator())


def test_damaged_files_of_a_run_are_named(tmp_path, tiny_pipe):
    """As a disk leaves them that loses its power."""
    run = ["--output_dir", str(tmp_path), "--prompts", "x", "--sampler", "DDIM"]
    targets = Targets(parse([*run, *TINY.split()]), tiny_pipe, ["a cat"])
    targets.folder.mkdir()
    for name in ("checkpoint.pt", "targets/00000000.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="checkpoint.pt is damaged: remove it"):
        Checkpoint(tmp_path / "checkpoint.pt", []).load()
    with pytest.raises(ValueError, match="00000000.safetensors is damaged.*: remove it"):
        targets.make(Accelerator())


def test_steps_that_are_not_finite_change_nothing(tmp_path, monkeypatch, tiny):
    """One such step is skipped and counted; many in a row end the run, which can go on."""
    options, losses = (
        [*tiny, "--epochs", "25", "--save_every", "1", "--output_dir", str(tmp_path / "run")],
        iter([1.0, float("nan"), 1.0]),
    )
    monkeypatch.setattr(
        train_refiner,
        "msd_loss",
        lambda *arguments: msd_loss(*arguments) * next(losses, float("inf")),
    )
    with pytest.raises(ArithmeticError, match="20 steps in a row.*lower --lr"):
        main(options)
    assert [line["skipped"] for line in stats(tmp_path / "run")] == [0, 1, 0] + [1] * 20
    bad = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(parameter.isfinite().all() for parameter in bad["parameters"])
    monkeypatch.setattr(train_refiner, "msd_loss", msd_loss)
    main(options)
    assert [line["skipped"] for line in stats(tmp_path / "run")][-3:] == [1, 0, 0] and all(
        value.isfinite().all() for value in lora(tmp_path / "run").values()
    )


def test_ctrl_c_leaves_a_checkpoint(tmp_path, small):
    with script(
        "train/train_refiner.py", *small, "--save_every", "1000", "--output_dir", tmp_path
    ) as process:
        while len(stats(tmp_path)) < 3:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        said = process.communicate()[0]
    assert process.returncode == 130 and "to continue" in said and "Traceback" not in said
    assert (
        torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
        == len(stats(tmp_path))
        < 16
    )


@pytest.mark.parametrize("megabytes", [0.01, 1])
def test_a_full_disk_is_said(tmp_path, megabytes, tiny):
    """A limit to the size of files looks like a full disk to the writer, of targets or state."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 2**20), resource.RLIM_INFINITY))

    arguments = [*tiny, "--save_every", "1", "--output_dir", tmp_path]
    with script("train/train_refiner.py", *arguments, preexec_fn=limit) as process:
        said = process.communicate()[0]
    assert process.returncode == 1 and "can't be written" in said and "Traceback" not in said, said
    assert not list(tmp_path.rglob(f"*{UNFINISHED}")) and not (tmp_path / "checkpoint.pt").exists()
    main([str(argument) for argument in arguments])
    assert lora(tmp_path)


def test_paper_is_the_default(tmp_path):
    options = parse(["--output_dir", str(tmp_path), "--prompts", "x"])
    assert (
        options.rank,
        options.guidance_scale,
        options.pag_scale,
        options.target_steps,
        options.steps,
    ) == (128, 7.0, 3.0, 20, 10)
    assert (options.num_targets, options.epochs) == (50_000, 6.0)
    assert all(hasattr(options, name) for preset in PRESETS.values() for name in preset)
    assert all(field.metadata["help"] for field in Options.__dataclass_fields__.values())
    # Appendix A.7 with CFG alone: 2 N' M and (1 + N + 1) M E.
    assert plan(parse(["--output_dir", "x", "--prompts", "x", "--pag_scale", "0"]), 1)[1] == {
        "targets": 2_000_000,
        "training": 3_600_000,
    }
    heun = ["--output_dir", "x", "--prompts", "x", "--pag_scale", "0", "--sampler", "Heun (EDM)"]
    heun_cost = {"targets": 39 * 100_000, "training": (19 + 2) * 300_000}
    assert plan(parse(heun), 1)[1] == heun_cost
    assert plan(parse(heun), 1, DDIMScheduler())[1] == heun_cost, "of the chosen sampler"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--preset", "nonsense"], "no preset"),
        (["--steps", "0"], "--steps must be above 0"),
        (["--guidance_scale", "1"], "need guidance"),
        (["--seed", "-1"], "--seed is from 0 to 2147483647; got -1"),
        (["--seed", str(2**31)], "--seed is from 0 to"),
        (["--keep_top", "5"], "go together"),
        (["--prompts", "missing.txt"], "no prompt file"),
        (["--backbone", "missing"], "no folder or file here"),
        (["--sampler", "x"], "no sampler"),
        (["--sampler", "UniPC"], "no sampler 'UniPC' for StableDiffusionPipeline"),
        (["--mixed_precision", "fp16"], "needs a GPU"),
        (["--hours", "1"], "--hours knows .* of the presets sd15.* give --num_targets"),
        (["--hours", "1", "--backbone", "assets/emoji"], "presets sd15.* give --num_targets"),
        (["--lr_schedule", "x"], "no lr_schedule"),
        (["--patience", "3"], "needs --validation_prompts"),
        (["--lr_schedule", "piecewise_constant"], "no lr_schedule"),
        (["--keep_top", "2", "--score", "json:nothing"], "--score takes module:Name"),
        (["--network", "nonsense"], "--network takes module:Name"),
        (["--loss", "nonsense"], "--loss takes module:Name"),
        (["--height", "65"], "native size"),
        (["--fp8", "True"], "only with --gradient_checkpointing"),
        (["--fp8", "True", "--compile", "True"], "--compile cannot: leave one out"),
    ],
)
def test_bad_options_are_said_first(tmp_path, tiny, arguments, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        main([*tiny, "--output_dir", str(tmp_path / "run"), *arguments])
    assert not (tmp_path / "run").exists()


def test_bad_prompts_are_named(tmp_path, tiny):
    (tmp_path / "prompts.txt").write_text("a cat\n" + "apple " * 80 + "\n")
    arguments = ["--output_dir", str(tmp_path / "run"), "--prompts", str(tmp_path / "prompts.txt")]
    says = "prompt 2: The prompt is 82 tokens long.*Of its 2 prompts 1 are short enough"
    with pytest.raises(ValueError, match=says):
        main([*tiny, *arguments])


def test_dry_run_loads_and_writes_nothing(tmp_path, capsys):
    arguments = ["--preset", "sd21", "--backbone", "nowhere", "--dry_run"]
    main([*arguments, "--output_dir", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "18,750 steps" in said and "hours" not in said and not (tmp_path / "run").exists()
    main(["--preset", "sd21", "--dry_run", "--output_dir", str(tmp_path / "run")])
    assert "About 19.7 hours at 200 TFLOP/s" in capsys.readouterr().out


def test_other_options_do_not_continue_a_run(tmp_path, tiny):
    (tmp_path / "config.json").write_text('{"rank": 16}')
    with pytest.raises(ValueError, match="rank was 16, now 8"):
        main([*tiny, "--output_dir", str(tmp_path)])


def test_targets_of_another_run(tmp_path, tiny, small):
    """The same refiner as with targets of its own; other targets are refused."""
    tiny = [*small, "--num_targets", "16", "--epochs", "2", "--validate_every", "100"]
    main([*tiny, "--output_dir", str(tmp_path / "own")])
    main([*tiny, "--targets_of", str(tmp_path / "own"), "--output_dir", str(tmp_path / "shared")])
    assert not (tmp_path / "shared" / "targets").exists()
    states = [
        load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
        for name in ("own", "shared")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    results = [
        json.loads((tmp_path / name / "refiner.json").read_text())["results"]
        for name in ("own", "shared")
    ]
    assert results[0]["seconds_of_targets"] == results[1]["seconds_of_targets"] > 0
    other = ["--targets_of", str(tmp_path / "own"), "--output_dir", str(tmp_path / "other")]
    with pytest.raises(ValueError, match="target_steps was 4, now 5"):
        main([*tiny, *other, "--target_steps", "5"])
    with pytest.raises(
        ValueError, match="loss was 'msd', now 'train.experiments.losses:NoiseLoss'"
    ):
        main([*tiny, *other, "--loss", "train.experiments.losses:NoiseLoss"])
    with pytest.raises(FileNotFoundError, match="is no run"):
        main([*tiny, "--targets_of", str(tmp_path), "--output_dir", str(tmp_path / "other")])
    settings = json.loads((tmp_path / "own" / "config.json").read_text())
    with pytest.raises(ValueError, match="num_targets was 16, now 17"):
        check_targets_of(tmp_path / "own", settings | {"num_targets": 17})
    rounded = torch.tensor(settings["backbone_signature"]).bfloat16().tolist()
    check_targets_of(tmp_path / "own", settings | {"backbone_signature": rounded})
    with pytest.raises(ValueError, match="backbone_signature"):
        check_targets_of(tmp_path / "own", settings | {"backbone_signature": rounded[::-1]})
    assert not (tmp_path / "other" / "targets").exists()


def test_the_first_targets_of_a_larger_run(tmp_path, tiny):
    """They are those that the smaller run would make."""
    small = [*tiny, "--num_targets", "4", "--target_batch_size", "4"]
    more = [*small, "--num_targets", "8"]
    main([*more, "--output_dir", str(tmp_path / "larger")])
    main([*small, "--output_dir", str(tmp_path / "own")])
    shared = ["--targets_of", str(tmp_path / "larger"), "--output_dir", str(tmp_path / "shared")]
    main([*small, *shared])
    own, same = lora(tmp_path / "own"), lora(tmp_path / "shared")
    assert all(torch.equal(own[name], same[name]) for name in own)
    seconds = [
        json.loads((tmp_path / name / "refiner.json").read_text())["results"]["seconds_of_targets"]
        for name in ("shared", "larger")
    ]
    assert 0 < seconds[0] < seconds[1]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_guidance_scale_is_trained(tmp_path, tiny_pipe, precision, tiny):
    main(
        [
            *tiny,
            "--output_dir",
            str(tmp_path),
            "--num_targets",
            "8",
            "--target_batch_size",
            "2",
            "--guidance_scale_range",
            "1",
            "5",
            "--epochs",
            "2",
            "--mixed_precision",
            precision,
            "--validation_prompts",
            tiny[5],
            "--num_validation",
            "2",
        ]
    )
    refiner = Refiner.from_pretrained(tmp_path, tiny_pipe, merge=False)
    assert refiner.config.guidance_scale_range == [1.0, 5.0]
    assert refiner.network.scale_input.weight.abs().max() > 0, "it starts at zero"
    options = parse(
        [*tiny, "--output_dir", "x", "--target_batch_size", "2", "--guidance_scale_range", "1", "5"]
    )
    scales = [Targets(options, tiny_pipe, ["a cat"]).guidance_scale(i) for i in range(200)]
    assert scales[0] == scales[1] != scales[2], "a batch has one scale"
    counts = torch.histc(torch.tensor(scales), bins=4, min=1, max=5)
    assert counts.min() >= 40, "spread evenly over the range"


@pytest.mark.parametrize("scales", [["5", "1"], ["0", "5"], ["3"], ["3", "4"]])
def test_bad_guidance_scale_range(scales, tiny):
    with pytest.raises(ValueError, match="guidance_scale_range"):
        parse([*tiny, "--output_dir", "x", "--guidance_scale_range", *scales])


def test_prompt_files_from_public_data(tmp_path):
    """One caption an image, no repeats, nothing that the tokenizer would cut."""
    coco, pickapic, output = (
        tmp_path / "captions.json",
        tmp_path / "train.parquet",
        tmp_path / "prompts.txt",
    )
    coco.write_text(
        json.dumps(
            {
                "annotations": [
                    {
                        "image_id": i // 2,
                        "caption": f"a cat {'on' if i % 2 == 0 else 'under'} a number  {i // 2}",
                    }
                    for i in range(20)
                ]
            }
        )
    )
    pandas.DataFrame(
        {"caption": ["a dog", "a  dog", "a bird", "long " * 100, "a cat on a number 3"]}
    ).to_parquet(pickapic)
    arguments = [
        "--coco",
        str(coco),
        "--pickapic",
        str(pickapic),
        "--backbone",
        EMOJI,
        "--output",
        str(output),
    ]
    prompts.main([*arguments, "--coco_count", "10", "--pickapic_count", "2"])
    assert sorted(output.read_text().splitlines()) == sorted(
        [f"a cat on a number {i}" for i in range(10)] + ["a bird", "a dog"]
    )
    with pytest.raises(ValueError, match="Pick-a-Pic holds only 2"):
        prompts.main([*arguments, "--coco_count", "10", "--pickapic_count", "3"])
    with pytest.raises(ValueError, match="not a COCO caption file"):
        coco.write_text("[]")
        prompts.main([*arguments, "--coco_count", "1"])
    with pytest.raises(FileNotFoundError, match="no file"):
        prompts.main(["--coco", str(tmp_path / "nothing.json"), "--output", str(output)])


def test_precisions_share_targets(tmp_path, tiny):
    """Each encodes prompts of its own, trains in its precision and saves the LoRA in float32."""
    first, second = tmp_path / "bf16", tmp_path / "fp32"
    main([*tiny, "--mixed_precision", "bf16", "--output_dir", str(first)])
    AcceleratorState._reset_state(reset_partial_state=True)
    shared = ["--targets_of", str(first), "--output_dir", str(second)]
    main([*tiny, "--mixed_precision", "no", *shared])
    prompts = first / "targets" / "prompts"
    assert {path.name for path in prompts.iterdir()} == {"bfloat16", "float32"}
    assert stats(second)[0]["loss"] == pytest.approx(stats(first)[0]["loss"], rel=0.01)
    tensors = [*lora(first).values(), *lora(second).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    recorded = [json.loads((run / "refiner.json").read_text()) for run in (first, second)]
    assert [config["training"]["mixed_precision"] for config in recorded] == ["bf16", "no"]


def test_two_runs_may_write_the_same_target(tmp_path):
    """Each renames its own file, whole, and one that fails leaves none."""
    path = tmp_path / "target"
    with atomic(path) as first, atomic(path) as second:
        assert first.parent == second.parent == tmp_path
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the one that ended last"
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), atomic(path) as part:
            part.write_text("half a file")
            raise error
    assert path.read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_a_run_goes_on_with_what_does_not_change_its_result(tmp_path, tiny):
    """Memory options, bookkeeping and more epochs at a constant rate may change; others not."""
    run = [*tiny, "--lr_schedule", "constant", "--output_dir", str(tmp_path / "run")]
    main([*run, "--epochs", "2"])
    (tmp_path / "run" / f"checkpoint.pt.0{UNFINISHED}").write_text("killed while it wrote")
    others = "--batch_size 2 --gradient_accumulation_steps 2 --gradient_checkpointing True"
    others += " --save_every 7 --validate_every 9 --target_batch_size 3 --epochs 4"
    main([*run, *others.split()])
    assert len(stats(tmp_path / "run")) == 4 and not list(tmp_path.rglob(f"*{UNFINISHED}"))
    whole = [*tiny, "--lr_schedule", "constant", "--output_dir", str(tmp_path / "whole")]
    main([*whole, "--epochs", "4"])
    for line, expected in zip(stats(tmp_path / "run"), stats(tmp_path / "whole"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for option, value in (("lr", "0.5"), ("rank", "64"), ("epochs", "1"), ("batch_size", "2")):
        with pytest.raises(ValueError, match="holds another run .*was"):
            main([*run, "--epochs", "4", f"--{option}", value])
    with pytest.raises(ValueError, match="epochs was 4.0, now 8.0"):
        main([*run, "--epochs", "8", "--lr_schedule", "cosine"])


def test_targets_go_on_with_another_batch(tmp_path, tiny_pipe, tiny):
    """What is on disk stays; the rest is sampled in calls of another size."""
    arguments = [*tiny, "--sampler", "DDIM", "--output_dir", str(tmp_path)]

    def targets(count, size):
        options = [*arguments, "--num_targets", str(count), "--target_batch_size", str(size)]
        made = Targets(parse(options), tiny_pipe, ["a cat", "a dog"])
        made.make(Accelerator())
        return made

    first = targets(3, 3).read([0, 1, 2])["x0"]
    more = targets(8, 4)
    assert sorted(more.files) == [0, 3, 4] and torch.equal(more.read([0, 1, 2])["x0"], first)
    alone = sample_latents(
        with_sampler(tiny_pipe, "DDIM"),
        more.noise([5]),
        encode_prompt(tiny_pipe, [more.prompts[5]]),
        2,
        guidance_scale=2.0,
    )
    torch.testing.assert_close(more.read([5])["x0"], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "data",
    [
        "\ufeffa café\na panda\n".encode(),
        "a café\na panda\n".encode("utf-16"),
        "a café\na panda\n".encode("utf-16-be").join([b"\xfe\xff", b""]),
        "a café\r\n\r\na panda\r\n".encode("cp1252"),
        b'{"file_name": "1.png", "text": "a caf\\u00e9"}\n{"name": "2.png", "text": "a panda"}',
        'file_name,caption\n1.png,"a café"\n2.png,a panda\n'.encode(),
        'caption\n"a café"\n"a panda"\n'.encode(),
    ],
)
def test_prompt_files_of_any_kind(tmp_path, pipe, data):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    assert read_prompts(path, pipe) == ["a café", "a panda"]


def test_all_bad_prompts_are_named(tmp_path, pipe):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["a cat", "apple " * 90, "a dog", *["plum " * 90] * 6]))
    with pytest.raises(ValueError, match=r"prompts 2, 4, 5, 6, 7 and 2 more: The prompt is 92"):
        read_prompts(path, pipe)
    (tmp_path / "records.jsonl").write_text('{"file": "1.png"}\n')
    with pytest.raises(ValueError, match="line 1: .*no field prompt, text, caption"):
        read_prompts(tmp_path / "records.jsonl", pipe)
    (tmp_path / "list.csv").write_text("a cat\na dog\n")
    with pytest.raises(ValueError, match="a .csv file a header"):
        read_prompts(tmp_path / "list.csv", pipe)


def test_shipped_prompts(pipe):
    """Enough of them, each once, none in both files; found from anywhere."""
    general, held_out = (
        (ROOT / f"assets/prompts/{name}.txt").read_text().splitlines()
        for name in ("general", "general_heldout")
    )
    assert len(set(general)) == len(general) == 2000 and not set(general) & set(held_out)
    assert max(len(prompt.split()) for prompt in general) < 40, "77 tokens are enough"
    assert read_prompts("assets/prompts/emoji.txt", pipe)


def test_patience(tmp_path, tiny):
    log = [{"step": i, "validation_refined": v} for i, v in enumerate([5, 3, 2, 2, 4])]
    assert has_converged(log, 2) and not has_converged(log, 3) and not has_converged(log[:3], 2)
    stuck = [*tiny, "--epochs", "30", "--lr", "1e-12", "--validate_every", "1", "--patience", "2"]
    stuck += ["--validation_prompts", tiny[5], "--num_validation", "2"]
    main([*stuck, "--output_dir", str(tmp_path)])
    steps = len(stats(tmp_path))
    assert 3 <= steps < 30 and stats(tmp_path)[-1]["validation_percent"] < 50
    main([*stuck, "--output_dir", str(tmp_path)])
    assert len(stats(tmp_path)) == steps and lora(tmp_path), "it has ended"
    assert (tmp_path / "validation" / "0000000.png").exists(), "the first sheet, before training"


def test_eight_bits_need_bitsandbytes(monkeypatch):
    """The optimiser is bitsandbytes' where it is installed; where it is not, that is said first."""
    arguments = ["--preset", "emoji", "--output_dir", "x", "--optimizer", "adamw8bit"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install"):
        parse(arguments)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    bitsandbytes = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=torch.optim.Adamax))
    monkeypatch.setitem(sys.modules, "bitsandbytes", bitsandbytes)
    assert train_refiner._adamw(parse(arguments)) is torch.optim.Adamax
