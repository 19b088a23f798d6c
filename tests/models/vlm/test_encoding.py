"""From records to batches: what an answer's tokens are, what is refused and why, what a batch holds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign.branches import Answer, BranchRecord, Message, Part, VideoRef
from mmalign.errors import ModelError
from mmalign.models.vlm.base import VlmFamily
from mmalign.models.vlm.errors import VlmDataError
from mmalign.types import ImageRef
from tests.fixtures.tiny_vlm import VARIANTS, clip, load, picture, record

Loaded = Callable[[str], VlmFamily]

ENDS = {
    "llava": "</s>", "llava_next": "</s>", "llava_onevision": "<|im_end|>\n",
    "qwen2_vl": "<|im_end|>\n", "qwen2_5_vl": "<|im_end|>\n",
    "qwen3_vl": "<|im_end|>\n", "smolvlm": "<end_of_utterance>\n", "idefics3": "<end_of_utterance>\n",
    "internvl": "<|im_end|>\n", "gemma3": "<end_of_turn>\n",
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_targets_are_the_answer_and_its_turn_end(name: str, tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family(name)
    example = family.encode(record(media=[picture(1)]))
    batch = family.collate([example])
    texts = [family.tokenizer.decode(ids) for ids in example.rows[0].branches]
    assert [text.lstrip() for text in texts] == [f"a red circle{ENDS[name]}", f"there is nothing here, no star{ENDS[name]}"]
    read = [batch.target[0][batch.seg[0] == k + 1] for k in range(2)]
    assert all(torch.equal(*both) for both in zip(read, example.rows[0].branches, strict=True))
    placeholder = torch.isin(batch.target, torch.tensor(sorted(family.placeholder_ids)))
    assert not (placeholder & (batch.seg > 0)).any()
    # Every prediction is read one token before its target, and the first of every answer at the prompt's last token.
    for column in range(batch.target.shape[1]):
        place = int(batch.pred_index[0, column])
        if int(batch.offset[0, column]) == 0:
            assert place == batch.prefix_lengths[0] - 1
        else:
            assert batch.input_ids[0, place + 1] == batch.target[0, column]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_prompt_is_what_the_processor_makes_of_the_template(name: str, tiny_vlm_family: Loaded) -> None:
    """One start token, never two; placeholders as many as features."""
    family = tiny_vlm_family(name)
    example = family.encode(record(media=[picture(1)]))
    prefix = example.rows[0].prefix
    bos = family.tokenizer.bos_token_id
    if bos is not None and name not in ("smolvlm", "idefics3"):
        assert (prefix == bos).sum() == 1 and prefix[0] == bos
    batch = family.collate([example])
    with torch.no_grad():
        features = family.vision_features(family.network, batch)
    count = sum(len(features.image[unit]) for unit in batch.media.image_rows[0])
    assert family.image_token_positions(batch).sum() == count == (prefix == family.image_token_id).sum()


def test_equal_media_are_held_and_encoded_once(tiny_vlm_family: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny_vlm_family("llava")
    items = [record(str(n), media=[picture(1 + n % 2), picture(1)]) for n in range(3)]
    batch = family.collate([family.encode(item) for item in items])
    assert batch.media.image["pixel_values"].shape[0] == 2 and batch.media.image_rows == ((0, 0), (1, 0), (0, 0))
    tower = family.network.model.vision_tower
    seen: list[int] = []
    handle = tower.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    try:
        with torch.no_grad():
            for prefix in ("shared", "plain"):
                family.log_probs(family.network, batch, prefix=prefix)  # type: ignore[arg-type]
            assert seen == [2, 2]
            vision = family.vision_features(family.network, batch)
            family.log_probs(family.network, batch, vision=vision)
            family.log_probs(family.network, batch, vision=vision, prefix="plain")
            assert seen == [2, 2, 2]
    finally:
        handle.remove()


def test_lists_single_answers_and_pairs_share_a_batch(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    answers = (Answer(text="yes", label=1.0, scores={"judge": 2.0}), Answer(text="no", label=0.0), Answer(text="a star"))
    items = [
        replace(record("list"), answers=answers), record("one", answers=["yes"]),
        record("pair", p_chosen=0.8, weight=0.5, margin=0.25, group="g", stage=2),
    ]  # fmt: skip
    batch = family.collate([family.encode(item) for item in items])
    assert batch.counts == (3, 1, 2) and batch.record.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.answer.tolist() == [0, 1, 2, 0, 0, 1]
    nan = float("nan")
    assert batch.label.tolist() == pytest.approx([1, 0, nan, nan, 1, 0], nan_ok=True)
    assert batch.scores["judge"].tolist() == pytest.approx([2.0, nan, nan, nan, nan, nan], nan_ok=True)
    assert batch.p_chosen[2] == pytest.approx(0.8) and batch.weight.tolist() == [1, 1, 0.5] and batch.margin[2] == 0.25
    assert batch.groups == (None, None, "g") and batch.stages == (0, 0, 2)
    table, mask = batch.table(torch.arange(6.0), fill=-1.0)
    assert table.tolist() == [[0, 1, 2], [3, -1, -1], [4, 5, -1]]
    assert mask.sum() == 6
    with pytest.raises(ValueError, match="two answers"):
        batch.pair(torch.arange(6.0))
    with torch.no_grad():
        found = family.log_probs(family.network, batch, per_token=True)
    assert found.tokens is not None and found.mask is not None
    assert torch.allclose(found.tokens.sum(-1), found.sum, atol=1e-4)
    assert torch.equal(found.mask.sum(-1), batch.lengths) and torch.equal(found.length, batch.lengths.float())


def test_answers_with_media_of_their_own_share_no_prompt(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("qwen2_5_vl")
    base = record(media=[picture(1)])
    own = replace(base, answers=(base.answers[0], replace(base.answers[0], media=(picture(2, (64, 30)),))))
    example = family.encode(own)
    assert example.flags == ("own_media",) and len(example.rows) == 2
    batch = family.collate([example, family.encode(base)])
    assert batch.unshared == 1 and batch.flat.max() == 3 and batch.input_ids.shape[0] == 3
    with torch.no_grad():
        found = family.log_probs(family.network, batch)
        plain = family.log_probs(family.network, batch, prefix="plain")
    assert torch.allclose(found.sum, plain.sum, rtol=1e-5)
    assert found.sum[0] == pytest.approx(float(found.sum[2]), rel=1e-5)
    assert abs(float(found.sum[0] - found.sum[1])) > 1e-4


def test_token_weights_follow_character_spans(tiny_vlm_family: Loaded) -> None:
    """'red' weighs 3 and 'circle' 0; the sum is that of the weighted tokens."""
    family = tiny_vlm_family("qwen2_5_vl")
    text = "a red circle"
    item = replace(record(), answers=(Answer(text=text, spans=((2, 5, 3.0), (6, 12, 0.0))), Answer(text="no")))
    example = family.encode(item)
    ids, weights = example.rows[0].branches[0], example.rows[0].weights[0]
    assert weights is not None and example.rows[0].weights[1] is None
    text_so_far, by_word = "", {"red": set(), "circle": set(), "end": set()}
    for number, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        middle = len(text_so_far) + len(family.tokenizer.decode([number])) / 2
        text_so_far += family.tokenizer.decode([number])
        by_word["red" if 2 <= middle < 5 else "circle" if 6 <= middle < 12 else "end" if middle > 12 else "red"].add(weight)
    assert by_word["circle"] == {0.0} and by_word["end"] == {1.0} and 3.0 in by_word["red"]
    with torch.no_grad():
        found = family.log_probs(family.network, family.collate([example]), per_token=True)
    assert found.tokens is not None
    assert float(found.sum[0]) == pytest.approx(float((found.tokens[0, : len(ids)] * weights).sum()), rel=1e-5)


def test_limits_cut_answers_and_never_media(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    item = record(media=[picture(1)], answers=["there is nothing here"] * 2)
    whole = family.encode(item).rows[0]
    room = len(whole.prefix) + 3
    cut = family.with_limits(max_length=room).encode(item)
    assert [len(ids) for ids in cut.rows[0].branches] == [3, 3] and "truncated" in cut.flags
    assert torch.equal(cut.rows[0].prefix, whole.prefix)
    assert family.tokenizer.eos_token_id not in cut.rows[0].branches[0]
    for limits in ({"max_length": len(whole.prefix)}, {"max_prefix": len(whole.prefix) - 1}):
        with pytest.raises(VlmDataError, match="tokens") as caught:
            family.with_limits(**limits).encode(item)
        assert caught.value.reason == "too_long"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"media": ()}, "placeholder_mismatch"),
        ({"media": (ImageRef(path="/no/such/file.png"),)}, "missing_media"),
        ({"media": (ImageRef(data=b"no picture", label="bytes"),)}, "undecodable_media"),
        ({"media": (clip(1),)}, "placeholder_mismatch"),
        ({"answers": (Answer(text="  "), Answer(text="x"))}, "empty_answer"),
        ({"answers": ()}, "empty_answer"),
        ({"answers": (Answer(text="a <image> here"), Answer(text="x"))}, "placeholder_in_answer"),
        ({"messages": (Message(role="user", parts=(Part(media=0), Part(text="<image> what?"))),)}, "placeholder_mismatch"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(change: dict[str, object], reason: str, tiny_vlm_family: Loaded) -> None:
    broken: BranchRecord = replace(record("bad", media=[picture(1)]), **change)  # type: ignore[arg-type]
    with pytest.raises(VlmDataError, match="bad") as caught:
        tiny_vlm_family("llava").encode(broken)
    assert caught.value.reason == reason


def test_a_processor_that_would_lose_pictures_is_not_asked(tiny_vlm_family: Loaded) -> None:
    """SmolVLM's processor hands frames over in the place of the pictures; both alone are fine."""
    family = tiny_vlm_family("smolvlm")
    for media in ([picture(1)], [clip(1), clip(2, 3)]):
        assert family.encode(record(media=media)).rows
    with pytest.raises(VlmDataError, match="it would lose the pictures") as refused:
        family.encode(record(media=[picture(1), clip(1)]))
    assert refused.value.reason == "placeholder_mismatch"


def test_threads_encode_alike(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("smolvlm")
    items = [record(str(number), media=[picture(number)], prompt=f"What? {number}") for number in range(6)]
    alone = [family.encode(item) for item in items]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(family.encode, items))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.rows[0].prefix, other.rows[0].prefix)
        assert [unit.digest for unit in one.rows[0].units] == [unit.digest for unit in other.rows[0].units]


def test_a_thinking_template_falls_back_to_its_turn_end(tiny_vlm_family: Loaded) -> None:
    """The generation prompt opens a block that rendered answers do not have: it is no prefix of them."""
    family = tiny_vlm_family("internvl")
    processor = family.local_processor()
    before = processor.chat_template
    processor.chat_template = before.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    try:
        example = family.encode(record(answers=["a red circle", "yes"]))
    finally:
        processor.chat_template = before
    texts = [family.tokenizer.decode(ids) for ids in example.rows[0].branches]
    assert family.tokenizer.decode(example.rows[0].prefix).endswith("<think>")
    assert texts == ["a red circle<|im_end|>\n", "yes<|im_end|>\n"]


def test_keys_of_a_reference_cache_change_with_one_pixel(tiny_vlm_family: Loaded) -> None:
    family = tiny_vlm_family("llava")
    item = record(media=[picture(1)])
    keys = family.reference_keys([family.encode(item)])
    assert len(set(keys)) == 2 and keys == family.reference_keys([family.encode(item)])
    other = family.reference_keys([family.encode(replace(item, media=(picture(2),)))])
    assert not set(keys) & set(other)


def test_template_only_adds_nothing(tiny_vlm_family: Loaded, tiny_vlm_folder: Callable[[str], Path]) -> None:
    """Vicuna's template writes neither a start token nor a turn end, and a space behind the answer."""
    family = load("llava", tiny_vlm_folder("llava"), template_only=True)
    row, usual = (made.encode(record(media=[picture(1)])).rows[0] for made in (family, tiny_vlm_family("llava")))
    assert torch.equal(row.prefix, usual.prefix[1:]) and usual.prefix[0] == family.tokenizer.bos_token_id
    assert family.tokenizer.decode(row.branches[0]) == " a red circle "
    assert family.tokenizer.decode(usual.branches[0]) == " a red circle</s>"


def test_tensors_that_nobody_knows_are_not_left_out(tiny_vlm_family: Loaded) -> None:
    with pytest.raises(ModelError, match="what its model does with depth_maps"):
        tiny_vlm_family("llava").cut({"input_ids": torch.zeros(1, 2), "depth_maps": torch.zeros(1)})


def test_video_files_are_sampled_at_a_rate(
    tiny_vlm_family: Loaded, tiny_vlm_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """40 frames at 10 a second: 2 a second give 8, of seconds 1 to 3 four, thinned to 4 by max_frames."""
    av = pytest.importorskip("av", reason="needs the extra video")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 56, 40, "yuv420p"
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((40, 56, 3), 6 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    family = tiny_vlm_family("llava_onevision")
    counts = []
    for reference, made in (
        (VideoRef(path=str(path)), family), (VideoRef(path=str(path), start=1.0, end=3.0), family),
        (VideoRef(path=str(path), fps=5.0), load("llava_onevision", tiny_vlm_folder("llava_onevision"), max_frames=4)),
    ):  # fmt: skip
        unit = made.encode(record(media=[reference])).rows[0].units[0]
        counts.append(len(unit.tensors["pixel_values_videos"]))
    assert counts == [8, 4, 4]
    with pytest.raises(VlmDataError) as caught:
        family.encode(record(media=[VideoRef(path=str(tmp_path / "none.mp4"))]))
    assert caught.value.reason == "missing_media"
