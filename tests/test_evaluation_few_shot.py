"Few-shot accuracy: episodes, the fit of many at once, the evaluation."

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glsd.evaluation import evaluate
from glsd.evaluation import few_shot as L


def test_few_shots():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    means = torch.eye(10).repeat(1, 2)
    easy = means[labels] + 0.1 * torch.randn(200, 20, generator=rng)
    mean, half = L.few_shot_accuracy(easy, labels, 5, 3, episodes=30, n_query=5)
    assert mean > 0.95 and half < 0.03
    assert L.few_shot_accuracy(easy, labels, 5, 3, 30, 5) == (mean, half)
    noise, _ = L.few_shot_accuracy(torch.randn(200, 20, generator=rng), labels, 4, 3, 60, 5)
    assert abs(noise - 0.25) < 0.08
    for ways, shots in ((11, 1), (1, 1), (5, 20)):
        with pytest.raises(ValueError, match='ways need .* classes of at least'):
            L.few_shot_accuracy(easy, labels, ways, shots, 5, 1)
    assert np.isfinite(mean)


def test_all_episodes_at_once_are_fitted_as_each_alone():
    torch.manual_seed(0)
    x = F.normalize(torch.randn(3, 4, 5, 12), dim=-1)
    weights, bias = L.fit_episodes(x, 4, decay=0.05)
    for i in range(3):
        alone, its_bias = L.fit_episodes(x[i : i + 1], 4, decay=0.05)
        shift = bias[i] - its_bias[0]
        assert torch.allclose(weights[i], alone[0], atol=2e-3)
        assert (shift - shift.mean()).abs().max() < 2e-3  # a number added to all logits changes nothing


def test_shots_and_queries_of_an_episode_are_apart_and_of_one_class_a_row():
    labels = torch.arange(120) % 6
    labels[::7] = -1
    shots, queries = L.draw_episodes(labels, 3, 4, 5, 20)
    for s, q in zip(shots, queries):
        rows = labels[torch.cat([s, q], 1)]
        assert (rows == rows[:, :1]).all() and (rows >= 0).all() and len(rows[:, 0].unique()) == 3
        assert len(torch.cat([s, q], 1).unique()) == 3 * 9


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(n_way=1), 'n_way = 1 must be a whole number of at least 2'),
        (dict(n_way=13), '13 ways need 13 classes of at least 20 images'),
        (dict(k_shot=0), 'k_shot = 0 must be at least 1'),
        (dict(k_shot=[1, 400]), 'classes of at least 415 images'),
        (dict(episodes=1), 'episodes = 1 must be a whole number of at least 2'),
    ],
)
def test_what_few_shot_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate('few-shot', ['random:vit_mini'], data='toyworld', size=32, images=400, **options)


def test_few_shot_of_a_folder_with_val_of_a_plain_folder_and_with_test(folders, tmp_path):
    found = [
        evaluate('few-shot', ['random:vit_mini'], size=32, n_way=2, k_shot=2, n_query=2, episodes=5, **given)
        for given in folders
    ]
    figures = [r['backbones']['random:vit_mini']['few_shot'] for r in found]
    assert figures[0] == figures[1] == figures[2] and set(figures[0]) == {2}


@pytest.fixture
def folders(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for part in ('train', 'val'):
        for name in ('a', 'b'):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(6):
                image = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
                image.save(tmp_path / part / name / f'{i}.png')
    val = str(tmp_path / 'val')
    return dict(data=str(tmp_path)), dict(data=val), dict(test=val)
