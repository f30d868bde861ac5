"""What strangers have done to files on purpose, each with the words that its refusal owes its user.

A value drawn at random is seldom the one that a check is there for. These are: each kind of file has its list, the draw
chooses from it, and whoever reads the file must refuse it and name the reason. So a check that is gone is noticed even
where something behind it would fail as well.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.mutations import Mutation, endless

__all__ = ["attacked"]

_PIPE, _DEVICE, _LEADS_OUT = r"pipe|is not a regular file", r"device|is not a regular file|points out", r"points out"
_OVER = r"over [\d,]+ bytes|damaged"
_ELSEWHERE = (
    *("transformers_weights", "configuration_files", "fast_tokenizer_files", "gguf_file", "tokenizer_object"),
    *("init_inputs", "mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs", "fusion_config", "kernel_config"),
)
"""Keys by which transformers reads, or puts together, something else than the folder's own."""
_JSON: list[tuple[str, str]] = [
    ('{"a": ' + "[" * 150 + "]" * 150 + "}", r"deeper than 100|index.json is damaged"),
    ('{"a": ' + "9" * 400 + "}", r"400 digits|index.json is damaged"),
    ('{"a": 1, "a": 2}', r"twice|index.json is damaged"),
    ('{"a": "\\ud800"}', r"surrogate|index.json is damaged"),
    ('{"a": 1', r"not JSON|not valid JSON|damaged"),
    ("[1, 2]", r"not a JSON object|damaged|holds no"),
]
"""Texts that no reader of JSON takes."""
_STRICT: list[tuple[str, str]] = [('{"a": 1e999}', r"too large"), ('{"a": NaN}', r"NaN is not a number")]
"""What a reader of numbers does not take either; settings of models hold Infinity."""

Draw = tuple[str, Any, str]
"""(what, a key's value or a whole file, what the refusal must say)."""


def attacked(draw: random.Random, name: str, content: bytes, outside: Path, turn: int) -> Mutation:
    """One of the attacks on a file of this name, of each kind in turn."""
    kinds = list(_kinds(name, content, outside))
    kind = turn % len(kinds)
    what, made, says = draw.choice(kinds[kind])
    if kind == len(kinds) - 1:
        return Mutation(what, special=made, says=says)
    return Mutation(what, made() if callable(made) else made, says=says)


def _kinds(name: str, content: bytes, outside: Path) -> Iterator[list[Draw]]:
    """Lists of (what, the file's content or what makes it, the words that are owed)."""
    short = Path(name).name
    if (whole := _WHOLE.get(short)) is not None:
        yield whole(content)
    for group in _SETTINGS.get(name, _SETTINGS.get(short, ())):
        yield [
            (
                f"{key} = {'a path outside' if callable(value) else value!r:.60}",
                partial(_with, content, key, value, outside),
                says,
            )
            for key, value, says in group
        ]
    if short in _SETTINGS:
        texts = _JSON + (_STRICT if name in _NUMBERS else [])
        yield [(f"JSON {text[:20]}", text.encode(), says) for text, says in texts]
    yield list(_no_files(name, outside))


def _with(content: bytes, key: str, value: Any, outside: Path) -> bytes:
    value = value(outside) if callable(value) else value
    return json.dumps(json.loads(content) | {key: value}).encode()


_NUMBERS = {"run/result.json"}
_NEEDED = {"model/config.json": r"has no config\.json", "model/model.safetensors": r"has no \.safetensors weights"}
"""Without it there is no model, and the refusal says so before any library does."""
_QUIET = ("run/data.json", "run/checkpoints/")
"""A run goes on without them: today's date, an earlier checkpoint."""


def _no_files(name: str, outside: Path) -> list[tuple[str, Callable[[Path], None], str]]:
    """What takes a file's place and is none; each is named in the refusal."""
    weights, typed = name.endswith(".safetensors"), name in ("r.yaml", "own.jinja", "pairs.jsonl", "pairs.jsonl.gz")
    kinds: list[tuple[str, Callable[[Path], None], str]] = [
        ("a pipe", os.mkfifo, _PIPE),
        ("a link to a pipe", lambda file: file.symlink_to(outside / "pipe.json"), f"{_PIPE}|{_LEADS_OUT}"),
        ("a socket", _socket, r"socket|is not a regular file"),
        ("a link to /dev/zero", lambda file: file.symlink_to("/dev/zero"), _DEVICE),
        ("a link to itself", lambda file: file.symlink_to(file.name), r"cannot be read|points out|no such"),
    ]
    if not weights and not typed:
        kinds.append(("a link out", lambda file: file.symlink_to(outside / "secret.json"), _LEADS_OUT))
    if not weights and not name.startswith(("pairs.jsonl", *_QUIET)):
        kinds.append(("an endless file", endless, _OVER))
    if name in _NEEDED:
        kinds.append(("nothing", lambda file: None, _NEEDED[name]))
    if name == "r.yaml":
        kinds += [("nothing", lambda file: None, r"no such"), ("a folder", Path.mkdir, r"a folder")]
    return kinds


def _socket(file: Path) -> None:
    """What can be looked at, and not opened."""
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(file))


# config.json and its like: groups of keys, of which each is drawn as often as the next


def _redirects() -> list[Draw]:
    return [(key, lambda outside: str(outside / "weights.safetensors"), key) for key in _ELSEWHERE] + [
        ("extra", [{"sp_model_kwargs": {"model_file": "/etc/passwd"}}], r"model_file")
    ]


_CODE: list[Draw] = [
    ("trust_remote_code", True, r"trust_remote_code"),
    ("custom_generate", "somebody/code", r"custom_generate"),
    ("attn_implementation", "kernels-community/flash-attn", r"kernel from the Hub"),
    ("inner", [{"experts_implementation": "somebody/kernel"}], r"kernel from the Hub"),
]
_SIZES: list[Draw] = [
    ("num_hidden_layers", 10**5, r"allow"),
    ("num_labels", 10**9, r"allow"),
    ("hidden_size", 10**12, r"allow"),
    ("vocab_size", 10**30, r"allow"),
    ("vision_config", {"depths": [2, 10**7]}, r"allow"),
    ("intermediate_size", "64", r"whole number"),
    ("num_attention_heads", 4.5, r"whole number"),
]
_TOO_BIG: list[Draw] = [
    ("intermediate_size", 2**20, r"describes a model of"),
    ("vocab_size", 2**23, r"describes a model of|vocabulary"),
]
_MODEL: list[Draw] = [
    ("model_type", "of-my-own", r"does not know this model"),
    ("quantization_config", {"quant_method": "x"}, r"quanti"),
    ("text_config", {"quantization_config": {"quant_method": "gptq"}}, r"quantization_config inside"),
    ("vision_config", {"compression_config": {"quant_method": "x"}}, r"compression_config inside"),
]
_TOKENIZER: list[Draw] = [
    ("model_max_length", "512", r"model_max_length"),
    ("padding_side", "up", r"padding_side"),
    ("truncation_side", 1, r"truncation_side"),
    ("model_input_names", "input_ids", r"model_input_names"),
    ("chat_template", 3, r"chat_template"),
    ("chat_template", [{"name": "default"}], r"chat_template"),
    ("tokenizer_class", ["x"], r"tokenizer_class"),
    ("eos_token", 7, r"eos_token"),
    ("pad_token", {"x": 1}, r"pad_token"),
]
_TOKEN_IDS: list[Draw] = [
    ("added_tokens_decoder", [1], r"not an object"),
    ("added_tokens_decoder", {"99999999": {"content": "<x>"}}, r"not a token id"),
    ("added_tokens_decoder", {"-1": {"content": "<x>"}}, r"not a token id"),
    ("added_tokens_decoder", {"\u0663": {"content": "<x>"}}, r"not a token id"),
]
_ADDED: list[Draw] = [
    ("<x>", 10**8, r"not a token id"),
    ("<x>", -1, r"not a token id"),
    ("<x>", "4", r"not a token id|cannot"),
]
_ADAPTER: list[list[Draw]] = [
    [
        ("peft_type", "LOHA", r"only LoRA"),
        ("bias", "all", r"only LoRA"),
        ("modules_to_save", ["lm_head"], r"modules_to_save"),
        ("trainable_token_indices", [1], r"trainable_token_indices"),
        ("init_lora_weights", "pissa", r"changes the base"),
        ("init_lora_weights", 5, r"init_lora_weights"),
        ("rank_pattern", {"(a+)+$": 2}, r"expression"),
        ("a_new_setting", 1, r"does not know"),
        ("r", "2", r"r: 2"),
        ("r", 0, r"r: 0"),
        ("lora_alpha", True, r"lora_alpha"),
        ("lora_dropout", 1.5, r"lora_dropout"),
        ("use_rslora", "yes", r"use_rslora"),
        ("target_modules", [1], r"target_modules"),
        ("layers_to_transform", ["a"], r"layers_to_transform"),
        ("layers_pattern", 3, r"layers_pattern"),
        ("task_type", 3, r"task_type"),
        ("alpha_pattern", {"q_proj": "x"}, r"alpha_pattern"),
        ("alpha_pattern", [1], r"alpha_pattern|expression"),
    ],
    [
        ("r", 64, r"rank 64"),
        ("rank_pattern", {"q_proj": 7}, r"rank 7"),
        ("target_modules", [f"m{n}" for n in range(100_000)], r"target modules"),
        ("alpha_pattern", {f"m{n}": 1 for n in range(1000)}, r"entries"),
    ],
    [  # read of an adapter alone: a run knows its base
        ("base_model_name_or_path", "../../outside", r"leads elsewhere"),
        ("base_model_name_or_path", "https://somewhere/model", r"leads elsewhere"),
        ("base_model_name_or_path", "~/model", r"leads elsewhere"),
        ("base_model_name_or_path", ["x"], r"leads elsewhere"),
        ("base_model_name_or_path", None, r"names no base"),
        ("base_model_name_or_path", "/not-there/model", r"no such model folder"),
        ("base_model_name_or_path", "somebody/not-here", r"is not on this machine"),
        ("revision", "refs/pr/1", r"not a branch or commit"),
    ],
]
_INDEX: list[Draw] = [
    ("weight_map", lambda outside: {"a": str(outside / "weights.safetensors")}, r"invalid weight file"),
    ("weight_map", {"a": "../outside/weights.safetensors"}, r"invalid weight file"),
    ("weight_map", {"a": "pytorch_model.bin"}, r"invalid weight file"),
    ("weight_map", {"a": 1}, r"invalid weight file"),
    ("weight_map", {"a": "9" * 5000 + ".safetensors"}, r"5,012 characters"),
    ("weight_map", ["a"], r"damaged"),
    ("weight_map", {"a": "not-there.safetensors"}, r"missing|not-there|cannot be loaded"),
]
_SETTINGS: dict[str, list[list[Draw]]] = {
    "config.json": [_redirects(), _CODE, _SIZES, _TOO_BIG, _MODEL],
    "generation_config.json": [_redirects(), _CODE],
    "tokenizer_config.json": [_redirects(), _CODE, _TOKENIZER, _TOKEN_IDS],
    "added_tokens.json": [_ADDED],
    "adapter_config.json": [*_ADAPTER[:2], _redirects(), _CODE],
    "adapter/adapter_config.json": [*_ADAPTER, _redirects(), _CODE],
    "model.safetensors.index.json": [_INDEX],
    "result.json": [],
}


# Whole files

_UNFIT = r"damaged|cannot be loaded|cannot be read|rank|does not fit|tensors"


def _weights(content: bytes, bad: str) -> list[Draw]:
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    name = sorted(set(header) - {"__metadata__"})[0]

    def with_header(changed: dict[str, Any]) -> bytes:
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return [
        ("a pickle by another name", pickle.dumps({"a": [1.0] * 50}), bad),
        ("a header of 2^60 bytes", struct.pack("<Q", 2**60) + content[8:], bad),
        ("a header that is no JSON", content[:8] + b"{" * size + content[8 + size :], bad),
        ("nothing in it", b"", bad),
        ("cut in half", content[: len(content) // 2], bad),
        ("a tensor of 2^62", with_header(header | {name: header[name] | {"shape": [2**31, 2**31]}}), bad),
        ("a tensor outside the file", with_header(header | {name: header[name] | {"data_offsets": [0, 2**50]}}), bad),
        ("a tensor less", with_header({key: held for key, held in header.items() if key != name}), _UNFIT),
    ]


def _rows(content: bytes) -> list[Draw]:
    pair = json.loads(content.splitlines()[0])

    def row(**more: Any) -> bytes:
        return content + json.dumps(pair | more).encode() + b"\n"

    deep: Any = 1
    for _ in range(150):
        deep = [deep]
    return [
        ("a deep row", row(more=deep), r"nested deeper"),
        ("a wide row", row(**{f"c{n}": 1 for n in range(10_050)}), r"columns"),
        ("a row of 17 MiB", lambda: row(more="x" * (17 << 20)), r"longer than"),
        ("a row of a million lists", lambda: row(more=[[]] * 1_100_000), r"values"),
        ("a million blank lines", lambda: content + b"\n" * 1_100_000, r"blank lines"),
        ("Latin-1", content + json.dumps(pair | {"chosen": "é"}, ensure_ascii=False).encode("latin-1"), r"not UTF-8"),
        ("UTF-16", content.decode().encode("utf-16"), r"not UTF-8"),
    ]


def _folded(content: bytes) -> list[Draw]:
    rows = gzip.decompress(content)
    return [
        ("a bomb of blanks", lambda: gzip.compress(rows + b" " * (70 << 20), 1), r"decompresses to"),
        ("a gzip cut short", content[:-20], r"cannot be read"),
        ("no gzip", rows, r"cannot be read"),
        ("a gzip whose sum is wrong", content[:-8] + bytes(8), r"cannot be read"),
        ("a gzip of UTF-16", gzip.compress(rows.decode().encode("utf-16"), mtime=0), r"not UTF-8"),
    ]


def _template(content: bytes) -> list[Draw]:
    return [("Latin-1", content + b"\xe9", r"UTF-8|utf-8")]


_WHOLE: dict[str, Callable[[bytes], list[Draw]]] = {
    "model.safetensors": partial(_weights, bad=r"model\.safetensors is damaged"),  # transformers has other words for it
    "adapter_model.safetensors": partial(_weights, bad=_UNFIT),
    "pairs.jsonl": _rows,
    "pairs.jsonl.gz": _folded,
    "chat_template.jinja": _template,
    "own.jinja": _template,
}
