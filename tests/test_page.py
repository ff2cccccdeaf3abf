"""The page of a report: what a browser makes of it, and that nothing in it is trusted."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import made_up
import pytest

from clbench import report
from clbench.results import Result

LONG = "x" * 300
NASTY = (
    '"><script>window.attacked = 1</script><img src="http://192.0.2.1/a" '
    'onerror="window.attacked = 1">'
    "{{ 7 * 7 }} ${alert(1)} </style></script><!-- $\\frac$ \x00\ud800 ' é"
)
SKILLS = {"joint": 0.95, "derpp": 0.9, "replay": 0.8, "ewc": 0.2, "finetune": 0.1}


def filled(root: Path) -> Path:
    """Boards of two scenarios, tuned and untuned, failed and nasty; the page made of them."""
    for name, skill in SKILLS.items():
        kept = 0 if name in ("ewc", "finetune") else 200
        for scenario in ("digits", "glyphs"):
            study = made_up.study(name, scenario=scenario)
            made_up.kept(root, study)
            tuned = None if name == "joint" else made_up.tuned_by(study)
            options = {"tuned": tuned, "memory": kept, "scenario": scenario}
            made_up.stored(root, *(made_up.run(name, i, skill, **options) for i in range(3)))
    made_up.stored(
        root,
        made_up.run("lost", 0, 0.7),
        made_up.failed(made_up.run("lost", 1), "diverged", f"the loss is nan {NASTY}"),
        *(made_up.run(NASTY, i, 0.5, values={NASTY: NASTY}) for i in range(2)),
        *(made_up.run(LONG, i, 0.4) for i in range(2)),
        made_up.run("replay", 0, scenario=NASTY),
        *(
            made_up.adapted(name, i, e)
            for i in range(2)
            for name, e in (("tent", 0.2), ("sar", 0.3))
        ),
    )
    odd = made_up.run(
        "replay", 0, 0.8, scenario="glyphs", environment={"code": NASTY, NASTY: NASTY}
    )
    made_up.stored(root, replace(odd, run={**odd.run, "run_id": "odd #1?<b>"}))
    (root / "runs" / "broken<script>").mkdir()
    (root / "runs" / "broken<script>" / "result.json").write_text("{")
    report.write(root)
    return root / "leaderboard" / "index.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("results"))


# Without a browser.


class Tags(HTMLParser):
    """All tags with their attributes, and what is in style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, str] = {}
        self.words = ""
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag if tag in ("style", "script") else self._open

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inside[self._open] = self.inside.get(self._open, "") + data
        else:
            self.words += data


def test_the_policy_allows_this_script_and_style_and_nothing_else(page: Path) -> None:
    tags = Tags(page.read_text())
    (policy,) = [
        a["content"]
        for t, a in tags.tags
        if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    hashes = {
        kind: "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for kind, text in tags.inside.items()
    }
    assert rules == {
        "default-src": "'none'",
        "style-src": hashes["style"],
        "script-src": hashes["script"],
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert [t for t, _ in tags.tags].count("script") == 1
    assert [t for t, _ in tags.tags].count("style") == 1


def test_nothing_on_the_page_comes_from_elsewhere_or_acts_by_itself(page: Path) -> None:
    tags = Tags(page.read_text()).tags
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert tag not in ("iframe", "object", "embed", "base", "form", "video", "audio", "source")
        if tag in ("img", "link"):
            assert str(attributes.get("src", attributes.get("href"))).startswith("data:")
        if tag == "a":
            link = str(attributes["href"])
            assert re.match(r"#|figures/[\w.-]+$|\.\./[\w%./ -]+/result\.json$", link), link


def test_texts_of_files_are_words_and_no_markup(page: Path) -> None:
    found = Tags(page.read_text())
    assert NASTY.replace("\ud800", "?") in found.words
    assert LONG in found.words


def test_links_lead_to_the_files_of_the_runs(page: Path) -> None:
    from urllib.parse import unquote

    links = [str(a["href"]) for t, a in Tags(page.read_text()).tags if t == "a"]
    results = [link for link in links if link.endswith("/result.json")]
    assert len(results) > 30
    assert any("odd%20%231%3F%3Cb%3E" in link for link in results)
    assert all((page.parent / unquote(link)).is_file() for link in results)
    assert all((page.parent / link).is_file() for link in links if link.startswith("figures/"))


def test_a_row_holds_its_runs_configuration_environment_and_warnings(page: Path) -> None:
    text = re.sub(r"\s+", " ", Tags(page.read_text()).words)
    assert "1 diverged" in text
    assert "What completed is no fair sample: no mean." in text
    assert "Not tuned: its hyper-parameters" in text
    assert "strategies.derpp.X" in text
    assert "3.11.7" in text
    assert "tag(log, interval(0.001, 0.3))" in text
    assert "1 of 8 trials of its search failed." in text


def test_seeds_that_ran_on_different_machines_are_a_warning(tmp_path: Path) -> None:
    other: dict[str, Any] = {**made_up.ENVIRONMENT, "torch": "2.12.0", "code": "abc+dirty"}
    made_up.stored(
        tmp_path, made_up.run("a", 0), made_up.run("a", 1, environment=other), made_up.run("a", 2)
    )
    report.write(tmp_path)
    text = Tags((tmp_path / "leaderboard" / "index.html").read_text()).words
    assert "Its seeds did not run alike: code, torch differ." in text
    assert "2.11.0 | 2.12.0" in text
    assert "Made with changes to the code that were not committed." in text


# In a browser.


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Any]:
    """The page on a desktop; afterwards nothing may have gone wrong or out."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    yield tab
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert tab.evaluate("window.attacked") is None
    tab.close()


def names(tab: Any, board: str) -> list[str]:
    found: list[str] = tab.locator(f"{board} tbody:not([hidden]) .open").all_inner_texts()
    return found


def board_of(tab: Any, scenario: str) -> str:
    section = tab.locator("section.board", has=tab.locator("h2", has_text=scenario)).first
    return f"#{section.get_attribute('id')}"


def heading(tab: Any, board: str, title: str) -> Any:
    return tab.locator(f"{board} th button", has_text=re.compile(f"^{re.escape(title)}$"))


def test_headings_sort_both_ways_and_what_has_no_number_stays_last(opened: Any) -> None:
    board = board_of(opened, "digits")
    ranked = names(opened, board)
    assert ranked[:3] == ["joint", "derpp", "replay"]
    assert ranked[-1] == "lost"
    scores = heading(opened, board, "average accuracy, %")
    scores.click()
    assert names(opened, board) == ranked
    scores.click()
    assert names(opened, board) == [*ranked[-2::-1], "lost"]
    heading(opened, board, "strategy").click()
    found = names(opened, board)
    plain = [name for name in found if name in (*SKILLS, "lost")]
    assert plain == ["derpp", "ewc", "finetune", "joint", "lost", "replay"]
    sorts = opened.locator(f"{board} th[aria-sort]")
    assert sorts.count() == 1
    assert sorts.first.get_attribute("aria-sort") == "ascending"
    heading(opened, board, "rank").click()
    assert names(opened, board) == ranked


def test_words_and_boxes_filter_rows_and_hide_empty_boards(opened: Any) -> None:
    total = opened.locator("tbody[data-text]").count()
    assert opened.locator("#count").inner_text() == f"{total} rows"
    opened.fill("#words", "derpp glyphs")
    assert opened.locator("tbody[data-text]:not([hidden])").count() == 1
    assert opened.locator("#count").inner_text() == f"1 of {total} rows"
    assert opened.locator("section.board:not([hidden])").count() == 1
    opened.fill("#words", "")
    board = board_of(opened, "digits")
    opened.get_by_label("exemplar-free").check()
    assert names(opened, board) == ["ewc", "finetune"]
    opened.get_by_label("exemplar-free").uncheck()
    opened.get_by_label("tuned").check()
    opened.get_by_label("all seeds complete").check()
    assert names(opened, board) == ["derpp", "replay", "ewc", "finetune"]
    opened.fill("#words", "nothing has this name")
    assert opened.locator("#count").inner_text() == f"0 of {total} rows"


def test_a_row_opens_and_closes_and_moves_with_what_it_opened(opened: Any) -> None:
    board = board_of(opened, "digits")
    identifier = opened.locator(f"{board} .open").nth(1).get_attribute("aria-controls")
    button, detail = (
        opened.locator(s) for s in (f"[aria-controls={identifier}]", f"#{identifier}")
    )
    assert not detail.is_visible()
    button.click()
    assert detail.is_visible()
    assert button.get_attribute("aria-expanded") == "true"
    for title in ("Warnings", "Runs", "Configuration", "Environment", "Search"):
        assert detail.get_by_role("heading", name=title).is_visible()
    assert detail.locator("tbody tr").count() == 3
    heading(opened, board, "strategy").click()
    assert detail.is_visible()
    entry = opened.locator(f"{board} tbody", has=button)
    assert entry.locator(".detail").get_attribute("id") == identifier
    button.focus()
    opened.keyboard.press("Enter")
    assert not detail.is_visible()


def test_pictures_are_there_and_drawn(opened: Any) -> None:
    pictures = opened.locator("figure img")
    assert pictures.count() > 10
    sizes = pictures.evaluate_all("all => all.map(i => i.complete && i.naturalWidth)")
    assert all(size > 100 for size in sizes)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_width_needs_scrolling_sideways(
    browser: Any, page: Path, width: int, scheme: str
) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab.goto(page.as_uri())
    for button in tab.locator(".open").all()[:8]:
        button.click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = (
        tab.evaluate(f"getComputedStyle(document.body).{c}") for c in ("color", "backgroundColor")
    )
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (bright[0] > bright[1]) == (scheme == "dark")
    assert abs(bright[0] - bright[1]) > 450
    tab.close()


def test_everything_can_be_read_without_a_script(browser: Any, page: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(page.as_uri())
    assert tab.locator(".detail").first.is_visible()
    assert not tab.locator(".filters").is_visible()
    context.close()


def test_a_result_of_the_helper_is_one_of_the_suite(tmp_path: Path) -> None:
    """What these tests are made of has the form of what runs leave."""
    (path,) = made_up.stored(tmp_path, made_up.adapted("tent"))
    assert Result.from_json((path / "result.json").read_text()) == made_up.adapted("tent")
