"""A model's folder: found, scanned, and each of its small files and its weights' headers read once.

Everything before the weights asks this one value, and the weights are loaded from it. So what is loaded is what was
looked at: a settings or weight file that changes in between is refused.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from dpo_studio.config import ModelSection
from dpo_studio.errors import ModelError, reason_of
from dpo_studio.frozen.formats import Quantization, read_quantization
from dpo_studio.models.attention import check_architecture
from dpo_studio.models.find import find_folder
from dpo_studio.models.fingerprint import weights_fingerprint
from dpo_studio.models.layouts import choose_layout
from dpo_studio.models.tokenizer_settings import load_encoder
from dpo_studio.models.unsupported import refuse_unfit
from dpo_studio.models.vocabulary import check_vocabulary
from dpo_studio.runs.folder import is_run
from dpo_studio.scan import INDEX, NO_CODE, PICKLES, read_json, scan_folder, weights_of
from dpo_studio.sizes import Shapes, check_numbers, tensor_shapes
from dpo_studio.tokens.chat import ChatEncoder

__all__ = ["ModelFolder", "open_model"]

_LOADED_FROM = ("config.json", "generation_config.json", "quantize_config.json", "adapter_config.json", INDEX)
"""What transformers and our readers of quantised weights open beside the weights; an adapter's config would load the
adapter as well."""
_State = Mapping[str, tuple[int, int, int]]
"""(size, time of the last change, inode) of each file that a model is loaded from."""


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A model's folder on this machine, scanned by `open_model`; what is in it is read when it is first asked for."""

    path: Path
    name: str
    """What messages call it."""
    _state: _State = field(repr=False)
    """Of its settings and weights, before any was read."""
    _encoders: dict[tuple[str | None, str, datetime.date | None], ChatEncoder] = field(default_factory=dict, repr=False)

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """config.json as it is written; empty where there is none."""
        return read_json(self.path / "config.json")

    @cached_property
    def config(self) -> PreTrainedConfig:
        """What transformers makes of config.json, the wrapper's where there is one. Copy it before you change it.

        Raises:
            ModelError: it is of no model that transformers has, or has a value that cannot be.
        """
        kind = self.raw_config.get("model_type")
        if self.raw_config.get("auto_map") and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
            raise ModelError(
                f"{self.name}: config.json asks to run code from the model's folder (auto_map)", hint=NO_CODE
            )
        try:
            return AutoConfig.from_pretrained(self.path)
        except Exception as error:  # it checks the values of most keys, and raises whatever comes
            raise ModelError(f"{self.name}: transformers does not know this model: {reason_of(error)}") from None

    @cached_property
    def weights(self) -> list[Path]:
        """The files that the weights are loaded from; they may be missing."""
        return weights_of(self.path, self.name)

    @cached_property
    def shapes(self) -> Shapes:
        """Of every tensor of the weights, by their headers.

        Raises:
            ModelError: a file is damaged, or not there.
        """
        return tensor_shapes(self.weights, self.name)

    @cached_property
    def quantization(self) -> Quantization | None:
        """How the weights are quantised; None where they are not.

        Raises:
            ModelError: in a way that we do not train through.
        """
        return read_quantization(self.path)

    @cached_property
    def fingerprint(self) -> str:
        """What tells these weights from others."""
        return weights_fingerprint(self.path)

    def encoder(self, section: ModelSection, *, today: datetime.date | None = None) -> ChatEncoder:
        """The tokenizer with its chat template, or the section's; `today` is the date that one may write, None today's.

        Raises:
            ModelError: no tokenizer, no chat template, or one that cannot be used safely.
        """
        key = (section.chat_template, json.dumps(section.template, sort_keys=True), today)
        if key not in self._encoders:
            self._encoders[key] = load_encoder(self.path, section, today=today)
        return self._encoders[key]

    def check_files(self) -> None:
        """See that there is a model in the folder, and weights that are numbers alone.

        Raises:
            ModelError: no config, remote code, or pickle-only weights.
        """
        self._check_config()
        if (self.path / "adapter_config.json").is_file():
            raise ModelError(
                f"{self.name} is a model and an adapter in one folder, and transformers would put the two together "
                "unasked",
                hint="move adapter_config.json and its weights to a folder of their own, and name that as "
                "model.adapter",
            )
        if not list(self.path.glob("*.safetensors")):
            pickles = sorted(path.name for path in self.path.iterdir() if path.suffix in PICKLES)
            if pickles:
                raise ModelError(
                    f"{self.name} has its weights as pickle only ({pickles[0]}), which can run code when loaded",
                    hint="convert it to safetensors with a tool you trust, or use a repository that has them",
                )
            raise ModelError(f"{self.name} has no .safetensors weights in {self.path}")

    def check_base(self, section: ModelSection) -> PreTrainedConfig:
        """See that it is a model that we can train, in the way the section asks; return the config of its text model.

        Raises:
            ModelError: no config, an adapter beside it, pickle-only weights, or a kind of model that we cannot train.
        """
        self.check_files()
        if self.quantization is not None and section.quantize is not None:
            raise ModelError(
                f"model.quantize: {section.quantize} is for dense bases, and {self.name} is quantised already",
                hint="remove model.quantize: it trains as it is",
            )
        if self.quantization is None and section.quantize is None and section.residency != "packed":
            raise ModelError("model.residency is for quantised bases", hint=f"{self.name} is not quantised: remove it")
        if section.compute == "fp8" and section.quantize is not None:
            raise ModelError(
                f"model.quantize: {section.quantize} and model.compute: fp8 are two ways to store the same weights",
                hint="compute: fp8 alone rounds them once, and stores what its products need",
            )
        config = self.config
        try:
            refuse_unfit(config, self.name)
            text: PreTrainedConfig = config.get_text_config()
            check_architecture(text, self.name)
            choose_layout(text, section.layout, self.name)
        except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
            raise ModelError(
                f"{self.name}: config.json has a value of the wrong kind: {reason_of(error)}",
                hint="is it as its author saved it? compare it with the original",
            ) from None
        return text

    def look_over(self, section: ModelSection, *, today: datetime.date | None = None) -> ChatEncoder:
        """Everything that can be seen before weights are loaded; return the base's encoder.

        Raises:
            ModelError: what `check_base` and `encoder` refuse, or the tokenizer makes ids that the embedding lacks.
        """
        config = self.check_base(section)
        encoder = self.encoder(section, today=today)
        check_vocabulary(config, self.shapes_if_whole(), encoder, self.name)
        return encoder

    def shapes_if_whole(self) -> Shapes | None:
        """`shapes`, or None where there are no weights, or not all of them: loading them reports it."""
        with suppress(ModelError):
            return self.shapes or None
        return None

    def check_unchanged(self) -> None:
        """Check that the files are those that were checked, by their sizes, times and inodes.

        Raises:
            ModelError: a settings or weight file was changed, added or taken away since.
        """
        now = _state_of(self.path)
        changed = sorted(file for file in self._state.keys() | now.keys() if self._state.get(file) != now.get(file))
        if changed:
            raise ModelError(
                f"{self.name}: {changed[0]} has changed since the folder was checked",
                hint="start again when nothing writes into the folder any more",
            )

    def _check_config(self) -> None:
        if (self.path / "config.json").is_file():
            return
        hint = None
        if (self.path / "adapter_config.json").is_file():
            hint = "this is an adapter folder: give its base as model.path and this as model.adapter"
        elif is_run(self.path):
            hint = f"this is a run: give its base as model.path and {self.path / 'adapter'} as model.adapter"
        raise ModelError(f"{self.name} has no config.json: not a model folder", hint=hint)


def open_model(path: str, revision: str | None = None, say: Callable[[str], None] = lambda _: None) -> ModelFolder:
    """Find a model (bundled, on disk, or on the Hub, from where it is fetched) and scan its folder.

    Raises:
        ModelError: no such folder, no such repository, no network, what no model folder needs in it, or sizes that its
            weights are too few for.
    """
    place = find_folder(path, revision, say)
    folder = ModelFolder(place, path, _state_of(place))
    scan_folder(place, path)
    check_numbers(folder.raw_config, folder.shapes_if_whole(), path)
    return folder


def _state_of(folder: Path) -> _State:
    """Of the files that a model is loaded from, and no other: other files in the folder may change."""
    state = {}
    for file in folder.iterdir():
        if file.name in _LOADED_FROM or file.suffix == ".safetensors":
            with suppress(OSError):  # a link to nothing: missing, like any other file
                found = file.stat()
                state[file.name] = (found.st_size, found.st_mtime_ns, found.st_ino)
    return state
