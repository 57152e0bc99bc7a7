"""What the chapter cannot show about retrieval: the published definition on random rankings, faiss,
folders, ties."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from glsd.backbones import Features
from glsd.data import ToyWorld
from glsd.evaluation.copies import EDITS, Edited, WithGeM, copy_detection, copy_set, ranks_of_originals
from glsd.evaluation.ranking import average_precision, mean_average_precision, precision_at, search
from glsd.evaluation.retrieval import retrieval_figures, retrieval_map, retrieval_picture
from glsd.evaluation.retrieval_sets import Images, RetrievalFolder, RetrievalSet, edit, toy_retrieval


def area_under(wanted, ignored, ranking):
    "AP as an integral: precision is piecewise linear between the points before and after each hit."
    kept = [i for i in ranking if i not in ignored]
    points, seen = [(0.0, 1.0)], 0
    for r, i in enumerate(kept):
        if i not in wanted:
            continue
        points += [
            (seen / len(wanted), seen / r if r else 1.0),
            ((seen + 1) / len(wanted), (seen + 1) / (r + 1)),
        ]
        seen += 1
    x, y = np.array(points).T
    return float(((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum()), kept


def test_all_three_setups_on_random_lists():
    rng = np.random.default_rng(0)
    rankings, lists = [], []
    for _ in range(60):
        numbers, cuts = rng.permutation(30), np.sort(rng.integers(0, 12, 3))
        easy, hard, junk, _ = np.split(numbers, cuts)
        lists.append({'easy': easy.tolist(), 'hard': hard.tolist(), 'junk': junk.tolist()})
        rankings.append(rng.permutation(30))
    found = mean_average_precision(rankings, lists, at=(3,))
    sets = {
        'easy': (['easy'], ['hard', 'junk']),
        'medium': (['easy', 'hard'], ['junk']),
        'hard': (['hard'], ['easy', 'junk']),
    }
    for name, (wanted, ignored) in sets.items():
        ap, p3 = [], []
        for ranking, entry in zip(rankings, lists):
            w, g = (set(sum((entry[n] for n in names), [])) for names in (wanted, ignored))
            if not w:
                continue
            value, kept = area_under(w, g, ranking)
            last = max(r for r, i in enumerate(kept) if i in w) + 1
            ap.append(value)
            p3.append(sum(i in w for i in kept[: min(3, last)]) / min(3, last))
        assert 0 < len(ap) < 60 and found[name]['queries'] == len(ap)
        assert found[name]['map'] == pytest.approx(100 * np.mean(ap)) and found[name]['p@3'] == pytest.approx(
            100 * np.mean(p3)
        )


def test_junk_may_lie_anywhere():
    rng = np.random.default_rng(1)
    for _ in range(200):
        relevant, junk = rng.random(20) < 0.3, rng.random(20) < 0.3
        if not (relevant & ~junk).any():
            continue
        assert average_precision(relevant, junk) == average_precision(relevant[~junk])
        assert precision_at(relevant, 4, junk) == precision_at(relevant[~junk], 4)


def test_a_cut_ranking_misses_what_it_does_not_hold():
    whole = np.isin(np.arange(50), [0, 3, 40])
    assert average_precision(whole[:10], n_relevant=3) == pytest.approx(
        average_precision(whole) - (2 / 40 + 3 / 41) / 6
    )
    assert mean_average_precision([[0, 1]], [{'easy': [0, 7]}])['easy']['map'] == 50


def test_an_image_listed_and_found_twice_counts_once():
    assert mean_average_precision([[0, 1, 2]], [{'easy': [0, 0]}])['easy']['map'] == 100


@pytest.mark.parametrize('n, m, d, k', [(1, 1, 1, 1), (7, 50, 3, 50), (40, 3000, 24, 100)])
def test_faiss_finds_what_torch_finds(n, m, d, k):
    pytest.importorskip(
        'faiss', reason='faiss is not installed (pip install faiss-cpu): torch and faiss are not compared'
    )
    torch.manual_seed(1)
    q, b = 3 * torch.randn(n, d), torch.randn(m, d)
    (s, i), (s2, i2) = search(q, b, k), search(q, b, k, backend='faiss')
    torch.testing.assert_close(s, s2, atol=1e-5, rtol=0)
    far = (
        (s.diff(dim=1).abs() > 1e-5).all(1) if k > 1 else torch.ones(n, dtype=bool)
    )  # of equal cosines either may come first
    assert (
        (i == i2)[far].all()
        and i2.dtype == torch.long
        and sorted(i2[0].tolist()) == sorted(set(i2[0].tolist()))
    )
    figures = [
        retrieval_figures(q, b, [{'easy': [0]}] * n, backend)['easy']['map'] for backend in ('torch', 'faiss')
    ]
    assert figures[0] == pytest.approx(figures[1], rel=0.02)


def test_without_faiss_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'faiss', None)
    with pytest.raises(ValueError, match='pip install faiss-cpu'):
        search(torch.ones(1, 2), torch.ones(1, 2), 1, 'faiss')


def write_folder(root, data):
    "A RetrievalSet as a folder with lists.json, every query with a frame around what counts."
    for name, ds in ('q', data.queries), ('d', data.database):
        (root / name).mkdir(parents=True)
        for i in range(len(ds)):
            image = ds[i][0].permute(1, 2, 0).numpy()
            if name == 'q':
                image = np.pad(image, ((3, 5), (2, 4), (0, 0)))
            Image.fromarray(image).save(root / name / f'{i}.png')
    path = lambda i: f'd/{i}.png'
    record = {
        'queries': [f'q/{i}.png' for i in range(len(data.queries))],
        'database': [path(i) for i in range(len(data.database))],
        'lists': [
            {**{k: [path(i) for i in v] for k, v in l.items()}, 'box': [2, 3, 34, 35]} for l in data.lists
        ],
    }
    (root / 'lists.json').write_text(json.dumps(record))


def test_a_folder_gives_the_figures_of_what_it_was_written_from(tmp_path):
    data = toy_retrieval(6, size=32)
    write_folder(tmp_path, data)
    folder = RetrievalFolder(tmp_path)
    assert folder.lists == data.lists and (folder.queries[2][0] == data.queries[2][0]).all()
    for workers in (0, 1):
        assert retrieval_map(nn.Flatten(), folder, 32, workers=workers) == retrieval_map(
            nn.Flatten(), data, 32
        )


def test_a_damaged_list_is_one_line(tmp_path):
    write_folder(tmp_path, toy_retrieval(2, size=32))
    path = tmp_path / 'lists.json'
    good = json.loads(path.read_text())
    for change, message in [
        ({'queries': []}, 'needs queries and a database'),
        ({'lists': good['lists'][:1]}, '2 queries, but 1 lists'),
        ({'database': good['database'][:-1]}, 'd/9.png, which is not in its database'),
        ({'lists': [{'easy': ['d/1.png'], 'junk': ['d/1.png']}, {}]}, 'in two lists'),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message) as e:
            RetrievalFolder(tmp_path)
        assert '\n' not in str(e.value)
    for text in ('[]', '{"queries', '3'):
        path.write_text(text)
        with pytest.raises(ValueError, match='lists.json'):
            RetrievalFolder(tmp_path)


def test_toy_lists_depend_on_the_seed_alone():
    a, b, c = toy_retrieval(3), toy_retrieval(3), toy_retrieval(3, seed=1)
    assert all(torch.equal(a.database[i][0], b.database[i][0]) for i in range(15)) and not torch.equal(
        a.database[0][0], c.database[0][0]
    )
    assert torch.equal(a.queries[1][0], a.database[5][0])  # the query itself is in the database, as junk


class Knows(nn.Module):
    "A network that reads the number of a scene off its first pixel."

    def forward(self, x):
        return nn.functional.one_hot((x[:, 0, 0, 0] * 1000).round().long() % 97, 97).float()


def test_perfect_and_collapsed_networks():
    plates = Images([torch.full((3, 16, 16), 5 * i, dtype=torch.uint8) for i in range(12)])
    nothing = {'nothing': {}}
    perfect = copy_detection(Knows(), plates, 16, edits=nothing)
    assert perfect['map'] == perfect['first'] == 100

    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 4)

    collapsed = copy_detection(Constant(), plates, 16, edits=nothing)
    assert collapsed['first'] == 0 and collapsed['map'] == pytest.approx(
        100 * 0.5 / 12
    )  # a tie is not a find
    assert collapsed['chance']['first'] == pytest.approx(100 / 12)


def test_ranks_are_those_of_a_sort():
    torch.manual_seed(2)
    bank = torch.randn(600, 8)
    copies = bank[:550] + torch.randn(550, 8)
    i = search(copies, bank, 600)[1]
    assert (
        ranks_of_originals(copies, bank) == (i == torch.arange(550)[:, None]).int().argmax(1)
    ).float().mean() > 0.99


def test_every_edit_keeps_size_and_depends_on_seed_and_index_alone():
    photos = Images(
        [torch.randint(256, (3, h, w), dtype=torch.uint8) for h, w in ((40, 40), (33, 80), (90, 31))]
    )
    for name, options in EDITS.items():
        a, b, c = (Edited(photos, options, seed) for seed in (0, 0, 1))
        for i in range(3):
            assert torch.equal(a[i][0], b[i][0]) and a[i][0].shape == photos[i][0].shape
        assert not torch.equal(a[1][0], photos[1][0])
        if not name.startswith('JPEG'):
            assert not all(torch.equal(a[i][0], c[i][0]) for i in range(3))
    assert torch.equal(edit(photos[1][0], np.random.default_rng(0)), photos[1][0])
    flipped = edit(photos[1][0], np.random.default_rng(0), flip=1)
    assert torch.equal(flipped, photos[1][0].flip(-1))


def test_gem_lies_between_mean_and_maximum():
    class Net(nn.Module):
        def forward(self, x):
            return Features(x.mean((2, 3)), x.flatten(2).mT.abs(), x.shape[2:])

    x = torch.randn(4, 3, 6, 6)
    t = x.flatten(2).abs()
    gem = WithGeM(Net())(x).pooled[:, 3:]
    assert ((t.mean(2) < gem) & (gem < t.amax(2))).all()
    torch.testing.assert_close(WithGeM(Net(), 1)(x).pooled[:, 3:], t.mean(2))


def test_pictures_of_lists_and_of_copies():
    data, world = toy_retrieval(4, size=32), ToyWorld(8, 32)
    fig = retrieval_picture({'a': nn.Flatten(), 'b': nn.Flatten()}, data, 32, queries=[3], k=2)
    assert [len(f.axes) for f in fig.subfigs] == [3, 3]
    fig.canvas.draw()
    retrieval_picture({'a': nn.Flatten()}, copy_set(world), 32, queries=20, k=2).canvas.draw()
    with pytest.raises(ValueError, match='at least one backbone'):
        retrieval_picture({}, data, 32)
    with pytest.raises(ValueError, match='k = 30 must be from 1 to the 20'):
        retrieval_picture({'a': nn.Flatten()}, data, 32, k=30)


def test_what_diverged_is_named():
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 4), float('nan'))

    for call in (
        lambda: retrieval_map(Broken(), toy_retrieval(2, size=32), 32),
        lambda: copy_detection(Broken(), ToyWorld(3, 32), 32),
    ):
        with pytest.raises(ValueError, match='features are not finite') as e:
            call()
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='needs queries and a database'):
        RetrievalSet(Images([]), Images([]))


GREY = Images([torch.full((3, 8, 8), v, dtype=torch.uint8) for v in (10, 60, 110)])


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: average_precision([0, 0]), '0 relevant images'),
        (lambda: average_precision([1, 1], n_relevant=1), 'no fewer than the 2 found'),
        (lambda: search(torch.ones(2, 3), torch.ones(4, 3), 5), 'k = 5 must be from 1 to the 4'),
        (lambda: search(torch.ones(2, 3), torch.full((4, 3), torch.nan), 2), '4 of 4 database features'),
        (lambda: search(torch.ones(0, 3), torch.ones(4, 3), 2), r'query features must be \[n, d\]'),
        (lambda: search(torch.ones(2, 3), torch.ones(4, 2), 2), 'query features have 3 dimensions'),
        (lambda: search(torch.ones(2, 3), torch.ones(4, 3), 2, 'annoy'), "no backend 'annoy'"),
        (lambda: RetrievalSet(GREY, GREY, [{}]), '3 queries, but 1 lists'),
        (lambda: RetrievalSet(GREY, GREY, [{'easy': [0], 'hard': [0]}, {}, {}]), 'in two lists'),
        (lambda: RetrievalSet(GREY, GREY, [{'easy': [3]}, {}, {}]), 'query 0 lists image 3'),
        (lambda: toy_retrieval(1), 'a search needs at least 2'),
        (lambda: copy_detection(nn.Flatten(), Images([]), 8), '0 originals'),
        (lambda: copy_detection(nn.Flatten(), Images([GREY[0][0]]), 8), 'at least 2 images'),
        (lambda: copy_detection(nn.Flatten(), GREY, 8, edits={}), 'at least one edit'),
        (lambda: WithGeM(nn.Flatten())(torch.zeros(1, 3, 8, 8)), 'returns no tokens'),
    ],
)
def test_refusals_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert '\n' not in str(e.value)


def test_lists_that_lead_nowhere_are_one_line(tmp_path):
    Image.new('RGB', (40, 20)).save(tmp_path / 'a.png')
    good = {'queries': ['a.png'], 'database': ['a.png'], 'lists': [{}]}

    def folder(**changes):
        (tmp_path / 'lists.json').write_text(json.dumps({**good, **changes}))
        return RetrievalFolder(tmp_path)

    with pytest.raises(FileNotFoundError, match='no such file'):
        RetrievalFolder(tmp_path, 'none.json')
    with pytest.raises(FileNotFoundError, match='z.png is in the list, but not below'):
        folder(queries=['z.png'])
    with pytest.raises(ValueError, match='holds no pixel of an image of 40 x 20'):
        folder(lists=[{'box': [90, 0, 99, 9]}]).queries[0]


def test_pixels_see_the_crops_that_the_backbone_sees():
    "A network that wants the whole image is compared with pixels of the whole image."
    net = nn.Flatten()
    net.mean, net.std, net.crop_pct = (0.5,) * 3, (0.5,) * 3, 1.0
    for measure, data in ((retrieval_map, toy_retrieval(4, size=64)), (copy_detection, ToyWorld(8, 64))):
        r = measure(net, data, 32)
        assert all(r['pixels'][k] == r[k] for k in r['pixels'])
