"""What is fetched is whole and what it should be, now and later; archives keep within bounds."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from clbench import checksums, datasets, downloads, hub
from clbench.archives import Bounds, kept_inside
from clbench.errors import UserError

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def address(tmp_path: Path) -> str:
    """Where the content is published."""
    path = tmp_path / "published" / "file.bin"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path.as_uri()


@pytest.mark.parametrize("expected", [SHA256, SHA256[:8], ""])
def test_a_file_is_fetched_once(address: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "file.bin"
    nowhere = (tmp_path / "absent").as_uri()
    downloads.kept(path, [nowhere, address], expected, "the suite")
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"]
    downloads.kept(path, [nowhere], expected, "the suite")


def test_another_file_never_comes_to_its_place(address: str, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "file.bin"
    says = rf"file\.bin can't be fetched: .*SHA-256 is {SHA256}, and the suite says {'0' * 64}"
    with pytest.raises(UserError, match=says):
        downloads.kept(path, [address], "0" * 64, "the suite")
    assert not list(path.parent.iterdir())


def test_another_file_at_its_place_is_refused(address: str, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"other")
    with pytest.raises(UserError, match=rf"{path} is another .* and its name says {SHA256[:8]}\."):
        downloads.kept(path, [address], SHA256[:8], "its name")


def test_a_folder_that_can_t_be_made_is_a_message(address: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(UserError, match=r"Can't write .*cache/file\.bin: .*choose another folder"):
        downloads.kept(tmp_path / "cache" / "file.bin", [address], SHA256, "the suite")


def test_the_suite_s_own_list_is_whole() -> None:
    known = checksums.known()
    archives = {name for one in datasets._PUBLISHED.values() for name in one.archives}
    weights = known.keys() - archives
    assert archives <= known.keys()
    assert weights
    assert all(known[name].startswith(name.split("-")[-1].removesuffix(".pth")) for name in weights)
    assert len(set(known.values())) == len(known)


def test_what_comes_is_remembered_and_may_not_change(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("not fetched")
    with checksums.watched(tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "first").write_bytes(CONTENT)
    with checksums.watched(tmp_path):
        (tmp_path / "second").write_bytes(CONTENT)
    list_of = (tmp_path / checksums.REMEMBERED).read_text()
    assert list_of == f"{SHA256}  folder/first\n{SHA256}  second\n"
    if shutil.which("sha256sum"):
        words = ["sha256sum", "--check", "--strict", checksums.REMEMBERED]
        subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "mine").write_text("changed, which is nobody's business")
    (tmp_path / "second").unlink()
    checksums.compare(tmp_path)
    (tmp_path / "folder" / "first").write_bytes(b"changed")
    with (
        pytest.raises(UserError, match=rf"first is another file .*{SHA256}.*[Dd]elete"),
        checksums.watched(tmp_path),
    ):
        pytest.fail("what has changed was handed on")


def test_a_file_that_comes_again_must_be_the_same(tmp_path: Path) -> None:
    with checksums.watched(tmp_path):
        (tmp_path / "file").write_bytes(CONTENT)
    (tmp_path / "file").unlink()
    with pytest.raises(UserError, match="a line can be removed"), checksums.watched(tmp_path):
        (tmp_path / "file").write_bytes(b"what the server gives now")
    (tmp_path / checksums.REMEMBERED).unlink()
    with checksums.watched(tmp_path):
        pass


def test_a_damaged_list_is_no_list(tmp_path: Path) -> None:
    (tmp_path / checksums.REMEMBERED).write_text(f"# mine\n\n{SHA256} file\n")
    with pytest.raises(UserError, match=r"clbench\.sha256 is damaged: .*is no SHA-256 and path"):
        checksums.compare(tmp_path)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_the_hub_s_cache_holds_what_its_names_say(
    kind: hub.Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    blobs = tmp_path / f"{kind}s--owner--name" / "blobs"
    small = hashlib.sha1(b"blob 2\0{}").hexdigest()
    with hub.verified("owner/name", kind):
        blobs.mkdir(parents=True)
        (blobs / SHA256).write_bytes(CONTENT)
        (blobs / small).write_bytes(b"{}")
        (blobs / f"{'0' * 64}.incomplete").write_bytes(b"under way")
    other = f"{'1' * 64}"
    says = rf"{other} is another file .*is {SHA256}, and the Hugging Face hub's owner/name says"
    with pytest.raises(UserError, match=says), hub.verified("owner/name", kind):
        (blobs / other).write_bytes(CONTENT)
    (blobs / other).unlink()
    (blobs / small).write_bytes(b"[]")
    if kind == "dataset":  # what was made of it is read, not this
        with hub.verified("owner/name", kind):
            return
    with (
        pytest.raises(UserError, match=rf"{small} is another file .*Git SHA-1"),
        hub.verified("owner/name", kind),
    ):
        pytest.fail("what has changed was handed on")


def test_a_folder_is_nobody_s_but_the_user_s(tmp_path: Path) -> None:
    with hub.verified(str(tmp_path), "model"):
        pass


def tar_of(members: int, size: int) -> io.BytesIO:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for number in range(members):
            info = tarfile.TarInfo(str(number))
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    data.seek(0)
    return data


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        (Bounds(members=9), "more than 9 files"),
        (Bounds(total=10_000), r"may become 10,000 bytes, and its first 7 files take 10,584"),
        (Bounds(ratio=10, spared=10_000), "an archive of [0-9]+ bytes may become 10,000 bytes"),
    ],
    ids=["members", "total", "ratio"],
)
def test_each_bound_holds(bounds: Bounds, says: str, tmp_path: Path) -> None:
    """Ten members of a thousand zeros."""
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(tar_of(10, 1000).getvalue())
    says = rf"{path} is not unpacked: .*{says}"
    with kept_inside(bounds), tarfile.open(path) as tar:
        with pytest.raises(UserError, match=says):
            tar.extract("0", tmp_path / "inside", filter="data")
        with pytest.raises(UserError, match=says):
            tar.extractall(tmp_path / "inside")
    assert not (tmp_path / "inside").exists()


def test_what_keeps_within_the_bounds_is_unpacked(tmp_path: Path) -> None:
    bounds = Bounds(members=10, total=15_120)
    with kept_inside(bounds), tarfile.open(fileobj=tar_of(10, 1000)) as tar:
        tar.extractall(tmp_path)
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [1000] * 10


def test_a_stream_that_can_t_be_looked_at_is_refused(tmp_path: Path) -> None:
    with (
        kept_inside(),
        tarfile.open(fileobj=tar_of(1, 1), mode="r|gz") as tar,
        pytest.raises(UserError, match="read as a stream"),
    ):
        tar.extractall(tmp_path)


def test_a_zip_archive_that_lies_gets_no_more_than_it_says(tmp_path: Path) -> None:
    """The directory says 1,000 bytes, the member goes on."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("zeros", bytes(10**7))
        packed.filelist[0].file_size = 1000
    with kept_inside(), zipfile.ZipFile(data) as packed, pytest.raises(zipfile.BadZipFile):
        packed.extractall(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000


def test_archives_are_as_before_after_the_block() -> None:
    before = (tarfile.TarFile.extractall, zipfile.ZipFile.__init__)
    with kept_inside():
        assert tarfile.TarFile.extractall is not before[0]
    assert (tarfile.TarFile.extractall, zipfile.ZipFile.__init__) == before
    assert "extraction_filter" not in vars(tarfile.TarFile)
