"""One start for every test's random numbers: a test that fails, fails again."""

import sys

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: left out by `make check`, run by `make test`')


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
