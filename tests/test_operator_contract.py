"""Every registered operator keeps the contract. A new operator is tested by existing."""

import importlib
import pkgutil

import contract
import pytest

import diffbio.operators.normalization
import diffbio.operators.singlecell
import diffbio.pipelines
from diffbio.operators.base import REGISTRY

OPERATORS = {n: c for n, c in sorted(REGISTRY.items()) if c.__module__.startswith("diffbio.")}
every_operator = pytest.mark.parametrize("cls", OPERATORS.values(), ids=OPERATORS.keys())
every_case = pytest.mark.parametrize(
    ("cls", "case"), [pytest.param(c, k, id=f"{n}-{k}") for n, c in OPERATORS.items() for k in c.examples()]
)


@every_case
@pytest.mark.parametrize("promise", contract.ON_CASES, ids=lambda f: f.__name__)
def test_operator(cls, case, promise):
    op, data = cls.examples()[case]
    promise(op, data)


@every_case
@pytest.mark.parametrize("hard", contract.DEGENERATE)
def test_degenerate_data(cls, case, hard):
    op, data = cls.examples()[case]
    contract.degenerate_data_is_finite_or_refused(op, data, hard)


@every_operator
@pytest.mark.parametrize("promise", contract.ON_CLASSES, ids=lambda f: f.__name__)
def test_class(cls, promise):
    promise(cls)


@pytest.mark.parametrize("cls", [c for n, c in OPERATORS.items() if "Pipeline" not in n], ids=lambda c: c.__name__)
def test_settings(cls):
    contract.settings_change_results(cls)


def test_every_operator_file_is_imported_and_exported():
    for package in (diffbio.operators.singlecell, diffbio.operators.normalization):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    assert {n for n, c in REGISTRY.items() if c.__module__.startswith("diffbio.")} == set(OPERATORS)
    for name, cls in OPERATORS.items():
        exported = importlib.import_module(cls.__module__.rpartition(".")[0])
        assert getattr(exported, name) is cls, f"add `{name}` to {exported.__name__}/__init__.py"
