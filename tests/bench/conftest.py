"""What several tests of the benches look at, made once."""

from __future__ import annotations

import pytest

from bench import matrix


@pytest.fixture(scope="session")
def found() -> list[matrix.Row]:
    """Every class and what every pass says of it."""
    return matrix.rows()
