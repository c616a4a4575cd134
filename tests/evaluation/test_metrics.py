"""Compare metrics with formulas, other libraries and known results."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from trtq.errors import ArtefactError, NonFiniteError, UsageError
from trtq.evaluation.classifier import ImageClassifier, save_classifier
from trtq.evaluation.extractor import ClipExtractor, load_extractor
from trtq.evaluation.frechet import (
    Statistics,
    bootstrap_interval,
    feature_statistics,
    frechet_distance,
)
from trtq.evaluation.metrics import (
    inception_score,
    pixel_scores,
    precision_recall,
    score_images,
    share_interval,
)


def test_frechet_distance_equals_scipys():
    generator = torch.Generator().manual_seed(0)
    a, b = (feature_statistics(torch.randn(50, 6, generator=generator) * s + s) for s in (1.0, 1.7))
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum() + np.trace(
        a.covariance.numpy() + b.covariance.numpy() - 2 * root
    )
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_two_normals():
    a = Statistics(torch.tensor([0.0]).double(), torch.tensor([[4.0]]).double())
    b = Statistics(torch.tensor([3.0]).double(), torch.tensor([[1.0]]).double())
    assert frechet_distance(a, b) == pytest.approx(3.0**2 + (2 - 1) ** 2)


def test_rejects_too_few_or_non_finite_features():
    with pytest.raises(UsageError, match="at least 2"):
        feature_statistics(torch.zeros(1, 3))
    with pytest.raises(NonFiniteError):
        feature_statistics(torch.tensor([[0.0], [torch.nan]]))


def test_the_interval_contains_the_value_and_shrinks_with_more_images():
    generator = torch.Generator().manual_seed(0)
    truth = Statistics(torch.zeros(4).double(), torch.eye(4).double())
    widths = []
    for count in (100, 1600):
        features = torch.randn(count, 4, generator=generator) + 0.5
        value = frechet_distance(feature_statistics(features), truth)
        low, high = bootstrap_interval(features, truth)
        assert low < value < high
        assert bootstrap_interval(features, truth) == (low, high)
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(("sharp", "score"), [(50.0, 4.0), (0.0, 1.0)])
def test_inception_score_of_known_logits(sharp, score):
    logits = sharp * torch.nn.functional.one_hot(torch.arange(400) % 4, 4).float()
    assert inception_score({"class": logits}) == pytest.approx(score, rel=5e-2)


def test_inception_score_combines_questions():
    first = 50.0 * torch.nn.functional.one_hot(torch.arange(1200) % 2, 2).float()
    second = 50.0 * torch.nn.functional.one_hot(torch.arange(1200) // 2 % 3, 3).float()
    assert inception_score({"a": first, "b": second}) == pytest.approx(6.0, rel=6e-2)


def test_precision_and_recall():
    points = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points + 1000, points) == (0.0, 0.0)
    precision, recall = precision_recall(points[:1].repeat(60, 1), points)
    assert precision == 1.0
    assert recall < 0.2


@pytest.mark.parametrize("size", [8, 32])
def test_pixel_scores(size):
    images = torch.rand(3, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same = pixel_scores(images, images)
    assert same["psnr_db"] == 100.0
    assert same["ssim"] == pytest.approx(1.0)
    shifted = pixel_scores((images * 0.5), (images * 0.5 + 0.2))
    assert shifted["psnr_db"] == pytest.approx(20.0, abs=1e-3)  # 10 log10(2^2 / 0.2^2)
    assert shifted["ssim"] < 1.0


def test_the_interval_of_a_mean_contains_it_and_shrinks_with_more_images():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 1, 16, 16, generator=generator) * 2 - 1
    noisy = images + 0.1 * torch.randn(images.shape, generator=generator)
    few, many = (pixel_scores(noisy[:n], images[:n]) for n in (8, 64))
    for name in ("psnr_db", "ssim"):
        low, high = many[f"{name}_interval"]
        assert low < many[name] < high
        assert high - low < few[f"{name}_interval"][1] - few[f"{name}_interval"][0]


@pytest.mark.parametrize(
    ("share", "count", "interval"),
    [(1.0, 20, (0.8389, 1.0)), (0.0, 20, (0.0, 0.1611)), (0.5, 100, (0.4038, 0.5962))],
)
def test_the_interval_of_a_share_is_wilsons(share, count, interval):
    # Expected values: scipy.stats.binomtest(...).proportion_ci(method="wilson").
    assert share_interval(share, count) == pytest.approx(interval, abs=1e-4)


def test_an_image_is_correct_only_if_every_answer_is(tmp_path):
    torch.manual_seed(0)
    model = ImageClassifier(channels=3, size=8, heads={"colour": 3, "shape": 2})
    statistics = {"mean": torch.zeros(48).double(), "covariance": torch.eye(48).double()}
    save_classifier(model, tmp_path / "classifier", statistics)
    extractor = load_extractor(tmp_path)
    images = torch.rand(10, 3, 8, 8)
    answers = {n: a.argmax(1) for n, a in extractor.answers(extractor.features(images)).items()}
    assert score_images(images, answers, extractor).accuracy == 1.0
    wrong = answers | {"shape": 1 - answers["shape"]}
    assert score_images(images, wrong, extractor).accuracy == 0.0
    assert score_images(images, {}, extractor).accuracy is None


def test_a_clip_folder_is_an_extractor(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=5,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    extractor = load_extractor(None, tmp_path)
    assert isinstance(extractor, ClipExtractor)
    images = torch.rand(3, 1, 8, 8)
    assert extractor.features(images).shape == (3, 5)
    assert extractor.spatial_features(images).shape == (3, 4 * 7)
    scores = score_images(images, {}, extractor)
    assert scores.fd is scores.accuracy is scores.inception_score is None


def test_rejects_folders_without_an_extractor(tmp_path):
    assert load_extractor(tmp_path) is None
    with pytest.raises(UsageError, match="is not a folder"):
        load_extractor(None, tmp_path / "nothing")
    with pytest.raises(ArtefactError, match="CLIP"):
        load_extractor(None, tmp_path)
