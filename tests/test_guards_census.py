# ruff: noqa: E501 - lists of names
"""What the source may not contain, looked for in its syntax tree, and what the libraries may not be asked to do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.source_names import name_of

ROOT = Path(__file__).parent.parent
SOURCE = sorted((ROOT / "src").rglob("*.py"))
ALL = sorted(file for folder in ("src", "scripts", "benchmarks") for file in (ROOT / folder).rglob("*.py"))

MODULES = frozenset(
    {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "pty"}
)
"""Modules whose loaders run what they read."""
CALLS = frozenset(
    (
        *("eval", "exec", "compile", "__import__", "breakpoint", "torch.load", "torch.save", "torch.jit.load"),
        *("torch.hub.load", "torch.package.PackageImporter", "torch.serialization.load", "np.load", "numpy.load"),
        *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.safe_load", "yaml.safe_load_all"),
        *("os.system", "os.popen", "os.execv", "os.execvp", "os.spawnl", "commands.getoutput", "pty.spawn"),
        *("subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp", "xml.etree.ElementTree.parse"),
        *("urllib.request.urlopen", "requests.get", "httpx.get", "runpy.run_path", "importlib.reload"),
    )
)
"""Calls that run what they read, hand text to a shell, or fetch what a URL names; YAML is read by `config.parse_yaml`."""
KEYWORDS = {
    "shell": True,
    "trust_remote_code": True,
    "weights_only": False,
    "allow_pickle": True,
    "use_safetensors": False,
}
IMPORTERS = frozenset({"src/dpo_studio/__init__.py", "src/dpo_studio/preferences/files.py"})
"""They import by name: our own modules and pyarrow's, by names that are written in the file."""


def findings(text: str, file: str = "x.py") -> Iterator[str]:
    """What a source text contains that it may not, each with its line."""
    for node in ast.walk(ast.parse(text)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            whole = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                if module.partition(".")[0] in MODULES:
                    yield f"{file}:{line} imports {module}"
            for name in whole:
                if name in CALLS:
                    yield f"{file}:{line} imports {name}"
        elif isinstance(node, ast.Call):
            called = name_of(node.func)
            if called in CALLS or called.removeprefix("builtins.") in CALLS:
                yield f"{file}:{line} calls {called}"
            if called.endswith("import_module") and not file.startswith("benchmarks/") and file not in IMPORTERS:
                yield f"{file}:{line} calls {called}"
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else keyword.value
                if keyword.arg in KEYWORDS and (
                    value is KEYWORDS[keyword.arg] or not isinstance(keyword.value, ast.Constant)
                ):
                    yield f"{file}:{line} passes {keyword.arg}"
            if called.endswith(".from_pretrained") and any(k.arg == "code_revision" for k in node.keywords):
                yield f"{file}:{line} passes code_revision"


@pytest.mark.parametrize("file", ALL, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_in_the_source_unpickles_evaluates_or_asks_a_shell(file: Path) -> None:
    assert list(findings(file.read_text(), str(file.relative_to(ROOT)))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import a, dill as d",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import yaml\nyaml.load(x, yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "import yaml\nyaml.safe_load(x)",
        "eval('1')",
        "builtins.exec(x)",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=flag)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=trust)",
        "f(weights_only=False)",
        "numpy.load(x)",
        "importlib.import_module(name)",
        "os.system(x)",
        "AutoModel.from_pretrained(x, code_revision='y')",
    ],
)
def test_the_census_would_find_it(text: str) -> None:
    assert list(findings(text))


def test_the_census_lets_honest_code_be() -> None:
    text = "import json\nmodel.eval()\nf(shell=False, trust_remote_code=False)\nre.compile('x')\nyaml.safe_dump(x)\nload(x)"
    assert list(findings(text)) == []


LOADERS = {
    "AutoConfig.from_pretrained": 3,
    "AutoTokenizer.from_pretrained": 2,
    "AutoModelForCausalLM.from_pretrained": 1,
    "AutoModelForCausalLM.from_config": 3,
    ".from_config": 1,
    "kind.from_pretrained": 1,
    "kind.from_config": 1,
    "PeftModel.from_pretrained": 2,  # a scanned adapter; and, to prove it, one that was written a moment before
    "GPTQModel.from_pretrained": 1,
}
"""Where a library opens a folder. A new place must be thought of: is the folder scanned (`open_model`, `read_adapter_config`)?"""


def test_every_place_where_a_library_opens_a_folder_is_known() -> None:
    found: dict[str, int] = {}
    for file in SOURCE:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and re.search(r"\.from_(pretrained|config)$", name_of(node.func)):
                found[name_of(node.func)] = found.get(name_of(node.func), 0) + 1
    assert found == LOADERS


def test_weights_are_asked_for_as_safetensors_alone() -> None:
    """Where transformers might choose: elsewhere there is a GGUF with a known checksum, or no weights at all."""
    text = (ROOT / "src/dpo_studio/models/load.py").read_text()
    (call,) = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)
               and name_of(node.func) == "kind.from_pretrained"]  # fmt: skip
    assert any(k.arg == "use_safetensors" and getattr(k.value, "value", None) is True for k in call.keywords)


def test_nothing_is_fetched_from_the_hub_but_data() -> None:
    """The list of what a download may bring: no `.py`, no pickle."""
    from dpo_studio.models.find import HUB_FILES

    assert set(HUB_FILES) == {"*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"}


def test_processes_are_started_with_lists_of_words() -> None:
    """Every `subprocess` call in the source: its command is a list, or a name that a line above sets to one."""
    for file in ALL:
        tree = ast.parse(file.read_text())
        lists = {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.List)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        arguments = {
            argument.arg
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            for argument in node.args.args
            if argument.annotation is not None and "list[str]" in ast.unparse(argument.annotation)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and name_of(node.func).startswith("subprocess.") and node.args:
                command = node.args[0]
                known = isinstance(command, ast.Name) and command.id in lists | arguments
                assert isinstance(command, ast.List) or known, f"{file}:{node.lineno}"


def test_no_dependency_s_unpickler_is_reached_by_a_whole_run() -> None:
    """Train, score and export in a process in which unpickling and remote code raise; the libraries' own imports first.

    The audit hook sees `pickle.find_class`, which every unpickler calls before it can run anything.
    """
    code = """
import sys, tempfile
from pathlib import Path
import torch, transformers, peft, datasets, accelerate
from transformers import dynamic_module_utils
from tests.tiny_models import tiny_folder
from tests.tiny_runs import dpo, write_recipe
place = Path(tempfile.mkdtemp())
base = tiny_folder(place / "model")
recipe = write_recipe(place / "recipe.yaml", base, training={"max_steps": 2, "save_every": 1})
seen = []
def hook(event, arguments):
    if event == "pickle.find_class":
        seen.append(arguments)
sys.addaudithook(hook)
def refused(*args, **kwargs):
    raise SystemExit("an unpickler or remote code was reached")
torch.load = dynamic_module_utils.get_class_from_dynamic_module = refused
codes = [dpo("train", recipe).code, dpo("score", place / "run", place / "pairs.jsonl").code]
codes += [dpo("export", place / "run", place / "out", "--to", "adapter").code]
print(codes, seen)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout.strip().splitlines()[-1:] == ["[0, 0, 0] []"], done.stdout + done.stderr[-2000:]


def test_security_md_names_tests_that_there_are() -> None:
    """Every promise names one, and every guard's test file is named."""
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(test_\w+)\.py::(\w+)`", text)
    assert len(named) > 25
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / f"{file}.py").read_text(), re.M), f"{file}::{test}"
    promises = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| Promise", "| ---"))
    ]
    assert all("::test_" in line for line in promises), promises
    assert {file for file, _ in named} >= {path.stem for path in (ROOT / "tests").glob("test_guards_*.py")}
