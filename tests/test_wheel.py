"""The wheel alone, without the checkout: it has everything, and a user's two files join it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from suite import write_all
from test_snippets import blocks

from clbench import userspace

MINE = {
    "strategies/mine.py": '''
from dataclasses import dataclass
from clbench.training import GradientStrategy


@dataclass(kw_only=True)
class Mine(GradientStrategy):
    """Fine-tuning by another name. **Differs from the paper:** there is none."""
''',
    "conf/strategy/mine.yaml": "_target_: strategies.mine.Mine\nlr: 0.05\n",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("build", "--wheel", "--no-isolation", "--outdir", str(folder), str(userspace.suite()))
    run("-m", *build, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(
        "-m", "pip", "install", *options, "--target", str(folder / "target"), str(wheel), cwd=folder
    )
    return folder / "target"


def run(*arguments: str, cwd: Path, path: str | None = None) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if path:
        environment["PYTHONPATH"] = path
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def without_the_checkout(target: Path) -> str:
    """An import path: the wheel and the libraries. With `python -S` no .pth file adds to it."""
    libraries = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return os.pathsep.join([str(target), *libraries])


def test_the_wheel_has_the_configuration_and_every_plugin(installed: Path) -> None:
    root = userspace.suite()
    for folder, inside in (
        *((kind, kind) for kind in ("clbench", *userspace.PLUGINS)),
        ("conf", "clbench/conf"),
    ):
        ours = {f.relative_to(root / folder) for f in (root / folder).rglob("*") if f.is_file()}
        ours = {f for f in ours if "__pycache__" not in f.parts}
        packed = {
            f.relative_to(installed / inside)
            for f in (installed / inside).rglob("*")
            if f.is_file() and "__pycache__" not in f.parts
        }
        if folder == "clbench":
            packed = {f for f in packed if f.parts[0] != "conf"}
        assert packed == ours
        assert folder == "conf" or Path("py.typed") in packed
    assert {f.name for f in installed.iterdir() if not f.name.endswith(".dist-info")} == {
        *("bin", "clbench", *userspace.PLUGINS),
    }


def test_a_two_file_strategy_runs_beside_the_wheel(installed: Path, work: Path) -> None:
    write_all(work, MINE)
    path = without_the_checkout(installed)
    code = "import clbench, clbench.userspace as u; print(clbench.__file__, u.configuration())"
    found = run("-S", "-c", code, cwd=work, path=path).split()
    assert found == [str(installed / "clbench" / p) for p in ("__init__.py", "conf")]
    run("-S", "-m", "clbench", "strategy=mine", "scenario.epochs=1", cwd=work, path=path)
    (file,) = work.glob("results/runs/*/result.json")
    result = json.loads(file.read_text())
    assert result["status"] == "complete"
    assert result["run"]["strategy"] == "mine"
    assert result["environment"]["code"] == f"wheel {result['environment']['clbench']}"
    assert "_code_" in result["run"]["options"]["strategy"]
    assert "_code_" not in result["run"]["options"]["scenario"]


def test_pyright_accepts_a_user_s_folder(installed: Path, work: Path) -> None:
    """Strategies, scenarios and scripts beside the wheel, strictly; and it does look."""
    pytest.importorskip("basedpyright", reason="basedpyright is not installed")
    pages = ("add-strategy", "add-scenario", "own-data", "index", "faq", "backbones")
    for page in pages:
        found = list(blocks(f"docs/{page}.md"))
        write_all(work, {b.file: b.text for b in found if b.file.endswith(".py")})
        code = [b.text for b in found if b.language == "python" and not b.file]
        write_all(work, {f"{page.replace('-', '_')}.py": "\n".join(code)})
    wrong = "from clbench import run\n\nresult = run('digits', 'replay', seed='1')\nresult.metric\n"
    write_all(work, {"wrong.py": wrong})
    libraries = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    settings = {
        "include": ["."],
        "extraPaths": [str(installed), *libraries],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.10",
        # Of other libraries, which say little of their types.
        **dict.fromkeys(
            (
                "reportMissingTypeStubs",
                "reportUnknownMemberType",
                "reportUnknownVariableType",
                "reportUnknownArgumentType",
            ),
            "none",
        ),
    }
    (work / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson"],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    report = json.loads(done.stdout)
    found = [(Path(d["file"]).name, d["rule"], d["message"]) for d in report["generalDiagnostics"]]
    assert report["summary"]["filesAnalyzed"] > len(pages)
    rules = [rule for name, rule, _ in found if name == "wrong.py"]
    assert rules[:2] == ["reportArgumentType", "reportAttributeAccessIssue"]
    assert [one for one in found if one[0] != "wrong.py"] == []
