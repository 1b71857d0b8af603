"""A blind comparison of two arms by a person (tables 3, 16 and 17)."""

import math
import random
from dataclasses import dataclass

QUESTIONS = {"better": "Which is better?", "follows": "Which follows the prompt?"}
LEFT, RIGHT, NEITHER = "left", "right", "can't tell"


@dataclass(frozen=True)
class Vote:
    """The answers to both questions about one pair."""

    prompt: str
    seed: int
    left: str  # the arms
    right: str
    better: str  # LEFT, RIGHT or NEITHER
    follows: str


def in_random_order(first: str, second: str) -> tuple[str, str]:
    """Return the two arms, either one first with equal chance."""
    pair = [first, second]
    random.SystemRandom().shuffle(pair)
    return pair[0], pair[1]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson 1927); [0, 1] for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z, share = 1.959964, successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def tally(votes: list[Vote]) -> dict[str, dict]:
    """Return for each question how often the refined image was chosen.

    n decided votes, undecided ones, the share of the decided and its interval.
    """
    result = {}
    for question in QUESTIONS:
        decided = [vote for vote in votes if getattr(vote, question) != NEITHER]
        won = sum(getattr(vote, getattr(vote, question)) == "refined" for vote in decided)
        result[question] = {
            "n": len(decided),
            "undecided": len(votes) - len(decided),
            "share": won / len(decided) if decided else None,
            "interval": wilson(won, len(decided)),
        }
    return result
