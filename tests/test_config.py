from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import dpo_studio
from dpo_studio.config import (
    AdapterSection,
    Recipe,
    RecipeFile,
    TrainingSection,
    cache_folder,
    load_recipe,
    parse_override,
    recipe_schema,
    validate_recipe,
)
from dpo_studio.errors import RecipeError, UsageError
from dpo_studio.objectives import OBJECTIVES, SFT, Mixture
from dpo_studio.paths import user_path

SOURCE = Path(dpo_studio.__file__).parent
SHIPPED = sorted((SOURCE / "recipes").glob("*.yaml"))
MINIMAL = {"model": {"path": "some/model"}, "data": {"train": {"source": "some/pairs"}}}

CONTRACT = """
model: {path: bundled:smollm2-135m-instruct, revision: null, dtype: auto, attention: auto, adapter: null, chat_template: null,
        residency: packed, compute: auto, sharding: auto}        # GPTQ bases: residency packed|bf16, compute auto|fp8
data:
  train: {source: pairs.jsonl, split: null, format: auto, rows: null, map: {}, label: {}}
  held_out: {fraction: 0.1, rows: null}          # or {source: ..., split: ...}
  split_seed: 0
  max_length: 1024
  too_long: drop
adapter: {rank: 16, alpha: 32, dropout: 0.0, targets: all-linear}
objective: {kind: dpo, beta: 0.1, label_smoothing: 0.0}
reference: {mode: cached, model: null, adapter: null}
training: {pairs_per_step: 32, tokens_per_micro_batch: auto, epochs: 1, max_steps: null, learning_rate: 5.0e-5, schedule: cosine,
           warmup: 0.1, weight_decay: 0.0, clip: 1.0, seed: 0, evaluate_every: 50, save_every: 50, sample_every: null}
run: {folder: null, tracker: null, sample_prompts: null}               # folder: runs/<recipe's name>
"""  # noqa: E501
"""The defaults as scripts and people have been promised them, word for word."""


def recipe(text: str, folder: Path, *overrides: str) -> RecipeFile:
    """The recipe in `text`, from a file."""
    file = folder / "r.yaml"
    file.write_text(text)
    return load_recipe(file, list(overrides))


def minimal(folder: Path, *overrides: str) -> RecipeFile:
    """The least a recipe says, with overrides."""
    return recipe("{model: {path: some/model}, data: {train: {source: some/pairs}}}", folder, *overrides)


def mixed(terms: list[tuple[dict[str, Any], float]]) -> dict[str, Any]:
    """A mixture of these terms with their weights."""
    return {"kind": "mixture", "terms": [term for term, _ in terms], "weights": [weight for _, weight in terms]}


def leaves(plain: dict[str, Any], *before: str) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting."""
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, *before, key)
        else:
            yield ".".join((*before, key)), value


def settings(section: type[BaseModel] = Recipe, name: str = "recipe") -> Iterator[tuple[str, str, Any]]:
    """Section, key and description of every field of the recipe, the objectives' apart."""
    for key, field in section.model_fields.items():
        yield name, key, field.description
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, key)


# What a recipe is


def test_the_defaults_are_the_contracts() -> None:
    promised = yaml.safe_load(CONTRACT)
    required = {"model": {"path": promised["model"]["path"]}, "data": {"train": {"source": "pairs.jsonl"}}}
    ours = dict(leaves(validate_recipe(required, where="contract").to_plain()))
    assert {key: ours.get(key, "no such key") for key, _ in leaves(promised)} == dict(leaves(promised))


def test_the_contracts_block_is_a_recipe(tmp_path: Path) -> None:
    assert recipe(CONTRACT, tmp_path).recipe.training == TrainingSection()


def test_a_recipe_is_frozen() -> None:
    """What a run was made with cannot change under it."""
    loaded = validate_recipe(MINIMAL, where="here")
    with pytest.raises(ValidationError, match="frozen"):
        loaded.training.epochs = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.objective.beta = 1.0  # type: ignore[misc]


def test_every_field_is_described_in_the_schema() -> None:
    """Editors show these texts. An objective's tag is described by its class."""
    schema: Any = recipe_schema()
    sections = schema["$defs"] | {"recipe": schema}
    bare = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, field in section["properties"].items()
        if not {"description", "$ref"} & field.keys() and key != "kind"
    ]
    assert bare == []
    assert all("description" in section for section in schema["$defs"].values())
    assert not any(section.get("additionalProperties", True) for section in schema["$defs"].values())


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_schema_holds_for_the_shipped_recipes(file: Path) -> None:
    """By a small reader of the keywords our schema uses: an editor must not underline what `dpo train` takes."""
    schema: Any = recipe_schema()
    assert list(violations(yaml.safe_load(file.read_text()), schema, schema["$defs"])) == []


def test_the_schema_refuses_what_the_recipe_refuses() -> None:
    schema: Any = recipe_schema()
    for bad in (
        {"training": {"epoch": 1}},
        {"training": {"epochs": 0}},
        {"model": {"path": 3}},
        {"run": {"tracker": "x"}},
    ):
        assert list(violations(MINIMAL | bad, schema, schema["$defs"]))


def violations(value: Any, schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """Where `value` breaks a JSON Schema made of the keywords that pydantic writes for us."""
    known = {
        *("$ref", "anyOf", "oneOf", "const", "enum", "type", "properties", "required", "additionalProperties", "items"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems", "prefixItems"),
        *("default", "description", "title", "$defs", "discriminator", "minLength"),
    }
    assert schema.keys() <= known, f"a keyword this reader does not know: {schema.keys() - known}"
    if "$ref" in schema:
        yield from violations(value, definitions[schema["$ref"].removeprefix("#/$defs/")], definitions)
    options = schema.get("anyOf") or schema.get("oneOf") or []
    if options and all(list(violations(value, option, definitions)) for option in options):
        yield f"{value!r} is none of {options}"
    if "const" in schema and value != schema["const"]:
        yield f"{value!r} is not {schema['const']!r}"
    if value not in schema.get("enum", [value]):
        yield f"{value!r} is not in {schema['enum']}"
    types: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "null": type(None),
    }
    if "type" in schema and not isinstance(value, types.get(schema["type"], bool)):
        yield f"{value!r} is no {schema['type']}"
        return
    limits = (schema.get("minimum"), schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum"))
    least, above, below = limits
    if isinstance(value, int | float):
        if (least is not None and value < least) or (above is not None and value <= above):
            yield f"{value!r} is too small"
        if below is not None and value >= below:
            yield f"{value!r} is too large"
    if isinstance(value, dict) and "properties" in schema:
        yield from (f"{key} is missing" for key in schema.get("required", []) if key not in value)
        for key, inner in value.items():
            if key in schema["properties"]:
                yield from violations(inner, schema["properties"][key], definitions)
            else:
                yield f"{key} is not known"


def test_every_key_is_read_somewhere() -> None:
    """Law 8. A setting that nothing reads is a lie. Read means: `section.key`, the section by its name or as `section`.

    An objective's parameters are read by its own formula.
    """
    read: set[tuple[str, str]] = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                read.add((name, node.attr))
    unread = [f"{name}.{key}" for name, key, _ in settings() if not {(name, key), ("section", key)} & read]
    assert unread == []
    formulas = {
        node.name: node
        for file in (SOURCE / "objectives").glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    for kind in OBJECTIVES:
        own = {node.attr for node in ast.walk(formulas[kind.__name__]) if isinstance(node, ast.Attribute)}
        assert {field.name for field in dataclasses.fields(kind)} - {"kind"} <= own


def test_what_is_loaded_is_not_read_again_and_takes_no_more_overrides(tmp_path: Path) -> None:
    """The file may be gone by then: a run reads it once."""
    loaded = minimal(tmp_path, "training.seed=3")
    (tmp_path / "r.yaml").unlink()
    assert load_recipe(loaded) is loaded
    with pytest.raises(UsageError, match="loaded already"):
        load_recipe(loaded, ["training.seed=4"])


# What is refused


@pytest.mark.parametrize(
    ("key", "value", "message", "hint"),
    [
        ("training.max_step", 1, "unknown key training.max_step", "training.max_steps"),
        ("trainig", {}, "unknown key trainig", "training"),
        ("objective.betta", 1, "unknown key objective.betta", "objective.beta"),
        ("data.train.sorce", "x", "unknown key data.train.sorce", "data.train.source"),
        ("data.heldout", {}, "unknown key data.heldout", "data.held_out"),
        ("learning_rate", 1, "unknown key learning_rate", "training.learning_rate"),
        ("training.beta", 1, "unknown key training.beta", "objective.beta"),
        ("lr", 1, "unknown key lr", "training.learning_rate"),
        ("training.lr", 1, "unknown key training.lr", "training.learning_rate"),
        ("training.per_device_train_batch_size", 1, "per_device_train_batch_size", "training.pairs_per_step"),
        ("lora", {"r": 8}, "unknown key lora", "did you mean adapter?"),
        ("adapter.r", 8, "unknown key adapter.r", "adapter.rank"),
        ("model.load_in_4bit", True, "unknown key model.load_in_4bit", "GPTQ"),
        ("base_model", "m", "unknown key base_model", "model.path"),
        ("objective.kind", "dppo", "unknown objective 'dppo'", "dpo, ipo, hinge, exo, nca"),
        ("objective.kind", "sigmoid", "unknown objective 'sigmoid'", "TRL's sigmoid is called dpo here"),
        ("objective", mixed([({"kind": "bco_pair"}, 1.0)]), "unknown objective 'bco_pair'", "called bco here"),
        ("objective", mixed([({"betta": 1}, 1.0)]), "unknown key objective.terms.0.betta", "objective.terms.0.beta"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest(key: str, value: Any, message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validate_recipe(with_key(key, value), where="r.yaml")
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("training.epochs", "two", "number"),
        ("training.epochs", 0, "greater than 0"),
        ("training.epochs", True, "is not a boolean key"),
        ("training.epochs", float("nan"), "finite"),
        ("training.learning_rate", float("inf"), "finite"),
        ("training.pairs_per_step", 2.5, "integer"),
        ("training.pairs_per_step", -1, "greater than 0"),
        ("training.tokens_per_micro_batch", "much", "'auto'"),
        ("training.schedule", "step", "'cosine'"),
        ("training.betas", [0.9], "required"),
        ("training.betas", [0.9, 1.0], "less than 1"),
        ("training.seed", -1, "greater than or equal to 0"),
        ("training.clip", 0, "greater than 0"),
        ("training", [1], "a section with keys"),
        ("data.train", "pairs.jsonl", "a section with keys"),
        ("data.held_out.fraction", 1, "less than 1"),
        ("data.max_length", 7, "greater than or equal to 8"),
        ("data.too_long", "cut", "'cut_prompt_start'"),
        ("adapter.rank", 0, "greater than 0"),
        ("adapter.dropout", 1.0, "less than 1"),
        ("adapter.targets", "q_proj", "list"),
        ("adapter.targets", [], "at least 1"),
        ("objective", "ipo", "a section with keys"),
        ("objective.beta", 0, "greater than 0"),
        ("objective.beta", True, "number"),
        ("objective.label_smoothing", 0.5, "less than 0.5"),
        ("objective", {"kind": "exo", "label_smoothing": 0}, "greater than 0"),
        ("objective", {"kind": "bco", "shift": "runing"}, "'running'"),
        ("objective", {"kind": "mixture", "weights": [1.0]}, "3 terms with 1 weights"),
        ("objective", {"kind": "mixture", "terms": [], "weights": []}, "0 terms"),
        ("objective", {"kind": "mixture", "terms": [{"kind": "sft"}], "weights": [0]}, "greater than 0"),
        ("model.path", 7, "string"),
        ("model.path", "", "at least 1 character"),
        ("model.dtype", "int8", "'bfloat16'"),
        ("reference.mode", "frozen", "'live'"),
        ("reference.update_every", 0, "greater than 0"),
        ("reference.update_share", 0, "greater than 0"),
        ("reference.update_share", 1.1, "less than or equal to 1"),
        ("run.tracker", "csv", "'wandb'"),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_what_was_given(key: str, value: Any, reason: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validate_recipe(with_key(key, value), where="r.yaml")
    assert caught.value.message.startswith(f"r.yaml: {key}")
    assert reason in caught.value.message
    assert "pydantic" not in str(caught.value)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        validate_recipe({"data": {"train": {}}, "training": {"epochs": 0, "clipp": 1}}, where="r.yaml")
    for part in ("model is required", "data.train.source is required", "training.epochs", "unknown key training.clipp"):
        assert part in caught.value.message


def test_a_long_value_is_not_repeated_in_full() -> None:
    with pytest.raises(RecipeError) as caught:
        validate_recipe(with_key("training.epochs", "x" * 10_000), where="r.yaml")
    assert len(caught.value.message) < 300


def test_an_adapter_to_continue_brings_its_own_shape() -> None:
    with pytest.raises(RecipeError, match=r"model\.adapter brings its own kind.*remove adapter\.alpha, adapter\.rank"):
        validate_recipe(
            MINIMAL | {"model": {"path": "m", "adapter": "a"}, "adapter": {"rank": 4, "alpha": 8}}, where="r"
        )


@pytest.mark.parametrize("kind", ["simpo", "orpo", "sft"])
def test_a_reference_nobody_asks_is_not_to_be_named(kind: str) -> None:
    """It would be loaded for nothing, and its author would believe the policy held to it. How it is kept may stand."""
    named = MINIMAL | {"objective": {"kind": kind}, "reference": {"model": "m", "adapter": "a"}}
    with pytest.raises(RecipeError, match=rf"objective.kind {kind} .* remove reference.model, reference.adapter"):
        validate_recipe(named, where="r")
    with pytest.raises(RecipeError, match=r"remove reference\.update_every"):
        validate_recipe(MINIMAL | {"objective": {"kind": kind}, "reference": {"update_every": 5}}, where="r")
    validate_recipe(named | {"objective": {"kind": "mixture"}}, where="r")
    validate_recipe(named | {"reference": {"mode": "live"}}, where="r")


def test_a_reference_that_moves_is_computed_live() -> None:
    """Without saying so; a recipe written out in full, as the run folder has it, reads back the same."""
    moving = validate_recipe(with_key("reference.update_every", 5), where="r")
    assert moving.reference.mode == "live"
    assert validate_recipe(moving.to_plain(), where="r") == moving
    assert validate_recipe(with_key("reference.update_every", None), where="r").reference.mode == "cached"


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"update_every": 5, "mode": "cached"}, "grow stale: use mode: live"),
        ({"update_every": 5, "model": "other/model"}, r"remove reference\.model"),
        ({"update_share": 0.6}, "update_share needs update_every"),
    ],
)
def test_a_reference_cannot_move_and_stay(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=f"reference: .*{reason}"):
        validate_recipe(MINIMAL | {"reference": section}, where="r")


def test_held_out_pairs_come_from_a_share_or_from_a_source() -> None:
    for held_out in ({"fraction": 0.2, "source": "x"}, {"split": "test"}):
        with pytest.raises(RecipeError, match=r"data\.held_out"):
            validate_recipe(with_key("data.held_out", held_out), where="r")
    both = with_key("data.held_out", {"source": "x", "split": "test", "rows": 5})
    assert validate_recipe(both, where="r").data.held_out.as_source() is not None


def with_key(key: str, value: Any) -> dict[str, Any]:
    """The minimal recipe with one key more, or another value."""
    raw: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": {"source": "s"}}}
    *sections, name = key.split(".")
    inner = raw
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return raw


# What YAML may hold


@pytest.mark.parametrize(
    ("text", "number"), [("5e-5", 5e-5), ("1e-3", 1e-3), ("5.0e-5", 5e-5), ("2", 2.0), ("1E3", 1e3)]
)
def test_a_learning_rate_may_be_written_as_people_write_it(text: str, number: float, tmp_path: Path) -> None:
    """YAML 1.1 takes 5e-5 for a text."""
    assert minimal(tmp_path, f"training.learning_rate={text}").recipe.training.learning_rate == number
    written = recipe(
        f"{{model: {{path: m}}, data: {{train: {{source: s}}}}, training: {{learning_rate: {text}}}}}", tmp_path
    )
    assert written.recipe.training.learning_rate == number


@pytest.mark.parametrize("text", ["2024-01-31", "2024-13-45", "'5e-5'", "1e", "e5", "nan"])
def test_what_looks_like_a_date_or_is_quoted_stays_text(text: str, tmp_path: Path) -> None:
    assert minimal(tmp_path, f"run.folder={text}").run_folder == Path(text.strip("'"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a recipe"),
        (b"- a\n- b\n", "is not a recipe"),
        (b"just a text", "is not a recipe"),
        (b"model: [", "not valid YAML"),
        (b"model: {path: a}\nmodel: {path: b}\n", "the key model occurs twice"),
        (b"model: &m {path: a}\ndata: *m\n", "aliases"),
        (b"a: &a [x,x]\nb: &b [*a,*a,*a]\nc: [*b,*b,*b,*b]\n", "aliases"),
        (b"model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        (b"model: {path: !local x}\n", "not valid YAML"),
        (b"? [a, b]\n: c\n", "not valid YAML"),
        (b"[" * 1500, "not valid YAML"),
        (b"n: " + b"9" * 5000, "not valid YAML"),
        (b"\xff\xfe\x00m", "not UTF-8"),
        (b"model: \x00", "not valid YAML"),
        (b"#" * 200_001, "over 200,000 bytes"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_for_its_reason(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_a_recipe_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="is a device"):
        load_recipe("/dev/zero")


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbfmodel: {path: m}\ndata: {train: {source: s}}\n")
    assert load_recipe(file).recipe.model.path == "m"


@pytest.mark.parametrize("section", ["objective", "training", "reference", "run", "data.held_out", "model"])
def test_a_section_that_is_null_is_refused_and_never_its_defaults(section: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe("{model: {path: m}, data: {train: {source: s}}}", tmp_path, f"{section}=null")
    assert f"a section with keys is expected: {section}" in caught.value.message
    assert "leave the section out" in (caught.value.hint or "")


def test_a_whole_model_has_one_reference_its_start_and_cached(tmp_path: Path) -> None:
    """`adapter: null` trains the whole model."""
    plain = "{model: {path: m}, data: {train: {source: s}}, adapter: null}"
    assert recipe(plain, tmp_path).recipe.adapter is None
    for key in ("reference.mode=live", "reference.update_every=4", "reference.adapter=a", "model.adapter=a"):
        with pytest.raises(RecipeError, match=f"trains the whole model.*remove {key.partition('=')[0]}"):
            recipe(plain, tmp_path, key)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "b"}'),
        ("pairs.csv", "prompt,chosen,rejected"),
        ("pairs.parquet", "PAR1"),
        ("pairs.json", '[{"prompt": "q", "chosen": "a", "rejected": "b"}]'),
    ],
)
def test_data_given_as_a_recipe_is_told_so(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match="is data, not a recipe") as caught:
        load_recipe(tmp_path / name)
    assert name in (caught.value.hint or "") and "dpo data check" in (caught.value.hint or "")


# --set


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("training.epochs=2", ["training", "epochs"], 2),
        ("training.epochs=0.5", ["training", "epochs"], 0.5),
        ("training.clip=null", ["training", "clip"], None),
        ("training.clip=", ["training", "clip"], None),
        ("adapter.targets=[q_proj, v_proj]", ["adapter", "targets"], ["q_proj", "v_proj"]),
        ("training.betas=[9e-1, 0.99]", ["training", "betas"], [0.9, 0.99]),
        ("data.train={source: a, rows: 5}", ["data", "train"], {"source": "a", "rows": 5}),
        ("run.folder=a=b", ["run", "folder"], "a=b"),
        ("data.train.source=x:train", ["data", "train", "source"], "x:train"),
        (" run . folder = x ", ["run", "folder"], "x"),
    ],
)
def test_an_override_is_a_dotted_key_and_a_yaml_value(text: str, keys: list[str], value: Any) -> None:
    assert parse_override(text) == (keys, value)


@pytest.mark.parametrize(
    "text", ["", "=", "=1", "training", "a..b=1", ".a=1", "a.=1", "a=[1", "a={", "a=!!python/none x"]
)
def test_an_override_of_another_form_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError):
        parse_override(text)


def test_overrides_reach_into_sections_and_are_kept_as_typed(tmp_path: Path) -> None:
    loaded = minimal(tmp_path, "training.epochs=2", "training.epochs=3", "data.train.map.prompt=question")
    assert loaded.recipe.training.epochs == 3
    assert loaded.recipe.data.sources[0].map == {"prompt": "question"}
    assert loaded.typed["training"] == {"epochs": 3}


def test_an_override_inside_a_value_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="path is not a section"):
        minimal(tmp_path, "model.path.x=1")


def test_a_section_can_be_taken_back_on_the_command_line(tmp_path: Path) -> None:
    """The way from a recipe with an adapter section to `model.adapter`, without an editor."""
    text = "{model: {path: m}, data: {train: {source: s}}, adapter: {rank: 4}}"
    loaded = recipe(text, tmp_path, "adapter={}", "model.adapter=a")
    assert loaded.recipe.adapter == AdapterSection()


# Paths


def test_paths_in_a_file_are_relative_to_it_and_those_on_the_command_line_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "model").mkdir(parents=True)
    monkeypatch.chdir(here)
    text = "{model: {path: model, adapter: a}, data: {train: {source: pairs.jsonl}}, run: {folder: out}}"
    written = recipe(text, there)
    assert written.recipe.model.path == str(there / "model")
    assert written.recipe.model.adapter == str(there / "a")  # nothing but a folder can be meant
    named = str(there / "pairs.jsonl")  # though it is not there: the error names it
    assert written.recipe.data.sources[0].source == named
    assert written.run_folder == Path("out")
    typed = recipe(text, there, "model.path=model", "data.train.source=pairs.jsonl", "model.chat_template=t.jinja")
    assert typed.recipe.model.path == str(here / "model")
    assert typed.recipe.data.sources[0].source == str(here / "pairs.jsonl")
    assert typed.recipe.model.chat_template == str(here / "t.jinja")
    assert typed.typed["model"] == {"path": "model", "adapter": "a", "chat_template": "t.jinja"}


def test_hub_ids_and_bundled_names_are_no_paths(tmp_path: Path) -> None:
    for name in ("HuggingFaceH4/ultrafeedback_binarized:train_prefs", "bundled:everyday:train", "gpt2"):
        loaded = minimal(tmp_path, f"data.train.source={name}", f"model.path={name}")
        assert (loaded.recipe.data.sources[0].source, loaded.recipe.model.path) == (name, name)


def test_a_split_behind_a_folder_does_not_hide_that_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    loaded = recipe(
        "{model: {path: m}, data: {train: {source: 'folder:test'}, held_out: {source: 'p.csv:x'}}}", tmp_path
    )
    assert loaded.recipe.data.sources[0].source == f"{tmp_path}/folder:test"
    assert loaded.recipe.data.held_out.source == f"{tmp_path}/p.csv:x"


@pytest.mark.parametrize("name", ["~", "~nosuchuser/x", "a\0b", "x" * 300])
def test_a_strange_path_is_no_traceback(name: str, tmp_path: Path) -> None:
    raw = with_key("model.path", name)
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(raw))
    assert load_recipe(file).recipe.model.path
    assert user_path("~nosuchuser/x") == Path("~nosuchuser/x")


def test_a_run_is_named_after_its_recipe_and_the_cache_after_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert minimal(tmp_path).run_folder == Path("runs/r")
    monkeypatch.setenv("DPO_STUDIO_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("DPO_STUDIO_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "dpo-studio"


# There and back

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
positive = st.floats(1e-12, 1e6, exclude_min=True)
parts = st.fixed_dictionaries(
    {"kind": st.sampled_from([kind.kind for kind in OBJECTIVES if kind not in (SFT, Mixture)]), "beta": positive}
)


recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"path": names}, optional={"revision": names, "adapter": names}),
        "data": st.fixed_dictionaries(
            {
                "train": st.fixed_dictionaries(
                    {"source": names}, optional={"rows": st.integers(1, 10**9), "split": names}
                )
            },
            optional={"held_out": st.one_of(st.fixed_dictionaries({"source": names}), st.just({"fraction": 0.0}))},
        ),
        "objective": st.one_of(
            parts,
            st.fixed_dictionaries({"kind": st.sampled_from([kind.kind for kind in OBJECTIVES])}),
            st.lists(st.tuples(parts, positive), min_size=1, max_size=3).map(mixed),
        ),
        "training": st.fixed_dictionaries(
            {},
            optional={"learning_rate": positive, "eps": positive, "clip": st.none() | positive, "max_steps": st.none()},
        ),
        "run": st.fixed_dictionaries({}, optional={"folder": names}),
    }
)


@given(recipes)
def test_a_resolved_recipe_reads_back_as_itself(raw: dict[str, Any]) -> None:
    """What a run writes down is what it was: to_plain, YAML, and back."""
    first = validate_recipe(raw, where="made up")
    text = yaml.safe_dump(first.to_plain(), allow_unicode=True)
    assert validate_recipe(yaml.safe_load(text), where="read back") == first


def test_every_objective_has_a_tag_of_its_own() -> None:
    """The recipe's `kind` finds the class."""
    tags = [get_args(field.type) for kind in OBJECTIVES for field in dataclasses.fields(kind) if field.name == "kind"]
    kinds = [kind.kind for kind in OBJECTIVES]
    assert len(set(kinds)) == len(tags) == len(OBJECTIVES)
    for kind in OBJECTIVES:
        assert type(validate_recipe(MINIMAL | {"objective": {"kind": kind.kind}}, where="r").objective) is kind


def test_what_a_template_is_handed_keeps_its_kind(tmp_path: Path) -> None:
    """A boolean is a value of a template, where it is no value of any other key."""
    given = {"enable_thinking": False, "effort": "low", "budget": 3}
    loaded = load_recipe({"model": {"path": "m", "template": given}, "data": {"train": {"source": "p.jsonl"}}})
    assert loaded.recipe.model.template == given
    assert loaded.recipe.model.template["enable_thinking"] is False
    assert load_recipe(loaded.recipe).recipe.model.template == given
    with pytest.raises(RecipeError, match=r"model\.template"):
        load_recipe({"model": {"path": "m", "template": {"a b": 1}}, "data": {"train": {"source": "p.jsonl"}}})
