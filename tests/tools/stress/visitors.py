"""Many visitors at once and one after another."""

import asyncio
import time
from collections.abc import Iterator

from tests.tools.stress.figure import Count, Figure, equality
from tests.tools.stress.server import PROMPT, RefusedError, Server, alone, client, same, server

MOST_SECONDS = 15  # for a visitor who comes after others left
MOST_GROWTH, MOST_GROWTH_WITH_SESSIONS = 1.05, 1.15  # of the memory


def visitors(count: Count) -> Iterator[Figure]:
    """Let crowds come at once; each visitor must get the pixels of a request made alone."""
    with server() as running:
        running.works()
        equal, _ = _crowd(running, 50)
        yield Figure("of 50 at once, with the pixels of a solo run", equal, "50", equal == 50)
        equal, refusals = _crowd(running, 150)
        clear = sum("full" in refusal.lower() for refusal in refusals)
        others = clear > 0 and equal + clear == 150
        yield Figure("of 150 at once, told that the queue is full", clear, "the others", others)
        seconds = asyncio.run(_leavers(running, 5))
        name = "seconds for one who comes after 5 who asked for much and left"
        goal = f"at most {MOST_SECONDS}"
        yield Figure(name, round(seconds, 1), goal, seconds <= MOST_SECONDS)
        yield equality("a normal request afterwards has the right pixels", running.works())


def _crowd(running: Server, clients: int) -> tuple[int, list[str]]:
    """Return how many of the clients get the right pixels, and the refusals of others."""
    kinds = [
        {
            "seed": seed,
            "steps": 1 + seed % 3,
            "strength": (seed % 5) / 4,
            "prompt": PROMPT if seed % 2 else "a panda on a pink background",
        }
        for seed in range(clients)
    ]
    expected = [alone(**kind) for kind in kinds]

    async def visit(number: int) -> bool | str:
        async with client() as http:
            try:
                session = f"crowd{clients}-{number}"
                images = await running.compare(http, session, **kinds[number])
            except RefusedError as error:
                return error.text
            return same(images, expected[number])

    async def all_at_once() -> list[bool | str]:
        return await asyncio.gather(*map(visit, range(clients)))

    answers = asyncio.run(all_at_once())
    refusals = [answer for answer in answers if isinstance(answer, str)]
    return sum(answer is True for answer in answers), refusals


async def _leavers(running: Server, clients: int) -> float:
    """Return the seconds until a request is answered after others left theirs."""

    async def leave(number: int) -> None:
        data = running.data("samplers", seed=number, steps=100)
        async with client() as http:
            messages = running.messages(
                http, running.functions["samplers"], data, f"leaver{number}"
            )
            for _ in range(2):
                await anext(messages)
            await messages.aclose()

    await asyncio.gather(*map(leave, range(clients)))
    began = time.perf_counter()
    async with client() as http:
        await running.compare(http, "after", steps=2)
    return time.perf_counter() - began


def memory(count: Count) -> Iterator[Figure]:
    """Serve many requests; the server's memory and temporary folders must not grow."""

    async def serve(requests: range, sessions: int) -> None:
        async with client() as http:
            for number in requests:
                session = f"visitor{number % sessions}"
                await running.compare(http, session, seed=number, steps=1)

    with server() as running:
        asyncio.run(serve(range(10), 10))
        early = running.memory()
        asyncio.run(serve(range(10, count(1000)), 10))
        ratio = running.memory() / early
        name = f"growth after {count(1000)} requests of 10 visitors"
        yield Figure(name, round(ratio, 3), f"at most {MOST_GROWTH}", ratio <= MOST_GROWTH)
        asyncio.run(serve(range(count(300)), count(300)))
        ratio = running.memory() / early
        name = f"growth after {count(300)} more visitors, of whom 100 are remembered"
        goal = f"at most {MOST_GROWTH_WITH_SESSIONS}"
        yield Figure(name, round(ratio, 3), goal, ratio <= MOST_GROWTH_WITH_SESSIONS)
        left = [
            path
            for path in running.folder.iterdir()
            if path.is_dir() and path.name != "gradio" and any(path.rglob("*.png"))
        ]
        yield Figure("temporary folders left", len(left), "0", not left)
