"""Requests with wrong values."""

import asyncio
import random
from collections.abc import Iterator

from tests.conftest import ROOT
from tests.tools.stress.figure import Count, Figure, equality, print_errors
from tests.tools.stress.server import RefusedError, Server, client, server

WRONG_VALUES = [
    *(None, True, False, -1, 0, 1.5, 1e308, -1e308, 2**63, 10**400, float("nan"), float("inf")),
    *("", " ", "nan", "1e999", "9" * 5000, "x" * 10**6, "apple " * 70, "😀\u202e\u0000\ufffe"),
    *("\ud800", "../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/"),
    *("a/b/c", "somebody/something", "..", "C:\\nul", "<script>alert(1)</script>", "{}", "%s%n"),
    *("assets/emoji", "train", [], {}, [[]], [None] * 1000, {"a": {"b": []}}),
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
]
SERVER_ERROR, QUEUE_IS_FULL = 500, 503
SHORTEST_SENTENCE = 12


def requests(count: Count) -> Iterator[Figure]:
    """Call the endpoints with wrong values; each must be carried out or refused in words."""
    with server() as running:
        wrong = asyncio.run(_fuzz(running, count(1000)))
        print_errors(wrong)
        yield Figure("requests with wrong values", count(1000), "1000", True)
        yield Figure("answers with a traceback, a hang or no sentence", len(wrong), "0", not wrong)
        tracebacks = running.log().split("Traceback (most recent call last)")[1:]
        ours = [traceback[-700:] for traceback in tracebacks if f"{ROOT}/" in traceback]
        print_errors(ours)
        yield Figure("errors of the project's code in the server's log", len(ours), "0", not ours)
        yield equality("a normal request afterwards has the right pixels", running.works())


async def _fuzz(running: Server, calls: int) -> list[str]:
    """Return what was wrong with the answers."""
    chance, slots = random.Random(0), asyncio.Semaphore(8)
    views = [view for view in running.views if view != "samplers"]  # the slowest

    async def call(number: int) -> str | None:
        view = chance.choice(views)
        data = _wrong_data(running, view, chance)
        async with slots, client() as http:
            call = running.call(http, running.functions[view], data, f"fuzz{number}")
            try:
                await asyncio.wait_for(call, 60)
            except RefusedError as error:
                if _is_a_sentence(error):
                    return None
                return f"{error.status} {error.text!r}: {view} {data}"
            except Exception as error:  # noqa: BLE001 (counted)
                return f"{type(error).__name__}: {error}: {view} {data}"
        return None

    return list(filter(None, await asyncio.gather(*map(call, range(calls)))))


def _wrong_data(running: Server, view: str, chance: random.Random) -> list:
    """Return inputs of a view with up to three wrong values, sometimes of a wrong number."""
    data = running.data(view, steps=1)
    for _ in range(chance.randint(1, 3)):
        data[chance.randrange(len(data) - 1)] = chance.choice(WRONG_VALUES)
    if chance.random() < 0.05:
        data = data[: chance.randrange(len(data))]
    if chance.random() < 0.05:
        data += [chance.choice(WRONG_VALUES)] * chance.randint(1, 30)
    return data


def _is_a_sentence(error: RefusedError) -> bool:
    """Return whether a refusal is one for people."""
    if error.status >= SERVER_ERROR and error.status != QUEUE_IS_FULL:
        return False
    is_raw = "Traceback" in error.text or "Error" in error.text.split(" ")[0]
    return len(error.text) >= SHORTEST_SENTENCE and not is_raw
