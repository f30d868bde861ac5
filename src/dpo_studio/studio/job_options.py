"""What a page may ask of `dpo export`, `dpo eval` and `dpo quantize`, and the words of the commands.

Every value is checked here: a judge from a page is one of ours, a reward model, or a server that Settings lists; never
a file with code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dpo_studio.studio.api_errors import Refused
from dpo_studio.studio.downloads import ask_first, say_yes
from dpo_studio.studio.endpoints import SERVER, key_variable_of, listed
from dpo_studio.studio.studio import Studio

__all__ = ["Evaluating", "Exporting", "Quantizing"]

Count = Annotated[int, Field(ge=1, le=100_000)]
_JUDGES = ("everyday", "length", "implicit")


class _Gptq(BaseModel):
    model_config = ConfigDict(extra="forbid")
    bits: Literal[2, 3, 4, 8] | None = None
    group_size: Annotated[str, Field(pattern=r"^(auto|-1|[1-9]\d{0,4})$")] | None = None
    rows: Count | None = None
    """Prompts with chosen answers to calibrate on."""
    desc_act: bool = False

    def gptq_words(self) -> list[str]:
        values = {"--bits": self.bits, "--group-size": self.group_size, "--rows": self.rows}
        return [*_flags(values), *(["--desc-act"] if self.desc_act else [])]


class Exporting(_Gptq):
    """`dpo export RUN OUT --to ...`."""

    run: str
    out: str
    to: Literal["adapter", "merged", "gptq", "gguf"] = "adapter"
    type: Literal["f16", "bf16", "q8_0", "q4_k_m"] | None = None
    """Of a GGUF's matrices."""
    force: bool = False
    """Keep it even if its check fails."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def words(self, here: Studio) -> list[str]:
        """The words after `dpo`."""
        run, out = _there(here, self.run, "run"), _new(here, self.out)
        more = [
            *self.gptq_words(),
            *_flags({"--type": self.type, "--dtype": self.dtype}),
            *(["--force"] if self.force else []),
        ]
        return ["export", run, out, "--to", self.to, *more]


class Quantizing(_Gptq):
    """`dpo quantize MODEL OUT ...`."""

    model: str
    out: str
    calibration: str | None = None
    max_length: Annotated[int, Field(ge=8, le=1_000_000)] | None = None

    def words(self, here: Studio) -> list[str]:
        """The words after `dpo`."""
        model = here.places.named(self.model, "model")
        pairs = None if not self.calibration else here.places.named(self.calibration, "calibration")
        more = _flags({"--calibration": pairs, "--max-length": self.max_length})
        return ["quantize", model, _new(here, self.out), *self.gptq_words(), *more]

    def begun(self, here: Studio) -> None:
        """Whoever starts the command that is shown says yes to what it downloads."""
        say_yes(here, [name for name in (self.model, self.calibration) if name])


class Evaluating(BaseModel):
    """`dpo eval RUN ...`."""

    model_config = ConfigDict(extra="forbid")
    run: str
    judge: str | None = None
    against: str | None = None
    temperatures: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(,\d+(\.\d+)?)*$", max_length=100)] | None = None
    prompts: Count | None = None
    samples: Count | None = None
    max_new_tokens: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    source: str | None = None

    def words(self, here: Studio) -> list[str]:
        """The words after `dpo`."""
        run = _there(here, self.run, "run")
        against = self.against
        if against and against != "reference":
            against = here.places.named(against, "against")
            ask_first(here, against)
        source = here.places.named(self.source, "source") if self.source else None
        if source is not None:
            ask_first(here, source)
        values = {
            "--against": against,
            "--temperatures": self.temperatures,
            "--prompts": self.prompts,
            "--samples": self.samples,
            "--max-new-tokens": self.max_new_tokens,
            "--seed": self.seed,
            "--source": source,
        }
        return ["eval", run, *_judge(here, self.judge), *_flags(values)]


def _judge(here: Studio, judge: str | None) -> list[str]:
    if not judge:
        return []
    kind, _, rest = judge.partition(":")
    if judge in _JUDGES:
        return ["--judge", judge]
    if kind in ("reward", "implicit") and rest:
        model = here.places.named(rest, "judge")
        ask_first(here, model)
        return ["--judge", f"{kind}:{model}"]
    if kind == "llm":
        name = listed(here, f"{SERVER}{rest}", "judge")
        return ["--judge", judge, *_flags({"--judge-key-env": key_variable_of(here, name)})]
    hint = "everyday, length, implicit, reward:MODEL, or llm:MODEL@URL of a server that Settings lists"
    raise Refused(f"{judge[:80]!r} is no judge that a page may name", status=403, field="judge", hint=hint)


def _flags(values: dict[str, Any]) -> list[str]:
    return [word for flag, value in values.items() if value not in (None, "") for word in (flag, str(value))]


def _there(here: Studio, name: str, field: str) -> str:
    return _typed(here, here.places.existing(name, field))


def _new(here: Studio, name: str) -> str:
    if not name.strip():
        raise Refused("where to is not said", field="out")
    return _typed(here, here.places.inside(name, "out"))


def _typed(here: Studio, path: Path) -> str:
    """As one would type it in the studio's folder; never an option."""
    return f"./{path.relative_to(here.folder)}" if path.is_relative_to(here.folder) else str(path)
