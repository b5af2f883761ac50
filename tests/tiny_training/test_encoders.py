"""Encoders of the sticker world: accuracy on unseen scenes and subjects, chance on shuffled labels, errors."""

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
from tools.tiny_training import dual_encoder as dual_encoder_stage
from tools.tiny_training import encoder_metrics, hard_negatives
from tools.tiny_training.augmentations import EncoderBatches, caption_loss, corrupt, identity_loss

from minikin import events
from minikin.errors import AssetError, BadPhoto, UnknownName
from minikin.tiny import vocabulary as words
from minikin.tiny.encoders import weights
from minikin.tiny.encoders.classifier import Classifier, Predictions
from minikin.tiny.encoders.dual_encoder import KIND, DualEncoder, Tokens
from minikin.tiny.encoders.fields import UNKNOWN, fields_of, slots_of, truth
from minikin.tiny.encoders.preprocess import BLANK, as_batch
from minikin.tiny.world import World

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS_WEIGHTS = pytest.mark.skipif(
    not all(weights.embedded(kind).exists() for kind in (KIND, "classifier")),
    reason="the encoders' weights are not in this checkout",
)


@pytest.fixture(scope="module")
def world() -> World:
    return World("small", backdrops=8)


@pytest.fixture(scope="module")
def held(world: World) -> encoder_metrics.HeldOut:
    """200 scenes of the test split, from a stream of their own."""
    return encoder_metrics.HeldOut.draw(world, 200, seed=515)


@pytest.fixture(scope="module")
def dual_encoder() -> DualEncoder:
    return DualEncoder.open()


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.open()


@pytest.fixture(scope="module")
def fit(dual_encoder: DualEncoder, held: encoder_metrics.HeldOut) -> torch.Tensor:
    """Cosine similarity of every held-out image with every caption."""
    return dual_encoder.fit(held.images, held.captions)


@pytest.fixture(scope="module")
def predictions(classifier: Classifier, held: encoder_metrics.HeldOut) -> Predictions:
    return classifier.predict(held.images)


@pytest.fixture(scope="module")
def photos() -> dict[str, list[Image.Image]]:
    """The ten photos of every personal identity: drawings that were not used in training."""
    return {
        name: [Image.open(p) for p in sorted((EXAMPLES / name).rglob("*.jpg"))] for name in words.IDENTITIES
    }


# ---- how good they are -----------------------------------------------------------------------


def shares(predictions: Predictions, true: Mapping[str, np.ndarray]) -> dict[str, float]:
    counts = encoder_metrics.accuracies(predictions, true)
    return {name: right / total for name, (right, total) in counts.items() if total}


@NEEDS_WEIGHTS
def test_classifier_accuracy_on_held_out_scenes(
    predictions: Predictions, held: encoder_metrics.HeldOut
) -> None:
    """Thresholds: results of tools.tiny_training.evaluate_encoders less 3 standard errors of 200."""
    right = shares(predictions, held.truth)
    least = {
        "first_object": 0.93,
        "background": 0.96,
        "layout": 0.95,
        "art": 0.93,
        "first_colour": 0.90,
        "first_pattern": 0.90,
        "count": 0.95,
        "size": 0.90,
        "second_object": 0.90,
        "objects": 0.88,
    }
    assert {k: v for k, v in right.items() if v < least.get(k, 0)} == {}


@NEEDS_WEIGHTS
def test_shuffled_labels_score_at_chance(predictions: Predictions, held: encoder_metrics.HeldOut) -> None:
    """Control: labels of the next scene are right about as often as chance."""
    moved = {k: np.roll(v, 1, axis=0) for k, v in held.truth.items()}
    right = shares(predictions, moved)
    assert right["first_object"] < 0.25
    assert right["background"] < 0.30


@NEEDS_WEIGHTS
def test_caption_accuracy_among_fifty(fit: torch.Tensor, held: encoder_metrics.HeldOut) -> None:
    assert encoder_metrics.caption_accuracy(fit, held.captions) >= 0.84


@NEEDS_WEIGHTS
def test_shuffled_captions_do_not_fit(fit: torch.Tensor, held: encoder_metrics.HeldOut) -> None:
    """Control: captions of the next scene are best as often as chance, 1 in 50."""
    moved = (*held.captions[1:], held.captions[0])
    assert encoder_metrics.caption_accuracy(fit.roll(-1, 1), moved) < 0.12
    assert fit.diagonal().mean() > fit.mean() + 0.2


@NEEDS_WEIGHTS
@pytest.mark.parametrize("which", ["dual_encoder", "classifier"])
def test_subject_vectors_recognise_unseen_subjects(which: str, request: pytest.FixtureRequest, photos) -> None:  # type: ignore[no-untyped-def]
    """Photos of the personal identities: the same thing against all others, no masks."""
    dual_encoder = request.getfixturevalue(which)
    vectors = {name: dual_encoder.encode_subjects(p) for name, p in photos.items()}
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
def test_masked_subject_vectors_ignore_the_background(dual_encoder: DualEncoder, world: World) -> None:
    """The same thing in the same place on two backgrounds: nearly one vector with masks."""
    scenes = [
        world.decide(np.random.default_rng(3), layout="single", background=b, identity="my_dog", size="huge")
        for b in ("plain_white", "plain_pink", "plain_green")
    ]
    rendered = [world.draw(s) for s in scenes]
    with_masks = dual_encoder.encode_subjects([i for i, _ in rendered], [m[0] for _, m in rendered])
    assert (with_masks @ with_masks.T).min() > 0.9


# ---- what they take and give -----------------------------------------------------------------


@NEEDS_WEIGHTS
def test_vectors_are_unit_and_independent_of_the_batch(
    dual_encoder: DualEncoder, held: encoder_metrics.HeldOut
) -> None:
    some = held.images[:5]
    for make in (dual_encoder.encode_images, dual_encoder.encode_subjects):
        together = make(some)
        assert together.norm(dim=-1).numpy() == pytest.approx(1, abs=1e-4)
        alone = torch.cat([make(some[i : i + 1]) for i in range(5)])
        assert torch.allclose(together, alone, atol=1e-4)
    assert dual_encoder.encode_texts(["a cat"]).shape == together[:1].shape


def test_images_of_every_kind_are_accepted(held: encoder_metrics.HeldOut) -> None:
    array = held.images[:2]
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


def test_bad_images_are_refused() -> None:
    with pytest.raises(BadPhoto, match=r"\(h, w, 3\) of uint8, got \(8, 8\)"):
        as_batch(np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(BadPhoto, match=r"\(n, 3, h, w\)"):
        as_batch(torch.zeros(3, 8, 8))
    with pytest.raises(BadPhoto, match="1 images but 0 masks"):
        as_batch([Image.new("RGB", (8, 8))], [])


@NEEDS_WEIGHTS
def test_probabilities(classifier: Classifier, held: encoder_metrics.HeldOut) -> None:
    predictions = classifier.predict(held.images[:4])
    assert predictions.probability("background").sum(-1) == pytest.approx(1, abs=1e-4)
    assert predictions.probability("background", "beach").shape == (4,)
    assert all(set(x) <= set(words.SMALL.categories) for x in predictions.all("objects"))
    with pytest.raises(UnknownName, match="Unknown field 'colour'. Did you mean 'first_colour'"):
        predictions.best("colour")
    with pytest.raises(UnknownName, match="Unknown answer to 'background' 'beech'. Did you mean 'beach'"):
        predictions.probability("background", "beech")
    assert classifier.predict([]).best("background") == []


@NEEDS_WEIGHTS
def test_sizes_of_the_embedded_weights() -> None:
    assert weights.embedded(KIND).stat().st_size <= 8e6
    assert weights.embedded("classifier").stat().st_size <= 4e6


# ---- damaged files ---------------------------------------------------------------------------


def test_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="encoder weights are missing.*none.safetensors.*Reinstall"):
        DualEncoder.open(tmp_path / "none.safetensors")


@NEEDS_WEIGHTS
@pytest.mark.parametrize("keep", [0, 7, 5000])
def test_truncated_weights(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "classifier.safetensors"
    path.write_bytes(weights.embedded("classifier").read_bytes()[:keep])
    with pytest.raises(AssetError, match="cannot be read.*Reinstall"):
        Classifier.open(path)


@NEEDS_WEIGHTS
def test_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=f"holds a {KIND} of format 2; expected a classifier"):
        Classifier.open(weights.embedded(KIND))
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(AssetError, match="cannot be read"):
        DualEncoder.open(path)


@NEEDS_WEIGHTS
def test_weights_that_do_not_fit_or_are_not_numbers(tmp_path: Path) -> None:
    tensors, facts = weights.read(weights.embedded("classifier"), "classifier")
    net = Classifier.open().net
    path = tmp_path / "wide.safetensors"
    weights.write(path, "classifier", net, {**facts, "dimensions": 64})
    with pytest.raises(AssetError, match="does not fit its own description: 2 tensors.*like.bias"):
        Classifier.open(path)
    net.subject_projection.weight[0, 0] = float("nan")
    weights.write(path, "classifier", net, facts)
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
        DualEncoder.open(tokenizer=tmp_path)
    with pytest.raises(AssetError, match="tokenizer.*cannot be read"):
        Tokens(tmp_path / "nothing")


# ---- labels and hard negatives ---------------------------------------------------------------


def test_labels_of_scenes(world: World) -> None:
    fields = {f.name: f for f in fields_of(world.spec)}

    def answer_of(scene, field: str):  # type: ignore[no-untyped-def]
        k = int(truth(scene, world.spec)[field])
        return None if k == UNKNOWN else fields[field].answers[k]

    rng = np.random.default_rng(1)
    for _ in range(20):
        pair = world.decide(rng, layout="pair")
        left, right = slots_of(pair)
        assert left.centre_x < right.centre_x
        assert (answer_of(pair, "first_object"), answer_of(pair, "second_object")) == (
            left.category,
            right.category,
        )
        assert answer_of(pair, "size") is None and answer_of(pair, "count") == "2"
    hat = world.decide(rng, layout="hat", category="dog", background="beach")
    assert (answer_of(hat, "first_object"), answer_of(hat, "second_object")) == ("dog", "top hat")
    assert answer_of(hat, "background") == "beach"
    three = world.decide(rng, layout="count", category="cat", look=words_look("red"))
    assert answer_of(three, "second_object") == "none" and answer_of(three, "count") in ("2", "3")
    assert answer_of(three, "first_colour") == "red" and answer_of(three, "second_colour") is None


def words_look(colour: str):  # type: ignore[no-untyped-def]
    from minikin.tiny.world import Look

    return Look(colour=colour)


@pytest.mark.parametrize("spec", ["small", "rich", "wide"])
def test_every_label_is_an_answer(spec: str) -> None:
    """In all worlds, numbers are within their fields, and all fields are asked somewhere."""
    world = World(spec, backdrops=1)
    rows = [truth(s, world.spec) for s in itertools.islice(world.scenes(3), 300)]
    for f in fields_of(world.spec):
        values = np.stack([r[f.name] for r in rows])
        assert values.min() >= UNKNOWN and values.max() < (2 if f.is_multiple else len(f.answers))
        assert (values != UNKNOWN).any()


def test_hard_negatives_hold_out_reserved_drawings(world: World) -> None:
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
                things[c].code,
                things[c].art,
                things[c].look,
            )
            assert same == (views[a].identity == views[c].identity)


def test_hard_negatives_are_read_back(world: World, tmp_path: Path) -> None:
    first = hard_negatives.HardNegatives.draw(tmp_path, world, 1, 9)
    second = hard_negatives.HardNegatives.draw(tmp_path, world, 1, 9)
    assert np.array_equal(first.images, second.images) and len(first.images) == hard_negatives.BLOCK
    assert first.mask(np.arange(8)).any((1, 2)).all()
    (next(tmp_path.iterdir()) / "labels.npz").write_bytes(b"torn")
    with pytest.raises(AssetError, match="Delete the folder"):
        hard_negatives.HardNegatives.draw(tmp_path, world, 1, 9)


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


def test_corruption_changes_images_a_little(held: encoder_metrics.HeldOut) -> None:
    images = torch.from_numpy(held.images[:16]).permute(0, 3, 1, 2)
    first, second = (corrupt(images, np.random.default_rng(k)) for k in (0, 0))
    assert torch.equal(first, second)
    off = (first - (images.float() / 127.5 - 1)).abs().mean((1, 2, 3))
    assert 0 < off.min() and off.max() < 0.35


# ---- learning --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dual-encoder", "classifier"])
def test_training_resumes_from_its_checkpoint(
    kind: str, world: World, held: encoder_metrics.HeldOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step, then one more from its checkpoint; what is written can be opened."""
    scenes = [world.scene(1, i) for i in range(12)]
    images = np.stack([np.asarray(world.draw(s)[0]) for s in scenes])
    negatives = hard_negatives.HardNegatives.draw(tmp_path, world, 2, 1)
    few = encoder_metrics.HeldOut(
        held.scenes[:8], held.images[:8], held.captions[:8], {k: v[:8] for k, v in held.truth.items()}
    )
    monkeypatch.setattr(encoder_metrics.HeldOut, "draw", lambda _: few)
    monkeypatch.setattr(encoder_metrics, "CANDIDATES", 8)
    tokens = Tokens()
    batches = EncoderBatches(world.spec, images, scenes, negatives, tokens if kind == "dual-encoder" else None)
    module = dual_encoder_stage if kind == "dual-encoder" else classifier_stage
    out, more = tmp_path / "out.safetensors", {"tokens": tokens} if kind == "dual-encoder" else {}
    for steps in (1, 2):
        plan = module.PLANS["cpu"].model_copy(update={"steps": steps, "minutes": None, "batch": 10})
        happened = list(
            module.learn(
                tmp_path / kind, out, world, batches, negatives, device=torch.device("cpu"), plan=plan, **more
            )
        )
        notes = [e.text for e in happened if isinstance(e, events.Note)]
        assert any("going on after step 1" in t for t in notes) == (steps == 2)
    assert f"{kind}: written to {out}" in notes[-1]
    (DualEncoder if kind == "dual-encoder" else Classifier).open(out).encode_subjects(images[:1])
