"""The recipe: what is trained, on what, how. The only reader of recipe files and `--set` overrides.

Every key is documented under its definition (the text becomes the JSON Schema that editors show), every section is
frozen, and a key nobody knows is refused with the nearest one that is known.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpo_studio.errors import RecipeError, UsageError
from dpo_studio.objectives import AOT, DPO, IPO, Hinge, Objective

__all__ = ["LoadedRecipe", "Recipe", "cache_folder", "load_recipe", "parse_override", "recipe_schema"]

OBJECTIVES = (DPO, IPO, Hinge, AOT)
_MAX_RECIPE_BYTES = 1_000_000
BUNDLED = "bundled:"
TooLong = Literal["drop", "cut_prompt_start", "cut_answer_end"]


class Section(BaseModel):
    """A part of the recipe: frozen, strict about names, documented field by field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model."""

    path: str
    """A Hub id, a folder, or `bundled:smollm2-135m-instruct`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the frozen base. auto: bfloat16 on CUDA; on a CPU, whichever a timed product finds faster."""
    attention: Literal["auto", "sdpa"] = "auto"
    """Attention implementation. auto: the fastest that honours the pack's mask on this device."""
    adapter: str | None = None
    """Continue training this LoRA adapter. It is then also the reference, frozen as it was."""
    chat_template: str | None = None
    """A Jinja file used in place of the tokenizer's own chat template."""
    residency: Literal["packed", "bf16"] = "packed"
    """GPTQ bases: keep the 4-bit words and dequantise on the fly, or dequantise once."""
    compute: Literal["auto", "fp8"] = "auto"
    """GPTQ bases: the precision of the forward products."""


class SourceSection(Section):
    """Where pairs come from."""

    source: str
    """A file (.jsonl .json .jsonl.gz .parquet .csv), a folder, `bundled:everyday`, or a Hub id `name[/config][:split]`."""
    split: str | None = None
    """Which split of a folder or Hub dataset."""
    revision: str | None = None
    """Hub datasets: branch, tag or commit."""
    data_dir: str | None = None
    """Hub datasets: a sub-folder of the repository."""
    format: str = "auto"
    """Name of the shape of a row; auto looks at the first rows."""
    rows: Annotated[int, Field(gt=0)] | None = None
    """Take a seeded sample of this many rows."""
    map: dict[str, str] = {}
    """Which column (dots reach into nested ones) holds prompt, chosen, rejected, or first, second and label."""
    label: dict[str, str | int | float | bool] = {}
    """What the label's values mean: {first: 1, second: 2, tie: 0}. Compared as text."""


class HeldOutSection(Section):
    """Pairs that are never trained on: a share of the training prompts, or a source of their own."""

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of prompts (not rows) held out of the training source. Not used when `source` is given."""
    source: str | None = None
    """A source of its own. Training pairs that share a prompt with it are dropped and counted."""
    split: str | None = None
    """Which split of `source`."""
    revision: str | None = None
    """Hub datasets: branch, tag or commit."""
    data_dir: str | None = None
    """Hub datasets: a sub-folder of the repository."""
    format: str = "auto"
    """Shape of the rows of `source`."""
    rows: Annotated[int, Field(gt=0)] | None = None
    """Use at most this many held-out pairs, a seeded sample."""
    map: dict[str, str] = {}
    """As in data.train."""
    label: dict[str, str | int | float | bool] = {}
    """As in data.train."""

    @model_validator(mode="after")
    def _one_origin(self) -> HeldOutSection:
        given = self.model_fields_set
        if self.source is not None and "fraction" in given and self.fraction != 0:
            raise ValueError("give either fraction or source, not both")
        if self.source is None:
            stray = sorted(given & {"split", "revision", "data_dir", "format", "map", "label"})
            stray = [name for name in stray if getattr(self, name) != HeldOutSection.model_fields[name].default]
            if stray:
                raise ValueError(f"{', '.join(stray)} describe a held_out source, and none is given")
        return self

    def as_source(self) -> SourceSection | None:
        """The held-out source in the words of `data.train`, if there is one."""
        if self.source is None:
            return None
        return SourceSection(**self.model_dump(exclude={"fraction"}))


class DataSection(Section):
    """Preference pairs, and how long they may be."""

    train: SourceSection
    """Pairs to learn from."""
    held_out: HeldOutSection = HeldOutSection()
    """Pairs to measure on."""
    split_seed: int = 0
    """Seed of the split by prompt and of `rows` samples."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Most tokens a prompt and one of its answers may have together."""
    too_long: TooLong = "drop"
    """What happens to pairs over `max_length`: dropped, answers cut (and no end of turn learned), or oldest turns cut."""


class AdapterSection(Section):
    """The LoRA adapter (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Annotated[int, Field(gt=0)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Which linear layers: all of them but the head, or a list of name endings such as [q_proj, v_proj]."""


class ReferenceSection(Section):
    """What the policy is held close to: the base with the adapter off, unless another is named."""

    mode: Literal["cached", "live"] = "cached"
    """cached: log-probs are computed once and kept on disk. live: computed in every step."""
    model: str | None = None
    """Another model as the reference: a folder or Hub id with the same tokenizer."""
    adapter: str | None = None
    """Another adapter as the reference, on `reference.model` or on the base."""


class TrainingSection(Section):
    """How the adapter is fitted."""

    pairs_per_step: Annotated[int, Field(gt=0)] = 32
    """Pairs an optimizer step learns from, over all devices. The batch size of the mathematics."""
    tokens_per_micro_batch: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Tokens in memory at once. Changes speed and memory, never what is learned."""
    epochs: Annotated[float, Field(gt=0)] = 1
    """Passes over the pairs; may be fractional."""
    max_steps: Annotated[int, Field(gt=0)] | None = None
    """Stop after this many steps; wins over `epochs`."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.1
    """Below 1: share of all steps (rounded up). From 1 on: a number of steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; null turns clipping off."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the adapter's start, the order of the pairs and dropout."""
    evaluate_every: Annotated[int, Field(gt=0)] = 50
    """Steps between held-out evaluations; there is always one at the start and one at the end."""
    save_every: Annotated[int, Field(gt=0)] = 50
    """Steps between checkpoints; there is always one at the end."""


class RunSection(Section):
    """Where the run is kept and who else is told."""

    folder: str | None = None
    """The run folder, relative to the working directory. Default: runs/<recipe's name>."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Also send metrics to this tracker, through accelerate."""


class Recipe(Section):
    """Everything a run depends on."""

    model: ModelSection
    """The base model."""
    data: DataSection
    """Preference pairs, and how long they may be."""
    adapter: AdapterSection = AdapterSection()
    """The LoRA adapter."""
    objective: Objective = DPO()
    """What is minimised: its kind and its parameters."""
    reference: ReferenceSection = ReferenceSection()
    """What the policy is held close to."""
    training: TrainingSection = TrainingSection()
    """How the adapter is fitted."""
    run: RunSection = RunSection()
    """Where the run is kept and who else is told."""

    @model_validator(mode="after")
    def _an_adapter_brings_its_own_shape(self) -> Recipe:
        if self.model.adapter is not None and (conflicting := self.adapter.model_fields_set):
            keys = ", ".join(f"adapter.{name}" for name in sorted(conflicting))
            raise ValueError(f"model.adapter brings its own rank, alpha, dropout and targets; remove {keys}")
        return self

    def to_plain(self) -> dict[str, Any]:
        """Every setting as plain data that reads back as the same recipe."""
        plain: dict[str, Any] = self.model_dump(mode="json")
        if self.model.adapter is not None:
            del plain["adapter"]
        if self.data.held_out.source is not None:
            del plain["data"]["held_out"]["fraction"]
        return plain


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe ready to run, and what its author typed."""

    recipe: Recipe
    """Resolved: local paths are absolute, defaults filled in."""
    typed: dict[str, Any]
    """As given, overrides merged."""
    name: str
    """The file's name without its ending; names the default run folder."""

    @property
    def run_folder(self) -> Path:
        """Where the run goes, relative to the working directory unless absolute."""
        return Path(self.recipe.run.folder or Path("runs") / self.name).expanduser()


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> LoadedRecipe:
    """Read, override, validate and resolve a recipe file.

    Paths in the file are relative to the file, paths in `overrides` (`a.b=c`) to the working directory.

    Raises:
        RecipeError: the file cannot be read, or holds something that is not a recipe.
        UsageError: an override is not of the form `a.b=c`.
    """
    file = Path(path).expanduser()
    typed = _read_yaml(file)
    absolute = _with_absolute_paths(typed, file.resolve().parent)
    for text in overrides or []:
        keys, value = parse_override(text)
        _set(typed, keys, value, text)
        patch: dict[str, Any] = {}
        _set(patch, keys, value, text)
        _set(absolute, keys, _dig(_with_absolute_paths(patch, Path.cwd()), keys), text)
    return LoadedRecipe(recipe=validate_recipe(absolute, where=str(file)), typed=typed, name=file.stem)


def validate_recipe(raw: dict[str, Any], *, where: str) -> Recipe:
    """A Recipe from plain data; every problem in one error, each with its key."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems, hints = _explain(error)
        raise RecipeError(f"{where}: {'; '.join(problems)}", hint="; ".join(hints) or None) from None


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=c` -> (["a", "b"], c), c read as YAML."""
    keys, equals, value = text.partition("=")
    if not equals or not all(keys.split(".")):
        raise UsageError(f"--set {text!r} is not of the form section.key=value", hint="--set training.epochs=2")
    try:
        return keys.strip().split("."), _number(yaml.safe_load(value))
    except (yaml.YAMLError, RecursionError):
        raise UsageError(f"--set {text!r}: the value is not YAML") from None


def recipe_schema() -> dict[str, Any]:
    """The recipe's JSON Schema, for editors and forms."""
    schema: dict[str, Any] = Recipe.model_json_schema()
    return schema


def cache_folder() -> Path:
    """Where downloads, conversions and reference log-probs are kept (`$DPO_STUDIO_CACHE`)."""
    return Path(os.environ.get("DPO_STUDIO_CACHE") or "~/.cache/dpo-studio").expanduser()


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise RecipeError(f"no such recipe: {file}", hint="recipes/demo.yaml is a small one to start from")
    if file.is_dir():
        raise RecipeError(f"{file} is a folder, not a recipe", hint="name the .yaml file")
    try:
        if file.stat().st_size > _MAX_RECIPE_BYTES:
            raise RecipeError(f"{file} is over {_MAX_RECIPE_BYTES:,} bytes: not a recipe")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} cannot be read: {error}") from None
    try:
        _refuse_aliases(text, file)
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{file} holds no recipe", hint="it needs at least model.path and data.train.source")
    return _numbers(raw)


def _refuse_aliases(text: str, file: Path) -> None:
    """A recipe needs no YAML aliases, and nested ones unfold to gigabytes."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(f"{file}: YAML aliases (*name) are not allowed in a recipe", hint="write the value out")


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return _number(value)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 5e-5 as text: only 5.0e-5 is a number to it. People mean the number."""
    if isinstance(value, str) and value[:1] in "+-.0123456789" and ("e" in value or "E" in value):
        try:
            return float(value)
        except ValueError:
            return value
    return value


_PATH_KEYS = (
    ("model", "path"),
    ("model", "adapter"),
    ("model", "chat_template"),
    ("data", "train", "source"),
    ("data", "held_out", "source"),
    ("reference", "model"),
    ("reference", "adapter"),
)


def _with_absolute_paths(raw: dict[str, Any], base: Path) -> dict[str, Any]:
    """A copy in which whatever is a local path is absolute; Hub ids and `bundled:` names stay."""
    resolved = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    if isinstance(resolved.get("data"), dict):
        resolved["data"] = {key: dict(v) if isinstance(v, dict) else v for key, v in resolved["data"].items()}
    for keys in _PATH_KEYS:
        value = _dig(resolved, list(keys))
        if isinstance(value, str):
            _set(resolved, list(keys), _absolute(value, base), "")
    return resolved


def _absolute(value: str, base: Path) -> str:
    if value.startswith(BUNDLED) or not value or "\0" in value:
        return value
    path = Path(value).expanduser()
    is_local = path.is_absolute() or value.startswith((".", "~")) or (base / path).exists()
    return str((base / path).resolve()) if is_local else value


def _dig(raw: Any, keys: list[str]) -> Any:
    for key in keys:
        if not isinstance(raw, dict) or key not in raw:
            return None
        raw = raw[key]
    return raw


def _set(raw: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        if raw.get(key) is None:
            raw[key] = {}
        raw = raw[key]
        if not isinstance(raw, dict):
            raise UsageError(f"--set {text!r}: {key} is not a section")
    raw[keys[-1]] = value


def _explain(error: ValidationError) -> tuple[list[str], list[str]]:
    """Problems in the author's words, and hints for misspelt names."""
    problems, hints = [], []
    for item in error.errors(include_url=False):
        loc = [str(part) for part in item["loc"]]
        if loc[:1] == ["objective"] and len(loc) > 2:
            del loc[1]  # pydantic puts the union's tag into the path; the recipe has no such level
        key = ".".join(loc) or "recipe"
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            problems.append(f"unknown key {key}")
            if near := difflib.get_close_matches(loc[-1], _known_keys(item["loc"][:-1]), n=1, cutoff=0.5):
                hints.append(f"did you mean {'.'.join([*loc[:-1], near[0]])}?")
        elif item["type"] == "union_tag_invalid":
            known = [tag.strip(" '") for tag in str(item["ctx"]["expected_tags"]).split(",")]
            problems.append(f"unknown objective {item['ctx']['tag']!r}")
            hints.append(f"objective.kind is one of {', '.join(known)}")
        elif item["type"] == "missing":
            problems.append(f"{key} is required")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = f" (given: {item['input']!r})" if not isinstance(item["input"], dict | BaseModel) else ""
            problems.append(f"{key}: {message[:1].lower()}{message[1:]}{given}")
    return list(dict.fromkeys(problems)), hints


def _known_keys(loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at `loc`."""
    section: Any = Recipe
    for part in loc:
        if section is not None and isinstance(section, type) and issubclass(section, BaseModel):
            field = section.model_fields.get(str(part))
            section = field.annotation if field is not None else None
        else:  # the objective: the tag picks the class
            section = next((kind for kind in OBJECTIVES if kind.kind == part), None)
    if isinstance(section, type) and issubclass(section, BaseModel):
        return list(section.model_fields)
    if is_dataclass(section):
        return list(section.__dataclass_fields__)
    return []
