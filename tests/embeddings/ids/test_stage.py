"""The id stage on several ranks gives each what one rank alone gives to all."""

from __future__ import annotations

from tests.helpers.launching import launched


def test_two_three_and_four_ranks_have_the_map_of_one() -> None:
    """Other rules in each feature, a map within another, steps that are taken back, ranks without ids."""
    done = launched("tests.programs.id_stages", timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
