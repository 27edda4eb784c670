"""The settings of the conformance tests."""

from collections.abc import Iterator

import jax
import pytest

from tests.conformance.table import MACHINERY, Case, telling


@pytest.hookimpl(tryfirst=True)  # before the slow ones are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of pairs that tell little, all but what counts most is asked by slow tests."""
    for item in items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if isinstance(case, Case) and not telling(case):
            if item.path.name == "test_contract.py" and "every_pair" not in item.keywords:
                item.add_marker(pytest.mark.slow)
        if isinstance(case, Case) and "machinery" in item.keywords and case.rule not in MACHINERY:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    """Everything here is compared at 1e-10."""
    with jax.enable_x64(True):
        yield
