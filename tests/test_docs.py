"""The documentation builds without a network, lists all there is, and asks nobody for anything."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from suite import configured

from clbench import userspace

pytest.importorskip("material", reason="mkdocs-material is not installed: the extra docs")
ROOT = userspace.suite()
#: Where each group of configurations has its pages.
FOLDERS = {"strategy": "strategies", "scenario": "scenarios", "backbone": "models"}
EVERY_CHOICE = [(group, name) for group in FOLDERS for name in configured(group)]
#: Nothing listens there: whoever asks for something over the network fails.
NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "127.0.0.1:9")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """The built documentation, once for all processes of a parallel run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    built = folder / "documentation"
    with (folder / "documentation.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.is_dir():
            done = subprocess.run(
                [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built)],
                cwd=ROOT,
                env={**environment, **NOWHERE, "NO_MKDOCS_2_WARNING": "1"},
                capture_output=True,
                text=True,
                check=False,
                timeout=570,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert "WARNING" not in done.stderr
    return built


def pages(site: Path) -> list[Path]:
    """What people open; a report's page has tests of its own, 404.html is for a server."""
    found = (p for p in site.rglob("*.html") if p.relative_to(site).parts[0] != "results")
    return sorted(p for p in found if p.name != "404.html")


class Asked(HTMLParser):
    """What a page makes the browser fetch, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.urls += [str(found[name]) for name in ("src", "srcset", "poster") if found.get(name)]
        if tag == "link" and found.get("rel") != "canonical":
            self.urls.append(str(found["href"]))

    def handle_data(self, data: str) -> None:
        self.words += data


def page_of(site: Path, group: str, name: str) -> Asked:
    """The one page of a group that says how to choose this."""
    needle = re.compile(rf"python -m clbench {group}={name}(?!\w)")
    read = (Asked(p.read_text()) for p in pages(site / FOLDERS[group]) if p.name != "index.html")
    (found,) = [page for page in read if needle.search(page.words)]
    return found


@pytest.mark.parametrize(("group", "name"), EVERY_CHOICE)
def test_every_choice_has_its_options_on_one_page(site: Path, group: str, name: str) -> None:
    words = page_of(site, group, name).words
    file = (userspace.configuration() / group / f"{name}.yaml").read_text().strip()
    assert file in words, "the file, word for word"
    for option in re.findall(r"^(\w+):", file, re.M):
        assert option in ("defaults", "search", "_target_") or f"\n{option}\n" in words, option
    assert name in Asked((site / FOLDERS[group] / "index.html").read_text()).words


def test_pages_of_strategies_say_what_a_reader_looks_for(site: Path) -> None:
    read = [
        Asked(p.read_text()).words for p in pages(site / "strategies") if p.name != "index.html"
    ]
    for words in read:
        for title in ("Options", "Search space", "Measured", "Differs from the paper:"):
            assert title in words
    assert sum("Cost" in words for words in read) > 0.9 * len(read)
    ewc = next(words for words in read if "Overcoming catastrophic forgetting" in words)
    assert "½ ewc_lambda Σ_i P_i(θ)" in ewc
    assert "tag(log, interval(1, 1000000))" in ewc


def test_what_the_leaderboard_measured_stands_on_the_pages(site: Path) -> None:
    import pandas as pd

    table = pd.read_csv(ROOT / "results" / "leaderboard" / "leaderboard.csv")
    row = table[table["average_accuracy"].notna()].iloc[0]
    value = f"{100 * row['average_accuracy']:.1f}"
    assert value in page_of(site, "strategy", row.get("name", row["strategy"])).words
    assert value in page_of(site, "scenario", row["scenario"]).words


def test_every_metric_is_listed_with_its_definition(site: Path) -> None:
    from clbench import metrics

    words = Asked((site / "metrics.html").read_text()).words
    for name in ("average_accuracy", "forgetting", "learning_curve_area"):
        assert name in words
        assert (vars(metrics)[name].__doc__ or "").splitlines()[0] in words
    for name in metrics.FORGETTING_CONVENTIONS:
        assert f"\n{name}\n" in words


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in pages(site):
        for url in Asked(page.read_text()).urls:
            assert not re.match(r"(\w+:)?//", url), f"{page}: {url}"
            path = (page.parent / url.partition("?")[0].partition("#")[0]).resolve()
            assert path.is_file() or url == ".", f"{page}: {url}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?\s*(https?:)?//", sheet.read_text()), sheet


def test_no_marker_is_left(site: Path) -> None:
    assert not [page for page in pages(site) if "generated:" in page.read_text()]


# In a browser.


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab; afterwards nothing may have gone wrong, or out."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    yield opened
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    opened.close()


@pytest.mark.parametrize("width", [360, 1280])
def test_pages_open_from_files_and_fit(site: Path, tab: Any, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 800})
    generated = ("strategies/mos.html", "strategies/index.html", "scenarios/digits.html")
    written = [page for page in pages(site) if page.parent == site]
    for page in [*written, *(site / name for name in generated)]:
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, page
        pictures = tab.locator("article img").evaluate_all("all => all.map(i => i.naturalWidth)")
        assert all(found > 100 for found in pictures), page


@pytest.mark.slow
def test_all_pages_open(site: Path, tab: Any) -> None:
    for page in pages(site):
        tab.goto(page.as_uri())
        assert tab.locator("article h1").count() == 1, page
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1280, page


def test_search_works_on_files(site: Path, tab: Any) -> None:
    tab.goto((site / "index.html").as_uri())
    tab.locator("input[name=query]").click()
    tab.keyboard.type("synaptic intelligence")
    found = tab.locator(".md-search-result__link").first
    found.wait_for(timeout=20_000)
    assert "strategies/si.html" in str(found.get_attribute("href"))
