"What several test files of training share: small recipes, and how two states are compared."

import dataclasses
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glsd.backbones import create_backbone
from glsd.masked.dvae import save_tokenizer
from glsd.objectives.method import create_method, find_method, list_methods
from glsd.training import Recipe, pretrain
from glsd.training.options import RunOptions

SMALL = dict(
    n_images=48, image_size=32, global_size=32, local_size=16, n_local=1, local_scale=(0.1, 0.4),
    backbone='swin_mini', drop_path=0.2, out_dim=32, head_hidden=32, head_bottleneck=16, head_batchnorm=True,
    batch_size=8, steps=13, lr=1e-2, momentum=0.9, checkpoint_every=4,
)  # fmt: skip
QUICK = Recipe('geometric', **SMALL).replace(steps=6, checkpoint_every=2)
SUPERVISED = dict(
    n_images=48, n_test=12, image_size=32, global_size=32, backbone='swin_mini', batch_size=8, steps=6,
    lr=0.1, drloc_weight=0.5, drloc_m=16, drloc_hidden=16, checkpoint_every=2,
)  # fmt: skip
MASKED = dict(
    n_images=48, image_size=32, global_size=32, decoder_dim=32, decoder_depth=1, decoder_heads=2, hog_cell=4,
    mask_unit=0, frames=4, frame_stride=1, n_codes=16, code_dim=8, decoder_width=8, batch_size=8, steps=6,
    lr=1e-2, lr_batch=8, warmup=0.1, checkpoint_every=2,
)  # fmt: skip
CONTRASTIVE = dict(
    n_images=48, image_size=32, global_size=32, backbone='vit_mini', batch_size=8, steps=6, lr=1e-2,
    lr_batch=8, warmup=0.1, checkpoint_every=2,
)  # fmt: skip
SMALL_PROJECTOR = dict(projector_hidden=32, projector_dim=16)

# every method, without second names; the quick tests take three that differ most
METHODS = [
    pytest.param(name, marks=() if name in ('geometric', 'moby', 'supervised') else pytest.mark.slow)
    for name in list_methods()
    if name not in ('vanilla', 'moco')
]


# one of each kind: for what depends on the parts that a method has, and not on its loss
KINDS = 'geometric moby supervised finetune deit mae vqkd beit maskfeat_video swav'.split()
KINDS = [method for method in METHODS if method.values[0] in KINDS]


def known_fields(method: str, values: dict) -> dict:
    "Those of the values that are fields of a recipe of this method."
    cls = find_method(method)
    own = {f.name for kind in (cls.Options, cls.Views, RunOptions) for f in dataclasses.fields(kind)}
    return {k: v for k, v in values.items() if k in own}


def plain_backbone(method: str) -> str:
    "A small network that a method can train: not every one takes masks, or leaves patches out."
    own = dict(maskfeat_video='mvit_mini', deit='deit_mini')
    if method in own:
        return own[method]
    return 'vit_mini_p4' if find_method(method).__module__.startswith('glsd.masked.') else 'vit_mini'


def files_of_masked() -> dict:
    "A tokenizer and a teacher for the methods that name one; subprocesses find the same files."
    folder = Path(os.environ.setdefault('GLSD_TEST_FILES', tempfile.mkdtemp(prefix='glsd_tests_')))
    files = dict(tokenizer=folder / 'words.safetensors', teacher=folder / 'teacher.safetensors')
    if not files['teacher'].exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = dict(n_codes=16, code_dim=8, decoder_width=8, global_size=32)
            tokenizer = create_method('dvae', backbone='dvae_mini', **sizes)
            tokenizer.counts.fill_(1.0)
            save_tokenizer(tokenizer, files['tokenizer'])
            weights = create_backbone('vit_mini_p4').model.state_dict()
            about = dict(backbone='vit_mini_p4', timm_kwargs=json.dumps({}))
            save_file(weights, files['teacher'], about)
    return {name: str(path) for name, path in files.items()}


def files_named_by(method: str) -> dict:
    "The option of a masked method that names a file, where it has one."
    option = dict(beit='tokenizer', vqkd='teacher').get(method)
    return {option: files_of_masked()[option]} if option else {}


@cache
def deit_teacher() -> str:
    "The folder of a run of one step, by which students are taught."
    folder = Path(os.environ.setdefault('GLSD_TEST_FILES', tempfile.mkdtemp(prefix='glsd_tests_')))
    recipe = Recipe('supervised', **SUPERVISED).replace(backbone='resnet_mini', steps=1, drloc_weight=0.0)
    return str(pretrain(recipe, folder / 'classifier', {}, progress=False).path)


def deit_options() -> dict:
    "Fields of a small student."
    own = dict(drloc_weight=0.0, backbone='deit_mini', n_global=1, batch_size=8, teacher=deit_teacher())
    return SUPERVISED | own


def small_recipe(method: str, **changes) -> Recipe:
    "A recipe of any method that takes a few steps in a second."
    if find_method(method).__module__.startswith('glsd.masked.'):
        own = dict(backbone=plain_backbone(method))
        own |= files_named_by(method)
        return Recipe(method, **{**known_fields(method, MASKED), **own, **changes})
    if method == 'deit':
        return Recipe(method, **deit_options() | changes)
    others = dict(  # those that are not student and teacher
        supervised=SUPERVISED,
        finetune=dict(SUPERVISED, ema=0.9),
        simclr=CONTRASTIVE | SMALL_PROJECTOR,
        mocov2=CONTRASTIVE | SMALL_PROJECTOR | dict(queue=32, bn_group=4, momentum=0.9, momentum_final=0.9),
        mocov3=CONTRASTIVE | SMALL_PROJECTOR | dict(predictor_hidden=32, momentum=0.9),
        byol=CONTRASTIVE | SMALL_PROJECTOR,
        lejepa=CONTRASTIVE | SMALL_PROJECTOR | dict(directions=16),
        swav=CONTRASTIVE | SMALL_PROJECTOR | dict(prototypes=12, n_local=2, local_size=16),
        dilo=CONTRASTIVE | SMALL_PROJECTOR | dict(superpixels=40, p_paste=0.5),
        looc=CONTRASTIVE | SMALL_PROJECTOR | dict(queue=16),
        nnclr=CONTRASTIVE | SMALL_PROJECTOR | dict(predictor_hidden=32, queue=32),
    )
    if method in others:
        return Recipe(method, **{**others[method], **changes})
    backbone = (
        'swin_mini' if method in ('dino', 'vanilla', 'geometric', 'similarity', 'shuffled') else 'vit_mini'
    )
    own = dict(n_query=3) if method.startswith('adclr') else {}
    own |= dict(view_queue=64, view_hidden=32, view_width=16) if method == 'moby' else {}
    own |= dict(view_hidden=32, view_width=16) if method == 'simdino' else {}
    return Recipe(
        method, **{**SMALL, 'backbone': backbone, 'steps': 6, 'checkpoint_every': 2, **own, **changes}
    )


def _rank(rank, n, port, function, args):
    address = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    os.environ |= address | dict(RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ |= dict(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n))
    torch.set_num_threads(1)
    function(*args)
    sys.stdout.flush()
    os._exit(0)  # torch's threads now and then abort when the interpreter is taken down


def in_processes(n: int, function, *args) -> None:
    """Calls a function of a test file in n processes that torch.distributed finds as torchrun's.

    They are forked from a server that has imported glsd: that alone takes a process many seconds."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['training_runs'])
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(rank, n, port, function, args)) for rank in range(n)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0] * n


def same(a, b) -> bool:
    "Two nested states, bit for bit."
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def apart(a, b) -> float:
    "The largest difference between two nested states."
    if isinstance(a, torch.Tensor):
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    if isinstance(a, dict):
        return max([apart(a[k], b[k]) for k in a], default=0.0)
    if isinstance(a, (list, tuple)):
        return max([apart(x, y) for x, y in zip(a, b, strict=True)], default=0.0)
    if a == b:
        return 0.0
    return float(abs(a - b)) if isinstance(a, float) else float('inf')


def finite(state: dict) -> bool:
    "Are all the floating-point numbers of a method's state finite?"
    return all(v.isfinite().all() for v in state.values() if v.is_floating_point())


def one_line(error) -> bool:
    return '\n' not in str(error.value)


def interrupt_at(last: int):
    "A monitor that ends the run after a step."

    def monitor(method, step, views):
        if step == last:
            raise KeyboardInterrupt
        return {}

    return monitor
