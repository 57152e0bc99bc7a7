"""Compiles .ci/requirements.txt from settings.ini: names, versions and markers, no addresses."""

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(root / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
wanted = '\n'.join(
    cfg['requirements'].split()
    + cfg['course_requirements'].split()
    + cfg['dev_requirements'].split()
    + ['setuptools']
)
done = subprocess.run(
    [
        *sys.argv[1:],
        'pip',
        'compile',
        '--universal',
        '--python-version',
        cfg['min_python'],
        '--no-header',
        '--no-annotate',
        '--no-emit-index-url',
        '--no-emit-find-links',
        '--quiet',
        '-',
    ],
    input=wanted,
    text=True,
    capture_output=True,
)
if done.returncode:
    sys.exit(done.stderr)
assert '://' not in done.stdout, 'the lock file must not hold addresses'
(root / '.ci/requirements.txt').write_text(
    '# compiled from settings.ini by `make lock`; do not edit\n' + done.stdout
)
