"""Who may know whom, read from the imports of every file."""

from __future__ import annotations

import ast
import graphlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clbench import userspace

ROOT = userspace.suite()
ENGINE = sorted((ROOT / "clbench").rglob("*.py"))
PLUGINS = sorted(f for kind in userspace.PLUGINS for f in (ROOT / kind).rglob("*.py"))
EVERY_FILE = pytest.mark.parametrize(
    "file", ENGINE + PLUGINS, ids=lambda f: str(f.relative_to(ROOT))
)
EVERY_PLUGIN = pytest.mark.parametrize("file", PLUGINS, ids=lambda f: str(f.relative_to(ROOT)))

#: What only people and the command line use; a method or a dataset never does.
ROOMS_ABOVE = {
    *("__main__", "account", "checkpoint", "cli", "commands", "conditions", "config", "display"),
    *("leaderboard", "plots", "progress", "protocol", "report", "results", "saving", "scoring"),
    *("statistics", "study", "testing", "tuning"),
    *("agreement", "columns", "figures", "findings", "markdown", "page", "published", "userspace"),
}
#: Names of strategies that are also a word of a setting, or the package that one is made of.
WORDS = {"avalanche", "source"}
#: Not needed to say `--help`; each takes a second to import, or ten.
HEAVY = {"avalanche", "matplotlib", "pandas", "sklearn", "timm", "torch", "transformers"}


def module(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(file: Path, *, at_start: bool = False) -> set[str]:
    """Modules that a file imports; `at_start`: only those that importing it imports at once."""
    tree = ast.parse(file.read_text())
    nodes = _at_start(tree.body) if at_start else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module
            found |= {_submodule(node.module, alias.name) for alias in node.names}
    return found


def _at_start(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _at_start(node.body)


def _submodule(package: str, name: str) -> str:
    """`from clbench import machine` imports clbench.machine."""
    path = ROOT / package.replace(".", "/")
    inside = (path / f"{name}.py").exists() or (path / name).is_dir()
    return f"{package}.{name}" if inside else package


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def above(names: set[str]) -> set[str]:
    """Those in a room that only people and the command line use."""
    parts = {name: name.split(".") for name in names}
    return {n for n, p in parts.items() if p[0] == "clbench" and set(p[1:2]) & ROOMS_ABOVE}


def code_strings(file: Path) -> Iterator[str]:
    """String constants of a file that are not docstrings."""
    tree = ast.parse(file.read_text())
    constants = {id(n): n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            constants.pop(id(node.value), None)  # a docstring
    yield from (value for value in constants.values() if isinstance(value, str))


def test_there_is_something_to_check() -> None:
    assert {"clbench.protocol", "clbench.nn.memory"} <= {module(f) for f in ENGINE}
    assert {"strategies.finetune", "scenarios.digits"} <= {module(f) for f in PLUGINS}
    phases = ROOT / "clbench" / "commands" / "phases.py"
    assert "clbench.cells" in imports(phases)
    assert "clbench.cells" not in imports(phases, at_start=True)


@EVERY_PLUGIN
def test_plugins_know_the_engine_s_words_and_nothing_above(file: Path) -> None:
    assert not above(imports(file))


@EVERY_PLUGIN
def test_plugins_know_no_other_plugin(file: Path) -> None:
    assert not packages(imports(file)) & set(userspace.PLUGINS)


@pytest.mark.parametrize("file", ENGINE, ids=lambda f: str(f.relative_to(ROOT)))
def test_the_engine_names_no_plugin(file: Path) -> None:
    assert not packages(imports(file)) & set(userspace.PLUGINS)
    paths = {module(plugin) for plugin in PLUGINS}
    names = {plugin.stem for plugin in PLUGINS if plugin.parent.name == "strategies"} - WORDS
    for text in code_strings(file):
        assert text not in names, f"{file.name} names the strategy {text}"
        assert not any(path in text for path in paths), f"{file.name} names {text}"


def test_the_engine_imports_downwards() -> None:
    """No cycle; errors know nothing, types know errors and shared parts, nn knows no policy."""
    known = {module(file): file for file in ENGINE}
    graph = {name: imports(file, at_start=True) & known.keys() for name, file in known.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) == len(known)
    assert imports(known["clbench.errors"]) & known.keys() == set()
    assert imports(known["clbench.types"]) & known.keys() <= {
        *("clbench.errors", "clbench.samples", "clbench.nn.transforms"),
    }
    for name, file in known.items():
        if name.startswith("clbench.nn."):
            assert not above(imports(file)), f"{name} knows {above(imports(file))}"


@pytest.mark.parametrize("name", ["metrics", "statistics"])
def test_numbers_are_made_without_frameworks_or_files(name: str) -> None:
    file = ROOT / "clbench" / f"{name}.py"
    if not file.exists():
        pytest.skip(f"there is no clbench/{name}.py")
    foreign = packages(imports(file)) - sys.stdlib_module_names
    assert foreign <= {"numpy", "scipy", "pandas", "clbench"}
    assert imports(file) & {module(f) for f in ENGINE} <= {"clbench.errors"}
    assert not {"pathlib", "os", "io"} & imports(file)


@EVERY_FILE
def test_only_one_file_knows_avalanche(file: Path) -> None:
    assert file == ROOT / "clbench" / "avalanche.py" or "avalanche" not in packages(imports(file))


@EVERY_FILE
def test_only_the_command_line_prints(file: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    named = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    people = {ROOT / "clbench" / "cli.py", *(ROOT / "clbench" / "commands").iterdir()}
    assert file in people or "print" not in named


def test_no_drawer_for_everything() -> None:
    stems = {file.stem for file in ENGINE + PLUGINS}
    assert not stems & {"utils", "util", "helpers", "misc", "common"}


@pytest.mark.parametrize("kind", userspace.PLUGINS)
def test_plugin_folders_are_namespaces(kind: str) -> None:
    assert not list((ROOT / kind).rglob("__init__.py"))
    assert (ROOT / kind / "py.typed").exists()
    assert importlib.import_module(kind).__file__ is None


@pytest.mark.parametrize(
    "code",
    [
        "import clbench",
        "import clbench.cli as cli; sys.argv[1:] = ['--help']; cli.main()",
        "import clbench.cli as cli; sys.argv[1:] = ['--cfg', 'job']; cli.main()",
    ],
    ids=["import", "help", "cfg"],
)
def test_saying_little_loads_little(code: str, environment: dict[str, str], work: Path) -> None:
    script = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))\n"
        f"{code}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=work,
        timeout=60,
    )
    loaded = packages(set(json.loads(done.stdout.splitlines()[-1])))
    assert "clbench" in loaded
    assert not loaded & HEAVY
