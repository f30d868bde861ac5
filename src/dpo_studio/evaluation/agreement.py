"""How far a judge agrees with people: agreement with its interval, Cohen's kappa, and how far people agree themselves.

A judge cannot be expected to agree with people better than they do. So where several people labelled the same
comparisons, each of them is in turn taken out and measured like a judge, against what the others say together
(leave one out); the judge is measured against the same labels, and the two numbers can be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

from dpo_studio.evaluation.judges import Winner
from dpo_studio.evaluation.winrate import share_ci95

__all__ = ["agreement", "kappa", "leave_one_out", "majority"]


def agreement(said: Sequence[Winner], meant: Sequence[Winner], prompt_of: Sequence[Hashable]) -> dict[str, Any]:
    """How far the judge's verdicts agree with the labels.

    `agreement` is over the comparisons where people prefer an answer: 1 for the same answer, one half for a tie, 0 for
    the other one. A judge that always ties, or tosses a coin, is at one half; the interval is clustered by prompt.
    `exact` counts the same of three words over all comparisons, ties included, and `kappa` is that beyond chance.
    """
    preferred = [place for place, winner in enumerate(meant) if winner != "tie"]
    points = [1.0 if said[at] == meant[at] else 0.5 if said[at] == "tie" else 0.0 for at in preferred]
    prompts = [prompt_of[at] for at in preferred]
    return {
        "n": len(meant),
        "n_preferred": len(preferred),
        "agreement": sum(points) / len(points) if points else None,
        "agreement_ci95": list(share_ci95(points, prompts)) if points else None,
        "exact": sum(x == y for x, y in zip(said, meant, strict=True)) / len(meant) if meant else None,
        "kappa": kappa(said, meant),
    }


def kappa(said: Sequence[Winner], meant: Sequence[Winner]) -> float | None:
    """Cohen's kappa (1960): agreement beyond what two raters with these habits reach by chance, as a share of what is
    left to reach. None where chance alone agrees always: both say one and the same word throughout."""
    n = len(meant)
    observed = sum(x == y for x, y in zip(said, meant, strict=True))
    ours, theirs = Counter(said), Counter(meant)
    by_chance = sum(ours[word] * theirs[word] for word in ours)  # times n, to stay in whole numbers
    return None if by_chance == n * n else (n * observed - by_chance) / (n * n - by_chance)


def majority(labels: Sequence[Winner]) -> Winner | None:
    """The majority's label, None where no label has most votes."""
    (first, votes), *others = Counter(labels).most_common() or [("tie", 0)]
    return first if votes and all(votes > fewer for _, fewer in others) else None


def leave_one_out(
    labels: Sequence[Sequence[Winner]], verdicts: Sequence[Winner], prompt_of: Sequence[Hashable]
) -> dict[str, Any] | None:
    """The annotators' own agreement, and the judge's on the same labels; None where no two annotators labelled the same
    pair.

    `labels[i]` is what each annotator said of comparison i. Each annotator in turn stands against the majority of the
    others; where the others are split, there is nothing to stand against.
    """
    people: list[Winner] = []
    judged: list[Winner] = []
    meant: list[Winner] = []
    prompts: list[Hashable] = []
    for row, verdict, prompt in zip(labels, verdicts, prompt_of, strict=True):
        for place, one in enumerate(row):
            if (others := majority([*row[:place], *row[place + 1 :]])) is not None:
                people.append(one)
                judged.append(verdict)
                meant.append(others)
                prompts.append(prompt)
    if not meant:
        return None
    return {"people": agreement(people, meant, prompts), "judge": agreement(judged, meant, prompts)}
