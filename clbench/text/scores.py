"""How right an answer in words is: the published scores, and content apart from form."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from types import MappingProxyType
from typing import Any

from clbench.text.encoding import Task
from clbench.text.optional import needed

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, words one space apart; articles stay.

    Source: Natural Instructions' evaluation (Wang et al. 2022, arXiv 2204.07705), which O-LoRA's
    code uses too.
    """
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def spaced(text: str) -> str:
    """The text with its words one space apart, else as it is."""
    return " ".join(text.split())


def exact_match(prediction: str, references: Sequence[str], source: str) -> float:  # noqa: ARG001
    """1 where the prediction is one of the references, both `normalised`."""
    return float(normalised(prediction) in map(normalised, references))


def strict_match(prediction: str, references: Sequence[str], source: str) -> float:  # noqa: ARG001
    """1 where the prediction is one of the references, letter for letter but for outer spaces."""
    return float(prediction.strip() in (reference.strip() for reference in references))


def first_character(
    prediction: str,
    references: Sequence[str],
    source: str,  # noqa: ARG001
) -> float:
    """1 where the first characters are equal: for answers that begin with the letter chosen."""
    said = prediction.strip()[:1]
    return float(bool(said) and said in (reference.strip()[:1] for reference in references))


def rouge_l(prediction: str, references: Sequence[str], source: str) -> float:  # noqa: ARG001
    """F-measure of the longest common subsequence of stems, the best over the references.

    By the rouge_score library (Lin 2004), with stemming, as Natural Instructions has it. The
    `rouge` package that TRACE uses gives other numbers.
    """
    scorer = _rouge()
    return max(
        float(scorer.score(reference, prediction)["rougeL"].fmeasure) for reference in references
    )


def edit_similarity(
    prediction: str,
    references: Sequence[str],
    source: str,  # noqa: ARG001
) -> float:
    """2 M / T of matching blocks, to two places, of code whose literals are filled in.

    As TRACE scores Py150, whose masked literals become <NUM_LIT> 0, <STR_LIT> "", and
    <NUM_LIT:1> 1: fuzzywuzzy's ratio by Python's difflib. 0 where either is empty.
    """
    said = _literals(prediction)
    pairs = ((said, _literals(reference)) for reference in references)
    return max(round(SequenceMatcher(None, a, b).ratio(), 2) if a and b else 0.0 for a, b in pairs)


def sari(prediction: str, references: Sequence[str], source: str) -> float:
    """How well a simplification adds, keeps and deletes n-grams of its source, n = 1..4.

    The mean of F1 of addition, F1 of keeping and precision of deletion, each the mean over n, of
    lower-cased tokens (mteval-v13a); 0/0 is 1. Source: Xu et al. 2016, "Optimizing Statistical
    Machine Translation for Text Simplification", in the form of Hugging Face's `evaluate`.
    """
    said, given = _tokens(prediction), _tokens(source)
    wanted = [_tokens(reference) for reference in references]
    parts = [
        _sari_of(_grams(given, n), _grams(said, n), [_grams(w, n) for w in wanted])
        for n in range(1, 5)
    ]
    return sum(map(sum, parts)) / (3 * len(parts))


#: A prediction, the right answers and what the instruction was applied to, to a number in [0, 1].
Score = Callable[[str, Sequence[str], str], float]
SCORES: Mapping[str, Score] = MappingProxyType(
    {
        "exact_match": exact_match,
        "strict_match": strict_match,
        "first_character": first_character,
        "rouge_l": rouge_l,
        "edit_similarity": edit_similarity,
        "sari": sari,
    }
)
#: Scores to which case and punctuation matter.
_LITERAL = frozenset({"strict_match", "first_character", "edit_similarity"})


@dataclass(frozen=True)
class Judgement:
    """One answer under several points of view, each in [0, 1].

    Attributes:
        score: The task's own.
        answer: 1 where the right answer is in what was said, whatever else was: with labels, the
            first one named; else the words of a reference, in a row.
        format: 1 where it has the form that the task asks for: one of the labels and no more; the
            pattern; without either, it came to an end.
    """

    score: float
    answer: float
    format: float


def judge(
    prediction: str, ended: bool, references: Sequence[str], source: str, task: Task
) -> Judgement:
    """Scores one answer, content apart from form.

    A model that knows the answer and says it in the style of another task has lost form, not
    knowledge (superficial forgetting in the words of SEFE, Chen et al., ICML 2025).

    Args:
        prediction: What the model said.
        ended: Whether the end token came.
        references: Right answers.
        source: What the instruction was applied to.
        task: What is asked for.
    """
    form = spaced if task.score in _LITERAL else normalised
    said, right = form(prediction), [form(reference) for reference in references]
    labels = [form(label) for label in task.labels]
    if labels:
        content, formed = _first_named(said, labels) in right, said in labels
    else:
        content = any(_names(said, reference) for reference in right)
        formed = ended
        if task.pattern:
            formed = re.fullmatch(task.pattern, prediction.strip()) is not None
    score = SCORES[task.score](prediction, references, source)
    return Judgement(score, float(content), float(formed))


def _names(said: str, wanted: str) -> bool:
    """Whether some words are among others, in a row."""
    return f" {wanted} " in f" {said} " if wanted else not said


def _first_named(said: str, labels: Sequence[str]) -> str | None:
    """The label that is named first; of several at one place the longest."""
    text = f" {said} "
    found = [(text.index(f" {x} "), -len(x), x) for x in labels if x and f" {x} " in text]
    if not found:
        return "" if not said and "" in labels else None
    return min(found)[2]


@functools.cache
def _rouge() -> Any:
    scorer = needed("rouge_score.rouge_scorer")
    return scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _literals(code: str) -> str:
    """Code with its masked literals filled in, as CodeXGLUE does."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.S)


def _tokens(text: str) -> list[str]:
    """Lower-cased tokens by the rules of NIST's mteval-v13a."""
    text = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for escaped, plain in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(escaped, plain)
    text = re.sub(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([\.,])", r"\1 \2 ", text)
    text = re.sub(r"([\.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return text.split()


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def _sari_of(
    source: Counter[Any], said: Counter[Any], references: Sequence[Counter[Any]]
) -> tuple[float, float, float]:
    """F1 of keeping, precision of deletion, F1 of addition, of n-grams of one length."""
    count = len(references)
    wanted: Counter[Any] = sum(references, Counter())
    given = Counter({gram: n * count for gram, n in source.items()})
    made = Counter({gram: n * count for gram, n in said.items()})
    kept, keepable = given & made, given & wanted
    rightly_kept = kept & wanted
    keep = _f1(
        _share(sum(n / kept[gram] for gram, n in rightly_kept.items()), len(kept)),
        _share(rightly_kept.total(), keepable.total()),
    )
    deleted = given - made
    rightly_deleted = deleted - wanted
    deletion = _share(sum(n / deleted[gram] for gram, n in rightly_deleted.items()), len(deleted))
    added, addable = set(said) - set(source), set(wanted) - set(source)
    addition = _f1(
        _share(len(added & addable), len(added)), _share(len(added & addable), len(addable))
    )
    return keep, deletion, addition


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    both = precision + recall
    return 2 * precision * recall / both if both else 0.0
