"""The judges of the sticker world are right on what they never saw, and wrong where they must be."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tools.tiny_training import classifier as classifier_stage
from tools.tiny_training import dual_encoder as judge_stage
from tools.tiny_training import encoder_metrics, hard_negatives
from tools.tiny_training.augmentations import Glimpses, caption_loss, identity_loss, spoil

from minikin import events
from minikin.errors import AssetError, BadPhoto, UnknownName
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders import weights
from minikin.tiny.encoders.classifier import Classifier
from minikin.tiny.encoders.dual_encoder import Judge, Tokens
from minikin.tiny.encoders.fields import UNKNOWN, fields_of, slots_of, truth
from minikin.tiny.encoders.preprocess import BLANK, as_batch
from minikin.tiny.world import World

EXAMPLES = Path(__file__).parents[2] / "examples"
# they are still being trained (docs/tiny.md); with them in place these tests run
NEEDS_WEIGHTS = pytest.mark.skipif(
    not all(weights.embedded(kind).exists() for kind in ("judge", "classifier")),
    reason="the judges' weights are not in this checkout yet",
)


@pytest.fixture(scope="module")
def world() -> World:
    return World("small", backdrops=8)


@pytest.fixture(scope="module")
def held(world: World) -> encoder_metrics.Held:
    """200 scenes of the test split, from a stream of their own."""
    return encoder_metrics.Held.draw(world, 200, seed=515)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.open()


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.open()


@pytest.fixture(scope="module")
def photos() -> dict[str, list[Image.Image]]:
    """The ten photos of every personal identity: drawings that no judge ever saw."""
    return {
        name: [Image.open(p) for p in sorted((EXAMPLES / name).rglob("*.jpg"))] for name in words.IDENTITIES
    }


# ---- how good they are -----------------------------------------------------------------------


def shares(
    classifier: Classifier, held: encoder_metrics.Held, true: Mapping[str, np.ndarray]
) -> dict[str, float]:
    found = encoder_metrics.accuracies(classifier.look(held.pictures), true)
    return {name: right / asked for name, (right, asked) in found.items() if asked}


@NEEDS_WEIGHTS
def test_classifier_is_right_on_held_out_scenes(classifier: Classifier, held: encoder_metrics.Held) -> None:
    """Thresholds: measured by `python -m minikin.tiny.encoders`, less 3 standard errors of 200."""
    right = shares(classifier, held, held.truth)
    least = {
        "first_object": 0.93, "background": 0.96, "layout": 0.95, "art": 0.93, "first_colour": 0.90,
        "first_pattern": 0.90, "count": 0.95, "size": 0.90, "second_object": 0.90, "objects": 0.88,
    }  # fmt: skip
    assert {k: v for k, v in right.items() if v < least.get(k, 0)} == {}


@NEEDS_WEIGHTS
def test_wrong_labels_are_found_wrong(classifier: Classifier, held: encoder_metrics.Held) -> None:
    """Control: the truth of the next scene is right about as often as chance."""
    moved = {k: np.roll(v, 1, axis=0) for k, v in held.truth.items()}
    right = shares(classifier, held, moved)
    assert right["first_object"] < 0.25
    assert right["background"] < 0.30


@NEEDS_WEIGHTS
def test_judge_finds_the_caption_among_fifty(judge: Judge, held: encoder_metrics.Held) -> None:
    assert encoder_metrics.caption_of(judge, held.pictures, held.captions) >= 0.84


@NEEDS_WEIGHTS
def test_shuffled_captions_do_not_fit(judge: Judge, held: encoder_metrics.Held) -> None:
    """Control: captions of the next scene are best as often as chance, 1 in 50."""
    moved = (*held.captions[1:], held.captions[0])
    assert encoder_metrics.caption_of(judge, held.pictures, moved) < 0.12
    fit = judge.fit(held.pictures, held.captions)
    own = fit.diagonal().mean()
    assert own > fit.mean() + 0.2


@NEEDS_WEIGHTS
@pytest.mark.parametrize("which", ["judge", "classifier"])
def test_likeness_knows_things_it_never_saw(which: str, request: pytest.FixtureRequest, photos) -> None:  # type: ignore[no-untyped-def]
    """Photos of the personal identities: the same thing against all others, no masks."""
    judge = request.getfixturevalue(which)
    vectors = {name: judge.likeness(p) for name, p in photos.items()}
    category = {name: i.category for name, i in words.IDENTITIES.items()}
    everyone, near = encoder_metrics.examples_auc(vectors, category)
    assert everyone >= 0.95
    assert near >= 0.90  # my_cat and my_cat2 differ in pattern alone
    mixed = torch.cat(list(vectors.values()))[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    control, _ = encoder_metrics.examples_auc(
        dict(zip(vectors, mixed.chunk(10), strict=True)), dict.fromkeys(vectors, "")
    )
    assert 0.35 < control < 0.65


@NEEDS_WEIGHTS
def test_likeness_with_masks_ignores_the_background(judge: Judge, world: World) -> None:
    """The same thing in the same place on two backgrounds: nearly one vector with masks."""
    scenes = [
        world.decide(np.random.default_rng(3), layout="single", background=b, identity="my_dog", size="huge")
        for b in ("plain_white", "plain_pink", "plain_green")
    ]
    drawn = [world.draw(s) for s in scenes]
    with_masks = judge.likeness([i for i, _ in drawn], [m[0] for _, m in drawn])
    assert (with_masks @ with_masks.T).min() > 0.9


# ---- what they take and give -----------------------------------------------------------------


@NEEDS_WEIGHTS
def test_vectors_are_unit_and_alone_or_in_company_the_same(judge: Judge, held: encoder_metrics.Held) -> None:
    some = held.pictures[:5]
    for make in (judge.image, judge.likeness):
        together = make(some)
        assert together.norm(dim=-1).numpy() == pytest.approx(1, abs=1e-4)
        alone = torch.cat([make(some[i : i + 1]) for i in range(5)])
        assert torch.allclose(together, alone, atol=1e-4)
    assert judge.text(["a cat"]).shape == together[:1].shape


def test_pictures_of_any_kind(held: encoder_metrics.Held) -> None:
    array = held.pictures[:2]
    batch = as_batch(array)
    assert batch.shape == (2, 3, 128, 128) and -1 <= batch.min() and batch.max() <= 1
    assert torch.equal(as_batch([Image.fromarray(p) for p in array]), batch)
    assert torch.equal(as_batch(batch), batch)
    assert as_batch([Image.new("L", (300, 200))]).shape == (1, 3, 128, 128)
    assert as_batch([]).shape == (0, 3, 128, 128)
    mask = np.zeros((128, 128), bool)
    mask[:64] = True
    masked = as_batch(array, [mask, None])
    assert torch.equal(masked[1], batch[1]) and torch.equal(masked[0, :, :64], batch[0, :, :64])
    assert masked[0, :, 64:].unique().tolist() == [pytest.approx(BLANK)]


def test_bad_pictures_are_refused() -> None:
    with pytest.raises(BadPhoto, match=r"\(h, w, 3\) of uint8, got \(8, 8\)"):
        as_batch(np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(BadPhoto, match=r"\(n, 3, h, w\)"):
        as_batch(torch.zeros(3, 8, 8))
    with pytest.raises(BadPhoto, match="1 images but 0 masks"):
        as_batch([Image.new("RGB", (8, 8))], [])


@NEEDS_WEIGHTS
def test_probabilities(classifier: Classifier, held: encoder_metrics.Held) -> None:
    verdicts = classifier.look(held.pictures[:4])
    assert verdicts.probability("background").sum(-1) == pytest.approx(1, abs=1e-4)
    assert verdicts.probability("background", "beach").shape == (4,)
    assert all(set(x) <= set(words.SMALL.categories) for x in verdicts.all("objects"))
    with pytest.raises(UnknownName, match="Unknown field 'colour'. Did you mean 'first_colour'"):
        verdicts.best("colour")
    with pytest.raises(UnknownName, match="Unknown answer to 'background' 'beech'. Did you mean 'beach'"):
        verdicts.probability("background", "beech")
    assert classifier.look([]).best("background") == []


@NEEDS_WEIGHTS
def test_sizes_of_the_embedded_weights() -> None:
    assert weights.embedded("judge").stat().st_size <= 8e6
    assert weights.embedded("classifier").stat().st_size <= 4e6


# ---- damaged files ---------------------------------------------------------------------------


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="weights of the judge are missing.*none.safetensors.*Reinstall"):
        Judge.open(tmp_path / "none.safetensors")


@NEEDS_WEIGHTS
@pytest.mark.parametrize("keep", [0, 7, 5000])
def test_truncated_weights(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "classifier.safetensors"
    path.write_bytes(weights.embedded("classifier").read_bytes()[:keep])
    with pytest.raises(AssetError, match="cannot be read.*Reinstall"):
        Classifier.open(path)


@NEEDS_WEIGHTS
def test_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="holds a judge of format 2; expected a classifier"):
        Classifier.open(weights.embedded("judge"))
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(AssetError, match="cannot be read"):
        Judge.open(path)


@NEEDS_WEIGHTS
def test_weights_that_do_not_fit_or_are_not_numbers(tmp_path: Path) -> None:
    tensors, facts = weights.read(weights.embedded("classifier"), "classifier")
    own = Classifier.open().net
    path = tmp_path / "wide.safetensors"
    weights.write(path, "classifier", own, {**facts, "dimensions": 64})
    with pytest.raises(AssetError, match="does not fit its own description: 2 tensors.*like.bias"):
        Classifier.open(path)
    own.like.weight[0, 0] = float("nan")
    weights.write(path, "classifier", own, facts)
    with pytest.raises(AssetError, match="1 tensors.*like.weight"):
        Classifier.open(path)
    assert "like.weight" in tensors


@NEEDS_WEIGHTS
def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    source = Path(str(words.__file__)).parent / "weights" / "tokenizer" / "tokenizer.json"
    facts = json.loads(source.read_text())
    ids = facts["model"]["vocab"]
    ids["cat</w>"], ids["dog</w>"] = ids["dog</w>"], ids["cat</w>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    with pytest.raises(AssetError, match="trained with another tokenizer"):
        Judge.open(tokenizer=tmp_path)
    with pytest.raises(AssetError, match="tokenizer.*cannot be read"):
        Tokens(tmp_path / "nothing")


# ---- truths and lookalikes -------------------------------------------------------------------


def test_truth_of_scenes(world: World) -> None:
    fields = {f.name: f for f in fields_of(world.spec)}

    def named(scene, field: str):  # type: ignore[no-untyped-def]
        k = int(truth(scene, world.spec)[field])
        return None if k == UNKNOWN else fields[field].answers[k]

    rng = np.random.default_rng(1)
    for _ in range(20):
        pair = world.decide(rng, layout="pair")
        left, right = slots_of(pair)
        assert left is not None and right is not None and left.centre_x < right.centre_x
        assert (named(pair, "first_object"), named(pair, "second_object")) == (left.category, right.category)
        assert named(pair, "size") is None and named(pair, "count") == "2"
    hat = world.decide(rng, layout="hat", category="dog", background="beach")
    assert (named(hat, "first_object"), named(hat, "second_object")) == ("dog", "top hat")
    assert named(hat, "background") == "beach"
    three = world.decide(rng, layout="count", category="cat", look=words_look("red"))
    assert named(three, "second_object") == "none" and named(three, "count") in ("2", "3")
    assert named(three, "first_colour") == "red" and named(three, "second_colour") is None


def words_look(colour: str):  # type: ignore[no-untyped-def]
    from minikin.tiny.world import Look

    return Look(colour=colour)


@pytest.mark.parametrize("spec", ["small", "wide"])
def test_every_truth_is_an_answer(spec: str) -> None:
    """In both worlds, numbers are within their fields, and all fields are asked somewhere."""
    world = World(spec, backdrops=1)
    rows = [truth(s, world.spec) for s in itertools.islice(world.scenes(3), 300)]
    for f in fields_of(world.spec):
        values = np.stack([r[f.name] for r in rows])
        assert values.min() >= UNKNOWN and values.max() < (2 if f.is_multiple else len(f.answers))
        assert (values != UNKNOWN).any()


def test_lookalikes_keep_what_is_reserved(world: World) -> None:
    train, test = (hard_negatives.drawings(world.art, split) for split in ("train", "test"))
    of = {s: {d for ds in group.values() for d in ds} for s, group in (("train", train), ("test", test))}
    assert not of["train"] & of["test"] and len(of["test"]) >= 15
    assert not {(d.art, d.code) for group in of.values() for d in group} & words.WITHHELD
    for b in range(12):
        views = hard_negatives.block(world, 5, b)
        assert views == hard_negatives.block(world, 5, b)
        things = [v.scene.things[v.subject] for v in views]
        assert len({t.category for t in things}) == 1
        for a, c in itertools.combinations(range(len(views)), 2):
            same = (things[a].code, things[a].art, things[a].look) == (
                things[c].code, things[c].art, things[c].look,
            )  # fmt: skip
            assert same == (views[a].identity == views[c].identity)


def test_lookalikes_are_read_back(world: World, tmp_path: Path) -> None:
    made = hard_negatives.Lookalikes.draw(tmp_path, world, 1, 9)
    again = hard_negatives.Lookalikes.draw(tmp_path, world, 1, 9)
    assert np.array_equal(made.pictures, again.pictures) and len(made.pictures) == hard_negatives.BLOCK
    assert made.mask(np.arange(8)).any((1, 2)).all()
    (next(tmp_path.iterdir()) / "labels.npz").write_bytes(b"torn")
    with pytest.raises(AssetError, match="Delete the folder"):
        hard_negatives.Lookalikes.draw(tmp_path, world, 1, 9)


# ---- losses ----------------------------------------------------------------------------------


def test_losses_fall_when_pairs_agree() -> None:
    v = torch.nn.functional.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    twice = v.repeat_interleave(2, 0)
    who = torch.arange(8).repeat_interleave(2)
    assert identity_loss(twice, who) < identity_loss(twice, who.roll(1)) - 1
    ids = torch.arange(8)[:, None]
    assert (
        caption_loss(v, v, ids, torch.tensor(20.0)) < caption_loss(v, v.roll(1, 0), ids, torch.tensor(20.0)) - 5
    )
    same = torch.zeros(8, 1, dtype=torch.long)  # equal captions: nothing to tell apart
    assert caption_loss(v, v.roll(1, 0), same, torch.tensor(20.0)).item() == pytest.approx(0, abs=1e-6)


def test_spoiling_changes_pictures_but_not_much(held: encoder_metrics.Held) -> None:
    pictures = torch.from_numpy(held.pictures[:16]).permute(0, 3, 1, 2)
    one, two = (spoil(pictures, np.random.default_rng(k)) for k in (0, 0))
    assert torch.equal(one, two)
    off = (one - (pictures.float() / 127.5 - 1)).abs().mean((1, 2, 3))
    assert 0 < off.min() and off.max() < 0.35


# ---- learning --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["judge", "classifier"])
def test_learning_goes_on_where_it_stopped(
    kind: str, world: World, held: encoder_metrics.Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step, then one more from its checkpoint; what is written can be opened."""
    scenes = [world.scene(1, i) for i in range(12)]
    pictures = np.stack([np.asarray(world.draw(s)[0]) for s in scenes])
    some = hard_negatives.Lookalikes.draw(tmp_path, world, 2, 1)
    fifty = encoder_metrics.Held(
        held.scenes[:50], held.pictures[:50], held.captions[:50], {k: v[:50] for k, v in held.truth.items()}
    )
    monkeypatch.setattr(encoder_metrics.Held, "draw", lambda _: fifty)
    tokens = Tokens()
    glimpses = Glimpses(world.spec, pictures, scenes, some, tokens if kind == "judge" else None)
    module = judge_stage if kind == "judge" else classifier_stage
    out, more = tmp_path / "out.safetensors", {"tokens": tokens} if kind == "judge" else {}
    for steps in (1, 2):
        plan = module.PLANS["cpu"].model_copy(update={"steps": steps, "minutes": None, "batch": 24})
        happened = list(
            module.learn(
                tmp_path / kind, out, world, glimpses, some, device=torch.device("cpu"), plan=plan, **more
            )
        )
        told = [e.text for e in happened if isinstance(e, events.Note)]
        assert any("going on after step 1" in t for t in told) == (steps == 2)
    assert f"{kind}: written to {out}" in told[-1]
    (Judge if kind == "judge" else Classifier).open(out).likeness(pictures[:1])
