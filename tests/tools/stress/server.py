"""The app as a process of its own, spoken to as its page does."""

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from noiserefine.analysis.recipe import Maker, Recipe
from noiserefine.models.catalogue import Model
from noiserefine.page import jobs
from tests.conftest import ROOT, free_port

PROMPT = "a red apple on a blue background"
GUIDANCE_SCALE = 2.5
ARMS = ("gaussian", "guided", "refined")


class RefusedError(Exception):
    """The server's answer to a request that it does not carry out, with its HTTP status or 0."""

    def __init__(self, status: int, text: str | None) -> None:
        super().__init__(text)
        self.status, self.text = status, text or ""


class Server:
    """A running app.

    views    parameters with their defaults, by view
    upload   the function that reads a dropped picture
    """

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.folder, self.url = folder, f"http://127.0.0.1:{port}"
        places = {"TMPDIR": str(folder), "GRADIO_TEMP_DIR": str(folder / "gradio")}
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "app.py", "--port", str(port)],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | places,
            )
        while "Running on local URL" not in self.log():
            if self.process.poll() is not None:
                raise RuntimeError(self.log())
            time.sleep(0.1)
        functions = httpx.get(f"{self.url}/config").json()["dependencies"]
        self.functions = {
            function["api_name"]: function["id"] for function in functions if function["api_name"]
        }
        self.upload = next(
            function["id"]
            for function in functions
            if [name for _, name in function["targets"]] == ["upload"]
        )
        endpoints = httpx.get(f"{self.url}/gradio_api/info").json()["named_endpoints"]
        self.views = {
            path.removeprefix("/"): {
                parameter["parameter_name"]: parameter["parameter_default"]
                for parameter in endpoint["parameters"]
            }
            for path, endpoint in endpoints.items()
        }

    def log(self) -> str:
        """Return what the server has printed."""
        return (self.folder / "log").read_text()

    def close(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.wait()

    def memory(self) -> int:
        """Return the server's resident memory in bytes."""
        return psutil.Process(self.process.pid).memory_info().rss

    def data(self, view: str, **values: Any) -> list:
        """Return the inputs of a view: the given values, else its defaults, and the session's."""
        given = {"prompt": PROMPT, "guidance_scale": GUIDANCE_SCALE} | values
        defaults = self.views[view]
        return [*(given.get(name, default) for name, default in defaults.items()), None]

    async def call(
        self, client: httpx.AsyncClient, function: int, data: list, session: str
    ) -> list:
        """Return the outputs. Raises RefusedError with the sentence of a refusal."""
        async for message in self.messages(client, function, data, session):
            if message["msg"] == "process_completed":
                if not message["success"]:
                    raise RefusedError(0, message["output"].get("error"))
                return message["output"]["data"]
        raise RefusedError(-1, "The stream ended.")

    async def messages(
        self, client: httpx.AsyncClient, function: int, data: list, session: str
    ) -> Any:
        """Yield the messages about one run of a function."""
        body = {"data": data, "fn_index": function, "session_hash": session}
        joined = await client.post(
            f"{self.url}/gradio_api/queue/join",
            content=json.dumps(body, ensure_ascii=True),
            headers={"content-type": "application/json"},
        )
        if joined.status_code != httpx.codes.OK:
            raise RefusedError(joined.status_code, joined.text)
        address = f"{self.url}/gradio_api/queue/data"
        async with client.stream("GET", address, params={"session_hash": session}) as stream:
            async for line in stream.aiter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    async def compare(self, client: httpx.AsyncClient, session: str, **values: Any) -> list:
        """Return the pixels of the three arms."""
        outputs = await self.call(
            client, self.functions["compare"], self.data("compare", **values), session
        )
        files = [value for value in outputs if isinstance(value, dict) and "path" in value]
        return [await self._pixels(client, file["path"]) for file in files[: len(ARMS)]]

    async def _pixels(self, client: httpx.AsyncClient, path: str) -> np.ndarray:
        answer = await client.get(f"{self.url}/gradio_api/file={path}")
        return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))

    def works(self) -> bool:
        """Return whether a normal request is answered with the right pixels."""

        async def ask() -> list[np.ndarray]:
            async with client() as http:
                return await self.compare(http, f"normal{time.time()}", seed=7, steps=2)

        return same(asyncio.run(ask()), alone(seed=7, steps=2))


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """Start the app in a temporary folder, and end it."""
    with tempfile.TemporaryDirectory() as folder:
        running = Server(Path(folder))
        try:
            yield running
        finally:
            running.close()


def client() -> httpx.AsyncClient:
    """Return a client for any number of requests at once."""
    return httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None))


def alone(**values: Any) -> list[np.ndarray]:
    """Return the pixels of the three arms, made in this process."""
    loaded = jobs.MODELS.get(Model("emoji"))
    recipe = Recipe(
        **{"prompt": PROMPT, "guidance_scale": GUIDANCE_SCALE, "strength": 1.0} | values
    )
    make = Maker(loaded.pipe, loaded.refiner)
    return [np.asarray(make(getattr(recipe, arm)).image) for arm in ARMS]


def same(images: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    """Return whether the images are equal to the bit."""
    return all(np.array_equal(*pair) for pair in zip(images, expected, strict=True))
