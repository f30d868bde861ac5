"""The recipe's sections: what is trained, on what, how.

Every key is documented under its definition (the text becomes the JSON Schema that editors show), every section is
frozen, and an unknown key is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dpo_studio.config.rounds_section import RoundsSection
from dpo_studio.config.section import Section
from dpo_studio.errors import UsageError
from dpo_studio.objectives import DPO, Formula, Objective, check_objective, register

__all__ = [
    "BUNDLED",
    "MINUTES",
    "AdapterSection",
    "DataSection",
    "HeldOutSection",
    "Layout",
    "ModelSection",
    "Recipe",
    "ReferenceSection",
    "SourceLike",
    "SourceSection",
    "TemplateValue",
    "TooLong",
    "TrainingSection",
    "WeightedSource",
    "add_objective",
    "as_source",
    "recipe_schema",
]

BUNDLED = "bundled:"
LabelValue = str | int | float | bool
TemplateValue = bool | int | float | str | None
MINUTES = r"^(\d+(?:\.\d+)?) ?(?:m|min|minutes?)$"
Layout = Literal["packed", "rows", "apart"]
"""How a model reads pairs: in a pack, or one sequence a row, for layers with a state (rows) or any (apart)."""
TooLong = Literal["drop", "cut_prompt_start", "cut_answer_end"]


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
    layout: Literal["auto"] | Layout = "auto"
    """packed: each prompt once for both answers. rows, apart: one sequence a row. auto: the fastest that is right."""
    adapter: str | None = None
    """Continue training this LoRA adapter. It is then also the reference, frozen as it was."""
    chat_template: str | None = None
    """A Jinja file used in place of the tokenizer's own chat template."""
    template: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], TemplateValue] = {}
    """Handed to the chat template with every chat, such as {enable_thinking: false}; one that it reads."""
    quantize: Literal["nf4", "fp8"] | None = None
    """Dense bases: store the linear layers in fewer bits while loading."""
    residency: Literal["packed", "bf16"] = "packed"
    """Quantised bases: keep the weights as they are stored and form them for each product, or form them once."""
    compute: Literal["auto", "bf16", "fp8"] = "auto"
    """The precision of products with frozen weights. auto and bf16: the dtype's. fp8: e4m3, faster and coarser."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """Several GPUs. full: each holds a slice of every frozen layer (FSDP2). auto: only where one cannot hold all."""


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
    pairs: Literal["best-worst", "adjacent", "all"] = "best-worst"
    """Of several ranked answers in a row: the best against the worst, each against the next lower, or every two."""


class SourceSection(ReadingSection):
    """Where pairs come from."""

    source: Annotated[str, Field(min_length=1)]
    """File (.jsonl .json .jsonl.gz .parquet .csv .tsv), folder, `bundled:everyday`, Hub id `name[/config][:split]`."""


class WeightedSource(SourceSection):
    """One of several training sources."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Its share of an epoch's pairs, among the others' weights; every source has one, or none and all its pairs."""


SourceLike = str | Path | SourceSection
"""A source of pairs: its name, or a section with how it is read."""


def as_source(source: SourceLike) -> SourceSection:
    """The source as a section; for a name alone, the format follows from the first rows.

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
            stray = sorted(given & {"split", "revision", "data_dir", "format", "map", "label", "pairs"})
            stray = [name for name in stray if getattr(self, name) != HeldOutSection.model_fields[name].default]
            if stray:
                raise ValueError(f"{', '.join(stray)} describe a held_out source, and none is given")
        return self

    def as_source(self) -> SourceSection | None:
        """The held-out source as a section like `data.train`, if there is one."""
        if self.source is None:
            return None
        return SourceSection(**self.model_dump(exclude={"fraction"}))


def _as_one_source(schema: dict[str, object]) -> None:
    """Forms and editors show the fields of the one source that most recipes have."""
    kinds = schema.pop("oneOf", None)
    if isinstance(kinds, list):
        schema.pop("discriminator", None)
        schema["anyOf"] = kinds[:1]


class DataSection(Section):
    """Preference pairs, and how long they may be."""

    train: Annotated[
        Annotated[SourceSection, Tag("one")]
        | Annotated[list[WeightedSource], Field(min_length=2, max_length=100), Tag("several")],
        Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
        Field(json_schema_extra=_as_one_source),
    ]
    """Pairs to learn from; or a list of sources, each with its weight or all without."""
    held_out: HeldOutSection = HeldOutSection()
    """Pairs to measure on."""
    split_seed: int = 0
    """Seed of the split by prompt and of `rows` samples."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Most tokens a prompt and one of its answers may have together."""
    too_long: TooLong = "drop"
    """Pairs over `max_length` are dropped, or lose their answers' ends (no end of turn is learned) or oldest turns."""

    @model_validator(mode="after")
    def _sources_are_weighed_alike(self) -> DataSection:
        named = [one.source for one in self.sources]
        if len(set(named)) < len(named):
            raise ValueError("train names a source twice")
        if len({one.weight is None for one in self.sources if isinstance(one, WeightedSource)}) > 1:
            raise ValueError("train has sources with a weight and others without")
        return self

    @property
    def sources(self) -> tuple[SourceSection, ...]:
        """The training sources, of which most recipes have one."""
        return tuple(self.train) if isinstance(self.train, list) else (self.train,)


LayerName = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]
"""A layer's full name or the end of one; PEFT takes expressions too, and some of those take for ever to match."""


class AdapterSection(Section):
    """The LoRA adapter (Hu et al. 2021, arXiv 2106.09685)."""

    kind: Literal["lora", "rslora", "dora"] = "lora"
    """lora. rslora: scaled by alpha / sqrt(rank) (arXiv 2312.03732). dora: each output's magnitude is trained apart
    from its direction (arXiv 2402.09353)."""
    rank: Annotated[int, Field(gt=0)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""
    rank_pattern: dict[LayerName, Annotated[int, Field(gt=0)]] = {}
    """Other ranks, by a layer's name or the end of one: {down_proj: 8}. The first that fits a layer counts."""
    alpha_pattern: dict[LayerName, Annotated[float, Field(gt=0)]] = {}
    """Other alphas, by name as in `rank_pattern`."""
    learning_rate_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+ (arXiv 2402.12354): B's learning rate is so many times A's; DoRA's magnitudes take B's. null: the same."""
    modules_to_save: list[LayerName] = []
    """Modules that are trained whole and saved with the adapter: the input embedding, the head, or both."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Which layers: all linear ones but the head, and fused experts; or a list of name endings such as [q_proj]."""


_ABOUT_TRAINING = frozenset({"learning_rate_ratio"})
"""Keys of `adapter` that say how it is trained, not what it is: an adapter that is continued does not bring them."""


class ReferenceSection(Section):
    """What the policy is kept close to: the base with the adapter off, unless another is named."""

    mode: Literal["cached", "live"] = "cached"
    """cached: log-probs are computed once and kept on disk. live: computed in every step."""
    model: str | None = None
    """Another model as the reference: a folder or Hub id with the same tokenizer."""
    adapter: str | None = None
    """Another adapter as the reference, on `reference.model` or on the base."""
    update_every: Annotated[int, Field(gt=0)] | None = None
    """Move the reference towards the policy after every so many steps (TR-DPO, arXiv 2404.09656); needs mode: live."""
    update_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The policy's share in the moving reference after an update; its old weights are the rest. 1: it becomes the
    policy."""

    @model_validator(mode="before")
    @classmethod
    def _what_moves_is_live(cls, raw: object) -> object:
        if isinstance(raw, dict) and raw.get("update_every") is not None and "mode" not in raw:
            return raw | {"mode": "live"}
        return raw

    @model_validator(mode="after")
    def _what_moves_is_an_adapter_on_the_base(self) -> ReferenceSection:
        if self.update_every is None and self.update_share != 1:
            raise ValueError("update_share needs update_every, the number of steps between moves")
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
    sample_every: Annotated[int, Field(gt=0)] | None = None
    """Steps between answers to `run.sample_prompts`; null: with every held-out evaluation. Changes nothing else."""


class RunSection(Section):
    """Where the run is stored, and the tracker that also gets its metrics."""

    folder: str | None = None
    """The run folder, relative to the working directory. Default: runs/<recipe's name>."""
    tracker: Literal["tensorboard", "wandb", "trackio"] | None = None
    """Also send metrics to this tracker, through accelerate."""
    sample_prompts: Annotated[int, Field(gt=0, le=1000)] | str | None = None
    """Prompts that the policy answers during training, into samples.jsonl: so many held-out ones, or a file's."""


class Recipe(Section):
    """Everything a run depends on."""

    model: ModelSection
    """The base model."""
    data: DataSection
    """Preference pairs, and how long they may be."""
    adapter: AdapterSection | None = AdapterSection()
    """The LoRA adapter; null: the whole model is trained."""
    objective: Objective = DPO()
    """What is minimised: its kind and its parameters."""
    reference: ReferenceSection = ReferenceSection()
    """What the policy is kept close to."""
    training: TrainingSection = TrainingSection()
    """How the adapter is fitted."""
    run: RunSection = RunSection()
    """Where the run is stored, and the tracker that also gets its metrics."""
    rounds: RoundsSection | None = None
    """How `dpo rounds` makes the pairs of each round; without it the recipe is of one run on given pairs."""

    @model_validator(mode="after")
    def _an_adapter_brings_its_own_shape(self) -> Recipe:
        if self.adapter is None:
            there = {
                "model.adapter": self.model.adapter is not None,
                "reference.adapter": self.reference.adapter is not None,
                "reference.update_every": self.reference.update_every is not None,
                "reference.mode: live": self.reference.mode == "live",
            }
            if any(there.values()):
                names = ", ".join(name for name, is_there in there.items() if is_there)
                raise ValueError(f"adapter: null trains the whole model, whose reference is cached; remove {names}")
        elif self.model.adapter is not None and (conflicting := self.adapter.model_fields_set - _ABOUT_TRAINING):
            keys = ", ".join(f"adapter.{name}" for name in sorted(conflicting))
            raise ValueError(f"model.adapter brings its own kind, rank, alpha, dropout and targets; remove {keys}")
        return self

    @model_validator(mode="after")
    def _a_reference_that_moves_is_a_product(self) -> Recipe:
        if self.reference.update_every is not None and self.adapter is not None:
            if self.adapter.kind == "dora":
                raise ValueError("a DoRA adapter cannot be mixed into a reference that moves (reference.update_every)")
            if self.adapter.modules_to_save:
                raise ValueError(
                    "modules that are trained whole (adapter.modules_to_save) cannot be mixed into a reference that "
                    "moves (reference.update_every)"
                )
        return self

    @model_validator(mode="after")
    def _answers_need_prompts(self) -> Recipe:
        if self.training.sample_every is not None and self.run.sample_prompts is None:
            raise ValueError("training.sample_every needs run.sample_prompts: a number of held-out prompts, or a file")
        return self

    @model_validator(mode="after")
    def _an_objective_without_a_reference_has_none(self) -> Recipe:
        named = [name for name in ("model", "adapter", "update_every") if getattr(self.reference, name) is not None]
        if named and not self.objective.needs_reference:
            keys = ", ".join(f"reference.{name}" for name in named)
            raise ValueError(f"objective.kind {self.objective.kind} uses no reference; remove {keys}")
        return self

    def to_plain(self) -> dict[str, object]:
        """All settings as plain data, from which the same recipe can be loaded."""
        plain = self.model_dump(mode="json")
        if self.model.adapter is not None:
            plain["adapter"] = {name: plain["adapter"][name] for name in sorted(_ABOUT_TRAINING)}
        if self.data.held_out.source is not None:
            del plain["data"]["held_out"]["fraction"]
        if self.rounds is None:
            del plain["rounds"]
        return plain


def add_objective(formula: type[Formula]) -> None:
    """Register an objective from outside this package, so that recipes can name it: `objective: {kind: my_loss}`, or a
    mixture's term.

    Raises:
        UsageError: it is not a concrete `Formula` or a frozen dataclass, lacks a kind or a default, or its kind is
        taken.
    """
    check_objective(formula)
    register(formula)
    Recipe.model_rebuild(force=True)


def recipe_schema() -> dict[str, object]:
    """The recipe's JSON Schema, for editors and forms."""
    return Recipe.model_json_schema()
