"""Robustness in figures: one line each, `name: value (goal)`; the exit status is 1 where one falls short.

python -m tests.tools.stress              # all of it
python -m tests.tools.stress --quick      # a tenth of the counts, a few minutes
python -m tests.tools.stress --only training base requests uploads refiners visitors memory
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from tests.conftest import EMOJI, EMOJI_REFINER, ROOT, output, perturbed

PROMPT = "a red apple on a blue background"
PORT = 7893


@dataclass
class Figure:
    name: str
    value: float | int
    goal: str
    holds: bool


def sha256_of_output() -> str:
    """What a process that did nothing else makes of a fixed prompt and seed."""
    code = (
        "import hashlib; from noiserefine.models.loading import load_pipeline; "
        "from tests.conftest import EMOJI, output; "
        "print(hashlib.sha256(output(load_pipeline(EMOJI, 'cpu')).numpy().tobytes()).hexdigest())"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()[-1]


# ---------------------------------------------------------------------------------------------------- training

TRAINING = [
    "--preset",
    "emoji",
    "--num_targets",
    "128",
    "--target_batch_size",
    "8",
    "--target_steps",
    "4",
    "--steps",
    "3",
    "--batch_size",
    "8",
    "--epochs",
    "2",
    "--validate_every",
    "1000",
    "--num_validation",
    "4",
    "--save_every",
    "1",
]


def train(folder: Path, kill_after: float | None = None) -> tuple[bool, float]:
    """Runs the trainer until it ends or is killed, so many seconds after it began to write; whether it ended, and the seconds it worked."""
    process = subprocess.Popen(
        [sys.executable, "train/train_refiner.py", *TRAINING, "--output_dir", str(folder)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    config, began = folder / "config.json", None
    stamp = config.stat().st_mtime_ns if config.exists() else None
    while process.poll() is None:
        time.sleep(0.01)
        if began is None and config.exists() and config.stat().st_mtime_ns != stamp:
            began = time.perf_counter()
        if (
            kill_after is not None
            and began is not None
            and time.perf_counter() - began > kill_after
        ):
            process.kill()
    said = process.communicate()[1]
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(said)
    return process.returncode == 0, time.perf_counter() - (began or time.perf_counter())


def training(count: Callable[[int], int]) -> Iterator[Figure]:
    """Kills runs at random moments; each of them, gone on with to its end, must give the LoRA of a run that nobody disturbed."""
    with tempfile.TemporaryDirectory() as folder:
        _, seconds = train(Path(folder) / "whole")
        expected = load_file(Path(folder) / "whole" / "pytorch_lora_weights.safetensors")
        moments, left, kills, runs, equal = random.Random(0), count(20), 0, 0, 0
        while left > kills:
            run = Path(folder) / f"run{runs}"
            for _ in range(min(5, left - kills)):
                ended, _ = train(run, moments.uniform(0, seconds / 3))
                if ended:
                    break
                kills += 1
            train(run)
            runs += 1
            tensors = load_file(
                run / "pytorch_lora_weights.safetensors"
            )  # of the file's header the order is safetensors' own
            equal += tensors.keys() == expected.keys() and all(
                torch.equal(tensors[name], expected[name]) for name in tensors
            )
        yield Figure("training: kills at random moments", kills, f"{count(20)}", kills == count(20))
        yield Figure(
            "training: runs whose LoRA is that of an undisturbed run",
            equal,
            f"{runs}",
            equal == runs,
        )
        yield from full_disk(Path(folder), expected)


def full_disk(folder: Path, expected: dict[str, torch.Tensor]) -> Iterator[Figure]:
    """A disk that holds one checkpoint and not the next one beside it; only root may mount such a disk."""
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        print("    no right to mount a small disk: left out", file=sys.stderr)
        return
    try:
        command = [sys.executable, "train/train_refiner.py", *TRAINING, "--output_dir", str(disk)]
        full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said = (
            full.returncode == 1
            and "can't be written" in full.stderr
            and "Traceback" not in full.stderr
        )
        yield Figure("training: on a full disk it stops with a sentence", int(said), "1", said)
        step = torch.load(disk / "checkpoint.pt", weights_only=True)["step"]
        yield Figure(
            "training: the last checkpoint is whole, of step", step, "at least 1", step >= 1
        )
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        train(disk)
        tensors = load_file(disk / "pytorch_lora_weights.safetensors")
        equal = all(torch.equal(tensors[name], expected[name]) for name in expected)
        yield Figure(
            "training: with space again it ends with the same LoRA", int(equal), "1", equal
        )
    finally:
        subprocess.run(
            ["umount", "--lazy", str(disk)], check=True
        )  # the tensors read last are still mapped to their file


# ---------------------------------------------------------------------------------------------------- the base


def base(count: Callable[[int], int]) -> Iterator[Figure]:
    """Random things a visitor does, in this process; then the pipeline's output against that of a fresh process."""
    import gradio as gr

    from noiserefine.models.catalogue import SAMPLERS, Model
    from noiserefine.page import handlers, jobs
    from noiserefine.page.events import Made
    from noiserefine.page.settings import Settings
    from noiserefine.page.stream import stream
    from train.tools.architectures import random_pipeline

    chance, done, refused, stopped = random.Random(0), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        random_pipeline("sd-turbo", small=True).save_pretrained(f"{folder}/other")
        quick = [
            "compare",
            "compare",
            "strength",
            "two_prompts",
            "guided_from_refined",
            "refine",
            "trajectory",
            "attention",
        ]
        controls = {"two_prompts": {"other": "a panda"}, "attention": {"word": "apple"}}
        for _ in range(count(500)):
            last: dict = {}
            model = (
                {}
                if chance.random() < 0.8
                else chance.choice(
                    [
                        {"backbone": f"{folder}/other"},
                        {"refiner": f"{EMOJI_REFINER}-scales"},
                        {"lora": "assets/loras/emoji-clay"},
                    ]
                )
            )
            for _ in range(chance.randint(1, 4)):
                view = chance.choice(quick)
                values = (
                    asdict(
                        Settings(
                            chance.choice([PROMPT, "an apple"]),
                            chance.randrange(9),
                            "emoji",
                            chance.choice([1, 2, 3]),
                            chance.choice([2.5, 1.0]),
                            chance.choice([1.0, 0.0, 0.5]),
                            chance.choice([*SAMPLERS]),
                            chance.choice([0, 0, 72]),
                            lora_weight=chance.choice([1.0, 0.5]),
                            negative_prompt=chance.choice(["", "blurry"]),
                        )
                    )
                    | model
                )
                if chance.random() < 0.2:
                    values |= chance.choice(
                        [
                            {"prompt": ""},
                            {"backbone": "nonsense"},
                            {"strength": float("nan")},
                            {"width": 65},
                            {"sampler": "nonsense"},
                            {"refiner": "nonsense"},
                            {"lora": "nonsense"},
                            {"guidance_scale": 99.0},
                        ]
                    )
                settings = Settings(**values)
                running = handlers.run(view, settings, controls.get(view, {}), last)
                try:
                    for events in running:
                        for event in events:
                            if isinstance(event, Made):
                                last[event.model, event.sample.recipe] = event.sample
                        if chance.random() < 0.1:
                            stopped += 1
                            break
                    else:
                        done += 1
                except gr.Error:
                    refused += 1
                running.close()
        list(stream(jobs.WORKER, lambda report: None))  # the last one that was stopped has ended
    import hashlib

    ours = hashlib.sha256(
        output(jobs.MODELS.get(Model("emoji")).pipe).numpy().tobytes()
    ).hexdigest()
    yield Figure("base: random sequences", count(500), "500", True)
    yield Figure(
        "base: of their views done, stopped, refused",
        f"{done}, {stopped}, {refused}",
        "some of each",
        min(done, stopped, refused) > 0,
    )
    equal = ours == sha256_of_output()
    yield Figure("base: output equal to a fresh process's", int(equal), "1", equal)


# ---------------------------------------------------------------------------------------------------- the server


class Server:
    """The app as a process of its own, spoken to as its page does."""

    def __init__(self, folder: Path):
        self.folder, self.url = folder, f"http://127.0.0.1:{PORT}"
        self.log = open(folder / "log", "w")
        self.process = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(PORT)],
            cwd=ROOT,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {
                "HF_HUB_OFFLINE": "1",
                "TMPDIR": str(folder),
                "GRADIO_TEMP_DIR": str(folder / "gradio"),
            },
        )
        while "Running on local URL" not in (folder / "log").read_text():
            if self.process.poll() is not None:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.1)
        config = httpx.get(f"{self.url}/config").json()
        self.functions = {
            each["api_name"]: each["id"] for each in config["dependencies"] if each["api_name"]
        }
        self.uploads = [
            each["id"]
            for each in config["dependencies"]
            if [name for _, name in each["targets"]] == ["upload"]
        ]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    async def call(
        self,
        client: httpx.AsyncClient,
        function: int,
        data: list,
        session: str,
        leave_after: int | None = None,
    ):
        """The outputs, or the sentence of the refusal. leave_after: goes away after so many messages."""
        body = json.dumps(
            {"data": data, "fn_index": function, "session_hash": session}, ensure_ascii=True
        )
        joined = await client.post(
            f"{self.url}/gradio_api/queue/join",
            content=body,
            headers={"content-type": "application/json"},
        )
        if joined.status_code != 200:
            return joined.status_code, joined.text
        async with client.stream(
            "GET", f"{self.url}/gradio_api/queue/data", params={"session_hash": session}
        ) as stream:
            messages, state = 0, None
            async for line in stream.aiter_lines():
                if not line.startswith("data:"):
                    continue
                message = json.loads(line[5:])
                messages += 1
                if messages == leave_after:
                    return None
                if message["msg"] == "process_generating" and state is None:
                    state = message["output"].get("data")
                if message["msg"] == "process_completed":
                    if not message["success"]:
                        return 0, message["output"].get("error")
                    return message["output"]["data"]
        return -1, "the stream ended"

    async def pixels(self, client: httpx.AsyncClient, file: dict) -> np.ndarray:
        answer = await client.get(f"{self.url}/gradio_api/file={file['path']}")
        return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss


@contextlib.contextmanager
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        running = Server(Path(folder))
        try:
            yield running
        finally:
            running.close()


def good(seed: int = 7, steps: int = 2, strength: float = 1.0, prompt: str = PROMPT) -> list:
    return [prompt, seed, "emoji", steps, 2.5, strength, "DDIM", 0, 0, "", "", 1.0, "", None]


def alone(seed: int, steps: int, strength: float = 1.0, prompt: str = PROMPT) -> list[np.ndarray]:
    """The three columns, made in this process."""
    from noiserefine.analysis.recipe import Maker, Recipe
    from noiserefine.models.catalogue import Model
    from noiserefine.page import jobs

    loaded = jobs.MODELS.get(Model("emoji"))
    make, recipe = (
        Maker(loaded.pipe, loaded.refiner),
        Recipe(prompt, seed, steps, guidance_scale=2.5, strength=strength),
    )
    return [
        np.asarray(make(each).image) for each in (recipe.gaussian, recipe.guided, recipe.refined)
    ]


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None))


async def right(
    running: Server, http: httpx.AsyncClient, outputs: list, expected: list[np.ndarray]
) -> bool:
    """Whether the three columns have the expected pixels."""
    return all(
        [
            np.array_equal(await running.pixels(http, outputs[i]), image)
            for i, image in zip((0, 2, 4), expected)
        ]
    )


def as_ever(running: Server) -> bool:
    """Whether a normal request is answered with the right pixels."""

    async def ask() -> bool:
        async with client() as http:
            return await right(
                running,
                http,
                await running.call(
                    http, running.functions["compare"], good(), f"normal{time.time()}"
                ),
                expected,
            )

    expected = alone(7, 2)
    return asyncio.run(ask())


NASTY = [
    None,
    True,
    False,
    -1,
    0,
    1.5,
    1e308,
    -1e308,
    2**63,
    10**400,
    float("nan"),
    float("inf"),
    "",
    " ",
    "nan",
    "1e999",
    "9" * 5000,
    "x" * 10**6,
    "apple " * 70,
    "😀\u202e\u0000\ufffe",
    "\ud800",
    "../../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:1/",
    "a/b/c",
    "somebody/something",
    "..",
    "C:\\nul",
    "<script>alert(1)</script>",
    "{}",
    "%s%n",
    "assets/emoji",
    "train",
    [],
    {},
    [[]],
    [None] * 1000,
    {"a": {"b": []}},
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
]


async def fuzz(running: Server, calls: int) -> list[str]:
    """What was wrong with the answers to calls with wrong values."""
    chance, wrong, slots = random.Random(0), [], asyncio.Semaphore(8)
    views = [
        name
        for name in running.functions
        if name
        in (
            "compare",
            "refine",
            "strength",
            "frequencies",
            "two_prompts",
            "interpolation",
            "attention",
            "many",
        )
    ]
    extras = {
        "frequencies": [0.3],
        "two_prompts": ["a panda"],
        "interpolation": [8],
        "attention": ["apple"],
        "many": ["", 1],
    }

    async def one(number: int) -> None:
        view = chance.choice(views)
        data = good(steps=1)
        data[-1:-1] = []
        data = data[:-1] + extras.get(view, []) + [None]
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data) - 1)] = chance.choice(NASTY)
        if chance.random() < 0.05:
            data = data[: chance.randrange(len(data))]
        if chance.random() < 0.05:
            data = data + [chance.choice(NASTY)] * chance.randint(1, 30)
        shown = f"{view} {str(data)[:300]}"
        async with slots, client() as http:
            try:
                answer = await asyncio.wait_for(
                    running.call(http, running.functions[view], data, f"fuzz{number}"), 60
                )
            except TimeoutError:
                wrong.append(f"hang: {shown}")
                return
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}: {shown}")
                return
        if isinstance(answer, tuple):
            status, text = answer
            if (
                status >= 500
                and status != 503
                or not text
                or "Traceback" in text
                or "Error" in text.split(" ")[0]
                or len(text) < 12
            ):
                wrong.append(f"{answer!r}: {shown}"[:700])

    await asyncio.gather(*[one(number) for number in range(calls)])
    return wrong


def requests(count: Callable[[int], int]) -> Iterator[Figure]:
    with server() as running:
        wrong = asyncio.run(fuzz(running, count(1000)))
        for each in wrong[:20]:
            print("   ", each, file=sys.stderr)
        yield Figure("requests: with wrong values", count(1000), "1000", True)
        yield Figure(
            "requests: answered with a traceback, a hang or no sentence", len(wrong), "0", not wrong
        )
        tracebacks = (
            (running.folder / "log").read_text().split("Traceback (most recent call last)")[1:]
        )
        ours = sum(f"{ROOT}/" in each for each in tracebacks)
        yield Figure(
            "requests: errors of the project's own code in the server's log", ours, "0", ours == 0
        )
        normal = as_ever(running)
        yield Figure(
            "requests: a normal one after them has the right pixels", int(normal), "1", normal
        )


# ---------------------------------------------------------------------------------------------------- files of strangers


def png(text: str | None, size: tuple[int, int] = (8, 8)) -> bytes:
    chunks, data = PngInfo(), io.BytesIO()
    if text is not None:
        chunks.add_itxt("noiserefine", text, zip=True)
    Image.new("1", size).save(data, "PNG", pnginfo=chunks)
    return data.getvalue()


def bad_uploads() -> list[bytes]:
    """No PNGs, bombs of pixels and of text, settings of other kinds, markup."""
    sound = png(json.dumps({"settings": {"prompt": "a cat"}}))
    settings = [
        {"settings": value}
        for value in (
            None,
            [],
            1,
            {"seed": []},
            {"seed": "x"},
            {"prompt": 1},
            {"steps": {}},
            {"strength": "nan"},
            {"prompt": "x" * 10**5},
        )
    ]
    return [
        b"",
        b"x",
        b"GIF89a",
        b"<svg/>",
        b"\x89PNG\r\n\x1a\n",
        sound[:50],
        sound[:60] + b"\0" * 40 + sound[100:],
        png(None),
        png("{"),
        png("[" * 10**6),
        png("x" * 10**8),
        png("{}", (30000, 30000)),
        png("{}", (5000, 5000)),
        *[png(json.dumps(value)) for value in settings],
    ]


def uploads(count: Callable[[int], int]) -> Iterator[Figure]:
    async def upload(running: Server, data: bytes, number: int):
        async with client() as http:
            path = (
                await http.post(
                    f"{running.url}/gradio_api/upload",
                    files={"files": ("image.png", data, "image/png")},
                )
            ).json()[0]
            return await running.call(
                http,
                running.uploads[0],
                [{"path": path, "meta": {"_type": "gradio.FileData"}}],
                f"upload{number}",
            )

    with server() as running:
        answers = [asyncio.run(upload(running, data, i)) for i, data in enumerate(bad_uploads())]
        refused = sum(
            isinstance(answer, tuple)
            and bool(answer[1])
            and "Traceback" not in answer[1]
            and len(answer[1]) > 20
            for answer in answers
        )
        yield Figure(
            "uploads: bad files refused with a sentence",
            refused,
            str(len(answers)),
            refused == len(answers),
        )
        markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
        restored = asyncio.run(
            upload(running, png(json.dumps({"settings": {"prompt": markup}})), 1000)
        )
        plain = isinstance(restored, list) and restored[0] == markup
        yield Figure("uploads: markup comes back as the plain text it is", int(plain), "1", plain)
        normal = as_ever(running)
        yield Figure(
            "uploads: a normal request after them has the right pixels", int(normal), "1", normal
        )


def refiners(count: Callable[[int], int]) -> Iterator[Figure]:
    """Damages a sound refiner in random ways; what comes must be a refusal in words or a refiner."""
    from noiserefine import Refiner
    from noiserefine.models.loading import load_pipeline
    from noiserefine.models.user_lora import add_lora

    pipe = load_pipeline(EMOJI, "cpu")
    before, chance, wrong, refused = output(pipe), random.Random(0), [], 0
    sound = Path(EMOJI_REFINER + "-scales")
    weights, guidance, config = (
        "pytorch_lora_weights.safetensors",
        "guidance_embedding.safetensors",
        json.loads((sound / "refiner.json").read_text()),
    )
    tensors = load_file(sound / weights)
    with tempfile.TemporaryDirectory() as parent:
        canary = Path(parent) / "executed"

        class Payload:
            def __reduce__(self):
                return os.system, (f"touch {canary}",)

        def damage(folder: Path) -> str:
            kind = chance.choice(
                [
                    "cut",
                    "flip",
                    "shape",
                    "missing",
                    "extra",
                    "dtype",
                    "pickle",
                    "json",
                    "value",
                    "climb",
                    "name",
                    "link",
                    "empty",
                ]
            )
            file = folder / chance.choice([weights, guidance])
            data = file.read_bytes()
            if kind == "cut":
                file.write_bytes(data[: chance.randrange(len(data))])
            elif kind == "flip":
                place = chance.randrange(min(len(data), 4000))
                file.write_bytes(
                    data[:place]
                    + bytes([data[place] ^ chance.randrange(1, 256)])
                    + data[place + 1 :]
                )
            elif kind in ("shape", "missing", "extra", "dtype"):
                state, name = dict(tensors), chance.choice(list(tensors))
                if kind == "shape":
                    state[name] = state[name].flatten()
                elif kind == "missing":
                    del state[name]
                elif kind == "extra":
                    state[f"{name}.more"] = torch.zeros(2)
                else:
                    state[name] = state[name].to(torch.int64)
                save_file(state, folder / weights)
            elif kind == "pickle":
                file.unlink()
                for name in (file.name, file.stem + ".bin"):
                    torch.save(Payload(), folder / name)
            elif kind == "json":
                (folder / "refiner.json").write_text(
                    chance.choice(
                        ["", "{", "[]", "null", "1", "[" * 10**5, '"x"', "{}", '{"rank": 1}', "\0"]
                    )
                )
            elif kind == "value":
                changed = config | {
                    chance.choice(list(config)): chance.choice(
                        [None, -1, 0, 1.5, 10**30, "x", "../..", [], {}, [[]], True, float("nan")]
                    )
                }
                (folder / "refiner.json").write_text(json.dumps(changed))
            elif kind == "climb":
                (folder / "refiner.json").write_text(
                    json.dumps(
                        config
                        | {
                            "base_model": "../../../etc/passwd",
                            "architecture": {"../x": "/etc/passwd"},
                        }
                    )
                )
            elif kind == "name":
                return chance.choice(
                    [
                        "../" * 30 + "etc",
                        "a b",
                        "a/b/c",
                        "ü/ü",
                        "x" * 5000,
                        "a/\0",
                        "--help",
                        "somebody/some..thing",
                        "/dev/null",
                        "-",
                    ]
                )
            elif kind == "link":
                file.unlink()
                file.symlink_to("/dev/zero" if chance.random() < 0.01 else "/etc/passwd")
            else:
                file.write_bytes(b"")
            return str(folder)

        for i in range(count(300)):
            folder = Path(parent) / f"refiner{i}"
            shutil.copytree(sound, folder)
            name = damage(folder)
            for load in (
                lambda name: Refiner.from_pretrained(name, pipe),
                lambda name: add_lora(pipe, name),
            ):
                try:
                    load(name)
                except (ValueError, FileNotFoundError) as error:
                    refused += len(str(error)) > 20
                except Exception as error:
                    wrong.append(f"{type(error).__name__}: {error}")
                pipe.unload_lora_weights()
            shutil.rmtree(folder)
        executed = canary.exists() or bool(list(Path(parent).iterdir()))
    for each in wrong[:20]:
        print("   ", each[:300], file=sys.stderr)
    yield Figure(
        "refiners: damaged ones, each read as refiner and as LoRA", count(300), "300", True
    )
    yield Figure(
        "refiners: of these readings refused with a sentence",
        refused,
        "more than half",
        refused > count(300),
    )
    yield Figure("refiners: errors that nobody foresaw", len(wrong), "0", not wrong)
    yield Figure("refiners: something executed or written", int(executed), "0", not executed)
    untouched = torch.equal(output(pipe), before)
    yield Figure("refiners: the pipeline's output is what it was", int(untouched), "1", untouched)


# ---------------------------------------------------------------------------------------------------- many visitors


def crowd(running: Server, clients: int) -> tuple[int, list[str]]:
    """How many of the clients, who come at once with different settings, get the pixels of a request made alone, and what others are told."""
    kinds = [
        (
            seed,
            1 + seed % 3,
            (seed % 5) / 4,
            PROMPT if seed % 2 else f"a panda on a {('pink', 'green')[seed % 4 // 2]} background",
        )
        for seed in range(clients)
    ]
    expected = {kind: alone(*kind) for kind in kinds}

    async def one(kind: tuple) -> bool | str:
        async with client() as http:
            answer = await running.call(
                http, running.functions["compare"], good(*kind), f"crowd{clients}-{kind[0]}"
            )
            return (
                str(answer[1])
                if isinstance(answer, tuple)
                else await right(running, http, answer, expected[kind])
            )

    async def all_at_once() -> list[bool | str]:
        return await asyncio.gather(*[one(kind) for kind in kinds])

    answers = asyncio.run(all_at_once())
    return sum(answer is True for answer in answers), [
        answer for answer in answers if isinstance(answer, str)
    ]


async def leavers(running: Server, clients: int) -> float:
    """Seconds until a request is answered after clients who asked for much went away."""

    async def one(number: int) -> None:
        async with client() as http:
            await running.call(
                http,
                running.functions["samplers"],
                good(number, 100),
                f"leaver{number}",
                leave_after=2,
            )

    await asyncio.gather(*[one(number) for number in range(clients)])
    began = time.perf_counter()
    async with client() as http:
        await running.call(http, running.functions["compare"], good(), "after")
    return time.perf_counter() - began


def visitors(count: Callable[[int], int]) -> Iterator[Figure]:
    with server() as running:
        as_ever(running)
        equal, _ = crowd(running, 50)
        yield Figure(
            "visitors: of 50 at once, those who get the pixels of a solo run",
            equal,
            "50",
            equal == 50,
        )
        equal, told = crowd(running, 150)
        clear = sum("full" in each.lower() for each in told)
        yield Figure(
            "visitors: of 150 at once, those told that the queue is full",
            clear,
            "the others",
            clear > 0 and equal + clear == 150,
        )
        seconds = asyncio.run(leavers(running, 5))
        yield Figure(
            "visitors: seconds for one who comes after 5 who asked for much and left",
            round(seconds, 1),
            "at most 15",
            seconds <= 15,
        )
        normal = as_ever(running)
        yield Figure(
            "visitors: a normal request after them has the right pixels", int(normal), "1", normal
        )


def memory(count: Callable[[int], int]) -> Iterator[Figure]:
    async def some(running: Server, requests: range, visitors: int) -> None:
        async with client() as http:
            for number in requests:
                answer = await running.call(
                    http,
                    running.functions["compare"],
                    good(number, 1),
                    f"visitor{number % visitors}",
                )
                assert not isinstance(answer, tuple), answer

    with server() as running:
        asyncio.run(some(running, range(10), 10))
        early = running.memory()
        asyncio.run(some(running, range(10, count(1000)), 10))
        ratio = running.memory() / early
        yield Figure(
            f"memory: after {count(1000)} requests of 10 visitors, of that after 10",
            round(ratio, 3),
            "at most 1.05",
            ratio <= 1.05,
        )
        asyncio.run(some(running, range(count(300)), count(300)))
        ratio = running.memory() / early
        yield Figure(
            f"memory: after {count(300)} visitors more, of whom 100 are remembered",
            round(ratio, 3),
            "at most 1.15",
            ratio <= 1.15,
        )
        left = [
            path
            for path in running.folder.iterdir()
            if path.is_dir() and path.name != "gradio" and any(path.rglob("*.png"))
        ]
        yield Figure("memory: temporary folders left", len(left), "0", not left)


CHECKS = {
    "training": training,
    "base": base,
    "requests": requests,
    "uploads": uploads,
    "refiners": refiners,
    "visitors": visitors,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the counts")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    args = parser.parse_args()
    short = False
    for name in args.only:
        for figure in CHECKS[name](lambda full: max(1, full // 10) if args.quick else full):
            print(
                f"{figure.name}: {figure.value} ({figure.goal}){'' if figure.holds else '  FALLS SHORT'}",
                flush=True,
            )
            short |= not figure.holds
    sys.exit(short)


if __name__ == "__main__":
    main()
