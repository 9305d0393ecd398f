"""What an evaluation found, and the metrics of summaries.

Every score is a share in [0, 1] (BLEU too, which sacrebleu gives in percent), so that one table can show them all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .data.summaries import sentences
from .errors import ConfigError

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SUMMARY_METRIC = "rougeLsum"
"""What summaries are chosen by. ROUGE-Lsum joins the longest common subsequences of single sentences, as the original
ROUGE does; it is what papers on CNN/DailyMail call ROUGE-L."""

BOOTSTRAPS = 1000
_NORMAL_95 = 1.959964
"""Standard errors in half a 95 % interval."""


@dataclass(frozen=True)
class Score:
    """A metric and its standard error over the items."""

    value: float
    stderr: float

    @classmethod
    def of(cls, items: Sequence[float]) -> "Score":
        """Mean of the items; its standard error, which is the binomial one where every item is 0 or 1."""
        mean = sum(items) / len(items)
        variance = sum((item - mean) ** 2 for item in items) / len(items)
        return cls(mean, math.sqrt(variance / len(items)))


@dataclass(frozen=True)
class Evaluation:
    """Result of a task."""

    metric: str
    """The one that learning rates are chosen by: ``accuracy``, ``exact_match`` or ``rougeLsum``."""
    value: float
    stderr: float
    items: tuple[float, ...]
    """Item by item, in the order of the data, so that two models can be compared in pairs."""
    others: Mapping[str, Score] = field(default_factory=dict)
    """Further metrics of the same answers."""

    @classmethod
    def of(
        cls, metric: str, items: Sequence[float], others: Mapping[str, Score] | None = None
    ) -> "Evaluation":
        """Mean and standard error of the items, with further metrics beside it."""
        score = Score.of(items)
        return cls(metric, score.value, score.stderr, tuple(map(float, items)), dict(others or {}))

    def as_dict(self) -> dict[str, Any]:
        """As JSON stores it; the items in one line of text, six digits each."""
        return {
            "metric": self.metric,
            "value": self.value,
            "stderr": self.stderr,
            "others": scores_as_dict(self.others),
            "items": " ".join(f"{item:g}" for item in self.items),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Evaluation":
        """The counterpart of ``as_dict``."""
        others = {name: Score(**score) for name, score in stored["others"].items()}
        items = tuple(map(float, stored["items"].split()))
        return cls(stored["metric"], stored["value"], stored["stderr"], items, others)


def scores_as_dict(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    """Scores as JSON stores them."""
    return {name: {"value": score.value, "stderr": score.stderr} for name, score in scores.items()}


def check_installed() -> None:
    """Say what the metrics of summaries need, before hours of training that they would end.

    Raises:
        ConfigError: sacrebleu or rouge-score is not installed.
    """
    try:
        import rouge_score.rouge_scorer  # noqa: F401
        import sacrebleu  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"summaries are judged by sacrebleu and rouge-score, and {error.name} is not installed; "
            "install them with: pip install 'bitdistill[eval]'"
        ) from error


def judge_summaries(answers: Sequence[str], references: Sequence[str]) -> Evaluation:
    """ROUGE-1/2/L/Lsum (F1 with Porter's stemmer, averaged over the items) and BLEU (sacrebleu, over the corpus).

    Sentences of both sides are told apart by ``data.summaries.sentences``. The standard error of BLEU, which is no
    mean of items, is half its bootstrapped 95 % interval over 1.96.

    Raises:
        ConfigError: sacrebleu or rouge-score is not installed.
    """
    check_installed()
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    lines = [["\n".join(sentences(text)) for text in texts] for texts in (references, answers)]
    found = [scorer.score(reference, answer) for reference, answer in zip(*lines, strict=True)]
    items = {name: [float(scores[name].fmeasure) for scores in found] for name in ROUGE}
    flat = [[" ".join(text.split()) for text in texts] for texts in (answers, references)]
    bleu = BLEU().corpus_score(flat[0], [flat[1]], n_bootstrap=BOOTSTRAPS)
    others = {name: Score.of(items[name]) for name in ROUGE if name != SUMMARY_METRIC}
    others["bleu"] = Score(bleu.score / 100, bleu._ci / _NORMAL_95 / 100)
    return Evaluation.of(SUMMARY_METRIC, items[SUMMARY_METRIC], others)
