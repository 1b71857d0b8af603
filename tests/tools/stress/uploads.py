"""Pictures dropped on the page that hold no settings, or wrong ones."""

import asyncio
import io
import json
from collections.abc import Iterator

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.tools.stress.figure import Count, Figure, equality
from tests.tools.stress.server import RefusedError, Server, client, server

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
SHORTEST_SENTENCE = 20
WRONG_SETTINGS = [
    *(None, [], 1, {"seed": []}, {"seed": "x"}, {"prompt": 1}, {"steps": {}}),
    *({"strength": "nan"}, {"prompt": "x" * 10**5}),
]


def uploads(count: Count) -> Iterator[Figure]:
    """Drop bad files on the page; each must be refused in words, or its bad settings left out."""
    with server() as running:
        answers = [asyncio.run(_upload(running, data)) for data in _bad_files()]
        refused = sum(
            "Traceback" not in answer.text and len(answer.text) > SHORTEST_SENTENCE
            for answer in answers
            if isinstance(answer, RefusedError)
        )
        restored = sum(isinstance(answer, list) for answer in answers)
        goal, wrong = len(answers), len(WRONG_SETTINGS)
        yield Figure(
            "bad files restored without their bad settings",
            restored,
            f"at most {wrong}",
            restored <= wrong,
        )
        others = goal - restored
        yield Figure("others refused with a sentence", refused, str(others), refused == others)
        values = asyncio.run(_upload(running, _png(json.dumps({"settings": {"prompt": MARKUP}}))))
        plain = isinstance(values, list) and values[0] == MARKUP
        yield equality("markup comes back as plain text", plain)
        yield equality("a normal request afterwards has the right pixels", running.works())


async def _upload(running: Server, data: bytes) -> list | RefusedError:
    """Drop a file on the page; return the restored values, or the refusal."""
    async with client() as http:
        address = f"{running.url}/gradio_api/upload"
        answer = await http.post(address, files={"files": ("image.png", data, "image/png")})
        file = {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}
        try:
            return await running.call(http, running.upload, [file], f"upload{hash(data)}")
        except RefusedError as error:
            return error


def _png(text: str | None, size: tuple[int, int] = (8, 8)) -> bytes:
    chunks, data = PngInfo(), io.BytesIO()
    if text is not None:
        chunks.add_itxt("noiserefine", text, zip=True)
    Image.new("1", size).save(data, "PNG", pnginfo=chunks)
    return data.getvalue()


def _bad_files() -> list[bytes]:
    """Return files that are no PNG, bombs of pixels and of text, and settings of wrong kinds."""
    sound = _png(json.dumps({"settings": {"prompt": "a cat"}}))
    damaged = [sound[:50], sound[:60] + b"\0" * 40 + sound[100:]]
    return [
        *(b"", b"x", b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n", *damaged),
        *(_png(None), _png("{"), _png("[" * 10**6), _png("x" * 10**8)),
        *(_png("{}", (30000, 30000)), _png("{}", (5000, 5000))),
        *(_png(json.dumps({"settings": value})) for value in WRONG_SETTINGS),
    ]
