"""Property tests draw the same examples in every run, so that a failure belongs to a change.

`--hypothesis-profile=random` draws others each time, to look for what is still wrong.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random", derandomize=False, print_blob=True)
settings.load_profile("repeatable")
