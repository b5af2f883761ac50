"""Every score against a case whose answer is references, and every detector against a planted failure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks import distances, seeds
from PIL import Image
from torch import Tensor

from minikin.errors import BadRecipe, UnknownName
from minikin.evaluation import intervals, metrics
from minikin.evaluation import pareto as pareto
from minikin.evaluation.encoders import EncoderCard
from minikin.evaluation.scores import References, plain, score


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- intervals -------------------------------------------------------------------------------


def test_intervals_of_grouped_images_cover_the_truth() -> None:
    """24 prompts x 4 images that share their prompt's luck, 150 times; without groups they are too narrow."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(24), 4)
    hits, naive = [], []
    for _ in range(150):
        values = rng.normal(0, 1, 24)[prompts] + rng.normal(0, 0.3, 96)
        over, flat = intervals.bootstrap_mean(values, groups=prompts), intervals.bootstrap_mean(values)
        hits.append(over.low <= 0 <= over.high)
        naive.append(flat.low <= 0 <= flat.high)
    assert 0.88 <= np.mean(hits) <= 0.99  # 95 % less what a bootstrap of 24 loses, and 3 se of 150
    assert np.mean(naive) < 0.80


def test_ratio_of_the_same_examples_has_a_narrow_interval() -> None:
    """Half the value of every example is exactly half; unpaired examples have a wide interval."""
    rng = np.random.default_rng(0)
    whole = rng.uniform(0.2, 1.0, 60)
    half = intervals.bootstrap_ratio(whole / 2, whole)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    shuffled = intervals.bootstrap_ratio(rng.permutation(whole) / 2, whole)
    assert shuffled.value == pytest.approx(0.5) and shuffled.high - shuffled.low > 0.05
    inside = 0
    for k in range(100):
        a = np.random.default_rng(k).uniform(0.2, 1.0, 60)
        estimate = intervals.bootstrap_ratio(
            0.9 * a + np.random.default_rng(k + 1000).normal(0, 0.05, 60), a, k
        )
        inside += estimate.low <= 0.9 <= estimate.high
    assert 86 <= inside <= 100
    with pytest.raises(BadRecipe, match="same examples twice, got 60 and 59"):
        intervals.bootstrap_ratio(whole, whole[1:])


def test_intervals_are_repeatable_and_need_their_prompts() -> None:
    values = np.random.default_rng(1).normal(size=20)
    assert intervals.bootstrap_mean(values, seed=3) == intervals.bootstrap_mean(values, seed=3)
    assert intervals.bootstrap_mean(values, seed=3) != intervals.bootstrap_mean(values, seed=4)
    assert intervals.bootstrap_mean(values, groups=range(20)).value == intervals.bootstrap_mean(values).value
    with pytest.raises(BadRecipe, match="20 images but 3 prompts"):
        intervals.bootstrap_mean(values, groups=[1, 2, 3])
    with pytest.raises(BadRecipe, match="no images"):
        intervals.bootstrap_mean(np.zeros(0))


# ---- alignment, subject fidelity, diversity ------------------------------------------------------------


class PlantedEncoder:
    """Encoder with planted vectors: an image's first pixel is the index of the thing it shows."""

    name = "planted"
    has_text_encoder = True
    card = EncoderCard("planted", "tests", "Apache-2.0", "0")

    def __init__(self, things: Tensor, seed: int | None = None) -> None:
        self.things, self.noise = things, seed  # (k, d) unit; with a seed, vectors are noise

    def encode_images(self, images: Sequence[Image.Image] | np.ndarray) -> Tensor:
        if self.noise is not None:
            return unit(len(images), self.things.shape[1], seed=self.noise)
        return self.things[[int(np.asarray(p)[0, 0, 0]) for p in images]]

    def encode_subjects(self, images: Sequence[Image.Image] | np.ndarray, masks: object = None) -> Tensor:
        return self.encode_images(images)

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        return self.things[[int(c.split()[-1]) for c in captions]]


def numbered(*what: int) -> np.ndarray:
    return np.stack([np.full((4, 4, 3), k, np.uint8) for k in what])


def test_true_vectors_score_one() -> None:
    encoder = PlantedEncoder(unit(5, 64))
    references = References.encode(encoder, numbered(2, 2), held_out=numbered(2))
    scores = score(encoder, numbered(2, 2, 2, 2), ["thing 2"] * 4, references)
    assert scores.point() == pytest.approx((1, 1), abs=1e-6)
    assert scores.r_precision is None  # undefined for one prompt
    assert scores.held_out and scores.held_out.value == pytest.approx(1, abs=1e-6)
    assert scores.diversity and scores.diversity.value == pytest.approx(0, abs=1e-6)
    assert references.upper_bound == pytest.approx(1, abs=1e-6)
    wrong = score(encoder, numbered(0, 1), ["thing 3", "thing 4"], references)
    assert abs(wrong.point()[0]) < 0.3 and abs(wrong.point()[1]) < 0.3  # other directions of 64
    assert wrong.diversity is None and wrong.r_precision
    right = score(encoder, numbered(3, 4), ["thing 3", "thing 4"], references)
    assert right.r_precision and right.r_precision.value == 1


def test_noise_scores_chance() -> None:
    """400 images in 64 dimensions: cosines are 0 within 4 standard errors, and the interval holds 0."""
    encoder = PlantedEncoder(unit(5, 64), seed=9)
    references = References(encoder.things[2:3])
    scores = score(
        encoder, np.zeros((400, 4, 4, 3), np.uint8), [f"thing {k % 5}" for k in range(400)], references
    )
    assert scores.text_alignment and scores.diversity
    assert abs(scores.subject_fidelity.value) < 0.025 and abs(scores.text_alignment.value) < 0.025
    assert scores.diversity.value == pytest.approx(1, abs=0.02)
    assert scores.r_precision and scores.r_precision.value == pytest.approx(0.2, abs=0.08)  # of five prompts


def test_r_precision() -> None:
    """Each image lies on its own text but one, which lies on another's."""
    texts = unit(4, 32)
    right = metrics.r_precision(texts[[0, 1, 2, 3, 0]], texts, [0, 1, 2, 3, 0])
    assert right.value == 1 and right.n == 5
    assert metrics.r_precision(texts[[0, 1, 2, 0]], texts, [0, 1, 2, 3]).value == 0.75
    # what all prompts share decides nothing: the same direction taken from every image
    thing = F.normalize(texts.mean(0), dim=0)
    foreign = F.normalize(texts - 0.8 * thing, dim=-1)
    assert metrics.r_precision(foreign, texts, range(4)).value == 1
    chance = metrics.r_precision(unit(600, 32, seed=5), texts, np.arange(600) % 4)
    assert chance.value == pytest.approx(0.25, abs=0.08)
    with pytest.raises(BadRecipe, match="two different prompts"):
        metrics.r_precision(texts[:1], texts[:1], [0])


def test_subject_fidelity_is_the_mean_over_pairs() -> None:
    images, photos = unit(6, 8, seed=1), unit(3, 8, seed=2)
    pairs = [float(p @ q) for p in images for q in photos]
    assert metrics.subject_fidelity(images, photos, range(6)).value == pytest.approx(np.mean(pairs), abs=1e-6)
    between = [float(photos[a] @ photos[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert metrics.real_image_upper_bound(photos) == pytest.approx(np.mean(between), abs=1e-6)


def test_diversity_by_hand() -> None:
    """Two prompts: equal images (0) and opposite ones (2); the single image of a third is left out."""
    a, b = unit(2, 8)
    value = metrics.diversity(torch.stack([a, a, b, -b, a]), ["x", "x", "y", "y", "z"])
    assert value.value == pytest.approx(1, abs=1e-6) and value.n == 2
    with pytest.raises(BadRecipe, match="two images of one prompt"):
        metrics.diversity(unit(2, 8), ["x", "y"])


def test_plain_prompt_has_the_category_in_place_of_the_name() -> None:
    assert plain("a (photo:1.2) of <tom:0.8> on the beach", {"tom": "cat"}) == "a photo of a cat on the beach"
    with pytest.raises(UnknownName, match="'tom'"):
        plain("<tom>", {})


def test_scores_refuse_mismatched_inputs() -> None:
    encoder = PlantedEncoder(unit(5, 64))
    references = References.encode(encoder, numbered(2))
    assert references.upper_bound is None
    with pytest.raises(BadRecipe, match="2 images but 1 prompts"):
        score(encoder, numbered(0, 1), ["thing 0"], references)
    with pytest.raises(BadRecipe, match="no images to score"):
        score(encoder, numbered(0)[:0], [], references)
    with pytest.raises(BadRecipe, match="compares with photos"):
        metrics.subject_fidelity(unit(2, 8), unit(0, 8), range(2))
    with pytest.raises(BadRecipe, match="compares photos with each other"):
        metrics.real_image_upper_bound(unit(1, 8))
    with pytest.raises(BadRecipe, match="as many texts"):
        metrics.text_alignment(unit(2, 8), unit(3, 8), range(2))


# ---- drift, CCD, background preservation --------------------------------------------------------------------


def test_drift() -> None:
    before = unit(12, 32)
    same = metrics.drift(before, before.clone())
    assert (same.value, same.low, same.high) == (0, 0, 0)  # exactly
    assert metrics.drift(before, -before).value == pytest.approx(1, abs=1e-6)
    a, b = unit(12, 32, seed=1), unit(12, 32, seed=2)
    assert metrics.drift(a, b).value == pytest.approx(float((1 - (a * b).sum(1)).mean()) / 2, abs=1e-6)
    moved = before.clone()
    moved[3] = F.normalize(before[3] + 0.01 * before[4], dim=0)  # one image of twelve, a little
    assert metrics.drift(before, moved).value > 0


def test_ccd_is_the_lost_confidence() -> None:
    real, good = np.array([0.9, 1.0, 0.8]), np.array([0.9, 0.9])
    assert metrics.ccd(real, good).value == pytest.approx(0)
    lost = metrics.ccd(real, np.array([0.1, 0.3] * 10))
    assert lost.value == pytest.approx(0.7) and 0.5 < lost.low < 0.7 < lost.high < 0.9
    assert metrics.ccd(np.array([0.5]), np.array([0.7])).value == pytest.approx(-0.2)
    with pytest.raises(BadRecipe, match="real and generated"):
        metrics.ccd(real, np.zeros(0))


def test_background_preservation() -> None:
    rng = np.random.default_rng(0)
    without = rng.integers(60, 200, (3, 16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    masks = [mask] * 3
    generated = without.copy()
    generated[:, mask] = 0  # the subject is another one: not counted
    generated += 3  # within a tenth of the range
    assert metrics.background_preservation(without, generated, masks).value == 1
    generated[1, 0] += 40  # the top row of one image: 16 of its 192 pixels outside
    assert metrics.background_preservation(without, generated, masks).value == pytest.approx(1 - 16 / 192 / 3)
    everything = [mask, mask, np.ones((16, 16), bool)]
    assert metrics.background_preservation(without, generated, everything, prompts=["a", "b", "c"]).n == 2
    with pytest.raises(BadRecipe, match="nothing outside"):
        metrics.background_preservation(without[:1], generated[:1], [np.ones((16, 16))])
    with pytest.raises(BadRecipe, match="as many and of one size"):
        metrics.background_preservation(without, generated[:2], masks)


# ---- seeds ---------------------------------------------------------------------------------------


def test_seed_identifiability() -> None:
    """12 prompts x 6 seeds: a mark under noise of its own size is recognised; no mark is chance (1 in 6)."""
    marks, prompts, noise = unit(1, 6, 40, seed=1), 3 * unit(12, 1, 40, seed=2), unit(12, 6, 40, seed=3)
    assert seeds.identifiability(marks + prompts + noise).value > 0.85
    unmarked = [seeds.identifiability(prompts + unit(12, 6, 40, seed=s)) for s in range(10, 20)]
    assert np.mean([b.value for b in unmarked]) == pytest.approx(1 / 6, abs=0.06)
    collapsed = (prompts + torch.zeros(12, 6, 40)).clone()  # every seed gives the same image
    assert seeds.identifiability(collapsed).value == pytest.approx(1 / 6, abs=0.01)
    with pytest.raises(BadRecipe, match="at least two prompts"):
        seeds.identifiability(unit(1, 6, 40))


def test_thumbnails_keep_layout() -> None:
    left = np.zeros((64, 64, 3), np.uint8)
    left[:, :32] = 255
    t = seeds.thumbnails([Image.fromarray(left), Image.fromarray(left[:, ::-1].copy())])
    assert t.shape == (2, 3 * 16 * 16) and t.min() == -1 and t.max() == 1
    assert torch.allclose(t[0], -t[1])


# ---- distances of distributions --------------------------------------------------------------------


def gaussian(n: int, mean: np.ndarray, root: np.ndarray, seed: int) -> Tensor:
    """n points with exactly this mean and covariance root @ root.T."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(white @ root.T + mean)


def test_frechet_of_two_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    roots = [rng.normal(size=(5, 5)) for _ in range(2)]
    means = rng.normal(size=(2, 5))
    a, b = (gaussian(400, m, r, k) for k, (m, r) in enumerate(zip(means, roots, strict=True)))
    s, t = (r @ r.T for r in roots)
    # eigenvalues of S T are real and not negative; their roots add up to the trace of the root
    shared = np.sqrt(np.linalg.eigvals(s @ t).real).sum()
    expected = np.square(means[0] - means[1]).sum() + np.trace(s) + np.trace(t) - 2 * shared
    distance = distances.frechet_distance(a, b, resamples=20)
    assert distance.value == pytest.approx(expected, rel=1e-9)
    assert distance.low < expected < distance.high
    moved = distances.frechet_distance(a, a + 2.0, resamples=2)
    assert moved.value == pytest.approx(5 * 4, rel=1e-9)  # only the mean: the squared distance


def test_frechet_with_fewer_images_than_dimensions() -> None:
    """20 images in 200 dimensions, where a matrix square root turns complex: finite, and 0 for itself."""
    a, b = unit(20, 200).double(), unit(30, 200, seed=1).double()
    assert distances.frechet_distance(a, a, resamples=2).value == pytest.approx(0, abs=1e-9)
    wide = distances.frechet_distance(a, b, resamples=2).value
    s, t = (np.cov(x.numpy().T) for x in (a, b))
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(s) + np.trace(t) - 2 * shared
    assert wide == pytest.approx(expected, abs=1e-5)


def test_frechet_intervals_cover_other_samples() -> None:
    """40 pairs of samples: at least 80 % of the intervals cover the mean distance at this size."""
    estimates = []
    for k in range(40):
        x, y = (torch.randn(60, 4, generator=torch.Generator().manual_seed(2 * k + i)).double() for i in (0, 1))
        estimates.append(distances.frechet_distance(x, y + 1.0, resamples=60, seed=k))
    truth = np.mean([m.value for m in estimates])
    assert np.mean([m.low <= truth <= m.high for m in estimates]) >= 0.80
    assert all(m.low <= m.value <= m.high for m in estimates)


def test_kernel_is_the_direct_double_sum() -> None:
    a, b = unit(7, 5), unit(9, 5, seed=1) + 0.3
    for gamma in (1.0, 1 / 5):

        def k(x: Tensor, y: Tensor, gamma: float = gamma) -> float:
            return float(gamma * (x.double() @ y.double()) + 1) ** 3

        xx = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
        yy = np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
        xy = np.mean([k(x, y) for x in a for y in b])
        assert distances.kernel_distance(a, b, gamma).value == pytest.approx(xx + yy - 2 * xy, rel=1e-9)


def test_kernel_is_unbiased_and_its_interval_too() -> None:
    """Of one distribution: 0 on average, also over resamples; of another: its interval leaves 0 out."""
    same = [distances.kernel_distance(unit(40, 6, seed=2 * k), unit(40, 6, seed=2 * k + 1)) for k in range(60)]
    values = np.array([m.value for m in same])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(60)
    assert abs(np.mean([(m.low + m.high) / 2 - m.value for m in same])) < values.std()
    apart = distances.kernel_distance(unit(60, 6), F.normalize(unit(60, 6, seed=1) + 0.5, dim=-1))
    assert apart.low > 0.05
    grouped = distances.kernel_distance(unit(40, 6), unit(40, 6, seed=1), groups=(np.arange(40) // 4, None))
    assert grouped.value == same[0].value


def test_kernel_intervals_cover_the_truth() -> None:
    """80 pairs of samples of two distributions: at least 85 % of the intervals cover the mean of all."""
    estimates = [
        distances.kernel_distance(unit(50, 6, seed=k), F.normalize(unit(50, 6, seed=1000 + k) + 0.3, dim=-1))
        for k in range(80)
    ]
    truth = np.mean([m.value for m in estimates])
    assert np.mean([m.low <= truth <= m.high for m in estimates]) >= 0.85


def test_distances_refuse_single_images_and_other_encoders() -> None:
    for measure in (distances.frechet_distance, distances.kernel_distance):
        with pytest.raises(BadRecipe, match="at least two images"):
            measure(unit(1, 6), unit(5, 6))
        with pytest.raises(BadRecipe, match="by one encoder"):
            measure(unit(5, 6), unit(5, 7))


# ---- the Pareto front -----------------------------------------------------------------------------------

POINTS = np.array([[0.2, 0.9], [0.5, 0.8], [0.8, 0.3], [0.4, 0.7], [0.5, 0.8], [0.8, 0.2]])


def test_front_by_hand() -> None:
    assert pareto.pareto(POINTS).tolist() == [0, 1, 2]
    # 0.2 x 0.9 + 0.3 x 0.8 + 0.3 x 0.3
    assert pareto.hypervolume(POINTS) == pytest.approx(0.18 + 0.24 + 0.09)
    # above (0.4, 0.2): 0.1 x 0.6 + 0.3 x 0.1; the first point is not above it
    assert pareto.hypervolume(POINTS, (0.4, 0.2)) == pytest.approx(0.06 + 0.03)
    assert pareto.hypervolume(POINTS[:0]) == 0 and pareto.hypervolume(-POINTS) == 0
    assert pareto.knee(POINTS) == 1


def test_hypervolume_agrees_with_counting() -> None:
    """The share of 200,000 random points of the unit square that some point dominates."""
    rng = np.random.default_rng(0)
    points = rng.random((12, 2))
    darts = rng.random((200_000, 2))
    hit = (darts[:, None] < points[None]).all(-1).any(1).mean()
    assert pareto.hypervolume(points) == pytest.approx(hit, abs=0.005)
    worse = np.vstack([points, points * 0.5])  # dominated points change nothing
    assert pareto.hypervolume(worse) == pareto.hypervolume(points)


def test_knee_is_the_planted_bend() -> None:
    """A straight trade-off with one point far above it; scaling either axis moves nothing."""
    line = np.column_stack([np.linspace(0, 1, 11), np.linspace(1, 0, 11)])
    line[7] += 0.2
    assert pareto.knee(line) == 7
    assert pareto.knee(line * [100, 0.01]) == 7
    assert pareto.knee(np.array([[0.1, 0.9], [0.9, 0.2]])) == 1
    assert pareto.knee(np.array([[0.3, 0.4]])) == 0
    with pytest.raises(BadRecipe, match="at least one point"):
        pareto.knee(np.zeros((0, 2)))
    with pytest.raises(BadRecipe, match="NaN or Inf"):
        pareto.pareto(np.array([[0.1, math.nan]]))
