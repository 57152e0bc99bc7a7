"""What a change must pass before its tests: format, lint, types; notebooks, package and README in step."""

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root, bin = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
kept = ['nbs', 'glsd', 'settings.ini', '.ci', 'README.md']
sources = ['nbs', 'tests', 'benchmarks', 'data_scripts', '.ci', 'setup.py']


def run(*command, **options):
    "Runs a command of the environment; ends with its exit code if it fails."
    code = subprocess.run([str(bin / command[0]), *command[1:]], **{'cwd': root, **options}).returncode
    if code:
        sys.exit(code)


def files(top):
    "Modules and notebooks below nbs and glsd."
    found = [p for folder in ('nbs', 'glsd') for p in (top / folder).rglob('*')]
    wanted = [p for p in found if p.suffix in ('.py', '.ipynb') and '.ipynb_checkpoints' not in p.parts]
    return {p.relative_to(top) for p in wanted}


def same(a, b):
    return a.exists() and b.exists() and filecmp.cmp(a, b, shallow=False)


def out_of_step():
    "What exporting and cleaning a copy of the tree would change."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)
        ignored = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
        for name in kept:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, symlinks=True, ignore=ignored)
            else:
                shutil.copy(root / name, copy / name)
        for module in (copy / 'glsd').rglob('*.py'):
            module.unlink()  # a module without a notebook must show
        (copy / 'glsd/__init__.py').write_text((root / 'glsd/__init__.py').read_text())
        for command in ('nbdev_export', 'nbdev_clean'):
            run(command, cwd=copy)
        return sorted(str(f) for f in files(root) | files(copy) if not same(root / f, copy / f))


run('ruff', 'format', '--check', '--quiet', *sources)
run('ruff', 'check', '--quiet', *sources)
run('mypy')
bad = out_of_step()
if bad:
    sys.exit(f'not in step with the notebooks (run nbdev_export and nbdev_clean): {", ".join(bad)}')
run('python', str(root / '.ci/readme.py'), '--check')
print('formatted, linted, typed; notebooks, package and README are in step')
