"""Makes README.md from nbs/index.ipynb: nbconvert and a filter, no Quarto needed. `--check` only compares."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
nb = nbformat.read(root / 'nbs/index.ipynb', as_version=4)
nb.cells = [c for c in nb.cells if not c.source.startswith(('#| hide', '#| default_exp', '---'))]
nb.metadata['language_info'] = {'name': 'python'}
for c in nb.cells:
    if '#| echo: false' in c.source:
        c.source = ''
    c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
text, _ = MarkdownExporter().from_notebook_node(nb)
# chapters link beside themselves; the README lies one folder higher
text = re.sub(r'\]\((?!https?:|#|\.\./)([^)]+\.ipynb)\)', r'](nbs/\1)', text).replace('](../', '](')
text = re.sub(r'```python\n+```\n', '', text)  # an input that is hidden
text = (
    '<!-- made from nbs/index.ipynb by `make readme`; edit there -->\n\n'
    + re.sub(r'\n{3,}', '\n\n', text).strip()
    + '\n'
)
out = root / 'README.md'
if '--check' in sys.argv:
    if not out.exists() or out.read_text() != text:
        sys.exit('README.md is older than nbs/index.ipynb: run `make readme`')
else:
    out.write_text(text)
