"""Words shared with a reference report: BLEU, ROUGE-L and BERTScore, each by the library that its papers use, where installed.

They measure likeness, not truth: "no effusion" and "effusion" share most of their letters. They stand beside the judges for
comparison with published tables, and a library that is not there is said to be missing, never replaced by something like it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from mmalign.errors import RewardError

LIBRARIES: Final = {"bleu": "sacrebleu", "rouge-l": "rouge_score", "bertscore": "bert_score"}
"""Measure -> the library that computes it."""
EXTRA: Final = "reports"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """One measure of some candidates, in [0, 1]."""

    value: float
    """Over all of them: for BLEU that of the corpus, otherwise the mean."""
    each: np.ndarray
    """Per candidate ``[N]`` float64; of BLEU the sentence score, whose mean is not the corpus score."""


def missing(name: str, bertscore_model: str | None) -> str | None:
    """Why a measure cannot be computed here, with the remedy; None where it can."""
    library = LIBRARIES[name]
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed: pip install 'mmalign[{EXTRA}]'"
    if name == "bertscore" and bertscore_model is None:
        return "no model is named: evaluate.reports.bertscore_model"
    return None


def overlap(
    name: str, references: Sequence[str], candidates: Sequence[str], *, bertscore_model: str | None = None,
    layers: int | None = None,
) -> Overlap:  # fmt: skip
    """One measure of candidates against one reference each.

    Args:
        name: ``bleu`` (sacrebleu, its default tokens), ``rouge-l`` (F-measure with stemming), ``bertscore`` (F1, no rescaling).
        bertscore_model: local folder or hub id of an encoder.
        layers: which of its layers BERTScore reads; default: the library's choice for known models, else the last.

    Raises:
        RewardError: its library or model is missing; see `missing`.
    """
    why = missing(name, bertscore_model)
    if why is not None:
        raise RewardError(f"{name}: {why}")
    if name == "bleu":
        return _bleu(references, candidates)
    if name == "rouge-l":
        return _rouge(references, candidates)
    return _bertscore(references, candidates, str(bertscore_model), layers)


def _bleu(references: Sequence[str], candidates: Sequence[str]) -> Overlap:
    import sacrebleu

    corpus = sacrebleu.corpus_bleu(list(candidates), [list(references)])
    each = [
        sacrebleu.sentence_bleu(candidate, [reference]).score / 100
        for reference, candidate in zip(references, candidates, strict=True)
    ]
    return Overlap(value=corpus.score / 100, each=np.asarray(each, np.float64))


def _rouge(references: Sequence[str], candidates: Sequence[str]) -> Overlap:
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    each = [
        scorer.score(reference, candidate)["rougeL"].fmeasure
        for reference, candidate in zip(references, candidates, strict=True)
    ]
    return Overlap(value=float(np.mean(each)) if each else 0.0, each=np.asarray(each, np.float64))


def _bertscore(references: Sequence[str], candidates: Sequence[str], model: str, layers: int | None) -> Overlap:
    from bert_score import BERTScorer
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    if layers is None and model not in model2layers:
        layers = int(AutoConfig.from_pretrained(model, local_files_only=Path(model).is_dir()).num_hidden_layers)
    try:
        scorer = BERTScorer(model_type=model, num_layers=layers, device="cpu")
        _, _, found = scorer.score(list(candidates), list(references))
    except (OSError, ValueError, KeyError, OverflowError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RewardError(f"bertscore: '{model}' cannot be used: {first}") from error
    each = found.double().numpy()
    return Overlap(value=float(each.mean()) if len(each) else 0.0, each=each)
