"""Findings and words in common with reference reports: counts by hand, and the libraries' own values."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.errors import ConfigError, RewardError
from mmalign.rewards import overlap as module
from mmalign.rewards.findings import count_findings, load_extractor
from mmalign.rewards.overlap import missing, overlap
from mmalign.world.radiology import KINDS

NORMAL = "Normal heart size. The lungs are clear."
EFFUSION = "Normal heart size. Small left-sided pleural effusion."
BOTH = "Normal heart size. Small left-sided pleural effusion. Large right-sided nodule."
LARGE = "Normal heart size. Large left-sided pleural effusion."


def test_counts_and_rates_by_hand() -> None:
    references = [EFFUSION, EFFUSION, BOTH, NORMAL]
    candidates = [BOTH, LARGE, EFFUSION, "nothing that is read"]
    full = count_findings(load_extractor("cxr-findings"), references, candidates)
    # true: the effusion of studies 0 and 2; false: a nodule, a large effusion; missed: a small effusion, a nodule
    assert full.both.sum() == 2 and full.only_candidate.sum() == 2 and full.only_reference.sum() == 2 and full.unreadable == 1
    rates = full.rates()
    assert rates["micro_f1"] == pytest.approx(4 / 8) and rates["precision"] == rates["recall"] == 0.5
    # small left effusion: 2 of (2, 0, 1); large left effusion: (0, 1, 0); large right nodule: (0, 1, 1)
    assert rates["macro_f1"] == pytest.approx((4 / 5 + 0 + 0) / 3)
    kinds = count_findings(load_extractor("cxr-kinds"), references, candidates)
    assert kinds.labels == KINDS and kinds.rates()["micro_f1"] == pytest.approx(6 / 8)
    top, whole = full.parts()
    assert top.tolist() == [2, 0, 2, 0] and whole.tolist() == [3, 2, 3, 0]


def test_extractors_by_name_and_of_the_user_s_own() -> None:
    assert load_extractor("mmalign.world.extractors:StudyKinds").labels == KINDS
    with pytest.raises(ConfigError, match="did you mean 'cxr-kinds'"):
        load_extractor("cxr-kind")
    with pytest.raises(RewardError, match="no extractor: a class with labels"):
        load_extractor("mmalign.world.radiology:Study")
    with pytest.raises(RewardError, match="cannot read the reference report 0"):
        count_findings(load_extractor("cxr-findings"), ["who knows"], [NORMAL])


@pytest.mark.parametrize("name", ["bleu", "rouge-l"])
def test_likeness_without_a_model(name: str) -> None:
    if importlib.util.find_spec(module.LIBRARIES[name]) is None:
        pytest.skip(f"{module.LIBRARIES[name]} is not installed")
    found = overlap(name, [EFFUSION, EFFUSION], [EFFUSION, NORMAL])
    assert found.each[0] == pytest.approx(1.0) and found.each[1] < 0.7
    if name == "rouge-l":
        # "normal heart size" of 8 and 7 words (left-sided is two): 2 * 3 / 15
        assert found.each[1] == pytest.approx(6 / 15) and found.value == pytest.approx((1 + 6 / 15) / 2)


def test_bertscore_with_a_local_encoder(tmp_path: Path) -> None:
    if importlib.util.find_spec("bert_score") is None:
        pytest.skip("bert_score is not installed")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({word for text in (NORMAL, EFFUSION) for word in text.lower().replace(".", " .").replace("-", " - ").split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"), model_max_length=64).save_pretrained(tmp_path)
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=5 + len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(tmp_path)
    found = overlap("bertscore", [EFFUSION, EFFUSION], [EFFUSION, NORMAL], bertscore_model=str(tmp_path))
    assert found.each[0] == pytest.approx(1.0, abs=1e-5) and found.each[1] < 0.999
    assert found.value == pytest.approx(float(np.mean(found.each)))


def test_what_is_absent_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.LIBRARIES, "bleu", "no_such_library")  # type: ignore[misc]
    assert missing("bleu", None) == "no_such_library is not installed: pip install 'mmalign[reports]'"
    with pytest.raises(RewardError, match="bleu: no_such_library is not installed"):
        overlap("bleu", [NORMAL], [NORMAL])
    if importlib.util.find_spec("bert_score") is not None:
        assert missing("bertscore", None) == "no model is named: evaluate.reports.bertscore_model"
