"""A name of the hub without a network: one line, which names the folder option; no retries."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from clbench import hub
from clbench.errors import UserError

NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "127.0.0.1:9")
#: What names something on the hub, and the option that takes a folder or a file instead.
NAMES = {
    "scenario=string_instructions language_model=published language_model.where=a/b": (
        "language_model.where=FOLDER"
    ),
    "scenario=string_instructions scenario.tokenizer=a/b": "scenario.tokenizer=FOLDER",
    "scenario=glyphs scenario.n_experiences=2 scenario.n_classes=4 scenario.train_per_class=5 "
    "scenario.test_per_class=2 backbone=timm backbone.name=resnet18.a1_in1k "
    "backbone.pretrained=true": "backbone.weights=<file>",
}


@pytest.mark.slow
@pytest.mark.parametrize(("words", "option"), NAMES.items())
def test_without_a_network_one_line_says_what_to_do(
    words: str, option: str, work: Path, environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clbench", *words.split(), "strategy=finetune", "progress=false"],
        cwd=work,
        env={**environment, **NOWHERE, "HF_HOME": str(work / "hub")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line.startswith("error: ")
    assert option in line


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that the hub was asked for; there is no network."""
    import huggingface_hub

    names: list[str] = []

    def model_info(self: object, name: str, **options: object) -> SimpleNamespace:
        del self, options
        names.append(name)
        logging.getLogger("huggingface_hub").warning("Retrying")
        raise OSError("Connection refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.cached_only.cache_clear()
    return names


def test_the_hub_is_asked_once_and_in_silence(
    asked: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert [hub.cached_only("a/b") for _ in range(3)] == [True] * 3
    assert asked == ["a/b"]
    assert not hub.cached_only(str(tmp_path))
    assert asked == ["a/b"], "a folder is nobody's business"
    assert capsys.readouterr() == ("", "")
    with pytest.raises(hub.Unreachable, match="Connection refused"):
        hub.commit("a/b", "model")


def test_what_needs_it_says_so_without_a_network(asked: list[str]) -> None:
    pytest.importorskip("transformers", reason="the extra text is not installed")
    from clbench.text.decoders import Published as Model
    from clbench.text.tokenizers import Published as Words

    with pytest.raises(UserError, match=r"can't be reached.*language_model\.where=FOLDER"):
        _ = Model(where="nobody/has-this-model").context
    with pytest.raises(UserError, match=r"can't be reached.*scenario\.tokenizer=FOLDER"):
        Words("nobody/has-this-model")
    assert asked == ["nobody/has-this-model"]


def test_offline_by_choice_asks_nobody(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.commit("a/b", "model") is None
    assert hub.cached_only("a/c")
    assert asked == []


def test_a_refusal_is_no_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuses(self: object, name: str, **options: object) -> None:
        del self, options
        raise huggingface_hub.errors.HFValidationError(f"{name} is no name")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuses)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="does not give 'x y'"):
        hub.commit("x y", "dataset")


def test_logs_are_as_they_were() -> None:
    log = logging.getLogger("httpx")
    before = log.level
    with hub.quiet():
        assert not log.isEnabledFor(logging.ERROR)
    assert log.level == before
