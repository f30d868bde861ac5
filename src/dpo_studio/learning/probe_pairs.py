"""Which pairs the check at the start computes: those in which an error would show.

An error in the mask or the positions may touch one pair in fifty: those that reach past a window, or past the length a
model was first trained on. So every pair's length is examined, and a few pairs are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.tokens.pack import packed_tokens

__all__ = ["ProbePair", "limits_of", "probe_pairs"]

MOST_TOKENS = 8192
"""Of all the pairs chosen, each prompt counted once."""
_WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "window_size",
    "local_attention",
    "attention_window_size",
)
_ORIGINAL = "original_max_position_embeddings"
_LONGEST = "max_position_embeddings"


@dataclass(frozen=True)
class ProbePair:
    """A pair, and why it was chosen."""

    place: int
    """In the list of pairs."""
    why: str


def limits_of(model: nn.Module) -> dict[str, set[int]]:
    """Lengths at which something changes in this model, by the config's names: of every config that a module has, so
    that windows of single layers count, and those inside nested dicts (rope's parameters, one for each kind of layer).
    """
    found: dict[str, set[int]] = {}
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    for config in configs.values():
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        for name, value in _numbers_of(settings):
            found.setdefault(name, set()).add(value)
    return found


def _numbers_of(settings: object) -> Iterator[tuple[str, int]]:
    if isinstance(settings, list | tuple):
        for part in settings:
            yield from _numbers_of(part)
    if not isinstance(settings, dict):
        return
    changes_with_length = _kinds_of_rope(settings) & {"longrope", "dynamic"}
    for name, value in settings.items():
        sizes = value if isinstance(value, list | tuple) else [value]
        sizes = [size for size in sizes if type(size) is int and size > 0]
        if name in _WINDOWS or name == _ORIGINAL or (name == _LONGEST and changes_with_length):
            yield from ((name, size) for size in sizes)
        yield from _numbers_of(value)


def _kinds_of_rope(settings: dict[object, object]) -> set[str]:
    kinds = set()
    for key in ("rope_scaling", "rope_parameters"):
        rope = settings.get(key)
        if isinstance(rope, dict):
            for one in (rope, *(part for part in rope.values() if isinstance(part, dict))):
                kinds |= {str(one.get(name)) for name in ("rope_type", "type")}
    return kinds


def probe_pairs(
    pairs: Sequence[EncodedPair], limits: dict[str, set[int]], *, most: int = MOST_TOKENS
) -> list[ProbePair]:
    """The shortest pair and the longest, and for every limit that some pair goes past: one with its prompt inside and
    an answer past it, one whose prompt is past it, one inside. At most `most` tokens, unless the shortest pair
    is longer.
    """
    sizes = [packed_tokens(pair) for pair in pairs]
    prompts = [len(pair.prompt) for pair in pairs]
    reach = [len(pair.prompt) + max(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in pairs]
    everyone = range(len(pairs))
    chosen: dict[int, list[str]] = {}
    room = most

    def take(why: str, suits: Callable[[int], bool], rank: Callable[[int], float]) -> None:
        """Choose the first by `rank` of the pairs that suit and fit, unless a chosen one suits already."""
        nonlocal room
        candidates = [place for place in everyone if suits(place)]
        if not candidates or (why.startswith(("a pair", "an answer")) and any(suits(place) for place in chosen)):
            return
        fitting = [place for place in candidates if place in chosen or sizes[place] <= room]
        if not fitting:
            return
        best = min(fitting, key=rank)
        if best not in chosen:
            room -= sizes[best]
        chosen.setdefault(best, []).append(why)

    shortest = min(everyone, key=sizes.__getitem__)
    chosen[shortest] = ["the shortest pair"]
    room -= sizes[shortest]
    reached = sorted({(size, name) for name, values in limits.items() for size in values if size < max(reach)})

    def across(size: int, place: int) -> bool:
        return prompts[place] <= size < reach[place]

    def past(size: int, place: int) -> bool:
        return prompts[place] > size

    def inside(size: int, place: int) -> bool:
        return reach[place] <= size

    def longest_first(place: int) -> float:
        return -reach[place]

    for size, name in reached:
        take(f"an answer across {name} {size}", partial(across, size), longest_first)
        take(f"a pair past {name} {size}", partial(past, size), sizes.__getitem__)
    take("the longest pair", lambda _: True, lambda place: -sizes[place])
    for size, name in reached:
        take(f"a pair inside {name} {size}", partial(inside, size), longest_first)
    return [ProbePair(place, ", ".join(why)) for place, why in chosen.items()]
