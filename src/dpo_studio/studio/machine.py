"""What this machine has: for the page, without a library that takes seconds to load."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter

from dpo_studio import __version__
from dpo_studio.config import cache_folder
from dpo_studio.studio.studio import Here

__all__ = ["router"]

router = APIRouter(prefix="/api")
_PACKAGES = ("torch", "transformers", "peft", "datasets")


@router.get("/machine")
def machine(here: Here) -> dict[str, Any]:
    """Processor, memory, disk, GPUs and versions; sizes in bytes."""
    disk = shutil.disk_usage(here.folder)
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "memory": {"total": page * os.sysconf("SC_PHYS_PAGES"), "free": page * os.sysconf("SC_AVPHYS_PAGES")},
        "disk": {"total": disk.total, "free": disk.free},
        "gpus": _gpus(),
        "versions": {"dpo-studio": __version__} | {name: _version(name) for name in _PACKAGES},
        "cache": str(cache_folder()),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """A line of `nvidia-smi` for each; none where it is not installed or does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603 - a fixed list
    except (OSError, subprocess.TimeoutExpired):
        return []
    return said.stdout.splitlines() if said.returncode == 0 else []
