"""Strangers' LoRAs, checkpoints and folders, with random oddities and damages."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from noiserefine.models.loading import load_pipeline
from noiserefine.models.single_file import identify
from noiserefine.models.user_lora import add_lora, remove_lora
from tests.conftest import EMOJI, output
from tests.test_single_file import SD1, SD2, XL
from tests.test_user_lora import KINDS, attention
from tests.tools.stress.figure import Count, Figure, equality, print_errors

SHORTEST_SENTENCE = 20
ODD_VALUES = [
    *(None, -1, 0, 1.5, 10**30, "x", "../..", [], {}, [[]], True, float("nan"), [16, 24]),
    *("epsilon", "v", "True", "LCMScheduler", ["my", "Mine"]),
]
MARKERS = [
    *("modelspec.prediction_type", "modelspec.predict_key", "modelspec.architecture"),
    *("ss_v_parameterization", "ss_zero_terminal_snr", "ss_base_model_version"),
]
WORDS = ["v", "epsilon", "True", "False", "", "sd_v2_v", "stable-diffusion-v2-768-v", "x" * 9999]
RENAMES = [
    *(("lora_unet_", "lora_te1_"), ("lora_unet_", "unet."), ("lora_unet_down", "lora_unet_input")),
    *((".lora_down", ".lora_mid"), (".hada_w1_a", ".hada_t1"), (".lokr_w1", ".lokr_w2_b")),
    *((".weight", ""), ("attn", "at"), ("_0_", "_9_"), (".alpha", ".dora_scale"), ("unet_", "")),
]


class Tally:
    """Counts what loaded and what was refused with a sentence, and keeps the rest."""

    def __init__(self) -> None:
        self.loaded, self.refused = 0, 0
        self.unforeseen: list[str] = []

    def attempt(self, load: Callable[..., Any], *args: Any) -> None:
        """Call load, which may return or refuse in words."""
        try:
            load(*args)
            self.loaded += 1
        except (ValueError, FileNotFoundError) as error:
            sentence = str(error)
            bad = len(sentence) < SHORTEST_SENTENCE or "\n" in sentence or sentence[-1] in ":,;"
            self.refused += not bad
            if bad:
                self.unforeseen.append(f"no sentence: {sentence}")
        except Exception as error:  # counted
            self.unforeseen.append(f"{type(error).__name__}: {error}")

    def figures(self, name: str, count: int) -> Iterator[Figure]:
        """Yield the figures of these attempts."""
        print_errors(self.unforeseen)
        both = min(self.loaded, self.refused) > 0
        shares = f"{self.loaded}, {self.refused}"
        yield Figure(f"{name}: loaded, refused with a sentence, of {count}", shares, "both", both)
        unforeseen = len(self.unforeseen)
        yield Figure(f"{name}: errors that nobody foresaw", unforeseen, "0", not unforeseen)


def files(count: Count) -> Iterator[Figure]:
    """Load strangers' files; each must load, or be refused in words, and change nothing."""
    with tempfile.TemporaryDirectory() as parent:
        yield from _loras(Path(parent), count(500))
        yield from _checkpoints(Path(parent), count(1000))
        yield from _folders(Path(parent), count(150))


def _loras(parent: Path, count: int) -> Iterator[Figure]:
    pipe, chance, tally = load_pipeline(EMOJI, "cpu"), random.Random(0), Tally()
    before, scheduler = output(pipe), pipe.scheduler
    for number in range(count):
        folder = parent / f"{chance.choice(['style', 'lcm-lora', 'x-lightning'])}-{number}"
        folder.mkdir()
        make = KINDS[chance.choice(list(KINDS))][0]
        names = chance.sample(attention(pipe.unet), 4)
        state = {
            f"lora_unet_{name.replace('.', '_')}.{part}": tensor.contiguous()
            for name in names
            for part, tensor in make(pipe.unet.get_submodule(name).weight.data, number)[0].items()
        }
        for _ in range(chance.choice([0, 1, 1, 2])):
            state = _changed(state, chance)
        save_file(state, folder / "style.safetensors", {chance.choice(MARKERS): "{"})
        _damage_bytes(folder / "style.safetensors", chance)
        if chance.random() < 0.1:
            config = {"_class_name": chance.choice(ODD_VALUES), "beta_start": 0.1}
            (folder / "scheduler_config.json").write_text(json.dumps(config))
        tally.attempt(add_lora, pipe, str(folder))
        remove_lora(pipe)
        pipe.scheduler = scheduler
        shutil.rmtree(folder)
    yield from tally.figures("LoRAs", count)
    yield equality("LoRAs: the pipeline's output is unchanged", torch.equal(output(pipe), before))


def _changed(state: dict[str, torch.Tensor], chance: random.Random) -> dict[str, torch.Tensor]:
    """Return a LoRA's tensors with one thing changed."""
    if not state:
        return state
    name = chance.choice(list(state))
    old, new = chance.choice(RENAMES)
    tensor = state[name]
    return chance.choice(
        [
            lambda: {key.replace(old, new): value for key, value in state.items()},
            lambda: state | {name.replace(old, new): tensor.clone()},
            lambda: {key: value for key, value in state.items() if key != name},
            lambda: state | {name: tensor.flatten()},
            lambda: state | {name: tensor[:1] if tensor.ndim else tensor[None]},
            lambda: state | {name: torch.full_like(tensor, torch.nan)},
            lambda: state | {name: tensor * 1e30},
            lambda: state | {name: tensor.to(torch.int64)},
            lambda: {key: value.half() for key, value in state.items()},
            lambda: state | {f"{name}.more": torch.ones(2)},
            lambda: state | {"bundle_emb.word.string_to_param.*": torch.ones(1, 4)},
        ]
    )()


def _damage_bytes(file: Path, chance: random.Random) -> None:
    """Cut a file or change a byte of its head, now and then."""
    data = bytearray(file.read_bytes())
    draw = chance.random()
    if draw < 0.1:
        data[chance.randrange(min(len(data), 2000))] ^= chance.randrange(1, 256)
    elif draw < 0.15:
        del data[chance.randrange(len(data)) :]
    file.write_bytes(data)


def _checkpoints(parent: Path, count: int) -> Iterator[Figure]:
    chance, tally = random.Random(0), Tally()
    for number in range(count):
        shapes = dict(chance.choice([SD1, SD2, XL]))
        extra = chance.sample(
            ["v_pred", "ztsnr", "edm_mean", "edm_vpred.sigma_max", "a.lora_up"], 2
        )
        shapes |= {name: (1,) for name in extra if chance.random() < 0.3}
        if chance.random() < 0.1:
            shapes[chance.choice(list(shapes))] = chance.choice([(), (9,), (8, 9, 3, 3), (4, 640)])
        path = parent / f"{chance.choice(['model', 'my-vpred'])}{number}.safetensors"
        metadata = {
            chance.choice(MARKERS): chance.choice(WORDS) for _ in range(chance.randrange(3))
        }
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path, metadata)
        _damage_bytes(path, chance)
        if chance.random() < 0.1:
            text = chance.choice(
                ["", "{", "model: 1", "model:\n  params:\n    parameterization: v"]
            )
            path.with_suffix(".yaml").write_text(text)
        tally.attempt(identify, path)
        path.unlink()
    yield from tally.figures("checkpoints", count)


def _folders(parent: Path, count: int) -> Iterator[Figure]:
    chance, tally = random.Random(0), Tally()
    for number in range(count):
        folder = parent / f"folder{number}"
        shutil.copytree(EMOJI, folder)
        configs = sorted(folder.glob("**/*.json"))
        for _ in range(chance.choice([0, 1, 1, 2])):
            file = chance.choice([path for path in configs if path.stat().st_size < 10**5])
            try:
                values = json.loads(file.read_text())
                values[chance.choice(list(values))] = chance.choice(ODD_VALUES)
                file.write_text(json.dumps(values))
            except (ValueError, TypeError, IndexError):
                file.write_text(chance.choice(["", "[]", "{", "null", "\ufeff{}"]))
        weights = chance.choice(sorted(folder.glob("*/*.safetensors")))
        if chance.random() < 0.2:
            _damage_bytes(weights, chance)
        elif chance.random() < 0.1:
            state = load_file(weights)
            state.pop(chance.choice(list(state)))
            save_file(state, weights)
        tally.attempt(lambda folder=folder: _usable(load_pipeline(str(folder), "cpu")))
        shutil.rmtree(folder)
    yield from tally.figures("folders", count)


def _usable(pipe: DiffusionPipeline) -> None:
    """Raise AssertionError for a pipeline without a part that sampling needs."""
    assert None not in (pipe.unet, pipe.vae, pipe.scheduler, pipe.text_encoder, pipe.tokenizer)
