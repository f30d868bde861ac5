"""The files in deploy/ parse as what they are for, and start a command that there is. None was run on a cluster."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from dpo_studio.cli.app import app
from tests.test_ranks_together import recipe_in

DEPLOY = Path(__file__).parent.parent / "deploy"
SBATCH = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"),
    *("time", "output", "signal", "requeue"),
}
"""Options of sbatch that are used, each looked up in its manual."""


def load(name: str) -> list[Any]:
    """A YAML file's documents."""
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def check_launch(words: list[str]) -> None:
    """torchrun's own parser takes the launcher's options, and `dpo train` what follows."""
    given = get_args_parser().parse_args(words)
    assert given.module and given.training_script == "dpo_studio"
    assert given.rdzv_backend == "c10d" and given.rdzv_endpoint.endswith(":29500") and given.max_restarts == 0
    command: Any = typer.main.get_command(app)
    verb, *rest = given.training_script_args
    with command.commands[verb].make_context(verb, rest, resilient_parsing=False) as context:
        assert context.params["recipe"]


def launched(script: str) -> list[str]:
    """What follows `torch.distributed.run` in a shell script."""
    joined = script.replace("\\\n", " ")
    (line,) = [line for line in joined.splitlines() if "-m torch.distributed.run" in line]
    return shlex.split(line.partition("torch.distributed.run")[2])


def test_slurm() -> None:
    text = (DEPLOY / "slurm.sbatch").read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", DEPLOY / "slurm.sbatch"], check=True)
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert len(lines) > 5
    for line in lines:
        match = re.fullmatch(r"#SBATCH --([\w-]+)(=\S+)?", line)
        assert match is not None and match[1] in SBATCH, line
    first = next(number for number, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert all(number < first for number, line in enumerate(text.splitlines()) if line.startswith("#SBATCH"))
    check_launch(launched(text))


def test_skypilot() -> None:
    (task,) = load("skypilot.yaml")
    keys = {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert set(task) <= keys and task["num_nodes"] > 1
    assert re.fullmatch(r"\w+:\d+", task["resources"]["accelerators"])
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    check_launch(launched(task["run"]))


def test_kubernetes() -> None:
    service, job = load("kubernetes.yaml")
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert service["spec"]["clusterIP"] == "None"  # headless: each pod has a name of its own
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert container["command"] == ["python", "-m", "torch.distributed.run"]
    check_launch(container["args"])
    given = get_args_parser().parse_args(container["args"])
    assert int(given.nnodes) == spec["completions"]
    assert int(given.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert given.rdzv_endpoint == f"{job['metadata']['name']}-0.{pod['subdomain']}:29500"


@pytest.mark.parametrize("name", ["slurm.sbatch", "skypilot.yaml", "kubernetes.yaml"])
def test_each_says_that_it_was_not_run(name: str) -> None:
    assert "Parsed, not run" in "\n".join((DEPLOY / name).read_text(encoding="utf-8").splitlines()[:3])


def test_the_tables_in_the_docs_are_what_the_script_computes() -> None:
    root = DEPLOY.parent
    said = subprocess.run(
        [sys.executable, root / "scripts" / "scale_table.py"], check=True, capture_output=True, text=True
    )
    assert f"<!-- scale_table.py -->\n{said.stdout}<!-- end -->" in (root / "docs" / "scale.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_two_launchers_that_meet_train_one_run(tiny_base: Path, tmp_path: Path) -> None:
    """Two "machines" on loopback, a process each."""
    recipe = recipe_in(tmp_path / "run", tiny_base)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    more = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=x"]
    command = [sys.executable, "-m", "torch.distributed.run", *more, "-m", "dpo_studio", "train", str(recipe)]
    machines = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [machine.communicate(timeout=240)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert json.loads((recipe.parent / "run" / "status.json").read_text())["exit_code"] == 0
    timing = (recipe.parent / "run" / "timing.jsonl").read_text().splitlines()
    assert json.loads(timing[0])["ranks"] == 2
