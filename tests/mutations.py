"""How a file is mutated: values of wrong kinds, keys that lead elsewhere, broken text, and what is no file at all."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["Mutation", "endless", "mutated"]


@dataclass(frozen=True)
class Mutation:
    """What takes a file's place."""

    what: str
    content: bytes | None = None
    special: Callable[[Path], None] | None = None
    """Makes something that is no regular file."""
    says: str = ""
    """An expression for what its refusal must name; empty where none is promised."""

    def put(self, file: Path) -> None:
        """In the place of a file."""
        file.unlink(missing_ok=True)
        if self.special is not None:
            self.special(file)
        elif self.content is not None:
            file.write_bytes(self.content)

    def put_back(self, file: Path, seed: Path) -> bool:
        """The seed again; True where only a fresh copy of everything will do."""
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        file.unlink(missing_ok=True)
        if not file.parent.is_dir():
            return True
        shutil.copyfile(seed, file)
        return False


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


_PLAIN: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "x" * 5000,
    "\x00",
    "\ud800",
    "null",
    "1e9",
    "../..",
    "/",
    "~",
    "-",
    "{}",
    "[]",
    [],
    {},
    [[]],
    [None],
    [1, "a", None],
    {"a": 1},
    {"": {}},
    {"a": {"b": {"c": []}}},
    [{}],
    ["x"] * 2000,
    list(range(500)),
    "llama",
    "gpt2",
    "bfloat16",
    "all-linear",
    "(a+)+$",
    "${HOME}",
    "{{ 7*7 }}",
    "__import__('os')",
    "2026-13-45",
    "\x1b[2J",
    "é" * 300,
]
"""Values of every kind, most of them wrong wherever they stand."""
_KEYS = [
    "auto_map",
    "transformers_weights",
    "_name_or_path",
    "base_model_name_or_path",
    "quantization_config",
    "vocab_file",
    "model_type",
    "architectures",
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "rope_scaling",
    "torch_dtype",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "id2label",
    "num_labels",
    "text_config",
    "chat_template",
    "tokenizer_class",
    "tokenizer_file",
    "extra_special_tokens",
    "added_tokens_decoder",
    "model_max_length",
    "weight_map",
    "metadata",
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "peft_type",
    "auto_mapping",
    "model",
    "data",
    "training",
    "run",
    "adapter",
    "objective",
    "path",
    "folder",
    "source",
    "step",
    "loss",
    "steps",
    "files",
    "sha256",
    "date",
    "health",
    "kind",
    "attn_implementation",
    "",
    "\x00",
    "__class__",
    "temperature",
    "max_length",
    "sliding_window",
    "layer_types",
    "tie_word_embeddings",
    "head_dim",
    "rope_parameters",
    "rope_theta",
    "initializer_range",
    "is_encoder_decoder",
    "generation_config",
    "trust_remote_code",
]
_NOISE = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"}",
    b"[",
    b"[" * 3000,
    b'{"a":' * 1500,
    b"\n",
    b"\r",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"\\ud800",
    b"\xc3\x28",
    b"/*",
    b"// x\n",
    b"'",
    b'"',
    b"-" * 50,
    b"0x" + b"f" * 600,
]
_YAML = [
    "!!python/object/apply:os.system ['true']\n",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "x: !!bool abc\n",
    "x: 0x" + "f" * 5000 + "\n",
    "x: 0o" + "7" * 9000 + "\n",
    "? [a, b]\n: c\n",
    "x: !!int abc\n",
    "x: !!binary abc\n",
    "x: !!timestamp abc\n",
    "x: 190:20:30\n",
    "\tx: 1\n",
    "<<: {a: 1}\n",
    "x: 2026-99-99\n",
    "--- a\n--- b\n",
    "- - - -\n",
    "x: [" * 400,
    "x: {" * 400,
    "%TAG ! !\n---\n",
    "x: !!set {a, b}\n",
    "x: !!float abc\n",
    "x: .nan\n",
    "x: *nowhere\n",
    "".join(f"k{n}: {n}\n" for n in range(6000)),
    "x: |\n" + " y\n" * 900,
    "\u2028x: 1\n",
    "x: !<tag:yaml.org,2002:null> z\n",
]


def mutated(draw: random.Random, name: str, content: bytes, outside: Path) -> Mutation:
    """One mutation of a file's content; half of them change one value, and leave a file that can be parsed."""
    kind = draw.random()
    if kind < 0.06:
        return _no_file(draw, outside)
    if kind < 0.22:
        return _broken(draw, content)
    if name.endswith((".safetensors", ".gz", ".jinja")):
        return _broken(draw, content)
    if name.endswith(".yaml"):
        return _yaml(draw, content, outside)
    if name.endswith(".jsonl"):
        return _lines(draw, content, outside)
    value = json.loads(content)
    what = "; ".join(_change(draw, value, outside) for _ in range(draw.choice([1, 1, 1, 2, 4])))
    if draw.random() < 0.03:
        value, what = _value(draw, outside), "another value altogether"
    return Mutation(what, _json(value))


def _json(value: Any) -> bytes:
    """Two mutations may put something deep into something deep: deeper than Python writes unasked."""
    allowed = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        return json.dumps(value).encode()
    finally:
        sys.setrecursionlimit(allowed)


def _no_file(draw: random.Random, outside: Path) -> Mutation:
    kinds: list[tuple[str, Callable[[Path], None]]] = [
        ("a pipe", os.mkfifo),
        ("a folder", lambda file: file.mkdir()),
        ("a link to a pipe", lambda file: file.symlink_to(outside / "pipe.json")),
        ("a link to what is outside", lambda file: file.symlink_to(outside / "secret.json")),
        ("a link to /dev/zero", lambda file: file.symlink_to("/dev/zero")),
        ("a link to itself", lambda file: file.symlink_to(file.name)),
        ("nothing", lambda file: None),
        ("an endless file", endless),
    ]
    what, special = draw.choice(kinds)
    return Mutation(what, special=special)


def endless(file: Path) -> None:
    """A terabyte of nothing, which takes no room on a disk."""
    with file.open("wb") as made:
        made.truncate(2**40)


def _broken(draw: random.Random, content: bytes) -> Mutation:
    at = draw.randrange(len(content) + 1)
    match draw.randrange(5):
        case 0:
            return Mutation(f"cut at {at}", content[:at])
        case 1:
            noise = draw.choice(_NOISE)
            return Mutation(f"{noise[:12]!r} at {at}", content[:at] + noise + content[at:])
        case 2:
            return Mutation("UTF-16", content.decode("utf-8", "replace").encode("utf-16"))
        case 3:
            damaged = bytearray(content)
            for _ in range(draw.randint(1, 8)):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            return Mutation("bytes changed", bytes(damaged))
        case _:
            start = draw.randrange(len(content) + 1)
            low, high = min(at, start), max(at, start)
            return Mutation(f"bytes {low} to {high} twice", content[:high] + content[low:])


def _yaml(draw: random.Random, content: bytes, outside: Path) -> Mutation:
    if draw.random() < 0.3:
        extra = draw.choice(_YAML)
        return Mutation(f"YAML {extra[:30]!r}", content + extra.encode() if draw.random() < 0.7 else extra.encode())
    value = yaml.safe_load(content)
    what = _change(draw, value, outside)
    try:
        return Mutation(
            what, yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
        )
    except (yaml.YAMLError, RecursionError, ValueError):
        return Mutation(what, _json(value))


def _lines(draw: random.Random, content: bytes, outside: Path) -> Mutation:
    lines = content.splitlines()
    at = draw.randrange(len(lines))
    value = json.loads(lines[at])
    what = _change(draw, value, outside) if isinstance(value, dict) and value else "no object"
    if draw.random() < 0.1:
        value, what = _value(draw, outside), "another value altogether"
    lines[at] = _json(value)
    if draw.random() < 0.1:
        lines.insert(at, lines[at])
    return Mutation(f"line {at}: {what}", b"\n".join(lines) + b"\n" * draw.randint(0, 1))


def _change(draw: random.Random, value: Any, outside: Path) -> str:
    """Change one thing in a value, wherever in it; say what."""
    places = list(_places(value))
    if not places:
        return "nothing to change"
    holder, key = draw.choice(places)
    if isinstance(holder, dict) and draw.random() < 0.15:
        del holder[key]
        return f"{key!r} taken out"
    if isinstance(holder, dict) and draw.random() < 0.4:
        key = draw.choice(_KEYS)
    holder[key] = new = _value(draw, outside)
    try:
        return f"{key!r:.40} = {new!r:.60}"
    except RecursionError:
        return f"{key!r:.40} = something deep"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (object or list, key or index) in it."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = (
            list(holder) if isinstance(holder, dict) else list(range(len(holder))) if isinstance(holder, list) else []
        )
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys]
    return found


def _value(draw: random.Random, outside: Path) -> Any:
    kind = draw.random()
    if kind < 0.2:
        name = draw.choice(["secret.json", "secret.safetensors", "secret.txt", "weights.safetensors", "pipe.json"])
        name = draw.choice([name, "pipe.safetensors"])
        return draw.choice(
            [str(outside / name), f"../outside/{name}", f"../../outside/{name}", f"file://{outside / name}"]
        )
    if kind < 0.26:
        return _deep(draw.choice([50, 120, 400, 900]))
    if kind < 0.32:
        return {draw.choice(_KEYS): deepcopy(draw.choice(_PLAIN)) for _ in range(draw.randint(1, 4))}
    return deepcopy(draw.choice(_PLAIN))  # or a later mutation would change the list
