"""A Hugging Face tokenizer as llama.cpp reads it from a GGUF: tokens, their types, merges or scores, and special ids.

llama.cpp splits text before its byte-pair merges by a rule that it knows by name, and has no way to be told another
one. So the name follows from the tokenizer's own rule, and a rule that none of the names stands for is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from dpo_studio.errors import ModelError

__all__ = ["GgufTokenizer", "read_tokenizer"]

_HINT = "--to merged keeps the tokenizer as it is; vLLM and transformers read that"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS, _REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    f"{_CONTRACTIONS}|{_LETTERS}|\\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    f"{_CONTRACTIONS}|{_LETTERS}|\\p{{N}}|{_REST}": "qwen2",
}
"""llama.cpp's names of the rules that are one regular expression."""
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF says of a tokenizer."""

    model: str
    """gpt2: byte-level pairs with `merges`. llama: SentencePiece pairs, merged by `scores`, with tokens for bytes."""
    split: str
    """llama.cpp's name of the rule by which text is split first."""
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    """bos, eos, eot, unk and pad, those that there are."""
    adds_bos: bool
    adds_space: bool

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add it to a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_space)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{_ID_NAMES[name]}_token_id", token)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)


_ID_NAMES = {"bos": "bos", "eos": "eos", "eot": "eot", "pad": "padding", "unk": "unknown"}


def read_tokenizer(tokenizer: PreTrainedTokenizerBase, size: int, end_of_turn: int | None) -> GgufTokenizer:
    """The tokenizer of a model whose embedding has `size` rows and whose turns end with `end_of_turn`.

    Raises:
        ModelError: it is no byte-pair tokenizer, or splits or normalises text in a way that llama.cpp has no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("this tokenizer has no tokenizer.json, so a GGUF cannot hold it", hint=_HINT)
    content: dict[str, Any] = json.loads(backend.to_str())
    model = content["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"llama.cpp has no {model.get('type')} tokenizer as this one is", hint=_HINT)
    sentencepiece = bool(model.get("byte_fallback"))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    tokens, types = _tokens(content, size, sentencepiece=sentencepiece)
    split = _sentencepiece_rule(content) if sentencepiece else _byte_level_rule(content)
    return GgufTokenizer(
        model="llama" if sentencepiece else "gpt2",
        split=split,
        tokens=tokens,
        scores=_scores(tokens, merges) if sentencepiece else [],
        types=types,
        merges=[] if sentencepiece else merges,
        special=_special(tokenizer, end_of_turn),
        adds_bos=_adds_bos(tokenizer),
        adds_space=sentencepiece and _adds_space(tokenizer),
    )


def _tokens(content: dict[str, Any], size: int, *, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """(a text and a type for each row of the embedding); rows that the tokenizer has no token for are unused."""
    by_id = {index: token for token, index in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id |= {index: token["content"] for index, token in added.items()}
    if beyond := [index for index in by_id if index >= size]:
        raise ModelError(f"the tokenizer has {len(beyond)} tokens beyond the {size} rows of the model's embedding")
    unknown = content["model"].get("unk_token")
    tokens, types = [], []
    for index in range(size):
        token = by_id.get(index)
        kind = gguf.TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{index}]", gguf.TokenType.UNUSED
        elif sentencepiece and token == unknown:
            kind = gguf.TokenType.UNKNOWN
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        elif sentencepiece and token in _BYTES:
            kind = gguf.TokenType.BYTE
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """The order of the merges: the earliest that makes a token is its score, and what no merge makes has the least."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault(pair.replace(" ", "", 1), place)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _byte_level_rule(content: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    normalizer, rule = content.get("normalizer"), content.get("pre_tokenizer") or {}
    if normalizer not in (None, {"type": "NFC"}):
        raise ModelError(f"the tokenizer normalises text by {_kinds(normalizer)}, which llama.cpp does not", hint=_HINT)
    steps = rule.get("pretokenizers", [rule]) if isinstance(rule, dict) else []
    *first, last = steps or [{}]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if not first and last.get("use_regex", True):
            return "gpt-2"
        if first == [{"type": "Digits", "individual_digits": True}] and last.get("use_regex", True):
            return "smollm"
        if len(first) == 1 and first[0].get("type") == "Split" and not last.get("use_regex", True):
            name = _SPLITS.get(first[0].get("pattern", {}).get("Regex", ""))
            if name is not None and first[0].get("behavior") == "Isolated" and not first[0].get("invert"):
                return name
    raise ModelError(f"the tokenizer splits text by a rule that llama.cpp has no name for ({_kinds(rule)})", hint=_HINT)


def _sentencepiece_rule(content: dict[str, Any]) -> str:
    """llama.cpp's name for a tokenizer that only writes spaces as U+2581."""
    normalizer: Any = content.get("normalizer")
    rule: Any = content.get("pre_tokenizer")
    steps: list[dict[str, Any]] = normalizer.get("normalizers", [normalizer]) if normalizer else []
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    if steps in ([{"type": "Prepend", "prepend": "\u2581"}, replaces], [replaces]):
        if not rule or rule.get("type") == "Split":
            return "default"
    elif not steps and rule and rule.get("type") == "Metaspace" and rule.get("split") is False:
        return "default"
    raise ModelError(
        f"the tokenizer normalises and splits text by {_kinds(normalizer)} and {_kinds(rule)}, "
        "which llama.cpp has no name for",
        hint=_HINT,
    )


def _special(tokenizer: PreTrainedTokenizerBase, end_of_turn: int | None) -> dict[str, int]:
    """Ids by llama.cpp's names. A turn's end that is not the tokenizer's own eos is a second end of generation."""
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": end_of_turn if end_of_turn != tokenizer.eos_token_id else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {name: token for name, token in found.items() if isinstance(token, int)}


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text behind a special token begins with a space, as llama.cpp's do where it adds one at all."""
    begin = tokenizer.bos_token or tokenizer.eos_token or ""
    ids = tokenizer(f"{begin}a", add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids[-1:])[0]) != "a"


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether text alone gets a bos in front, as its own `encode` does."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _kinds(part: Any) -> str:
    """The names of a tokenizer's steps, for a message."""
    if not isinstance(part, dict):
        return "nothing"
    inner = part.get("pretokenizers") or part.get("normalizers")
    return "+".join(str(step.get("type")) for step in inner) if inner else str(part.get("type"))
