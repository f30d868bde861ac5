"""What the numbers of a report mean, in a sentence or two each."""

from __future__ import annotations

from dpo_studio.reports.markup import esc, section
from dpo_studio.runs.facts import RunFacts

__all__ = ["glossary_section"]

_TRAINING = (
    (
        "Reward",
        "beta times how much more likely an answer has become than it was under the reference (the difference of "
        "their log-probs). It is measured from the reference, so every reward is 0 at the start. Objectives without a "
        "reference (SimPO, ORPO, SFT) take beta times the log-prob a token in its place.",
    ),
    (
        "Margin",
        "The reward of the chosen answer minus that of the rejected one. Above 0 the pair is on the right side; "
        "large margins mean a model far from its reference, not a better one.",
    ),
    (
        "Accuracy",
        "The share of pairs whose margin is above 0, a tie counting one half. Held-out pairs have prompts the model "
        "was not trained on, so only their accuracy says what was learned.",
    ),
    (
        "Before training",
        "The untrained model has no margins, so it is asked otherwise: the share of held-out pairs whose chosen "
        "answer it finds likelier, by summed log-prob.",
    ),
    (
        "Longer wins",
        "The accuracy of always picking the longer answer. A model that does not beat it may have learned length "
        "and nothing else.",
    ),
    (
        "Loss",
        "What training brings down. For DPO it starts at ln 2 = 0.693, where chosen and rejected are separated no "
        "better than by a coin.",
    ),
    (
        "95 % interval",
        "Where the number would likely fall if the test were repeated with other prompts of the same kind. If it "
        "includes 50 %, chance alone could explain the result.",
    ),
)
_COMPARED = (
    (
        "Win rate",
        "The share of comparisons in which the judge prefers the tuned model’s answer to the base model’s on the "
        "same prompt, a tie counting one half. It is only as good as its judge.",
    ),
    (
        "Stop rate",
        "The share of answers the model ends by itself. An answer that runs into the token limit is cut, often in "
        "the middle of a sentence.",
    ),
)


def glossary_section(facts: RunFacts) -> str:
    """Only the words this page uses."""
    if not facts.result and not facts.metrics:
        return ""
    terms = (_COMPARED if "win_rate" in facts.result else ()) + _TRAINING
    body = "".join(f"<div><dt>{esc(term)}</dt><dd>{esc(meaning)}</dd></div>" for term, meaning in terms)
    return section("glossary", "What these numbers mean", f'<div class="panel"><dl class="glossary">{body}</dl></div>')
