"""tests/unit mirrors the tree: a test file for each module, in the same place."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MODULES = [
    module
    for package in ("data_prep", "trainer")
    for module in (REPOSITORY / package).rglob("*.py")
    if not module.name.startswith("__")
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(REPOSITORY)))
def test_each_module_has_a_test_file(module):
    place = module.relative_to(REPOSITORY)
    expected = REPOSITORY / "tests" / "unit" / place.with_name(f"test_{place.name}")
    assert expected.is_file(), f"{expected.relative_to(REPOSITORY)} is missing"
