"""`import mmcompress`: light, and every name it promises is there."""

from __future__ import annotations

import mmcompress
from mmcompress.jobs.compress import compress


def test_every_promised_name_is_there() -> None:
    for name in mmcompress.__all__:
        assert getattr(mmcompress, name) is not None, name
    assert mmcompress.compress is compress
