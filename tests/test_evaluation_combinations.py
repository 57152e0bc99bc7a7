"""Every evaluation on every kind of images with every kind of network: it works, or one clear line says
why not, before any features are computed."""

import json

import pytest
import timm
import torch
from PIL import Image
from training_runs import KINDS, small_recipe

from glsd.data import Subset, ToyWorld, save_list, write_shards
from glsd.data.folders import ImageFolder
from glsd.evaluation import evaluations
from glsd.evaluation.evaluations import EVALUATIONS, evaluate
from glsd.evaluation.specs import open_nets
from glsd.training import Recipe, export_backbone, pretrain

TINY = {  # what each evaluation is given, to be quick
    'knn': dict(k=[1, 3]),
    'linear': dict(epochs=1, cached=True, lrs=[0.1]),
    'few-shot': dict(n_way=2, k_shot=1, n_query=1, episodes=50),
    'correspondence': {},
    'collapse': dict(n=12),
    'attention': {},
    'retrieval': {},
    'dense-nn': dict(k=3),
}
N = 24  # images of each set
MANY = 80  # of a labelled set of the toy world: fewer miss one of its twelve classes


def small_run(method, out):
    "Two steps of a tiny backbone: the one place here that knows how runs are made."
    images = dict(n_images=32, image_size=32, global_size=32, n_local=0)
    heads = dict(out_dim=16, head_hidden=16, head_bottleneck=8) if method == 'vanilla' else dict(n_test=8)
    recipe = Recipe(method, backbone='vit_mini', batch_size=8, steps=2, device='cpu', **images, **heads)
    return pretrain(recipe, out, progress=False)


@pytest.fixture(scope='session')
def networks(tmp_path_factory):
    """{kind: what is named}: runs of two methods, an exported file, a timm model, weights in a file, a
    module in hand."""
    root = tmp_path_factory.mktemp('networks')
    run, supervised = small_run('vanilla', root / 'run'), small_run('supervised', root / 'supervised')
    export_backbone(run.path, root / 'mine.safetensors')
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=32, patch_size=8, depth=2)
    return {
        'run': str(run.path),
        'supervised run': str(supervised.path),
        'exported file': str(root / 'mine.safetensors'),
        'weights in a file': f'vit_mini@{root}/mine.safetensors',
        'timm model': 'random:swin_mini_patch4_window4_32',
        'module in hand': model,
    }


@pytest.fixture(scope='session')
def sources(tmp_path_factory):
    "{kind: (anchors, test)} of the same images."
    root = tmp_path_factory.mktemp('images')
    for part, split in (('train', 'train'), ('val', 'val')):
        world = ToyWorld(2 * N, size=40, split=split)
        for i in range(2 * N):
            file = root / part / world.classes[world.labels[i]] / f'{i:02}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(world[i][0].permute(1, 2, 0).numpy()).save(file)
        folder = ImageFolder(root / part)
        save_list(Subset(folder, range(0, 2 * N, 2)), root / part / 'half.txt')
        write_shards(folder, root / f'{part}_shards', per_shard=20)
    return {
        'folder': (f'{root}/train', f'{root}/val'),
        'shards': (f'{root}/train_shards', f'{root}/val_shards'),
        'toy world': ('toyworld', 'toyworld'),
        'list': (f'{root}/train/half.txt', f'{root}/val/half.txt'),
    }


def options_for(what, images):
    "Which flags name these images for an evaluation."
    anchors, test = images
    if what not in ('knn', 'linear'):
        return dict(images=N, size=32, data=test, **TINY[what])
    n = MANY if anchors == 'toyworld' else N
    return dict(images=n, size=32, anchors=anchors, test=test, **TINY[what])


def refusal(what, kind):
    "The words of the one line that a combination ends with; None if it works."
    if what == 'dense-nn' and kind != 'toy world':
        return 'has no masks'
    return None


@pytest.mark.parametrize('kind', ['folder', 'shards', 'toy world', 'list'])
@pytest.mark.parametrize('what', TINY)
def test_every_evaluation_on_every_kind_of_images_with_every_kind_of_network(
    what, kind, networks, sources, tmp_path, monkeypatch
):
    given, words, out = options_for(what, sources[kind]), refusal(what, kind), tmp_path / 'x.json'
    if words:
        with pytest.raises((ValueError, OSError), match=words) as e:
            evaluate(what, networks, out=out, **given)
        assert '\n' not in str(e.value) and not out.exists()
        return
    answer = evaluate(what, networks, out=out, picture=False, **given)
    assert list(answer['backbones']) == list(networks)
    for r in answer['backbones'].values():
        assert len(EVALUATIONS[what].line(r)) > 5
        assert len(r['mean']) == 3 and 0 < r['crop_pct'] <= 1
    assert json.loads(out.read_text())['what'] == what


@pytest.mark.slow
@pytest.mark.parametrize('method', [m.values[0] for m in KINDS])
def test_every_evaluation_of_a_run_of_every_kind(method, sources, tmp_path):
    "On every kind of images; where it is refused, it is as for the network of any other run."
    run = pretrain(small_recipe(method, steps=2, device='cpu'), tmp_path / 'run', progress=False)
    for what in TINY:
        for kind, images in sources.items():
            if refusal(what, kind) or (what == 'attention' and method == 'maskfeat_video'):
                continue  # the attention of a video network is refused, as torchvision's cannot be read
            answer = evaluate(what, {'run': str(run.path)}, picture=False, **options_for(what, images))
            assert len(EVALUATIONS[what].line(answer['backbones']['run'])) > 5


@pytest.mark.parametrize('what', TINY)
def test_every_evaluation_draws_its_picture_and_takes_a_block(what, networks, sources, tmp_path):
    named = {k: networks[k] for k in ('run', 'timm model')}
    given = options_for(what, sources['toy world'])
    evaluate(what, named, out=tmp_path / 'x.json', **given)
    assert Image.open(tmp_path / 'x.png').size[0] >= 600
    first = evaluate(what, named, block=0, **given)['backbones']
    last = evaluate(what, named, block=-1, **given)['backbones']
    own = evaluate(what, named, **given)['backbones']
    for name in named:
        a, b, c = (figures_only(r[name]) for r in (first, last, own))
        assert a != b
        if what not in (
            'collapse',
            'linear',
            'attention',
        ):  # without heads, without four blocks, a block by itself
            assert b == c


def figures_only(r):
    return {k: v for k, v in r.items() if k not in ('block', 'layers', 'pooling', 'report')}


# what each evaluation cannot do, by a word, before any features ---------------------------------------------

WRONG = [
    ('knn', dict(k='ten'), "k = 'ten' must be a whole number or a list of whole numbers"),
    ('knn', dict(k=0), 'k must be 1 or more'),
    ('knn', dict(k=[1, 81]), 'k = 81 is more than the 80 training images'),
    ('knn', dict(temperature=0), 'temperature = 0 must be above 0'),
    ('linear', dict(epochs='many'), "epochs = 'many' must be a whole number"),
    ('linear', dict(epochs=0), 'epochs = 0 must be a whole number of at least 1'),
    ('linear', dict(lrs=['a']), 'must be a list of numbers'),
    ('linear', dict(lrs=[-1.0]), 'must be positive'),
    ('linear', dict(n_blocks=40), 'n_blocks = 40: choose from 1 to'),
    ('correspondence', dict(shift=1.5), 'shift=1.5 must be a share'),
    ('correspondence', dict(flip=2.0), 'flip = 2.0 must be a probability'),
    ('correspondence', dict(images=1), 'at least 2'),
    ('collapse', dict(images=1), 'give at least two'),
    ('collapse', dict(n=1), 'n = 1 must be a whole number of at least 2'),
    ('attention', dict(mass=0.0), 'mass=0.0 must be above 0'),
    ('attention', dict(block=40), 'no block 40'),
    ('retrieval', dict(images=1), 'at least 2'),
    ('dense-nn', dict(k=100_000), 'k = 100000 must be from 1 to'),
    ('dense-nn', dict(memory_size=1), 'cannot hold one of each'),
    *((what, dict(size=30), '30') for what in TINY),
    *((what, dict(size=0), 'size = 0 must be a whole number of at least 1') for what in TINY),
    *((what, dict(size=[32, 0]), 'must be a whole number of at least 1, or two') for what in TINY),
    *((what, dict(size=[32, 48]), 'one number: .* dense-nn') for what in TINY if what != 'dense-nn'),
    *((what, dict(size='large'), "size = 'large' must be a whole number") for what in TINY),
    *((what, dict(images=0.5), 'images = 0.5 must be a whole number') for what in TINY),
    *((what, dict(block=40), 'no block 40') for what in TINY),
    *((what, dict(workers=-1), 'workers') for what in TINY),
    *((what, dict(nonsense=1), "no option 'nonsense'") for what in TINY),
    *((what, dict(mean=[0.5]), 'mean = .* must be three numbers') for what in TINY),
    *((what, dict(device='abacus'), 'abacus') for what in TINY),
]


@pytest.mark.parametrize('what, change, words', WRONG)
def test_every_cheap_mistake_is_one_line_before_any_features(
    what, change, words, networks, monkeypatch, tmp_path
):
    def measured(*args, **kwargs):
        raise AssertionError('it was measured')

    e = EVALUATIONS[what]
    monkeypatch.setitem(evaluations.EVALUATIONS, what, e._replace(measure=forbidden(e.measure, measured)))
    given = {**options_for(what, ('toyworld', 'toyworld')), **change}
    with pytest.raises((ValueError, OSError), match=words) as error:
        evaluate(what, {'run': networks['run']}, out=tmp_path / 'x.json', **given)
    assert '\n' not in str(error.value) and not (tmp_path / 'x.json').exists()


def forbidden(measure, instead):
    "A function with the options of `measure` that must not be called."
    import functools

    return functools.wraps(measure)(instead)


def test_patch_14_and_120_pixels_are_one_line_in_every_evaluation(sources):
    model = timm.create_model('vit_small_patch14_dinov2', num_classes=0, depth=1, img_size=112)
    for what in TINY:
        given = {**options_for(what, sources['toy world']), 'size': 120}
        with pytest.raises(ValueError, match='120') as e:
            evaluate(what, {'dino': model}, **given)
        assert '\n' not in str(e.value)


def test_a_network_without_attention_or_tokens_is_one_line(sources):
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8))
    for what in ('correspondence', 'attention', 'dense-nn'):
        with pytest.warns(UserWarning), pytest.raises(ValueError, match='tokens|attention') as e:
            evaluate(what, {'flat': flat}, **options_for(what, sources['toy world']))
        assert '\n' not in str(e.value)


def test_networks_of_two_sizes_need_a_choice(networks):
    with pytest.raises(ValueError, match=r'\[32, 224\] pixels: choose one with --size'):
        evaluate('knn', [networks['run'], 'random:vit_tiny_patch16_224'])
    assert evaluate('knn', [networks['run']], images=MANY, k=1)['size'] == 32


def test_each_network_is_measured_with_its_own_mean(networks, sources):
    named = {k: networks[k] for k in ('run', 'module in hand')}
    r = evaluate('knn', named, **options_for('knn', sources['folder']))['backbones']
    assert r['run']['mean'] == (0.485, 0.456, 0.406) and r['module in hand']['mean'] == (0.5,) * 3
    given = options_for('knn', sources['folder'])
    r = evaluate('knn', named, mean=[0.4] * 3, std=[0.2] * 3, **given)['backbones']
    assert all(tuple(x['mean']) == (0.4,) * 3 for x in r.values())


def test_a_run_that_was_trained_on_a_gpu_is_measured_on_the_cpu(networks, tmp_path):
    "Its checkpoint says cuda, and there is none."
    import shutil

    path = shutil.copytree(networks['run'], tmp_path / 'of_gpu')
    for file in (path / 'checkpoints').glob('*.pt'):
        state = torch.load(file, weights_only=True)
        state['recipe']['device'] = 'cuda'
        torch.save(state, file)
    assert evaluate('knn', [str(path)], images=MANY, k=1, device='cpu')['backbones']['of_gpu']['knn']


def test_collapse_of_a_supervised_run_looks_at_features_and_of_a_run_at_heads(networks):
    r = evaluate('collapse', {k: networks[k] for k in ('run', 'supervised run')}, images=N)['backbones']
    assert 'heads' in r['run'] and 'heads' not in r['supervised run'] and r['supervised run']['pooled']
    with pytest.raises(ValueError, match='4 images are fewer than the batch of 8'):
        evaluate('collapse', [networks['run']], images=4)
    assert evaluate('collapse', [networks['supervised run']], images=4)


def test_an_untrained_network_gets_no_advice_on_training(monkeypatch, networks):
    from glsd.evaluation import watching

    def constant(*args, **kwargs):
        part = dict(rank=1.0, most=96, std=0.0, feature_std=0.0, spread=0.0, spectrum=[1.0])
        return dict(pooled=part, tokens=part)

    monkeypatch.setattr(watching, 'collapse_of_backbone', constant)
    named = {'control': 'random:vit_mini', 'mine': networks['exported file']}
    r = evaluate('collapse', named, images=N, data='toyworld')['backbones']
    assert r['control']['kind'] == r['mine']['kind'] == 'full collapse'
    assert 'these weights are untrained' in r['control']['report'] and 'lr' not in r['control']['report']
    assert 'a lower lr' in r['mine']['report']


def test_data_with_train_and_val_in_it_are_two_labelled_sets(networks, sources, tmp_path):
    import os

    for part, source in zip(('train', 'val'), sources['folder']):
        os.symlink(source, tmp_path / part)
    r = evaluate('knn', [networks['run']], data=str(tmp_path), images=N, k=1)
    assert r['images'] == [N, N]
    with pytest.raises(ValueError, match='name labelled images with --anchors'):
        evaluate('knn', [networks['run']], data=sources['folder'][0], images=N)


def test_names_of_networks(networks):
    with pytest.raises(ValueError, match='two backbones are called'):
        open_nets([networks['run'], networks['run']])
    with pytest.raises(ValueError, match='no backbone is named'):
        open_nets([])
    assert list(open_nets([f'x={networks["run"]}', 'random:vit_mini'])) == ['x', 'random:vit_mini']
