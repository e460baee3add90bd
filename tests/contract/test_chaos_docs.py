"""README's table of what happens names the promises that `make chaos` shows each row by."""

from __future__ import annotations

import loadtest.chaos.__main__  # noqa: F401  (enters the promises)
from loadtest.chaos.figure import PROMISES
from tests.contract.markdown import page, tables

ROWS = tables(page("README.md"), "…", "the client sees", "the balancer does", "shown by")


def test_every_promise_that_is_named_is_tried() -> None:
    assert ROWS
    tried = {str(one.number) for one in PROMISES}
    named = {number for row in ROWS for number in row[3].split(", ") if number != "tests"}
    assert named
    assert named <= tried
