"""Packaging only: everything it says stands in settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(here / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    license='Apache-2.0',
    author=cfg['author'],
    keywords=cfg['keywords'],
    python_requires='>=' + cfg['min_python'],
    long_description=(here / 'README.md').read_text(encoding='utf-8')
    if (here / 'README.md').exists()
    else '',
    long_description_content_type='text/markdown',
    packages=find_packages(include=['glsd', 'glsd.*']),
    package_data={'glsd': ['py.typed'], 'glsd.backbones': ['weights/*']},
    install_requires=cfg['requirements'].split(),
    extras_require={name: cfg[f'{name}_requirements'].split() for name in ('course', 'dev')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['glsd=glsd._modidx:d']},
)
