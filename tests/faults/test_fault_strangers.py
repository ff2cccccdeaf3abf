"""What comes from elsewhere: files, names, archives, servers, values; none of it is trusted."""

from __future__ import annotations

import copy
import gc
import gzip
import hashlib
import http.server
import io
import json
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import made_up
import pytest
import torch
from suite import Command
from torchvision.datasets.utils import extract_archive
from toy_runs import planned

from clbench import archives, checksums, datasets, tuning
from clbench.cells import execute
from clbench.conditions import Names
from clbench.errors import UserError
from clbench.leaderboard import build
from clbench.report import write
from clbench.results import RunFolder, find, read
from clbench.tuning import FIRST_TUNING_SEED, Budget

QUICK = ("scenario.epochs=1", "device=cpu", "progress=false", "threads=1")


def faulty(kind: str, note: Path, **options: Any) -> dict[str, Any]:
    """The node of a strategy of this folder."""
    return {"_target_": f"strategies.faulty.{kind}", "lr": 0.05, "note": str(note), **options}


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


GARBAGE = {
    "empty": "",
    "garbage": "\x00\x01}{",
    "NaN": json.dumps(made_up.plain(made_up.run())).replace('"train_samples": 17960', '"x": NaN'),
    "other schema": json.dumps({**made_up.plain(made_up.run()), "schema": 99}),
    "a list": "[]",
    "a metric that is a text": json.dumps(
        {**made_up.plain(made_up.run()), "metrics": {"average_accuracy": "0.9"}}
    ),
    "deep": "[" * 100_000,
}


def test_fault_20_garbage_for_a_result(work: Path, command: Command) -> None:
    """Garbage, NaN or another schema as result.json | Left out, listed; rc 1 with strict=true."""
    made_up.stored(work / "results", made_up.run(seed=0), made_up.run(seed=1))
    for number, text in enumerate(GARBAGE.values()):
        bad = work / "results" / "runs" / f"stranger-{number}"
        bad.mkdir()
        (bad / "result.json").write_text(text)
    strict = command("phase=report", "strict=true")
    assert strict.returncode == 1, strict.stderr
    said = strict.stderr.splitlines()
    assert len(said) == len(GARBAGE)
    assert said[0].startswith("error: results/runs/stranger-0 can't be read: ")
    report = (work / "results" / "leaderboard" / "leaderboard.md").read_text()
    assert f"Unreadable, {len(GARBAGE)}:" in report
    for number, text in enumerate(GARBAGE.values()):
        assert f"runs/stranger-{number}: " in report
        kept = work / "results" / "runs" / f"stranger-{number}" / "result.json"
        assert kept.read_text() == text


def test_fault_26_numbers_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss NaN, or a metric inf | Diverged, with the reason; never the best, never averaged."""
    loss = execute(planned(tmp_path, faulty("Explodes", tmp_path / "note")))
    assert loss.result.status == "diverged"
    from clbench import metrics

    monkeypatch.setattr(metrics, "summary", lambda *_: {"average_accuracy": float("inf")})
    metric = execute(planned(tmp_path, seed=1))
    assert (metric.result.status, metric.result.reason) == (
        *("diverged", "average_accuracy is inf"),
    )
    monkeypatch.undo()
    well = execute(planned(tmp_path, seed=2))
    table = read(tmp_path).set_index("seed")
    assert table["average_accuracy"].notna().to_dict() == {0: False, 1: False, 2: True}
    boards = build(read(tmp_path)).boards
    (row,) = [r for b in boards for r in b.table.to_dict("records") if r["name"] == "replay"]
    assert row["diverged"] == 1
    assert row["average_accuracy"] != row["average_accuracy"], "a mean of the seeds that survived"
    assert tuning.score_of(loss.result) is tuning.score_of(metric.result) is None
    assert tuning.score_of(well.result) is not None


def test_fault_32_seeds_of_both_phases(tmp_path: Path) -> None:
    """Evaluation seeds among the tuning seeds | Refused."""
    cell = planned(tmp_path, seed=FIRST_TUNING_SEED - 1)
    with pytest.raises(UserError, match="seeds from 1,000,000 on are for tuning"):
        tuning.evaluate(cell, Budget(seeds=2), untuned=True)
    assert not (tmp_path / "runs").exists()


MISTAKES = {
    "group": ("strategi=ewc", "No option 'strategi'. Did you mean 'strategy'?"),
    "choice": ("strategy=ewcc", "No strategy 'ewcc'. Did you mean 'ewc'?"),
    "key": ("strategy.l_r=0.1", "No option 'strategy.l_r'. Did you mean 'strategy.lr'?"),
    "new key": ("+sed=1", "No option 'sed'. Did you mean 'seed'?"),
    "grammar": ("seed=[1", "Can't read 'seed=[1'"),
}


@pytest.mark.parametrize(("override", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_fault_33_misspelt(
    override: str, said: str, work: Path, environment: dict[str, str]
) -> None:
    """Misspelt group, choice or key, +key, grammar | rc 2, suggestion, before torch is imported."""
    script = (
        "import sys\nfrom clbench.cli import main\n"
        f"sys.argv[1:] = [{override!r}]\ncode = main()\n"
        "print('torch' in sys.modules)\nraise SystemExit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert done.stdout == "False\n"
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [("seed=one", "seed='one' has the wrong type"), ("seed=-1", "seed=-1 is out of range")],
)
def test_fault_33_wrong_values(override: str, said: str, command: Command) -> None:
    """A value of another type, or out of range | rc 2, and what it must be."""
    done = command(override)
    assert done.returncode == 2
    assert said in done.stderr


TARGETS = ["os.system", "shutil.copyfile", "logging.os.system", "subprocess.run", "builtins.eval"]
TARGETS += ["clbench.files.os.mkdir", "strategies..os.mkdir", "pickle.loads", "torch.load"]


PLACES = [("strategy", target) for target in TARGETS]
PLACES += [(key, target) for key in ("scenario", "scenario.backbone") for target in TARGETS[:2]]


@pytest.mark.parametrize(("key", "target"), PLACES)
def test_fault_34_a_target_that_is_no_part(
    target: str, key: str, work: Path, command: Command
) -> None:
    """`_target_` naming os.system or copyfile | Refused by name, canary absent."""
    (work / "source").write_text("x")
    kept = everything(work)
    done = command(f"{key}._target_={target}", *QUICK)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "_target_" in done.stderr
    assert everything(work) == kept


NAMES = ["../../x", "/etc/x", "x" * 300, "a\0b", "a\nb", "..", "", "con:*?", "-rf"]


@pytest.mark.parametrize("name", NAMES)
def test_fault_35_names_that_are_paths(name: str, tmp_path: Path) -> None:
    """Names ../../x, /etc/x, 300 characters, NUL | Nothing is ever written outside the store."""
    root = tmp_path / "deep" / "er" / "results"
    cell = replace(planned(root), names=Names(name, name, name or None))
    ended = execute(cell)
    assert ended.folder.path.parent == root / "runs"
    assert len(ended.folder.path.name) < 200
    assert re.fullmatch(r"[\w.+-]+", ended.folder.path.name)
    written = set(everything(tmp_path))
    assert all(path.startswith("deep/er/results/runs/") for path in written)
    ended.result.run["run_id"] = name or "x"
    (ended.folder.path / "result.json").write_text(ended.result.to_json())
    write(root)
    outside = set(everything(tmp_path)) - written
    assert all(path.startswith("deep/er/results/leaderboard/") for path in outside)


@pytest.mark.parametrize("override", ["strategy=../../x", "scenario=/etc/x", "seed=a\0b"])
def test_fault_35_on_the_command_line(override: str, work: Path, command: Command) -> None:
    """The same as choices | rc 2, and nothing is written."""
    done = command(override)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert list(work.iterdir()) == []


def archive(member: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    """A tar archive of one member."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        info = tarfile.TarInfo(member)
        info.type, info.linkname, info.size = kind, target, 1 if kind == tarfile.REGTYPE else 0
        tar.addfile(info, io.BytesIO(b"x"))
    return data.getvalue()


TARS = {
    "slip": archive("../canary"),
    "absolute": archive("/tmp/clbench-canary"),
    "symlink": archive("link", tarfile.SYMTYPE, "/etc/passwd"),
    "hardlink": archive("link", tarfile.LNKTYPE, "../../etc/passwd"),
    "device": archive("device", tarfile.CHRTYPE),
}


@pytest.mark.parametrize("data", TARS.values(), ids=TARS.keys())
def test_fault_36_archives(data: bytes, tmp_path: Path) -> None:
    """Tar slip, absolute path, link, device | Refused, also where a library asks for no filter."""
    inside = tmp_path / "inside"
    with archives.kept_inside(), tarfile.open(fileobj=io.BytesIO(data)) as tar:
        try:
            tar.extractall(inside)
        except tarfile.FilterError:
            pass
        else:  # PEP 706: an absolute path loses its root
            assert not Path("/tmp/clbench-canary").exists()
            there = [path.resolve() for path in inside.rglob("*")]
            assert all(path.is_relative_to(inside.resolve()) for path in there)
    assert [p.name for p in tmp_path.iterdir()] in ([], ["inside"])
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))
    assert "extraction_filter" not in vars(tarfile.TarFile)


def test_fault_36_zip_slip(tmp_path: Path) -> None:
    """Zip slip | The member lands inside."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as packed:
        packed.writestr("../../canary", "x")
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(link, "/etc/passwd")
    inside = tmp_path / "inside"
    with archives.kept_inside(), zipfile.ZipFile(data) as packed:
        packed.extractall(inside)
    assert sorted(everything(tmp_path)) == ["inside/canary", "inside/link"]
    assert not (inside / "link").is_symlink()


def zeros(size: int) -> Iterator[bytes]:
    yield from (bytes(2**20) for _ in range(size >> 20))


def zipped(path: Path) -> None:
    """300 MiB of zeros in 300 KiB."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
        packed.open("zeros", "w") as file,
    ):
        for block in zeros(300 * 2**20):
            file.write(block)


def overlapped(path: Path) -> None:
    """A thousand names of one and the same member."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("0", bytes(2**20))
        for number in range(1, 1000):
            again = copy.copy(packed.filelist[0])
            again.filename = str(number)
            packed.filelist.append(again)


def gzipped(path: Path) -> None:
    """300 MiB of zeros, behind a file that is none of it."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        for name, size in (("readme", 2**20), ("zeros", 300 * 2**20)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf())
            for block in zeros(size):
                file.write(block)


def sparse(path: Path) -> None:
    """A hole of two TiB, in ten KiB."""
    info = tarfile.TarInfo("hole")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "hole",
        "GNU.sparse.realsize": str(2**41),
    }
    body = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
    info.size = len(body)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as packed:
        packed.addfile(info, io.BytesIO(body))


@pytest.mark.parametrize("bomb", [zipped, overlapped, gzipped, sparse])
@pytest.mark.parametrize("how", [shutil.unpack_archive, extract_archive])
def test_fault_36_bombs(
    bomb: Callable[[Path], None], how: Callable[[str, str], object], tmp_path: Path
) -> None:
    """A small archive that becomes large | Refused before anything of it is unpacked."""
    ends = {zipped: ".zip", overlapped: ".zip", sparse: ".tar"}
    path, inside = tmp_path / f"bomb{ends.get(bomb, '.tar.gz')}", tmp_path / "inside"
    bomb(path)
    assert path.stat().st_size < 2**23
    with archives.kept_inside(), pytest.raises(UserError, match="is not unpacked: an archive of"):
        how(str(path), str(inside))
    assert not list(inside.rglob("*"))


class Server(http.server.BaseHTTPRequestHandler):
    """Gives what a test has prepared, and counts who asks."""

    status: ClassVar[int] = 200
    body: ClassVar[bytes] = b""
    length: ClassVar[int] = -1
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(self.status)
        body = self.files.get(self.path, self.body)
        length = self.length if self.length >= 0 else len(body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:  # type: ignore[override]
        """Says nothing."""


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    """The server that torchvision takes for MNIST's."""
    import torchvision

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    where = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [where])
    monkeypatch.setattr(Server, "asked", [])
    yield Server
    server.shutdown()
    thread.join()
    server.server_close()
    with warnings.catch_warnings():  # urllib leaves the sockets of refusals to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


ANSWERS: dict[str, tuple[int, bytes, int, str]] = {
    "another file": (200, b"\x1f\x8b" + b"0" * 1000, -1, "another file, its SHA-256 is"),
    "cut short": (200, b"\x1f\x8b" + b"0" * 1000, 9912422, "only 1,002 of 9,912,422 bytes came"),
    "an error of the server": (500, b"", -1, "HTTP Error 500"),
    "a page": (200, b"<html>Please log in</html>", -1, "440fcabf73cc546fa21475e81ea370265605f56b"),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_fault_37_downloads(
    answer: tuple[int, bytes, int, str],
    mirror: type[Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong hash, a cut, 500, an HTML page | No dataset, clear text; asked again later."""
    for name, value in zip(("status", "body", "length"), answer, strict=False):
        monkeypatch.setattr(mirror, name, value)
    for _ in range(2):
        before = len(mirror.asked)
        with pytest.raises(UserError, match=rf"idx3-ubyte\.gz can't be fetched: .*{answer[-1]}"):
            datasets.load("mnist", tmp_path, download=True)
        assert len(mirror.asked) > before
        assert not [name for name in everything(tmp_path) if name != ".lock"]
        with pytest.raises(UserError, match="MNIST is not in"):
            datasets.check("mnist", tmp_path)


@pytest.fixture
def published(mirror: type[Server], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small MNIST on the server, whose SHA-256 the suite knows; the files by name."""
    import torchvision

    images = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (20, 28, 28))
    labels = b"\0\0\x08\x01" + (20).to_bytes(4, "big")
    content = {
        f"{part}-{kind}-ubyte": head + bytes(range(count // 784 or 20)) * (count // 20)
        for part in ("train", "t10k")
        for kind, head, count in (("images-idx3", images, 20 * 784), ("labels-idx1", labels, 20))
    }
    packed = {f"{name}.gz": gzip.compress(data) for name, data in content.items()}
    md5 = [(name, hashlib.md5(data).hexdigest()) for name, data in packed.items()]
    known = {f"MNIST/raw/{n}": hashlib.sha256(data).hexdigest() for n, data in packed.items()}
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", md5)
    monkeypatch.setattr(checksums, "known", lambda: known)
    monkeypatch.setattr(mirror, "files", {f"/{name}": data for name, data in packed.items()})
    return content


def test_fault_37_two_at_once(
    published: dict[str, bytes], mirror: type[Server], tmp_path: Path
) -> None:
    """Two runs that want the same dataset | It is fetched once, and unpacked where it belongs."""
    runs = [
        threading.Thread(target=datasets.load, args=("mnist", tmp_path, True)) for _ in range(2)
    ]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert sorted(mirror.asked) == sorted(mirror.files)
    there = everything(tmp_path)
    assert {there[f"MNIST/raw/{name}"] == data for name, data in published.items()} == {True}
    assert len(there) == len(published) + 2, "besides them: what was remembered, and the lock"


def test_fault_37_changed_later(published: dict[str, bytes], tmp_path: Path) -> None:
    """A file that was fetched changes on the disk | Refused, with the old and the new SHA-256."""
    whole = datasets.load("mnist", tmp_path, download=True)
    name = "train-images-idx3-ubyte"
    file = tmp_path / "MNIST" / "raw" / name
    changed = bytearray(published[name])
    changed[100] ^= 1
    file.write_bytes(changed)
    both = (hashlib.sha256(data).hexdigest() for data in (changed, published[name]))
    with pytest.raises(UserError, match=rf"(?s){name} is another file .*{'.*'.join(both)}.*Delete"):
        datasets.load("mnist", tmp_path)
    file.unlink()
    again = datasets.load("mnist", tmp_path, download=True)
    assert torch.equal(again.train.inputs, whole.train.inputs)


def test_fault_38_words_that_are_code(tmp_path: Path) -> None:
    """Script, $, | and newlines in names and errors | Words everywhere; nothing runs."""
    evil = "<script>document.title='owned'</script>|$x$\n## owned `\\`"
    run = made_up.run(scenario=evil, strategy="replay")
    bad = made_up.failed(made_up.run(strategy=evil), reason=evil)
    made_up.stored(tmp_path, made_up.run(seed=3))
    for number, one in enumerate((run, bad)):
        folder = RunFolder(tmp_path, f"stranger-{number}")
        folder.path.mkdir(parents=True)
        folder.result_file.write_text(one.to_json())
    for path in write(tmp_path):
        text = path.read_text(errors="replace") if path.suffix in (".md", ".html") else ""
        assert "<script>document" not in text, path
        assert path.suffix == ".html" or "\n## owned" not in text, path
    # That nothing runs in a browser is tested on the page itself: tests/test_page.py.


def test_fault_39_hash_seeds(work: Path, environment: dict[str, str]) -> None:
    """Another PYTHONHASHSEED | The same result; the number of threads is recorded."""
    found = []
    for seed in ("0", "12345"):
        script = (
            "import sys, json; sys.path.insert(0, sys.argv[1]); import toy_runs\n"
            "from pathlib import Path\n"
            f"ended = toy_runs.execute(toy_runs.planned(Path('r{seed}')))\n"
            "print(json.dumps(toy_runs.numbers(ended), sort_keys=True))\n"
            "print(ended.result.environment['threads'])"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent)],
            env={**environment, "PYTHONHASHSEED": seed},
            cwd=work,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        found.append(done.stdout)
    assert found[0] == found[1]
    assert found[0].endswith("\n1\n")


@pytest.mark.needs_root
def test_fault_40_without_a_network(
    namespaces: str, work: Path, environment: dict[str, str]
) -> None:
    """unshare -n | A synthetic scenario runs without a network."""
    done = subprocess.run(
        [namespaces, "-n", sys.executable, "-m", "clbench", *QUICK],
        env=environment,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare" in done.stderr:
        pytest.skip("namespaces are not allowed here")
    assert done.returncode == 0, done.stderr
    assert [found.row["status"] for found in find(work)] == ["complete"]


def test_fault_40_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, work: Path
) -> None:
    """A secret in the environment | In no file of a run, whoever says it; nor home, nor host."""
    secret = "s3cr3t-0123456789abcdef"
    monkeypatch.setenv("CLBENCH_TEST_TOKEN", secret)
    monkeypatch.setattr("clbench.discretion._names", lambda: (str(Path.home()), "", "host-17"))
    cell = planned(work, faulty("Tells", tmp_path / "note"))
    with pytest.raises(RuntimeError, match=secret):
        execute(cell)
    files = everything(work)
    assert any(name.endswith("log.txt") for name in files)
    assert any(b"no *** in ~/data" in data for data in files.values())
    for data in files.values():
        assert secret.encode() not in data
        assert f"{Path.home()}/".encode() not in data
    done = command("results_dir=${oc.env:CLBENCH_TEST_TOKEN}", *QUICK)
    assert done.returncode == 2
    assert "reads the environment" in done.stderr
    assert not (work / secret).exists()


def test_a_broken_yaml_is_a_message(work: Path, command: Command) -> None:
    (work / "conf" / "strategy").mkdir(parents=True)
    (work / "conf" / "strategy" / "mine.yaml").write_text("lr: [0.1\n_target_: x")
    done = command("strategy=mine")
    assert done.returncode == 2
    assert done.stderr.startswith("error: A configuration file is no YAML: ")
    assert "mine.yaml" in done.stderr
