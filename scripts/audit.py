"""`pip-audit` for `make check`: known holes in what is installed fail it, an index that cannot be reached is said.

A mirror or a sealed network knows packages and no advisories: then nothing was audited, and that is no pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def main() -> int:
    """1 where something installed has a known hole."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    try:
        done = subprocess.run([*command, "--skip-editable"], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        print("pip-audit: NOT AUDITED: the advisories' index did not answer in five minutes")
        return 0
    found = _report(done.stdout)
    if found is None:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200]
        print(f"pip-audit: NOT AUDITED: the advisories' index cannot be reached ({reason})")
        return 0
    return _judge(found)


def _report(text: str) -> list[dict[str, Any]] | None:
    try:
        return list(json.loads(text)["dependencies"])
    except (ValueError, KeyError):
        return None


def _judge(dependencies: list[dict[str, Any]]) -> int:
    audited = [one for one in dependencies if "skip_reason" not in one]
    holes = [(one["name"], one["version"], hole) for one in audited for hole in one["vulns"]]
    for name, version, hole in holes:
        fixed = ", ".join(hole.get("fix_versions", [])) or "none yet"
        print(f"pip-audit: {name} {version}: {hole['id']} (fixed in: {fixed})")
    if not audited:
        print(f"pip-audit: NOT AUDITED: the index knows none of {len(dependencies)} packages' advisories")
    else:
        unknown = len(dependencies) - len(audited)
        print(f"pip-audit: {len(audited)} packages audited, {len(holes)} known holes, {unknown} not known to the index")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main())
