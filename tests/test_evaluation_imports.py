"Importing a metric imports no trainer, no plotting and no timm, and the package itself nothing at all."

import subprocess
import sys

import pytest

HEAVY = ['matplotlib', 'ipywidgets', 'timm', 'torchmetrics', 'glsd.training.loop', 'glsd.training.trainer']


def modules_after(code):
    "The names in sys.modules of a fresh interpreter after some code."
    done = subprocess.run(
        [sys.executable, '-c', f'{code}\nimport sys\nprint(*sys.modules)'], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


METRICS = 'extraction pictures labels knn collapse blocks linear pairs token_matching'.split()
METRICS += 'similarity ranking retrieval_sets copies memory dense report watching'.split()


def test_a_metric_needs_no_trainer_and_no_plotting():
    found = modules_after(f'import {", ".join(f"glsd.evaluation.{m}" for m in METRICS)}')
    assert not found & set(HEAVY)


def test_the_package_loads_what_is_used_and_when():
    found = modules_after('import glsd.evaluation')
    assert 'glsd.evaluation' in found and not found & {'torch', 'numpy', *HEAVY}


def test_every_name_of_the_package_is_there():
    import glsd.evaluation as package

    for name in package.__all__:
        assert callable(getattr(package, name)), name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        package.nonsense  # noqa: B018


def test_a_function_and_its_module_do_not_share_a_name():
    "Importing a module would put it in the function's place."
    import pkgutil

    import glsd.evaluation as package

    modules = {m.name for m in pkgutil.iter_modules(package.__path__)}
    assert not modules & set(package.__all__)
