"""The same examples on every run: what fails here fails everywhere, and goes on failing until it is mended."""

from hypothesis import settings

settings.register_profile("core", derandomize=True, deadline=None, database=None)
settings.load_profile("core")
