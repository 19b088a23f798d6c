"""PAL heads against closed forms: identity, mixtures, ideal points, hand values, and a fit that moves one user only."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign import rewards
from mmalign.errors import ModelError, RewardError
from mmalign.rewards.pal.fitting import (
    Choices,
    Population,
    accuracy,
    first_logits,
    fit,
    fit_user,
    losses,
    margins,
    parameter_groups,
    predict,
)
from mmalign.rewards.pal.folder import PalFolder
from mmalign.rewards.pal.network import HeadShape, PalHead
from mmalign.rewards.pal.settings import PalOptimConfig

WIDTH = 6


def make(variant: str = "b", prototypes: int = 3, *, moved: bool = True, seed: int = 1, **shape: object) -> PalHead:
    """A head; `moved` away from its first weights, so that nothing is the identity by chance."""
    settings: dict[str, object] = {"variant": variant, "width": WIDTH, "prototypes": prototypes, "hidden": 5, **shape}
    head = PalHead(HeadShape(**settings), scale=2.0, seed=seed)  # type: ignore[arg-type]
    if moved:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in head.parameters():
                value.add_(torch.randn(value.shape, generator=generator))
    return head


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(n: int = 8, users: int = 2, seed: int = 0) -> Choices:
    return Choices(
        pictures=draw(2 * n, WIDTH, seed=seed), texts=draw(n, WIDTH, seed=seed + 1), chosen=torch.arange(n),
        rejected=torch.arange(n, 2 * n), prompt=torch.arange(n), user=torch.arange(n) % users, p_chosen=torch.ones(n),
        weight=torch.ones(n),
    )  # fmt: skip


# ---------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("hidden", [0, 5])
def test_an_untrained_b_is_the_scaled_cosine_for_any_user(hidden: int) -> None:
    head = make(prototypes=3, moved=False, hidden=hidden)
    images, texts = draw(4, WIDTH), draw(4, WIDTH, seed=1)
    expected = 2.0 * torch.nn.functional.cosine_similarity(images, texts)
    for weights in (torch.full((4, 3), 1 / 3), torch.eye(3)[[0, 1, 2, 0]]):
        assert torch.allclose(head(images, texts, weights), expected, atol=1e-6)


@pytest.mark.parametrize("variant", ["a", "b"])
def test_prototypes_and_weights_permuted_together_change_nothing(variant: str) -> None:
    head, other = make(variant), make(variant)
    images, texts, weights = draw(4, WIDTH), draw(4, WIDTH, seed=1), torch.softmax(draw(4, 3), -1)
    order = [2, 0, 1]
    if variant == "a":
        other.points.data = head.points.data[order]
    else:
        for place, source in enumerate(order):
            other.guides[place].load_state_dict(head.guides[source].state_dict())
    assert torch.allclose(head(images, texts, weights), other(images, texts, weights[:, order]), atol=1e-6)


@pytest.mark.parametrize("variant", ["a", "b"])
def test_equal_prototypes_make_weights_irrelevant_and_give_them_no_gradient(variant: str) -> None:
    head = make(variant)
    if variant == "a":
        head.points.data[:] = head.points.data[0]
    else:
        for guide in head.guides:
            guide.load_state_dict(head.guides[0].state_dict())
    logits = draw(4, 3).requires_grad_(True)
    scores = head(draw(4, WIDTH), draw(4, WIDTH, seed=1), torch.softmax(logits, -1))
    alone = head(draw(4, WIDTH), draw(4, WIDTH, seed=1), torch.eye(3)[[0, 1, 2, 0]])
    assert torch.allclose(scores, alone, atol=1e-5)
    scores.sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-5


def test_one_hot_weights_choose_a_prototype_of_their_own() -> None:
    head, images, texts = make("b"), draw(4, WIDTH), draw(4, WIDTH, seed=1)
    prompts = texts / texts.norm(dim=-1, keepdim=True)
    for k in range(3):
        expected = head.scale * torch.nn.functional.cosine_similarity(head.place(images), head.guides[k](prompts))
        assert torch.allclose(head(images, texts, torch.eye(3)[[k] * 4]), expected, atol=1e-6)


@pytest.mark.parametrize(("variant", "loss"), [("a", "hinge"), ("a", "logistic"), ("b", "logistic")])
def test_what_lies_at_the_ideal_point_is_liked_best_and_training_moves_there(variant: str, loss: str) -> None:
    """A sign turned round anywhere, as in the released logistic form of distances, fails here."""
    head = make(variant, hidden=0)
    ideal = head.ideal(torch.tensor([[0.2, 0.3, 0.5]]), head.prototypes(draw(1, WIDTH)))
    others = draw(50, WIDTH, seed=3)
    assert (head.near(ideal, ideal) > head.near(others, ideal)).all()
    margin = torch.tensor([0.3], requires_grad=True)
    losses(margin, torch.ones(1), loss).sum().backward()
    assert margin.grad is not None and margin.grad.item() < 0, "a larger margin must be a smaller loss"


def test_the_hinge_of_distances_by_hand() -> None:
    """Distances 1 and 3 from the ideal point: y_hat = -2 for left preferred has no loss, the other way round 3."""
    head = PalHead(HeadShape(variant="a", width=2, prototypes=1, hidden=0), scale=1.0)
    ideal = torch.tensor([[0.0, 0.0]])
    left, right = head.near(torch.tensor([[1.0, 0.0]]), ideal), head.near(torch.tensor([[0.0, 3.0]]), ideal)
    assert (left.item(), right.item()) == (-1.0, -3.0)
    assert losses(left - right, torch.ones(1), "hinge").item() == 0.0
    assert losses(right - left, torch.ones(1), "hinge").item() == 3.0
    # A soft label of 0.75 pays both ways in proportion.
    assert losses(left - right, torch.tensor([0.75]), "hinge").item() == pytest.approx(0.25 * 3)


@pytest.mark.parametrize("variant", ["a", "b"])
def test_margins_are_antisymmetric_and_equal_pictures_cost_log_two(variant: str) -> None:
    head, pairs = make(variant), choices()
    weights = torch.softmax(draw(8, 3), -1)
    swapped = replace(pairs, chosen=pairs.rejected, rejected=pairs.chosen)
    assert torch.allclose(margins(head, pairs, weights), -margins(head, swapped, weights), atol=1e-6)
    same = margins(head, replace(pairs, rejected=pairs.chosen), weights)
    assert torch.equal(same, torch.zeros(8))
    assert losses(same, torch.ones(8), "logistic").tolist() == pytest.approx([math.log(2)] * 8)


@pytest.mark.parametrize("shape", [{"variant": "b"}, {"variant": "a"}, {"variant": "a", "input": "both"}])
def test_the_length_of_embeddings_is_irrelevant(shape: dict[str, str]) -> None:
    head = make(**shape)  # type: ignore[arg-type]
    images, texts, weights = draw(4, WIDTH), draw(4, WIDTH, seed=1), torch.softmax(draw(4, 3), -1)
    assert torch.allclose(head(images, texts, weights), head(7 * images, 0.1 * texts, weights), atol=1e-5)


def test_the_three_orders_of_mapping_and_mixing() -> None:
    weights = torch.tensor([[0.2, 0.8]])
    heads = {mixing: make("a", 2, mixing=mixing) for mixing in ("f(Pw)", "f(P)w", "Pw")}
    points = heads["Pw"].points
    mapped = heads["Pw"].items
    expected = {"f(Pw)": mapped(weights @ points), "f(P)w": weights @ mapped(points), "Pw": weights @ points}
    for mixing, head in heads.items():
        assert torch.allclose(head.ideal(weights, head.prototypes(None)), expected[mixing], atol=1e-6)
    assert not torch.allclose(expected["f(Pw)"], expected["f(P)w"], atol=1e-3)


def test_shapes_without_meaning_are_refused() -> None:
    with pytest.raises(ModelError, match=r"variant is 'c'.*hidden at least 0"):
        HeadShape(variant="c", width=4, prototypes=1, hidden=-1)
    with pytest.raises(ModelError, match="belong to variant a"):
        HeadShape(variant="b", width=4, prototypes=1, hidden=1, input="both")
    with pytest.raises(ModelError, match="reads the prompt"):
        make("b")(draw(1, WIDTH), None, torch.ones(1, 3) / 3)


# ---------------------------------------------------------------------- fitting


def opposite(users: int, each: int, seed: int = 0) -> Choices:
    """Users with even numbers prefer the picture with more of the first number, the others the one with less."""
    n = users * each
    pictures = torch.nn.functional.normalize(draw(2 * n, WIDTH, seed=seed), dim=-1)
    user = torch.arange(n) % users
    first, second = torch.arange(n), torch.arange(n, 2 * n)
    likes = torch.where(user % 2 == 0, 1.0, -1.0) * (pictures[first, 0] - pictures[second, 0]) > 0
    return Choices(
        pictures=pictures, texts=draw(n, WIDTH, seed=seed + 1), chosen=torch.where(likes, first, second),
        rejected=torch.where(likes, second, first), prompt=torch.arange(n), user=user, p_chosen=torch.ones(n),
        weight=torch.ones(n),
    )  # fmt: skip


SETTINGS = PalOptimConfig(epochs=8, patience=8, batch_size=64, lr=0.15, user_lr=0.2, user_prior=0.3)


@pytest.mark.parametrize(("variant", "loss"), [("b", "logistic"), ("a", "hinge")])
def test_two_prototypes_learn_opposite_tastes_that_one_cannot_and_read_a_new_user(variant: str, loss: str) -> None:
    names = [f"u{number}" for number in range(8)]
    train, held, new = opposite(8, 40), opposite(8, 20, seed=5), opposite(2, 60, seed=9)
    found = {}
    for prototypes in (1, 2):
        head = PalHead(HeadShape(variant=variant, width=WIDTH, prototypes=prototypes, hidden=12), scale=4.0)
        start = first_logits(names, prototypes, noise=0.5, seed=0)
        fitted = fit(head, start, train, held, loss=loss, settings=SETTINGS, seed=0)
        known = accuracy(predict(head, held, torch.softmax(fitted.logits, -1)), held).micro
        people = Population.of(fitted.logits)
        few = []
        for user in (0, 1):
            rows = torch.nonzero(new.user == user).flatten()
            logits = fit_user(head, new.take(rows[:12]), people, loss=loss)
            weights = torch.softmax(logits, -1).expand(2, -1)
            few.append(accuracy(predict(head, new.take(rows[12:]), weights), new.take(rows[12:])).micro)
        found[prototypes] = (known, sum(few) / 2)
    assert found[1][0] < 0.65 and found[1][1] < 0.65, "one head for everybody cannot order opposite tastes"
    assert found[2][0] > 0.85 and found[2][1] > 0.8


def test_a_new_user_moves_nothing_else_and_depends_on_own_pairs_alone() -> None:
    head, pairs, people = make(), choices(), Population.of(draw(5, 3))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    own = pairs.take([0, 2, 4])
    logits = fit_user(head, own, people)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert all(value.requires_grad for value in head.parameters())
    # The same rows out of a larger table, whose other rows were changed, give the same bits.
    spoilt = replace(pairs, chosen=pairs.chosen.clone())
    spoilt.chosen[[1, 3, 5]] = 0
    assert torch.equal(fit_user(head, spoilt.take([0, 2, 4]), people), logits)
    assert not torch.allclose(torch.softmax(logits, -1), people.weights, atol=1e-3)


def test_no_pairs_or_only_skipped_ones_are_the_population() -> None:
    head, people = make(), Population.of(torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    expected = torch.softmax(torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), -1).mean(0)
    assert torch.allclose(people.weights, expected, atol=1e-6)
    skipped = replace(choices(2), weight=torch.zeros(2))
    for pairs in (choices().take([]), skipped):
        assert torch.allclose(torch.softmax(fit_user(head, pairs, people), -1), expected, atol=1e-6)


def test_every_parameter_is_in_one_group_and_a_step_moves_each() -> None:
    for variant in ("a", "b"):
        head, users = make(variant), torch.nn.Parameter(draw(2, 3))
        groups = parameter_groups(head, users, SETTINGS)
        listed = [id(value) for group in groups for value in group["params"]]  # type: ignore[attr-defined]
        assert sorted(listed) == sorted(id(value) for value in [*head.parameters(), users])
        before = {name: value.clone() for name, value in head.state_dict().items()}
        fit(head, users.data, choices(), choices(seed=7), loss="logistic",
            settings=PalOptimConfig(epochs=1, patience=1), seed=0)  # fmt: skip
        assert before.keys() == head.state_dict().keys()


def test_a_fit_is_a_function_of_its_seed_and_keeps_its_best_epoch() -> None:
    def run(seed: int) -> tuple[Tensor, list[float], int]:
        head = PalHead(HeadShape(variant="b", width=WIDTH, prototypes=2, hidden=4), scale=4.0)
        found = fit(head, first_logits(["x", "y"], 2, noise=0.5, seed=0), opposite(2, 40), opposite(2, 20, seed=3),
                    loss="logistic", settings=PalOptimConfig(epochs=12, patience=12, batch_size=16), seed=seed)  # fmt: skip
        held = opposite(2, 20, seed=3)
        margin = predict(head, held, torch.softmax(found.logits, -1))
        best = float(losses(margin, held.p_chosen, "logistic").mean())
        assert best == pytest.approx(min(found.validation_loss), abs=1e-6)
        return found.logits, list(found.validation_loss), found.epoch

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first[0], again[0]) and first[1:] == again[1:]
    assert first[1] != other[1]


def test_accuracy_leaves_out_ties_and_halves_equal_rewards() -> None:
    pairs = replace(choices(4), p_chosen=torch.tensor([1.0, 0.5, 0.9, 1.0]), user=torch.tensor([0, 0, 0, 1]))
    found = accuracy(torch.tensor([1.0, 9.0, 0.0, -1.0]), pairs)
    assert (found.pairs, found.micro, found.macro) == (3, 0.5, pytest.approx(0.375))
    assert found.by_user == (0.75, 0.0)


# ---------------------------------------------------------------------- as a reward


@pytest.fixture
def folder(clip_folder: Path, tmp_path: Path) -> Path:
    """A head over a tiny real CLIP, with users ann and bob (one-hot), and cleo who came later."""
    encoder = rewards.load_backend("clipscore-logits", clip_folder, "cpu", "fp32")
    width = encoder.net.shape.embedding  # type: ignore[attr-defined]
    head = PalHead(HeadShape(variant="b", width=width, prototypes=2, hidden=3), scale=5.0)
    with torch.no_grad():
        for number, guide in enumerate(head.guides):
            guide.outer.bias += 40 * draw(width, seed=number)
    made = PalFolder(
        head=head, names=[], logits=torch.tensor([[20.0, 0.0], [0.0, 20.0], [1.0, 0.0]]), known=2, loss="logistic", facts={},
        encoder={"name": "clipscore-logits", "path": str(clip_folder), "weights": encoder.identity}, salt="00ff",
    )  # type: ignore[attr-defined]  # fmt: skip
    made.names = [made.stored_name(name) for name in ("ann", "bob", "cleo")]
    made.save(tmp_path / "pal")
    return tmp_path / "pal"


def test_rows_are_scored_for_their_own_users(folder: Path, pictures: list[Image.Image], prompts: list[str]) -> None:
    scorer = rewards.load(f"pal:{folder}", device="cpu")
    images, texts = pictures[:4], ["a red circle", "blue", "a star", "red"]
    ann, bob = (scorer.score(images, texts, users=user) for user in ("ann", "bob"))
    assert not torch.allclose(ann, bob, atol=1e-3)
    mixed = scorer.score(images, texts, users=["ann", "bob", "bob", "ann"])
    assert torch.allclose(mixed, torch.stack([ann[0], bob[1], bob[2], ann[3]]), atol=1e-5)
    assert torch.allclose(scorer.score(images, texts, users={"ann": 1.0, "bob": 0.0}), ann, atol=1e-6)
    nobody = scorer.score(images, texts, details=True)
    half = scorer.score(images, texts, users={"ann": 0.5, "bob": 0.5})
    assert torch.allclose(nobody.values, half, atol=1e-4), "nobody is the mean of the users of the fit, without cleo"
    assert all("no_user" in flags for flags in nobody.flags)
    assert torch.allclose(rewards.load(f"pal:{folder}#bob", device="cpu").score(images, texts, users="ann"), bob, atol=1e-6)
    lists = scorer.rank([images[:2], images[2:]], texts[:2], users=["ann", "bob"])
    assert torch.allclose(lists[1], scorer.score(images[2:], texts[1], users="bob"), atol=1e-5)
    assert torch.allclose(scorer.prefer(images[:1], images[1:2], texts[:1], users="bob"),
                          torch.sigmoid(bob[:1] - scorer.score(images[1:2], texts[:1], users="bob")), atol=1e-5)  # fmt: skip


def test_the_encoder_is_shared_and_other_rewards_are_not_disturbed(
    folder: Path, clip_folder: Path, pictures: list[Image.Image]
) -> None:
    name = f"pal:{folder}"
    both = rewards.load([name, "clipscore-logits"], {"clipscore-logits": clip_folder}, "cpu")
    images, texts = pictures[:3], ["a red circle", "blue", "a star"]
    found = both.score(images, texts, details=True, on_error="nan", users=["nobody-known", "ann", None])
    assert both.engine.counters.images_encoded and sum(both.engine.counters.images_encoded.values()) == 3
    assert found[name].errors == ("unknown_user", None, None)
    assert "fit-user" in str(found[name].messages[0])
    assert bool(torch.isnan(found[name].values[0])) and bool(torch.isfinite(found[name].values[1:]).all())
    alone = rewards.load("clipscore-logits", clip_folder, "cpu").score(images, texts)
    assert torch.allclose(found["clipscore-logits"].values, alone, atol=1e-5)


def test_wrong_users_are_refused_and_an_option_takes_them_for_the_population(
    folder: Path, pictures: list[Image.Image]
) -> None:
    scorer = rewards.load(f"pal:{folder}", device="cpu")
    with pytest.raises(RewardError, match="'zoe' is not among the 3 users"):
        scorer.score(pictures[:1], "red", users="zoe")
    with pytest.raises(RewardError, match="sum to 1"):
        scorer.score(pictures[:1], "red", users={"ann": 0.5, "bob": 0.4})
    with pytest.raises(RewardError, match="1 images but 2 users"):
        scorer.score(pictures[:1], "red", users=["ann", "bob"])
    with pytest.raises(RewardError, match="is a float"):
        scorer.score(pictures[:1], "red", users=[0.5])  # type: ignore[list-item]
    with pytest.raises(RewardError, match="'zoe' is not among"):
        rewards.load(f"pal:{folder}#zoe", device="cpu")
    lenient = rewards.load("pal", folder, "cpu", unknown="population")
    found = lenient.score(pictures[:1], "red", users="zoe", details=True)
    assert found.flags[0] == ("unknown_user",)
    assert torch.allclose(found.values, scorer.score(pictures[:1], "red"), atol=1e-6)


def test_pixels_have_a_gradient_for_their_user(folder: Path) -> None:
    scorer = rewards.load(f"pal:{folder}", device="cpu")
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    scorer.score_tensor(pixels, "red", users=["ann", "bob"]).sum().backward()
    assert pixels.grad is not None and (pixels.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    with pytest.raises(RewardError, match="row 1: unknown_user"):
        scorer.score_tensor(pixels, "red", users=["ann", "zoe"])


def test_users_come_and_go_and_names_are_not_on_disk(folder: Path) -> None:
    made = PalFolder.load(folder)
    assert "ann" not in (folder / "card.json").read_text() and made.has("ann") and not made.has("zoe")
    made.put("zoe", torch.tensor([3.0, 0.0]))
    made.put("zoe", torch.tensor([0.0, 3.0]))
    with pytest.raises(RewardError, match="fitted together with the head"):
        made.put("ann", torch.tensor([0.0, 0.0]))
    made.save(folder)
    again = PalFolder.load(folder)
    assert len(again.names) == 4 and torch.equal(again.weights("zoe"), torch.softmax(torch.tensor([0.0, 3.0]), -1))
    population = again.population.weights
    again.remove("zoe")
    again.remove("cleo")
    assert torch.equal(again.population.weights, population) and again.known == 2
    again.remove("bob")
    assert again.known == 1 and torch.allclose(again.population.weights, again.weights("ann"), atol=1e-6)
    with pytest.raises(RewardError, match="last of the population|last user"):
        again.remove("ann")


def test_damaged_folders_and_other_encoders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no PAL head here"):
        rewards.load(f"pal:{tmp_path / 'nothing'}")
    with pytest.raises(RewardError, match="weights"):
        rewards.load("pal", folder, "cpu", encoder=_other_clip(tmp_path))
    card = folder / "card.json"
    text = card.read_text()
    card.write_text(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(ModelError, match="newer"):
        PalFolder.load(folder)
    card.write_text(text.replace('"known": 2', '"known": 7'))
    with pytest.raises(ModelError, match="logits of"):
        PalFolder.load(folder)
    card.write_text(text)
    (folder / "head.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match="not a readable safetensors"):
        PalFolder.load(folder)


def _other_clip(tmp_path: Path) -> Path:
    from safetensors.torch import load_file, save_file

    from tests.rewards.tiny_checkpoints import make_clip

    other = tmp_path / "other"
    other.mkdir()
    make_clip(other)
    file = next(other.glob("*.safetensors"))
    state = load_file(file)
    state["text_projection.weight"] = state["text_projection.weight"] + 0.1
    save_file(state, file, metadata={"format": "pt"})
    return other
