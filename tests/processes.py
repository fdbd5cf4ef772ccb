"""Other processes for tests that kill what they start."""

from __future__ import annotations

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
"""A clean server that forks, with everything imported so that each process starts at once.

A fork of the test's own process would inherit locks that its other threads (pytest-xdist's, an engine's) hold, and now and then
wait for them forever.
"""
PROCESSES.set_forkserver_preload(["tests.test_pipeline", "tests.passes.distilling"])
