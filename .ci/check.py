"""Notebooks, package and README in step: exporting and cleaning a copy of the tree must change nothing in it."""

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root, bin = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
kept = ['nbs', 'glsd', 'settings.ini', '.ci', 'README.md']


def files(top):
    return {
        p.relative_to(top)
        for k in ('nbs', 'glsd')
        for p in (top / k).rglob('*')
        if p.suffix in ('.py', '.ipynb') and '.ipynb_checkpoints' not in p.parts
    }


with tempfile.TemporaryDirectory() as tmp:
    copy = Path(tmp)
    for k in kept:
        if (root / k).is_dir():
            shutil.copytree(
                root / k,
                copy / k,
                symlinks=True,
                ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'),
            )
        else:
            shutil.copy(root / k, copy / k)
    for module in (copy / 'glsd').rglob('*.py'):
        module.unlink()  # a module without a notebook must show
    (copy / 'glsd/__init__.py').write_text((root / 'glsd/__init__.py').read_text())
    for command in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([str(bin / command)], cwd=copy, check=True)
    bad = sorted(
        str(f)
        for f in files(root) | files(copy)
        if not (
            (root / f).exists() and (copy / f).exists() and filecmp.cmp(root / f, copy / f, shallow=False)
        )
    )
if bad:
    sys.exit('not in step with the notebooks (run nbdev_export and nbdev_clean): ' + ', '.join(bad))
subprocess.run([sys.executable, str(root / '.ci/readme.py'), '--check'], check=True)
print('notebooks, package and README are in step')
