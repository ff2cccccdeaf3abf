"""Bars on a terminal, silence elsewhere, and never two bars at once."""

from __future__ import annotations

import pytest

from clbench.progress import Bar, counting


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes rich take the error stream for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_terminal")
def test_counting_is_silent_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("decoding", "images") as tell:
        for done in range(5):
            tell(done, 5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("terminal")
def test_counting_shows_title_amount_and_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("decoding birds", "images") as tell:
        tell(1234, 5000)
    output = capsys.readouterr()
    assert output.out == ""
    assert "decoding birds" in output.err
    assert "1,234/5,000 images" in output.err


@pytest.mark.usefixtures("terminal")
def test_counting_that_never_counts_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("decoding", "images"):
        pass
    assert "images" not in capsys.readouterr().err


@pytest.mark.usefixtures("terminal")
def test_the_bar_of_a_run_waits_for_its_first_experience(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Until then the terminal belongs to `counting`: two bars would overwrite each other."""
    with Bar("my run") as bar:
        with counting("decoding", "images") as tell:
            tell(1, 2)
        assert "my run" not in capsys.readouterr().err
        bar.start("experience 1/2", 100)
        bar.advance(50)
        bar.finish("average accuracy 0.500")
    shown = capsys.readouterr().err
    assert "my run · experience 1/2" in shown
    assert "average accuracy 0.500" in shown


@pytest.mark.usefixtures("terminal")
def test_a_run_that_never_starts_leaves_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("my run"):
        pass
    assert "my run" not in capsys.readouterr().err
