"""Blind test: pairs, votes and their tally (paper, tables 3, 16, 17)."""

import math
import random
from dataclasses import dataclass

from noiserefine.page import texts
from noiserefine.page.settings import Settings

QUESTIONS = {"better": "Which is better?", "follows": "Which follows the prompt?"}
LEFT, RIGHT, NEITHER = "left", "right", "neither"
ANSWERS = {LEFT: "Left", NEITHER: "Can't tell", RIGHT: "Right"}
KEYS = {LEFT: "←", NEITHER: "0", RIGHT: "→"}
ROUND = 10  # pairs


@dataclass(frozen=True)
class Vote:
    """The answers to both questions about one pair."""

    settings: Settings
    left: str  # the arms
    right: str
    better: str  # LEFT, RIGHT or NEITHER
    follows: str

    @property
    def opponent(self) -> str:
        """Return the arm that the refined one was compared with."""
        return self.left if self.right == "refined" else self.right

    @property
    def made_with(self) -> str:
        """Return the settings but prompt and seed, in words: votes are pooled where it is equal."""
        return texts.made_with(self.settings)


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


def tally(votes: list[Vote]) -> list[dict]:
    """Return how often the refined image was chosen, by settings, opponent and question.

    n decided votes, undecided ones, the share of the decided and its interval.
    """
    groups: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        groups.setdefault((vote.made_with, vote.opponent), []).append(vote)
    return [
        {"made_with": made_with, "opponent": opponent, "question": question}
        | _count(group, question)
        for (made_with, opponent), group in groups.items()
        for question in QUESTIONS
    ]


def _count(votes: list[Vote], question: str) -> dict:
    decided = [vote for vote in votes if getattr(vote, question) != NEITHER]
    won = sum(getattr(vote, getattr(vote, question)) == "refined" for vote in decided)
    return {
        "n": len(decided),
        "undecided": len(votes) - len(decided),
        "share": won / len(decided) if decided else None,
        "interval": wilson(won, len(decided)),
    }


def table(votes: list[Vote]) -> str:
    """Return the tally as Markdown."""
    rows = [
        "| refined against | | refined chosen | of decided | 95 % interval | can't tell |",
        "|---|---|---|---|---|---|",
    ]
    for row in tally(votes):
        share = "–" if row["share"] is None else f"{row['share']:.0%}"
        low, high = row["interval"]
        opponent = "plain" if row["opponent"] == "gaussian" else row["opponent"]
        rows.append(
            f"| {opponent}, {row['made_with']} | {QUESTIONS[row['question']]} | {share} "
            f"| {row['n']} | {low:.0%} to {high:.0%} | {row['undecided']} |"
        )
    return "\n".join(rows)


def result(votes: list[Vote]) -> str:
    """Return a sentence to share, about the settings and opponent of the last vote."""
    last = votes[-1]
    group = [v for v in votes if (v.made_with, v.opponent) == (last.made_with, last.opponent)]
    counts = _count(group, "better")
    if not counts["n"]:
        return "I could not tell a single pair apart."
    won, opponent = round(counts["share"] * counts["n"]), last.opponent
    against = "plain sampling" if opponent == "gaussian" else "guided sampling at twice the cost"
    return (
        f"Blind test of NoiseRefine ({last.made_with}): I preferred the refined image over "
        f"{against} in {won} of {texts.counted(counts['n'], 'pair')}."
    )
