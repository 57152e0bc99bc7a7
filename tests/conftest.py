"""One start for every test's random numbers: a test that fails, fails again."""

import sys

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

LONGEST = 'training_processes', 'experiments_runner', 'evaluation_combinations', 'experiments_tables'


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: left out by `make check`, run by `make test`')


def pytest_collection_modifyitems(items):
    "The files that take minutes first: two processes share the files out, and should end together."
    order = {f'test_{name}.py': i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def run_notebook(monkeypatch):
    "`run_notebook(path, parameters, after=...)` as papermill would, in this process: torch is there already."
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])  # IPython puts its own there
    shell = InteractiveShell.instance()

    def run(path, parameters, after=lambda source, names: None):
        monkeypatch.chdir(path.parent)
        shell.reset()
        for cell in parameterize_notebook(load_notebook_node(str(path)), parameters).cells:
            if cell.cell_type != 'code':
                continue
            shell.run_cell(cell.source).raise_error()
            after(cell.source, shell.user_ns)

    yield run
    InteractiveShell.clear_instance()
