"The course as a whole: links, the order of imports, folded solutions, papers."

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


# chapters in which papers are still named without a link
NOT_YET_CITED = ('2_data/', '9_experiments/', 'index.ipynb')
PAPERS_AT = r'https?://(?:arxiv\.org|openaccess\.thecvf\.com|openreview\.net)/[^)\s]*'


def references():
    "The papers of references.bib: fields, `cited` ('Caron et al. 2021') and `mention`, how chapters name it."
    papers = []
    for entry in (NBS / 'references.bib').read_text().split('\n@')[1:]:  # what is before them is a comment
        paper = {
            k: ' '.join(v.split()) for k, v in re.findall(r'^ +(\w+) += \{(.*?)\},$', entry, re.M | re.S)
        }
        people = [author.split(',')[0] for author in paper['author'].split(' and ')]
        who = f'{people[0]} et al.' if len(people) > 2 else ' and '.join(people)
        names = rf'(?<![\w/-])(?:{paper["names"]})(?![\w*])|' if 'names' in paper else ''
        paper['mention'] = re.compile(rf'{names}{re.escape(who)},? \(?{paper["year"]}')
        papers.append(paper | dict(cited=f'{who} {paper["year"]}'))
    return papers


PAPERS = references()


def blanked(pattern, text, **how):
    "What the pattern finds, replaced by spaces: places stay what they are."
    return re.sub(pattern, lambda m: re.sub(r'\S', ' ', m[0]), text, **how)


def prose(source):
    "(line, its words) of a Markdown cell; no code, formulas, headings, nor what is said of another chapter."
    text = blanked(r'^```.*?^```|\$\$.*?\$\$', source, flags=re.M | re.S)
    for pattern in (
        r'^(?:#|:::|> |<details>).*',
        r'`[^`\n]*`',
        r'\$[^$\n]+\$',
        r'\[[^]\n]*\]\([^)\s]+\.ipynb[^)]*\)',
    ):
        text = blanked(pattern, text, flags=re.M)
    yield from zip(source.splitlines(), blanked(r'\]\([^)]*\)', text).splitlines())


def unlinked(path):
    "Papers whose first mention in a chapter has no link to them in its line (a paragraph, mostly)."
    named = set()
    for source in cells(path, 'markdown'):
        for line, words in prose(source):
            for paper in PAPERS:
                found = paper['mention'].search(words)
                if not found or paper['title'] in named:
                    continue
                by_year = found[0][-4:].isdigit()  # two papers may be 'Xie et al. 2021'
                alike = [p for p in PAPERS if p is paper or by_year and p['cited'] == paper['cited']]
                named |= {p['title'] for p in alike}
                if all('url' in p and p['url'] not in line for p in alike):
                    yield f'{found[0]}: {line[:100]}'


@pytest.mark.parametrize('name', NAMES)
def test_papers_are_linked_where_a_chapter_first_names_them(name):
    if name.startswith(NOT_YET_CITED):
        pytest.skip('its papers are not linked yet')
    assert not list(unlinked(NBS / name))


@pytest.mark.parametrize('name', NAMES)
def test_papers_that_are_linked_are_in_the_references(name):
    "The address is that of an entry; a link text with a year is the entry's authors and year."
    known = {paper['url']: paper['cited'] for paper in PAPERS if 'url' in paper}
    for source in cells(NBS / name, 'markdown'):
        for text, url in re.findall(rf'\[([^]]*)\]\(({PAPERS_AT})\)', source):
            assert url in known, f'{url} is not in references.bib'
            if re.search(r'\d{4}\)?$', text):
                assert re.sub('[(),]', '', text) == known[url]


@pytest.mark.parametrize('name', NAMES)
def test_a_chapter_that_speaks_of_the_paper_says_which(name):
    "'The paper' is GLSD's or the chapter's own: no line before the first link to one speaks of it."
    if name.startswith(NOT_YET_CITED):
        pytest.skip('its papers are not linked yet')
    for source in cells(NBS / name, 'markdown'):
        for line, words in prose(source):
            if re.search(PAPERS_AT, line):
                return
            assert not re.search(r'\b[Tt]he paper\b', words), line[:100]


def test_references_name_each_paper_once():
    assert len(PAPERS) > 50
    for field in 'title', 'url':
        found = [paper[field] for paper in PAPERS if field in paper]
        assert len(found) == len(set(found))
    assert all(re.fullmatch(r'\d{4}', paper['year']) for paper in PAPERS)


def test_names_in_the_notation_are_in_the_package():
    "What the tables of notation.ipynb call the code's name for a symbol is a name in glsd/."
    package = '\n'.join(path.read_text() for path in sorted((NBS.parent / 'glsd').rglob('*.py')))
    rows = [
        line for s in cells(NBS / 'notation.ipynb', 'markdown') for line in s.splitlines() if line[:1] == '|'
    ]
    names = {
        name
        for row in rows
        for code in re.findall('`([^`]+)`', row)
        for name in re.findall(r'\b[A-Za-z]\w{2,}', code)
    }
    assert len(names) > 30
    assert not {name for name in names if not re.search(rf'\b{name}\b', package)}


@pytest.mark.parametrize('name', NAMES)
def test_no_figure_is_only_named(name):
    "A figure that pyplot does not know is shown as '<Figure size ...>' and no more: then nobody has seen it."
    notebook = json.loads((NBS / name).read_text())
    shown = [o.get('data', {}) for c in notebook['cells'] for o in c.get('outputs', [])]
    named = [d for d in shown if ''.join(d.get('text/plain', '')).startswith('<Figure size')]
    assert all({'image/png', 'image/jpeg'} & set(d) for d in named)
