"""A model's folder is looked at once, and what is loaded is what was looked at."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from safetensors.torch import load_file, save_file

from dpo_studio.config import ModelSection
from dpo_studio.errors import ModelError
from dpo_studio.models.folder import ModelFolder, open_model
from dpo_studio.models.load import load_chat_model
from dpo_studio.scan import scan_folder
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo, write_recipe
from tests.tiny_tokenizers import CHATML

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each weight file's header is read, by whichever library: what `safe_open` and `load_file` do."""
    counted: Counter[Path] = Counter()
    real = safetensors.safe_open

    def counting(file: Any, *args: Any, **named: Any) -> Any:
        counted[Path(file)] += 1
        return real(file, *args, **named)

    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("safe_open") is real:
            monkeypatch.setattr(module, "safe_open", counting)
    return counted


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each model's folder is looked over."""
    counted: Counter[Path] = Counter()

    def counting(place: Path, name: str) -> None:
        counted[place] += 1
        scan_folder(place, name)

    monkeypatch.setattr("dpo_studio.models.folder.scan_folder", counting)
    return counted


def test_a_dry_run_reads_each_header_once(base: Path, opened: Counter[Path], scanned: Counter[Path]) -> None:
    said = dpo("train", write_recipe(base.parent / "r.yaml", base), "--dry-run")
    assert said.code == 0, said.err
    assert opened == {base / WEIGHTS: 1} and scanned == {base: 1}


def test_a_training_reads_each_header_once_and_transformers_once_more(
    base: Path, opened: Counter[Path], scanned: Counter[Path]
) -> None:
    """Two models: the reference is another, which is loaded when the base has been for a while."""
    other = tiny_folder(base.parent / "other", seed=1)
    said = dpo("train", write_recipe(base.parent / "r.yaml", base, reference={"model": str(other)}))
    assert said.code == 0, said.err
    assert {file: opened[file] for file in (base / WEIGHTS, other / WEIGHTS)} == {
        base / WEIGHTS: 2,
        other / WEIGHTS: 2,
    }
    assert scanned == {base: 1, other: 1}


@pytest.mark.parametrize("verb", [("score", "RUN", "PAIRS"), ("generate", "RUN", "--prompt", "a"), ("export", "RUN")])
def test_other_verbs_look_a_folder_over_once(
    verb: tuple[str, ...], base: Path, tmp_path: Path, scanned: Counter[Path]
) -> None:
    assert dpo("train", write_recipe(tmp_path / "r.yaml", base)).code == 0
    scanned.clear()
    names = {"RUN": tmp_path / "run", "PAIRS": tmp_path / "pairs.jsonl"}
    more = (tmp_path / "out", "--to", "merged", "--force") if verb[0] == "export" else ()
    said = dpo(*(names.get(word, word) for word in verb), *more)
    assert said.code == 0, said.err
    assert scanned.pop(base) == 1
    assert len(scanned) == (verb[0] == "export")  # what was exported, when it is loaded as anyone would


def test_what_is_read_is_kept(base: Path) -> None:
    """Files may go afterwards: nothing reads them a second time."""
    section = ModelSection(path=str(base))
    folder = open_model(section.path)
    day = datetime.date(2026, 1, 1)
    encoder = folder.look_over(section, today=day)
    seen = (folder.config, folder.shapes, folder.fingerprint)
    shutil.rmtree(base)
    assert (folder.config, folder.shapes, folder.fingerprint) == seen
    assert folder.encoder(section, today=day) is encoder


def test_each_template_and_date_has_its_encoder(base: Path) -> None:
    section = ModelSection(path=str(base))
    folder = open_model(section.path)
    template = base.parent / "t.jinja"
    template.write_text(CHATML)
    other = section.model_copy(update={"chat_template": str(template)})
    first, second = (datetime.date(2026, 1, day) for day in (1, 2))
    made = [folder.encoder(s, today=day) for s in (section, other) for day in (first, second)]
    assert len(set(map(id, made))) == 4


def _other_numbers(folder: Path, file: str = WEIGHTS) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def _same_time_and_size(folder: Path) -> None:
    """Another file moved into its place, as rsync does it."""
    before = (folder / WEIGHTS).stat()
    _other_numbers(folder, "new")
    (folder / "new").replace(folder / WEIGHTS)
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (folder / WEIGHTS).stat().st_size == before.st_size


def _other_base(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"rope_theta": 20000.0}))


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (_other_numbers, WEIGHTS),
        (_same_time_and_size, WEIGHTS),
        (_other_base, "config.json"),
        (lambda folder: (folder / "more.safetensors").write_bytes(b""), "more.safetensors"),
        (lambda folder: (folder / "generation_config.json").unlink(), "generation_config.json"),
    ],
)
def test_what_changes_between_the_look_and_the_load_is_refused(
    change: Callable[[Path], object], file: str, base: Path
) -> None:
    section = ModelSection(path=str(base), dtype="float32")
    folder = open_model(section.path)
    folder.look_over(section)
    change(base)
    with pytest.raises(ModelError, match=f"{file} has changed since the folder was checked"):
        load_chat_model(section, folder=folder)


def test_an_adapter_that_is_put_beside_the_weights_is_refused_as_always(base: Path) -> None:
    section = ModelSection(path=str(base), dtype="float32")
    folder = open_model(section.path)
    folder.look_over(section)
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is a model and an adapter in one folder"):
        load_chat_model(section, folder=folder)


def test_what_is_not_loaded_from_may_change(base: Path) -> None:
    """A log, results or a run in the folder, and a second name for the weights."""
    section = ModelSection(path=str(base), dtype="float32")
    folder = open_model(section.path)
    (base / "train.log").write_text("step 1\n")
    (base / "results.json").write_text("{}")
    (base / "runs").mkdir()
    (base.parent / "kept").hardlink_to(base / WEIGHTS)
    loaded = load_chat_model(section, folder=folder)
    assert loaded.files is folder and loaded.folder == base


def test_a_folder_with_a_tokenizer_alone_has_an_encoder_and_is_no_base(base: Path) -> None:
    (base / WEIGHTS).unlink()
    folder: ModelFolder = open_model(str(base))
    assert folder.encoder(ModelSection(path=str(base))).vocabulary()
    with pytest.raises(ModelError, match=r"has no \.safetensors weights"):
        folder.check_files()


def test_damaged_weights_are_told_when_they_are_asked_for(base: Path) -> None:
    (base / WEIGHTS).write_bytes(b"damaged")
    folder = open_model(str(base))
    assert folder.shapes_if_whole() is None
    with pytest.raises(ModelError, match=rf"cannot be loaded: {WEIGHTS} is damaged"):
        _ = folder.shapes


def test_how_weights_are_kept_is_a_question_of_quantised_bases_alone(base: Path) -> None:
    """Asked of another base it is refused; of a quantised one, whatever else is wrong with it, it is not."""
    section = ModelSection(path=str(base), residency="bf16")
    with pytest.raises(ModelError, match="is for quantised bases"):
        open_model(str(base)).check_base(section)
    config = json.loads((base / "config.json").read_text())
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}}
    (base / "config.json").write_text(json.dumps(config | gptq))
    open_model(str(base)).check_base(section)
