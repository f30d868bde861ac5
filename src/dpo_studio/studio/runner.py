"""The process around a job: it runs one `dpo` command, and writes down how that ended, whether a studio lives or not.

`python -m dpo_studio.studio.runner FOLDER ID WORD...`; it leads the job's process group. ID.pid is made first, and only
if it is not there: a job that is asked for twice runs once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from dpo_studio.disk import write_atomically
from dpo_studio.studio.processes import start_of


def main() -> int:
    folder, name, *words = sys.argv[1:]
    mark = Path(folder) / f"{name}.pid"
    with mark.open("x", encoding="ascii") as file:
        file.write(f"{os.getpid()} {start_of(os.getpid())}")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the whole group gets it; the command ends, and we say how
    command = [sys.executable, "-m", "dpo_studio", *words]
    code = subprocess.run(command, check=False).returncode  # noqa: S603 - the words that `Jobs` was given
    write_atomically(mark.with_suffix(".exit"), str(code if code >= 0 else 128 - code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
