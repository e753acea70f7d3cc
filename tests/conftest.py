"""Property tests draw the same examples every time, so that a failure here is a failure everywhere.

`pytest --hypothesis-profile=explore` draws new ones.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")
