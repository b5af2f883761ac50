"""Every score against a case whose answer is known, and every detector against a planted failure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks import frechet as distance
from benchmarks import seeds
from PIL import Image
from torch import Tensor

from minikin.errors import BadRecipe, UnknownName
from minikin.evaluation import intervals, metrics
from minikin.evaluation import pareto as front
from minikin.evaluation.encoders import Card
from minikin.evaluation.scores import References, plain, score


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# ---- intervals -------------------------------------------------------------------------------


def test_intervals_of_grouped_pictures_hold_the_truth() -> None:
    """24 prompts x 4 images that share their prompt's luck, 150 times; without groups they are too narrow."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(24), 4)
    hits, naive = [], []
    for _ in range(150):
        values = rng.normal(0, 1, 24)[prompts] + rng.normal(0, 0.3, 96)
        over, flat = intervals.mean(values, groups=prompts), intervals.mean(values)
        hits.append(over.low <= 0 <= over.high)
        naive.append(flat.low <= 0 <= flat.high)
    assert 0.88 <= np.mean(hits) <= 0.99  # 95 % less what a bootstrap of 24 loses, and 3 se of 150
    assert np.mean(naive) < 0.80


def test_a_ratio_of_the_same_examples_is_surer_than_two_intervals() -> None:
    """Hard examples are hard in both: half the value everywhere is half for sure; unpaired it is not."""
    rng = np.random.default_rng(0)
    whole = rng.uniform(0.2, 1.0, 60)
    half = intervals.ratio(whole / 2, whole)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    shuffled = intervals.ratio(rng.permutation(whole) / 2, whole)
    assert shuffled.value == pytest.approx(0.5) and shuffled.high - shuffled.low > 0.05
    inside = 0
    for k in range(100):
        a = np.random.default_rng(k).uniform(0.2, 1.0, 60)
        found = intervals.ratio(0.9 * a + np.random.default_rng(k + 1000).normal(0, 0.05, 60), a, k)
        inside += found.low <= 0.9 <= found.high
    assert 86 <= inside <= 100
    with pytest.raises(BadRecipe, match="same examples twice, got 60 and 59"):
        intervals.ratio(whole, whole[1:])


def test_intervals_are_repeatable_and_need_their_prompts() -> None:
    values = np.random.default_rng(1).normal(size=20)
    assert intervals.mean(values, seed=3) == intervals.mean(values, seed=3)
    assert intervals.mean(values, seed=3) != intervals.mean(values, seed=4)
    assert intervals.mean(values, groups=range(20)).value == intervals.mean(values).value
    with pytest.raises(BadRecipe, match="20 images but 3 prompts"):
        intervals.mean(values, groups=[1, 2, 3])
    with pytest.raises(BadRecipe, match="no images"):
        intervals.mean(np.zeros(0))


# ---- alignment, likeness, diversity ------------------------------------------------------------


class Told:
    """A judge that is handed the truth: an image's first pixel is the number of what it shows."""

    name = "told"
    reads = True
    card = Card("told", "tests", "Apache-2.0", "0")

    def __init__(self, things: Tensor, seed: int | None = None) -> None:
        self.things, self.noise = things, seed  # (k, d) unit; a seed makes it blind

    def images(self, pictures: Sequence[Image.Image] | np.ndarray) -> Tensor:
        if self.noise is not None:
            return unit(len(pictures), self.things.shape[1], seed=self.noise)
        return self.things[[int(np.asarray(p)[0, 0, 0]) for p in pictures]]

    def likeness(self, pictures: Sequence[Image.Image] | np.ndarray, masks: object = None) -> Tensor:
        return self.images(pictures)

    def texts(self, captions: Sequence[str]) -> Tensor:
        return self.things[[int(c.split()[-1]) for c in captions]]


def numbered(*what: int) -> np.ndarray:
    return np.stack([np.full((4, 4, 3), k, np.uint8) for k in what])


def test_a_judge_handed_the_truth_scores_one() -> None:
    judge = Told(unit(5, 64))
    known = References.of(judge, numbered(2, 2), held_out=numbered(2))
    found = score(judge, numbered(2, 2, 2, 2), ["thing 2"] * 4, known)
    assert found.point == pytest.approx((1, 1), abs=1e-6)
    assert found.recognised is None  # of one prompt, nothing can be told apart
    assert found.held_out and found.held_out.value == pytest.approx(1, abs=1e-6)
    assert found.diversity and found.diversity.value == pytest.approx(0, abs=1e-6)
    assert known.among == pytest.approx(1, abs=1e-6)
    wrong = score(judge, numbered(0, 1), ["thing 3", "thing 4"], known)
    assert abs(wrong.point[0]) < 0.3 and abs(wrong.point[1]) < 0.3  # other directions of 64
    assert wrong.diversity is None and wrong.recognised
    right = score(judge, numbered(3, 4), ["thing 3", "thing 4"], known)
    assert right.recognised and right.recognised.value == 1


def test_a_judge_handed_noise_scores_chance() -> None:
    """400 images in 64 dimensions: cosines are 0 within 4 standard errors, and the interval holds 0."""
    judge = Told(unit(5, 64), seed=9)
    known = References(judge.things[2:3])
    found = score(judge, np.zeros((400, 4, 4, 3), np.uint8), [f"thing {k % 5}" for k in range(400)], known)
    assert found.alignment and found.diversity
    assert abs(found.likeness.value) < 0.025 and abs(found.alignment.value) < 0.025
    assert found.diversity.value == pytest.approx(1, abs=0.02)
    assert found.recognised and found.recognised.value == pytest.approx(0.2, abs=0.08)  # of five prompts


def test_recognised_prompts() -> None:
    """Own prompt best among all: each image lies on its own text but one, which lies on another's."""
    texts = unit(4, 32)
    right = metrics.recognised(texts[[0, 1, 2, 3, 0]], texts, [0, 1, 2, 3, 0])
    assert right.value == 1 and right.n == 5
    assert metrics.recognised(texts[[0, 1, 2, 0]], texts, [0, 1, 2, 3]).value == 0.75
    # what all prompts share decides nothing: the same direction taken from every image
    thing = F.normalize(texts.mean(0), dim=0)
    foreign = F.normalize(texts - 0.8 * thing, dim=-1)
    assert metrics.recognised(foreign, texts, range(4)).value == 1
    chance = metrics.recognised(unit(600, 32, seed=5), texts, np.arange(600) % 4)
    assert chance.value == pytest.approx(0.25, abs=0.08)
    with pytest.raises(BadRecipe, match="two different prompts"):
        metrics.recognised(texts[:1], texts[:1], [0])


def test_likeness_is_the_mean_over_pairs() -> None:
    pictures, photos = unit(6, 8, seed=1), unit(3, 8, seed=2)
    pairs = [float(p @ q) for p in pictures for q in photos]
    assert metrics.likeness(pictures, photos, range(6)).value == pytest.approx(np.mean(pairs), abs=1e-6)
    between = [float(photos[a] @ photos[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert metrics.among(photos) == pytest.approx(np.mean(between), abs=1e-6)


def test_diversity_by_hand() -> None:
    """Two prompts: equal images (0) and opposite ones (2); the single image of a third says nothing."""
    a, b = unit(2, 8)
    found = metrics.diversity(torch.stack([a, a, b, -b, a]), ["x", "x", "y", "y", "z"])
    assert found.value == pytest.approx(1, abs=1e-6) and found.n == 2
    with pytest.raises(BadRecipe, match="two images of one prompt"):
        metrics.diversity(unit(2, 8), ["x", "y"])


def test_alignment_is_to_the_category_not_the_name() -> None:
    assert plain("a (photo:1.2) of <tom:0.8> on the beach", {"tom": "cat"}) == "a photo of a cat on the beach"
    with pytest.raises(UnknownName, match="'tom'"):
        plain("<tom>", {})


def test_scores_refuse_what_does_not_fit() -> None:
    judge = Told(unit(5, 64))
    known = References.of(judge, numbered(2))
    assert known.among is None
    with pytest.raises(BadRecipe, match="2 images but 1 prompts"):
        score(judge, numbered(0, 1), ["thing 0"], known)
    with pytest.raises(BadRecipe, match="no images to judge"):
        score(judge, numbered(0)[:0], [], known)
    with pytest.raises(BadRecipe, match="needs photos"):
        metrics.likeness(unit(2, 8), unit(0, 8), range(2))
    with pytest.raises(BadRecipe, match="needs two photos"):
        metrics.among(unit(1, 8))
    with pytest.raises(BadRecipe, match="as many texts"):
        metrics.alignment(unit(2, 8), unit(3, 8), range(2))


# ---- drift, CCD, what is kept --------------------------------------------------------------------


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
    assert metrics.deviation(real, good).value == pytest.approx(0)
    lost = metrics.deviation(real, np.array([0.1, 0.3] * 10))
    assert lost.value == pytest.approx(0.7) and 0.5 < lost.low < 0.7 < lost.high < 0.9
    assert metrics.deviation(np.array([0.5]), np.array([0.7])).value == pytest.approx(-0.2)
    with pytest.raises(BadRecipe, match="real and painted"):
        metrics.deviation(real, np.zeros(0))


def test_what_is_outside_the_subject_is_kept_or_not() -> None:
    rng = np.random.default_rng(0)
    without = rng.integers(60, 200, (3, 16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    masks = [mask] * 3
    painted = without.copy()
    painted[:, mask] = 0  # the subject is another one: not counted
    painted += 3  # within a tenth of the range
    assert metrics.kept(without, painted, masks).value == 1
    painted[1, 0] += 40  # the top row of one image: 16 of its 192 pixels outside
    assert metrics.kept(without, painted, masks).value == pytest.approx(1 - 16 / 192 / 3)
    everything = [mask, mask, np.ones((16, 16), bool)]
    assert metrics.kept(without, painted, everything, prompts=["a", "b", "c"]).n == 2
    with pytest.raises(BadRecipe, match="nothing outside"):
        metrics.kept(without[:1], painted[:1], [np.ones((16, 16))])
    with pytest.raises(BadRecipe, match="as many and of one size"):
        metrics.kept(without, painted[:2], masks)


# ---- seeds ---------------------------------------------------------------------------------------


def test_seeds_that_leave_a_mark_are_named_and_others_are_not() -> None:
    """12 prompts x 6 seeds: a mark under noise of its own size is found, no mark is chance (1 in 6)."""
    marks, prompts, noise = unit(1, 6, 40, seed=1), 3 * unit(12, 1, 40, seed=2), unit(12, 6, 40, seed=3)
    assert seeds.identifiability(marks + prompts + noise).value > 0.85
    blind = [seeds.identifiability(prompts + unit(12, 6, 40, seed=s)) for s in range(10, 20)]
    assert np.mean([b.value for b in blind]) == pytest.approx(1 / 6, abs=0.06)
    collapsed = (prompts + torch.zeros(12, 6, 40)).clone()  # every seed paints the same
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
    want = np.square(means[0] - means[1]).sum() + np.trace(s) + np.trace(t) - 2 * shared
    found = distance.frechet(a, b, resamples=20)
    assert found.value == pytest.approx(want, rel=1e-9)
    assert found.low < want < found.high
    moved = distance.frechet(a, a + 2.0, resamples=2)
    assert moved.value == pytest.approx(5 * 4, rel=1e-9)  # only the mean: the squared distance


def test_frechet_with_fewer_pictures_than_dimensions() -> None:
    """20 images in 200 dimensions, where a matrix square root turns complex: finite, and 0 for itself."""
    a, b = unit(20, 200).double(), unit(30, 200, seed=1).double()
    assert distance.frechet(a, a, resamples=2).value == pytest.approx(0, abs=1e-9)
    wide = distance.frechet(a, b, resamples=2).value
    s, t = (np.cov(x.numpy().T) for x in (a, b))
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ t @ root).clip(0)).sum()
    want = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(s) + np.trace(t) - 2 * shared
    assert wide == pytest.approx(want, abs=1e-5)


def test_frechet_intervals_tell_how_other_samples_would_come_out() -> None:
    """40 pairs of samples: their intervals hold the mean distance at this size about as often as they say."""
    found = []
    for k in range(40):
        x, y = (torch.randn(60, 4, generator=torch.Generator().manual_seed(2 * k + i)).double() for i in (0, 1))
        found.append(distance.frechet(x, y + 1.0, resamples=60, seed=k))
    truth = np.mean([m.value for m in found])
    assert np.mean([m.low <= truth <= m.high for m in found]) >= 0.80
    assert all(m.low <= m.value <= m.high for m in found)


def test_kernel_is_the_direct_double_sum() -> None:
    a, b = unit(7, 5), unit(9, 5, seed=1) + 0.3
    for gamma in (1.0, 1 / 5):

        def k(x: Tensor, y: Tensor, gamma: float = gamma) -> float:
            return float(gamma * (x.double() @ y.double()) + 1) ** 3

        xx = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
        yy = np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
        xy = np.mean([k(x, y) for x in a for y in b])
        assert distance.kernel(a, b, gamma).value == pytest.approx(xx + yy - 2 * xy, rel=1e-9)


def test_kernel_is_unbiased_and_its_interval_too() -> None:
    """Of one distribution: 0 on average, also over resamples; of another: its interval leaves 0 out."""
    same = [distance.kernel(unit(40, 6, seed=2 * k), unit(40, 6, seed=2 * k + 1)) for k in range(60)]
    values = np.array([m.value for m in same])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(60)
    assert abs(np.mean([(m.low + m.high) / 2 - m.value for m in same])) < values.std()
    apart = distance.kernel(unit(60, 6), F.normalize(unit(60, 6, seed=1) + 0.5, dim=-1))
    assert apart.low > 0.05
    grouped = distance.kernel(unit(40, 6), unit(40, 6, seed=1), groups=(np.arange(40) // 4, None))
    assert grouped.value == same[0].value


def test_kernel_intervals_hold_the_truth() -> None:
    """80 pairs of samples of two distributions: at least 85 % hold the mean of all."""
    found = [
        distance.kernel(unit(50, 6, seed=k), F.normalize(unit(50, 6, seed=1000 + k) + 0.3, dim=-1))
        for k in range(80)
    ]
    truth = np.mean([m.value for m in found])
    assert np.mean([m.low <= truth <= m.high for m in found]) >= 0.85


def test_distances_refuse_single_pictures_and_other_judges() -> None:
    for measure in (distance.frechet, distance.kernel):
        with pytest.raises(BadRecipe, match="at least two images"):
            measure(unit(1, 6), unit(5, 6))
        with pytest.raises(BadRecipe, match="by one judge"):
            measure(unit(5, 6), unit(5, 7))


# ---- the front -----------------------------------------------------------------------------------

POINTS = np.array([[0.2, 0.9], [0.5, 0.8], [0.8, 0.3], [0.4, 0.7], [0.5, 0.8], [0.8, 0.2]])


def test_front_by_hand() -> None:
    assert front.pareto(POINTS).tolist() == [0, 1, 2]
    # 0.2 x 0.9 + 0.3 x 0.8 + 0.3 x 0.3
    assert front.hypervolume(POINTS) == pytest.approx(0.18 + 0.24 + 0.09)
    # above (0.4, 0.2): 0.1 x 0.6 + 0.3 x 0.1; the first point is not above it
    assert front.hypervolume(POINTS, (0.4, 0.2)) == pytest.approx(0.06 + 0.03)
    assert front.hypervolume(POINTS[:0]) == 0 and front.hypervolume(-POINTS) == 0
    assert front.knee(POINTS) == 1


def test_hypervolume_agrees_with_counting() -> None:
    """The share of 200,000 random points of the unit square that some point dominates."""
    rng = np.random.default_rng(0)
    points = rng.random((12, 2))
    darts = rng.random((200_000, 2))
    hit = (darts[:, None] < points[None]).all(-1).any(1).mean()
    assert front.hypervolume(points) == pytest.approx(hit, abs=0.005)
    worse = np.vstack([points, points * 0.5])  # dominated points change nothing
    assert front.hypervolume(worse) == front.hypervolume(points)


def test_knee_is_the_planted_bend() -> None:
    """A straight trade-off with one point far above it; scaling either axis moves nothing."""
    line = np.column_stack([np.linspace(0, 1, 11), np.linspace(1, 0, 11)])
    line[7] += 0.2
    assert front.knee(line) == 7
    assert front.knee(line * [100, 0.01]) == 7
    assert front.knee(np.array([[0.1, 0.9], [0.9, 0.2]])) == 1
    assert front.knee(np.array([[0.3, 0.4]])) == 0
    with pytest.raises(BadRecipe, match="without points"):
        front.knee(np.zeros((0, 2)))
    with pytest.raises(BadRecipe, match="not a number"):
        front.pareto(np.array([[0.1, math.nan]]))
