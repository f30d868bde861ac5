"""The recipe: what is trained, on what, how. The only reader of recipe files and `--set` overrides.

Every key is documented under its definition (the text becomes the JSON Schema that editors show), every section is
frozen, and a key nobody knows is refused with the nearest one that is known.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dpo_studio.errors import RecipeError, UsageError
from dpo_studio.foreign_keys import FOREIGN_KEYS, LESS_BITS
from dpo_studio.objectives import DPO, OBJECTIVES, TRL_NAMES, Objective
from dpo_studio.paths import inside, user_path
from dpo_studio.reading import is_own_stream, open_input, shown_path

__all__ = [
    *("LoadedRecipe", "Recipe", "RecipeLike", "SourceLike", "as_source", "cache_folder", "load_recipe"),
    *("parse_override", "parse_yaml", "recipe_schema"),
]

_MAX_RECIPE_BYTES = 200_000
"""A recipe has two thousand; 1 MB of `1:1:1:...`, a number to the base of 60, takes PyYAML half a minute."""
BUNDLED = "bundled:"
LabelValue = str | int | float | bool
_LARGEST_WHOLE = 2**53
"""Whole numbers beyond it are no numbers of steps, tokens or rows, and some are not kept by JSON, float or torch."""
_DEPTH = 50
"""Levels of a recipe's YAML; a recipe has four."""
_LONGEST_NUMBER = 100
"""Characters of a number: 60,000 hexadecimal digits are read in no time and cannot be written again."""
MINUTES = r"^(\d+(?:\.\d+)?) ?(?:m|min|minutes?)$"
TooLong = Literal["drop", "cut_prompt_start", "cut_answer_end"]


class Section(BaseModel):
    """A part of the recipe: frozen, strict about names, documented field by field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_value(cls, value: Any) -> Any:
        """No key of the recipe is a yes or no, which pydantic would take for 1 or 0, or a number beyond all use."""
        if isinstance(value, bool):
            raise ValueError("is no yes or no (a text that YAML reads as one stands in quotes)")
        if isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
            raise ValueError(f"is a number beyond {_LARGEST_WHOLE:,}")
        return value


class ModelSection(Section):
    """The base model."""

    path: Annotated[str, Field(min_length=1)]
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


class ReadingSection(Section):
    """How a source of pairs is read."""

    split: str | None = None
    """Which split of a folder or Hub dataset."""
    revision: str | None = None
    """Hub datasets: branch, tag or commit."""
    data_dir: str | None = None
    """Hub datasets: a sub-folder of the repository."""
    format: str = "auto"
    """Name of the shape of a row; auto looks at the first rows."""
    rows: Annotated[int, Field(gt=0)] | None = None
    """Take a seeded sample of this many: of the rows, or of the held-out pairs."""
    map: dict[str, str] = {}
    """The column (dots reach into nested ones) of prompt, chosen, rejected; first, second, label; answers, scores."""
    label: dict[str, LabelValue | list[LabelValue]] = {}
    """What the label's values mean: {first: 1, second: [2, 3], tie: 0, both_bad: -1}. Compared as text."""


class SourceSection(ReadingSection):
    """Where pairs come from."""

    source: Annotated[str, Field(min_length=1)]
    """File (.jsonl .json .jsonl.gz .parquet .csv .tsv), folder, `bundled:everyday`, Hub id `name[/config][:split]`."""


SourceLike = str | Path | SourceSection
"""A source of pairs by its name, or with how it is read."""


def as_source(source: SourceLike) -> SourceSection:
    """The source with how it is read; of a name alone, as its first rows look.

    Raises:
        UsageError: the name is empty.
    """
    if isinstance(source, SourceSection):
        return source
    if not str(source):
        raise UsageError("the name of a source is empty", hint="give a file, a folder, bundled:everyday or a Hub id")
    return SourceSection(source=str(source))


class HeldOutSection(ReadingSection):
    """Pairs that are never trained on: a share of the training prompts, or a source of their own."""

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of prompts (not rows) held out of the training source. Not used when `source` is given."""
    source: str | None = None
    """A source of its own. Training pairs that share a prompt with it are dropped and counted."""

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
    """Pairs over `max_length` are dropped, or lose their answers' ends (no end of turn is learned) or oldest turns."""


class AdapterSection(Section):
    """The LoRA adapter (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Annotated[int, Field(gt=0)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Which linear layers: all of them but the head, or a list of name endings such as [q_proj, v_proj]."""


class ReferenceSection(Section):
    """What the policy is held close to: the base with the adapter off, unless another is named."""

    mode: Literal["cached", "live"] = "cached"
    """cached: log-probs are computed once and kept on disk. live: computed in every step."""
    model: str | None = None
    """Another model as the reference: a folder or Hub id with the same tokenizer."""
    adapter: str | None = None
    """Another adapter as the reference, on `reference.model` or on the base."""
    update_every: Annotated[int, Field(gt=0)] | None = None
    """Move the reference towards the policy after every so many steps (TR-DPO, arXiv 2404.09656); needs mode: live."""
    update_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """How much of the policy the moving reference takes; what it was keeps the rest. 1: it becomes the policy."""

    @model_validator(mode="before")
    @classmethod
    def _what_moves_is_live(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("update_every") is not None and "mode" not in raw:
            return raw | {"mode": "live"}
        return raw

    @model_validator(mode="after")
    def _what_moves_is_an_adapter_on_the_base(self) -> ReferenceSection:
        if self.update_every is None and self.update_share != 1:
            raise ValueError("update_share says how far the reference moves: say when, with update_every")
        if self.update_every is not None and self.mode == "cached":
            raise ValueError("log-probs of a reference that moves (update_every) grow stale: use mode: live")
        if self.update_every is not None and self.model is not None:
            raise ValueError("only the base with an adapter can move (update_every): remove reference.model")
        return self


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
    save_every: Annotated[int, Field(gt=0)] | Annotated[str, Field(pattern=MINUTES)] = 50
    """Steps between checkpoints, or minutes: `10min`. There is always one at the end. Never changes what is learned."""


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

    @model_validator(mode="after")
    def _an_objective_without_a_reference_has_none(self) -> Recipe:
        named = [name for name in ("model", "adapter", "update_every") if getattr(self.reference, name) is not None]
        if named and not self.objective.needs_reference:
            keys = ", ".join(f"reference.{name}" for name in named)
            raise ValueError(f"objective.kind {self.objective.kind} holds the policy to no reference; remove {keys}")
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
        """Where the run goes, relative to the working directory unless absolute.

        Raises:
            UsageError: the recipe's name does as no folder's, or leads out of `runs`.
        """
        if self.recipe.run.folder is not None:
            return user_path(self.recipe.run.folder)
        return inside(Path("runs"), self.name, hint="name the run's folder: --set run.folder=NAME")


RecipeLike = str | Path | Mapping[str, Any] | Recipe
"""A recipe's file, its content as a dict, or a `Recipe`."""


def load_recipe(recipe: RecipeLike, overrides: Sequence[str] | None = None) -> LoadedRecipe:
    """Read, override, validate and resolve a recipe.

    Paths in a file are relative to the file, others and those in `overrides` (`a.b=c`) to the working directory. A
    recipe that is no file is named `recipe`, and so is its run unless `run.folder` says otherwise.

    Raises:
        RecipeError: the file cannot be read, or holds something that is not a recipe.
        UsageError: an override is not of the form `a.b=c`.
    """
    typed, where, folder = _typed(recipe)
    absolute = _with_absolute_paths(typed, folder)
    for text in overrides or []:
        keys, value = parse_override(text)
        _set(typed, keys, value, text)
        patch: dict[str, Any] = {}
        _set(patch, keys, value, text)
        _set(absolute, keys, _dig(_with_absolute_paths(patch, Path.cwd()), keys), text)
    return LoadedRecipe(recipe=validate_recipe(absolute, where=str(where)), typed=typed, name=where.stem)


def _typed(recipe: RecipeLike) -> tuple[dict[str, Any], Path, Path]:
    """(its plain content, free to be changed, its name, what its paths are relative to)."""
    if isinstance(recipe, str | Path):
        file = user_path(recipe)
        if is_own_stream(file):
            return _read_yaml(file), Path("recipe"), Path.cwd()
        return _read_yaml(file), file, file.resolve().parent
    if isinstance(recipe, Recipe):
        return recipe.to_plain(), Path("recipe"), Path.cwd()
    return deepcopy(dict(recipe)), Path("recipe"), Path.cwd()


def validate_recipe(raw: dict[str, Any], *, where: str) -> Recipe:
    """A Recipe from plain data; every problem in one error, each with its key."""
    _refuse_empty_sections(raw, where)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems, hints = _explain(error, raw)
        raise RecipeError(f"{where}: {'; '.join(problems)}", hint="; ".join(hints) or None) from None


def _refuse_empty_sections(raw: dict[str, Any], where: str) -> None:
    """`adapter: null`, or `adapter:` with nothing under it, could mean none or its defaults; we ask.

    Raises:
        RecipeError: a section is null.
    """
    sections = [(name,) for name in Recipe.model_fields] + [("data", "train"), ("data", "held_out")]
    empty = [
        keys
        for keys in sections
        if isinstance(within := _dig(raw, keys[:-1]), dict) and within.get(keys[-1], 0) is None
    ]
    if empty:
        names = ", ".join(".".join(keys) for keys in empty)
        hint = "leave the section out for its defaults"
        if ("adapter",) in empty:
            hint += "; training a whole model, without an adapter, is not built yet"
        raise RecipeError(f"{where}: null where a section with keys of its own is wanted: {names}", hint=hint)


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=c` -> (["a", "b"], c), c read as YAML."""
    keys, equals, value = text.partition("=")
    path = [key.strip() for key in keys.split(".")]
    if not equals or not all(path):
        raise UsageError(f"--set {text!r} is not of the form section.key=value", hint="--set training.epochs=2")
    try:
        return path, parse_yaml(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text!r}: the value is not YAML: {_one_line(error)}") from None


def recipe_schema() -> dict[str, Any]:
    """The recipe's JSON Schema, for editors and forms."""
    schema: dict[str, Any] = Recipe.model_json_schema()
    return schema


def cache_folder() -> Path:
    """Where downloads, conversions and reference log-probs are kept (`$DPO_STUDIO_CACHE`)."""
    return user_path(os.environ.get("DPO_STUDIO_CACHE") or "~/.cache/dpo-studio")


def _read_yaml(file: Path) -> dict[str, Any]:
    shown = shown_path(file)
    if file.is_dir():
        raise RecipeError(f"{shown} is a folder, not a recipe", hint="name the .yaml file")
    if not is_own_stream(file) and not _is_there(file):
        raise RecipeError(f"no such recipe: {shown}", hint="recipes/demo.yaml is a small one to start from")
    if file.name.lower().endswith(tuple(suffix for suffix in _DATA_FILES if suffix != ".json")):
        raise _data_for_a_recipe(file)
    with open_input(file, what="recipe", error=RecipeError) as stream:
        try:
            content = stream.read(_MAX_RECIPE_BYTES + 1)
        except OSError as error:
            raise RecipeError(f"{shown} cannot be read: {error.strerror}") from None
    if len(content) > _MAX_RECIPE_BYTES:
        raise RecipeError(f"{shown} is over {_MAX_RECIPE_BYTES:,} bytes: not a recipe")
    try:
        raw = parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise RecipeError(f"{shown} is not UTF-8 text", hint="a recipe is a YAML file; is this the one?") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{shown} is not valid YAML: {_one_line(error)}") from None
    if isinstance(raw, list) and raw and all(isinstance(row, dict) for row in raw):
        raise _data_for_a_recipe(file)
    if not isinstance(raw, dict):
        raise RecipeError(f"{shown} holds no recipe", hint="it needs at least model.path and data.train.source")
    return raw


def _data_for_a_recipe(file: Path) -> RecipeError:
    return RecipeError(
        f"{shown_path(file)} is data, not a recipe",
        hint=f"a recipe names it: model: {{path: MODEL}} and data: {{train: {{source: {file.name}}}}} in a .yaml file; "
        f"`dpo data check {file}` looks at the data",
    )


_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map"))
"""Plain data. All other tags make objects, merge mappings, or are ways to write a date."""


class _Loader(yaml.SafeLoader):
    """YAML as people mean it, where YAML 1.1 surprises them or a file could do harm.

    5e-5 is a number (1.1: text), 2024-01-31 a text (1.1: a date), 1:30 a text (1.1: 90), a key given twice an error
    (1.1: the last one wins). Aliases are refused: a recipe needs none, and nested ones unfold to gigabytes.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed: write the value out", mark)
        self.depth += 1
        if self.depth > _DEPTH:
            raise yaml.YAMLError(f"nested deeper than {_DEPTH} levels")
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if node.tag not in _TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise yaml.composer.ComposerError(None, None, f"the tag {tag} is not allowed", node.start_mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "what is tagged !!map is none", node.start_mark)
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(self.construct_object(key_node)) if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key in made:
                wrong = "a key is no text" if key is None else f"the key {_cut(key)} is there twice"
                raise yaml.constructor.ConstructorError(None, None, wrong, key_node.start_mark)
            made[key] = self.construct_object(value_node, deep=deep)
        return made

    def _number(self, node: Any) -> Any:
        """A number or truth value, or what is wrong with it: a tag may call anything one."""
        text, kind = str(self.construct_scalar(node)), node.tag.rpartition(":")[2]
        if ":" in text:  # a time of day, which YAML 1.1 reads to the base of 60
            return text
        try:
            if len(text) > _LONGEST_NUMBER:
                raise ValueError
            return _MAKE[kind](self, node)
        except (ValueError, KeyError, IndexError):
            raise yaml.constructor.ConstructorError(None, None, f"{_cut(text)} is no {kind}", node.start_mark) from None


_MAKE: dict[str, Any] = {
    "int": yaml.SafeLoader.construct_yaml_int,
    "float": yaml.SafeLoader.construct_yaml_float,
    "bool": yaml.SafeLoader.construct_yaml_bool,
}
for _kind in _MAKE:
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader._number)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?|\d*\.\d+)[eE][-+]?\d{1,3}"), list("+-.0123456789")
)


def parse_yaml(text: str) -> Any:
    """Plain data from YAML: no tags that make objects, no aliases, no key twice, however the text came here.

    Raises:
        yaml.YAMLError: it is none, too long, or nested too deep.
    """
    if len(text) > _MAX_RECIPE_BYTES:
        raise yaml.YAMLError(f"over {_MAX_RECIPE_BYTES:,} characters")
    try:
        return _Loader(text).get_single_data()
    except (ValueError, OverflowError) as error:  # an escape that is no character
        raise yaml.YAMLError(str(error)) from None
    except RecursionError:
        raise yaml.YAMLError("nested too deep") from None


def _one_line(error: BaseException) -> str:
    text = str(error).replace('in "<unicode string>", ', "at ")
    return " ".join(text.split()) or type(error).__name__


_HUB_KEYS = (
    ("model", "path"),
    ("data", "train", "source"),
    ("data", "held_out", "source"),
    ("reference", "model"),
)
"""Hub ids unless something of that name is there, or the name can only be a path."""
_FILE_KEYS = (("model", "adapter"), ("model", "chat_template"), ("reference", "adapter"))
_DATA_FILES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".tsv")


def _with_absolute_paths(raw: dict[str, Any], base: Path) -> dict[str, Any]:
    """A copy in which whatever is a local path is absolute; Hub ids and `bundled:` names stay."""
    resolved = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
    if isinstance(resolved.get("data"), dict):
        resolved["data"] = {key: dict(v) if isinstance(v, dict) else v for key, v in resolved["data"].items()}
    for keys in (*_HUB_KEYS, *_FILE_KEYS):
        value = _dig(resolved, keys)
        if isinstance(value, str) and value and (keys in _FILE_KEYS or _is_local(value, base)):
            _set(resolved, keys, _absolute(value, base), "")
    return resolved


def _is_local(value: str, base: Path) -> bool:
    """Whether a name that may be a Hub id means a path: it looks like one, or is there (`folder:split` too)."""
    if value.startswith(BUNDLED):
        return False
    if value.startswith((".", "~", "/")) or value.partition(":")[0].lower().endswith(_DATA_FILES):
        return True
    return _is_there(base / value) or _is_there(base / value.rpartition(":")[0], but=base)


def _is_there(path: Path, *, but: Path | None = None) -> bool:
    try:
        return path != but and path.exists()
    except (OSError, ValueError):  # too long for a name, a NUL
        return False


def _absolute(value: str, base: Path) -> str:
    return os.path.normpath(base / user_path(value)) if "\0" not in value else value


def _dig(raw: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not isinstance(raw, dict) or key not in raw:
            return None
        raw = raw[key]
    return raw


def _set(raw: dict[str, Any], keys: Sequence[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        if raw.get(key) is None:
            raw[key] = {}
        raw = raw[key]
        if not isinstance(raw, dict):
            raise UsageError(f"--set {text!r}: {key} is not a section")
    raw[keys[-1]] = value


def _explain(error: ValidationError, raw: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Problems in the author's words, and hints for misspelt names."""
    problems: list[str] = []
    hints: list[str] = []
    refused: dict[str, tuple[list[str], str]] = {}
    for item in error.errors(include_url=False):
        keys = _keys_of(item["loc"], raw, missing=item["type"] == "missing")
        key = ".".join(keys) or "recipe"
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            problems.append(f"unknown key {key}")
            if keys[-1].lower() in LESS_BITS:
                hints.append("a GPTQ checkpoint as model.path trains in 4 or 8 bits (`dpo quantize` makes one)")
            elif near := _nearest(keys):
                hints.append(f"did you mean {near}?")
        elif item["type"] == "union_tag_invalid" and isinstance(item["input"], dict):
            problems.append(f"unknown objective {(tag := item['ctx']['tag'])!r}")
            hints.append(
                f"TRL's {tag} is called {TRL_NAMES[tag]} here"
                if tag in TRL_NAMES
                else f"objective.kind is one of {', '.join(kind.kind for kind in OBJECTIVES)}"
            )
        elif item["type"] == "missing":
            problems.append(f"{key} is required")
        else:
            given = f" (given: {_shown(item['input'])})" if not isinstance(item["input"], dict | BaseModel) else ""
            refused.setdefault(key, ([], given))[0].append(_what_is_wrong(item["type"], item["msg"]))
    problems += [f"{key}: {', or '.join(messages)}{given}" for key, (messages, given) in refused.items()]
    return problems, list(dict.fromkeys(hints))


def _keys_of(loc: tuple[int | str, ...], raw: Any, *, missing: bool) -> list[str]:
    """The author's keys in pydantic's path, which also names the members of the unions it has tried."""
    keys: list[str] = []
    for place, part in enumerate(loc):
        try:
            raw = raw[part]
        except (LookupError, TypeError):
            if not (missing and place == len(loc) - 1):
                continue
        keys.append(str(part))
    return keys


def _what_is_wrong(kind: str, message: str) -> str:
    if kind in ("model_type", "dataclass_type", "union_tag_invalid"):
        return "a section with keys of its own is wanted"
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _shown(value: object) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(keys: list[str]) -> str | None:
    """The key that was meant: the same name in another section, else one of this section spelt alike."""
    *section, name = keys
    if (ours := FOREIGN_KEYS.get(name.lower())) is not None and ours.split(".") != keys:
        return ours
    elsewhere = [other for other in Recipe.model_fields if [other] != section and name in _known_keys([other])]
    if len(elsewhere) == 1:
        return f"{elsewhere[0]}.{name}"
    near = difflib.get_close_matches(name, [key for key in _known_keys(section) if key != name], n=1, cutoff=0.5)
    return ".".join([*section, near[0]]) if near else None


def _known_keys(keys: list[str]) -> list[str]:
    """Names of the fields of the section at `keys`."""
    if keys[:1] == ["objective"]:  # and its terms, which are objectives again
        return list(dict.fromkeys(field.name for kind in OBJECTIVES for field in fields(kind)))
    section: Any = Recipe
    for key in keys:
        field = section.model_fields.get(key)
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return []
    return list(section.model_fields)
