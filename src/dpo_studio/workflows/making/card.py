"""The data card of pairs that were made: how, of what, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_studio.console.text import percent
from dpo_studio.export.card import quoted, versions

__all__ = ["card_of"]


def card_of(name: str, about: Mapping[str, Any]) -> str:
    """Markdown; the same counts give the same bytes, so no date is in it.

    `about`: what `making.run.make_pairs` counted.
    """
    lines = [
        f"# {quoted(name)}: made preference pairs",
        "",
        f"{about['pairs']:,} pairs on {about['prompts_with_pairs']:,} prompts, made by `dpo data make` "
        f"({', '.join(f'{package} {number}' for package, number in versions('torch', 'transformers').items())}).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {said} |" for what, said in _table(about)),
        "",
        "## The judge",
        quoted(about["judge"]) + ". " + " ".join(about["judge_description"].split()),
        "",
        "## What to keep in mind",
        "The answers are the models' own: nobody has checked that they are true, harmless or free of private data, and "
        "the terms of the models that wrote them apply. A preference is the judge's, with its taste (length, form) and "
        "its errors: `dpo judge check` measures them. `made` in each row says where its two answers come from.",
    ]
    return "\n".join(lines) + "\n"


def _table(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, lengths = about["settings"], about["lengths"]
    found = [("prompts", f"{about['prompts']:,} of {quoted(about['source'])}")]
    found += [("prompts held out, and left out", f"{about['held_out']:,}")]
    found += [(f"rows refused: {reason}", f"{count:,}") for reason, count in about["refused"].items()]
    for label, model in about["models"].items():
        found += [(f"answers of {quoted(label)}", _of_model(model))]
    found += [
        ("answers that repeat another one to the same prompt", f"{about['identical']:,}"),
        (
            "sampling",
            f"{settings['samples']} a model and prompt, temperature {settings['temperature']:g}, "
            f"at most {settings['max_new_tokens']} tokens, seed {settings['seed']}",
        ),
        ("choice", _choice(settings)),
    ]
    found += [(f"verdicts: {name.replace('_', ' ')}", _number(said)) for name, said in about["verdicts"].items()]
    found += [(f"prompts without a pair: {reason}", f"{n:,}") for reason, n in about["without_a_pair"].items()]
    if "chosen" in lengths:
        found += [
            (
                f"mean length, in {lengths['unit']}",
                f"chosen {lengths['chosen']:g}, rejected {lengths['rejected']:g}; "
                f"chosen is the longer one in {percent(lengths['chosen_longer'])}",
            )
        ]
    return found


def _of_model(model: Mapping[str, Any]) -> str:
    parts = [f"{model['answers']:,} of {model['asked']:,}, {model['cut']:,} cut, {model['empty']:,} empty"]
    parts += [f"{count:,} x {reason}" for reason, count in model["no_answer"].items()]
    if "fingerprint" in model:
        parts += [f"weights {model['fingerprint'][:12]}"]
    if "bill" in model:
        bill = model["bill"]
        money = "" if bill["dollars"] is None else f", ${bill['dollars']:,.4f}"
        parts += [f"{bill['read']:,} tokens read, {bill['written']:,} written{money}"]
    return "; ".join(part.replace("|", "\\|") for part in parts)


def _choice(settings: Mapping[str, Any]) -> str:
    parts = [settings["rule"]]
    parts += [f"scores at least {settings['margin']:g} apart"] if settings["margin"] else []
    parts += [f"lengths within a factor of {settings['match_length']:g}"] if settings["match_length"] else []
    return ", ".join(parts)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "-" if value is None else str(value)
