"""`dpo export --to gguf`: the merged model as a file for llama.cpp and Ollama, and what llama.cpp makes of it."""

from __future__ import annotations

import datetime
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_studio.config import ModelSection, Recipe
from dpo_studio.console.progress import Progress
from dpo_studio.errors import ModelError, install_hint
from dpo_studio.export.gguf_file import GgufType, gguf_family, write_gguf
from dpo_studio.export.llama_cpp import LlamaCpp
from dpo_studio.export.modelfile import Chat, modelfile
from dpo_studio.export.parity import Parity, PromptParity
from dpo_studio.learning.batched_logps import batched_logps
from dpo_studio.models.folder import open_model
from dpo_studio.models.load import ChatModel, load_chat_model
from dpo_studio.preferences.pair import Message
from dpo_studio.sampling.completion import Completion
from dpo_studio.tokens.chat import ChatEncoder, PairError
from dpo_studio.tokens.encode import EncodedPair
from dpo_studio.workflows.exporting.comparing import RunModel
from dpo_studio.workflows.exporting.quantizing import free_memory
from dpo_studio.workflows.loading import LoadedModel
from dpo_studio.workflows.talking import Sampling, answers

__all__ = ["GgufKind", "check_gguf", "write_gguf_export"]

GgufKind = Literal["f16", "bf16", "q8_0", "q4_k_m"]
FILE = "model.gguf"
_GREEDY = 32
"""Tokens of the answers that are compared."""
_QUANTISER = "llama-quantize"


@dataclass(frozen=True)
class GgufExport:
    """What was made of it."""

    content: dict[str, Any]
    """For export.json."""
    misses: list[str]


def check_gguf(section: ModelSection, type_: GgufKind) -> None:
    """Check before long work that the model can be written.

    Raises:
        ModelError: llama.cpp would compute another model; or k-quants are asked for and `llama-quantize` is missing.
    """
    gguf_family(open_model(section.path, section.revision).config.get_text_config())
    if type_ == "q4_k_m" and shutil.which(_QUANTISER) is None:
        raise ModelError(
            f"--type q4_k_m needs {_QUANTISER} of llama.cpp, which is not on PATH",
            hint="https://github.com/ggml-org/llama.cpp builds it; or --type q8_0, which needs nothing",
        )


def write_gguf_export(
    known: RunModel,
    recipe: Recipe,
    merged: Path,
    result: Path,
    type_: GgufKind,
    progress: Progress,
    today: datetime.date | None,
) -> GgufExport:
    """Write `merged` as `result`/model.gguf with a Modelfile, and compare llama.cpp's numbers with the run's.

    Raises:
        ModelError: llama.cpp would compute another model, or cannot load the file.
    """
    folder = open_model(str(merged))
    encoder = folder.look_over(ModelSection(path=str(merged)), today=today)
    end = int(known.pairs[0].chosen.ids[-1])
    written: GgufType = "f16" if type_ == "q4_k_m" else type_
    with progress.task(f"write {FILE}", len(folder.shapes), "tensors") as advance:
        write_gguf(
            merged,
            result / FILE,
            config=folder.config.get_text_config(),
            tokenizer=encoder.tokenizer,
            template=encoder.template,
            end_of_turn=end,
            name=result.parent.name,
            type_=written,
            progress=advance,
        )
    if type_ == "q4_k_m":
        _quantise(result / FILE, type_)
    text, has_template = _modelfile(encoder, end)
    (result / "Modelfile").write_text(text, encoding="utf-8")
    content: dict[str, Any] = {"type": type_, "modelfile_has_template": has_template, "parity": "not verified"}
    if not LlamaCpp.installed():
        progress.warn(f"llama.cpp: not verified, because xllamacpp is not installed: {install_hint('gguf-check')}")
        return GgufExport(content, [])
    parity = _parity(known, recipe, merged, result / FILE, type_, progress, today)
    for line in parity.lines():
        progress.say(line)
    return GgufExport(content | {"parity": parity.content()}, parity.misses())


def _quantise(file: Path, type_: str) -> None:
    """Let llama.cpp's own program make a k-quant of the f16 file."""
    program = shutil.which(_QUANTISER)
    assert program is not None
    small = file.with_suffix(".small")
    done = subprocess.run(  # noqa: S603 - a fixed argument list
        [program, str(file), str(small), type_.upper()], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not small.is_file():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(f"{_QUANTISER} failed: {reason}")
    small.replace(file)


def _modelfile(encoder: ChatEncoder, end: int) -> tuple[str, bool]:
    def render(chat: Chat) -> str:
        try:
            return encoder.prompt_text([Message(role, text) for role, text in chat])
        except PairError as error:
            raise ValueError(error.message) from None

    bos = encoder.tokenizer.bos_token
    ends = sorted({end, *encoder.eos_ids})
    stops = [str(text) for text in encoder.tokenizer.convert_ids_to_tokens(ends)]
    return modelfile(FILE, render, stops, bos if isinstance(bos, str) else None)


def _parity(
    known: RunModel,
    recipe: Recipe,
    merged: Path,
    file: Path,
    type_: GgufKind,
    progress: Progress,
    today: datetime.date | None,
) -> Parity:
    """llama.cpp beside the merged model and the base, both in fp32 by transformers."""
    pairs, chats = _asked(known)
    exact = ModelSection(path=str(merged), dtype="float32", attention="sdpa")
    tuned = load_chat_model(exact, today=today)
    run = _chosen_logps(tuned, pairs, "the merged model in fp32", progress)
    expected = _greedy(tuned, chats, progress)
    del tuned
    free_memory()
    plain = recipe.model.model_copy(update={"dtype": "float32", "compute": "auto", "attention": "sdpa"})
    base = load_chat_model(plain, folder=known.base, today=today)
    before = _chosen_logps(base, pairs, "the base in fp32", progress)
    del base
    free_memory()
    longest = max(len(pair.prompt) + len(pair.chosen.ids) for pair in pairs)
    consumer = LlamaCpp(file, context=longest + _GREEDY + 8)
    found = []
    with progress.task("llama.cpp", len(pairs), "prompts") as advance:
        for pair, chat, logp, base_logp, answer in zip(pairs, chats, run, before, expected, strict=True):
            prompt, ids = pair.prompt.tolist(), pair.chosen.ids.tolist()
            mine = sum(consumer.token_logps(prompt, ids))
            greedy = _same(consumer.greedy(prompt, _GREEDY), answer.ids)
            messages = [{"role": turn.role, "content": turn.content} for turn in chat]
            read_as = consumer.reads_chat_as(messages, prompt)
            found.append(PromptParity(len(ids), logp, mine, base_logp, read_as, greedy))
            advance(1)
    stops = consumer.ends_at(pairs[0].prompt.tolist(), int(pairs[0].chosen.ids[-1]))
    return Parity("llama.cpp", type_, found, stops)


def _asked(known: RunModel) -> tuple[list[EncodedPair], list[Sequence[Message]]]:
    """The first pair of each prompt that both models answered, and its chat; the showcase's prompt has no pair."""
    first: dict[str, EncodedPair] = {}
    for pair, key in zip(known.pairs, known.prompts, strict=True):
        first.setdefault(key, pair)
    chats = known.chats[:-1]
    return list(first.values())[: len(chats)], chats


def _chosen_logps(model: ChatModel, pairs: Sequence[EncodedPair], title: str, progress: Progress) -> list[float]:
    with progress.task(title, len(pairs), "pairs") as advance:
        logps = batched_logps(model.model, pairs, progress=advance)
    return [float(logp) for logp in logps.chosen_P]


def _greedy(model: ChatModel, chats: Sequence[Sequence[Message]], progress: Progress) -> list[Completion]:
    loaded = LoadedModel(model, model.model, None, None)
    return answers(loaded, chats, Sampling(0.0, _GREEDY), tuned=True, progress=progress)


def _same(these: Sequence[int], those: Sequence[int]) -> int:
    """How many first ids are the same."""
    count = 0
    for a, b in zip(these, those, strict=False):
        if a != b:
            break
        count += 1
    return count
