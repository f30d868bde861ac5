"""The model card of an export: README.md with the Hub's metadata. Text from data or models stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dpo_studio import __version__
from dpo_studio.config import BUNDLED, parse_yaml
from dpo_studio.errors import ModelError
from dpo_studio.models.bundled import published_name
from dpo_studio.reading import open_regular

__all__ = [
    "Card",
    "adapter_code",
    "gptq_code",
    "hub_id",
    "license_of",
    "plain_code",
    "public_name",
    "quoted",
    "versions",
]

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*\n", re.DOTALL)
_LONGEST_HEAD = 200_000
"""Characters of a base's card that are read: its metadata are first, in a thousand or two."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Card:
    """The content of a card."""

    title: str
    base_id: str | None
    """Its name on the Hub, where it has one."""
    datasets: Sequence[str]
    """Names on the Hub."""
    library: str
    """peft or transformers."""
    tags: Sequence[str]
    license: str | None
    facts: Sequence[str]
    """A line each, our own words; names in them are `quoted`."""
    measured: str = ""
    """The caption of the figures."""
    figures: Sequence[str] = ()
    """The measurements."""
    example: tuple[str, str] | None = None
    """A prompt and this model's answer."""
    code: str = ""
    """How it is loaded."""

    def text(self) -> str:
        """The whole README.md."""
        parts = [f"---\n{self._metadata()}---\n", f"# {_escaped(self.title)}\n", _list(self.facts)]
        if self.figures:
            parts += ["## Measured\n", *([f"{self.measured}\n"] if self.measured else []), _list(self.figures)]
        if self.example is not None:
            prompt, answer = self.example
            parts += ["## One answer\n", _fenced(prompt, "text"), _fenced(answer, "text")]
        if self.code:
            parts += ["## Use\n", _fenced(self.code, "python")]
        return "\n".join(parts)

    def _metadata(self) -> str:
        data: dict[str, Any] = {"library_name": self.library, "pipeline_tag": "text-generation"}
        if self.base_id is not None:
            data["base_model"] = self.base_id
        if self.datasets:
            data["datasets"] = list(self.datasets)
        if self.license is not None:
            data["license"] = self.license
        data["tags"] = list(self.tags)
        return yaml.safe_dump(data, sort_keys=True, allow_unicode=False)


def quoted(name: str) -> str:
    """A name inside our own text: one line, in backticks that it cannot close."""
    line = _plain(name)
    run = max((len(found) for found in re.findall("`+", line)), default=0)
    ticks = "`" * (run + 1)
    return f"{ticks} {line} {ticks}" if run else f"`{line}`"


def hub_id(name: str) -> str | None:
    """The model or data set on the Hub that the name stands for, if it is not a file or folder here."""
    name = published_name(name)
    if name.startswith(BUNDLED):
        return None
    found = _HUB_ID.match(name)
    return found[0] if found and not Path(name.partition(":")[0]).exists() and not name.startswith((".", "~")) else None


def public_name(name: str) -> str:
    """The name for publishing: of a path, its last part."""
    name = published_name(name)
    return name if name.startswith(BUNDLED) or hub_id(name) == name else Path(name).name or name


def gptq_code(name: str) -> str:
    """How plain transformers loads a GPTQ folder."""
    return f"# pip install transformers optimum gptqmodel\n{plain_code(name)}"


def plain_code(name: str) -> str:
    """How transformers loads a folder."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}, device_map="auto")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})"
    )


def adapter_code(name: str, base: str) -> str:
    """How PEFT loads an adapter."""
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}, device_map="auto")\n'
        f"model = PeftModel.from_pretrained(base, {json.dumps(name)})"
    )


def versions(*packages: str) -> dict[str, str]:
    """What made it."""
    return {"dpo-studio": __version__} | {name: version(name) for name in packages}


def license_of(folder: Path) -> str | None:
    """The license that the base's own card names, if it has one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        with open_regular(card, what="the base's card", error=ModelError) as file:
            found = _FRONT_MATTER.match(file.read(_LONGEST_HEAD).decode("utf-8", "ignore"))
        data = parse_yaml(found[1]) if found else None
    except (OSError, ModelError, yaml.YAMLError):
        return None
    name = data.get("license") if isinstance(data, dict) else None
    return name if isinstance(name, str) and re.fullmatch(r"[\w.+-]+", name) else None


def _escaped(text: str) -> str:
    """A name as a heading: no span, link, image, tag or entity, whatever it is called."""
    return re.sub(r"([\\`\[\]<>&])", r"\\\1", _plain(text))


def _plain(text: str) -> str:
    return " ".join(text.split())


def _list(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _fenced(text: str, language: str) -> str:
    """A block whose fence is longer than any run of backticks in the text."""
    run = max((len(found) for found in re.findall("`+", text)), default=0)
    fence = "`" * max(3, run + 1)
    return f"{fence}{language}\n{text}\n{fence}\n"
