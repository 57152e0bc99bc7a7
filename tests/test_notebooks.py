"The course as a whole: links, the order of imports, folded solutions."

import ast
import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).parent.parent / 'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not {'.ipynb_checkpoints', '_proc'} & {*p.parts})
NAMES = [str(p.relative_to(NBS)) for p in NOTEBOOKS]

# package -> its floor: which folder of nbs/ makes it
FLOORS = dict(views=1, data=2, backbones=3, objectives=4, masked=5, contrastive=6)
FLOORS |= dict(training=7, evaluation=8, experiments=9)
ROOF = 10  # nbs/*.ipynb: the README and the commands


def cells(path, kind):
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def python(source):
    "A cell without notebook magic, or an empty one if it is no Python."
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(('%', '!'))]
    try:
        return ast.parse('\n'.join(lines))
    except SyntaxError:
        return ast.parse('')


def links(path):
    "Relative links to notebooks, without anchors."
    for source in cells(path, 'markdown'):
        for link in re.findall(r'\]\(([^)\s]+?\.ipynb)(?:#[^)]*)?\)', source):
            if '://' not in link:
                yield link


@pytest.mark.parametrize('name', NAMES)
def test_links_lead_somewhere(name):
    path = NBS / name
    broken = {link for link in links(path) if not (path.parent / link).exists()}
    assert not broken


def place_of(path):
    "Where a notebook stands: (floor, chapter); a floor's page, and what has no number, after its chapters."
    floor = re.match(r'(\d+)_', path.parent.name)
    chapter = re.match(r'(\d+)_', path.name)
    return int(floor[1]) if floor else ROOF, int(chapter[1]) if chapter else 99


def places_of_modules():
    "'glsd.objectives.dino' -> (4, 4), for every module that a chapter exports."
    places = {}
    for path in NOTEBOOKS:
        for source in cells(path, 'code'):
            module = re.match(r'#\| default_exp (\S+)', source)
            if module and not module[1].endswith('__init__'):
                places[f'glsd.{module[1]}'] = place_of(path)
    return places


def imports(tree):
    "Modules that a cell imports when it runs: not those of a function's body, nor for type checkers only."
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f'{node.module}.{name.name}' for name in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING':
            continue
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For)):
            yield from imports(node)


def modules_named(imported, places):
    "The chapters' modules of an import, of a name in one, or of a name that a package gives."
    if imported in places:
        return imported
    module, _, name = imported.rpartition('.')
    if module in places:
        return module
    parts = imported.split('.')
    return '.'.join(parts[:2]) if parts[0] == 'glsd' and len(parts) > 1 and parts[1] in FLOORS else None


def home_of(package_name, places):
    "Where the chapter stands that makes a name which a package gives: 'glsd.objectives.create_method'."
    package, _, name = package_name.rpartition('.')
    source = Path(__file__).parent.parent / package.replace('.', '/') / '__init__.py'
    if not source.exists():
        return None
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and name in [n.asname or n.name for n in node.names]:
            module = node.module if not node.level else f'{package}.{node.module}'
            return places.get(module)
    return None


def stands_at(imported, places):
    "The place of what is imported, or None: it is not ours."
    module = modules_named(imported, places)
    if module is None:
        return None
    if module in places:
        return places[module]
    return home_of(imported, places) or (FLOORS[module.split('.')[1]], 0)


PLACES = places_of_modules()


def forward_imports(path):
    own = {f'glsd.{m}' for s in cells(path, 'code') for m in re.findall(r'#\| default_exp (\S+)', s)}
    found = set()
    for source in cells(path, 'code'):
        for imported in imports(python(source)):
            place = stands_at(imported, PLACES)
            module = modules_named(imported, PLACES)
            if place and place > place_of(path) and module not in own:
                found.add(module)
    return found


@pytest.mark.parametrize('name', NAMES)
def test_no_forward_imports(name):
    "A cell imports from lower floors and from earlier chapters of its own; a lazy import is in a function."
    assert not forward_imports(NBS / name)


@pytest.mark.parametrize('name', NAMES)
def test_what_is_folded_is_folded_in_jupyterlab(name):
    "A solution or a drawing helper (`code-fold: true`) has `source_hidden`: that folds it in JupyterLab."
    for cell in json.loads((NBS / name).read_text())['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and re.match(r'#\| code-fold: true', source):
            assert cell['metadata'].get('jupyter', {}).get('source_hidden'), source[:80]
