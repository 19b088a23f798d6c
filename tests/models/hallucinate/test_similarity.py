"""How alike two answers are: counts of words by hand, and a sentence encoder as sentence-transformers saves it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.errors import ModelError
from mmalign.models.hallucinate.similarity import SentenceEncoder, WordSimilarity, load_similarity

TEXTS = ["a red circle", "a red circle on grey ground", "nothing"]


def test_counts_of_words_and_neighbours_by_hand() -> None:
    """a, red, circle, (a red), (red circle) against a, blue, circle, (a blue), (blue circle): 2 shared of 5 and 5."""
    found = WordSimilarity().compare(["A red circle.", "A red circle", "x", ""], ["a blue circle", "a red, circle!", "y", ""])
    assert found == [pytest.approx(2 / 5), pytest.approx(1.0), 0.0, 1.0]
    # Twice the same word counts twice: (2,1,1,...) against (1,1,...) with the pairs (a b), (b a) and (a b)
    assert WordSimilarity().compare(["a b a"], ["a b"])[0] == pytest.approx(4 / math.sqrt((4 + 1 + 1 + 1) * 3))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MPNet with the files that sentence-transformers writes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import MPNetConfig, MPNetModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "[UNK]", "<mask>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    model = MPNetModel(MPNetConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                   intermediate_size=24, max_position_embeddings=40))  # fmt: skip
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps(
        [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
         {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
         {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}]))  # fmt: skip
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7, "do_lower_case": False}))
    pooling(folder, "mean")
    return folder


def pooling(folder: Path, mode: str) -> None:
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
    name = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "mean_sqrt_len": "mean_sqrt_len_tokens"}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    settings: dict[str, Any] = {f"pooling_mode_{one}": one == name.get(mode, mode) for one in modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **settings}))


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "mean_sqrt_len", "lasttoken"])
def test_sentences_are_pooled_as_the_folder_says(encoder: Path, mode: str) -> None:
    """One text at a time without padding, pooled by hand; in one batch the same."""
    pooling(encoder, mode)
    made = SentenceEncoder(str(encoder))
    wanted = []
    with torch.no_grad():
        for text in TEXTS:
            ids = made.tokenizer(text, return_tensors="pt", truncation=True, max_length=7)
            states = made.model(**ids).last_hidden_state[0]
            one = {"mean": states.mean(0), "cls": states[0], "max": states.amax(0), "lasttoken": states[-1],
                   "mean_sqrt_len": states.sum(0) / math.sqrt(len(states))}[mode]  # fmt: skip
            wanted.append(one / one.norm())
    assert torch.allclose(made.embed(TEXTS), torch.stack(wanted), atol=1e-6)
    assert made.compare([TEXTS[0]], [TEXTS[1]])[0] == pytest.approx(float(wanted[0] @ wanted[1]), abs=1e-6)
    assert made.compare(TEXTS, TEXTS) == [pytest.approx(1.0, abs=1e-6)] * 3
    pooling(encoder, "mean")


def test_long_texts_are_cut_as_the_folder_says(encoder: Path) -> None:
    made = SentenceEncoder(str(encoder))
    assert made.length == 7
    assert torch.equal(made.embed(["a a a a a a a red"]), made.embed(["a a a a a a a circle"]))


def test_no_path_is_the_embedded_measure_and_a_path_the_encoder(encoder: Path) -> None:
    assert load_similarity(None).name == "words"
    assert load_similarity(str(encoder)).name == f"encoder:{encoder.name}"


def test_a_plain_encoder_without_modules_is_averaged(encoder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(encoder, tmp_path / "plain")
    (tmp_path / "plain" / "modules.json").unlink()
    assert SentenceEncoder(str(tmp_path / "plain")).pooling == "mean"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "modules.json").write_text(json.dumps(
            [{"path": "", "type": "x.Transformer"}, {"path": "2_Dense", "type": "x.Dense"}])), "module 'Dense'"),
        (lambda f: (f / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_weightedmean_tokens": True})),
         "pooling .* is not known"),
        (lambda f: (f / "1_Pooling" / "config.json").unlink(), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "no sentence encoder can be loaded"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_read_are_named(encoder: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    import shutil

    shutil.copytree(encoder, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    with pytest.raises(ModelError, match=message):
        SentenceEncoder(str(tmp_path / "spoilt"))
