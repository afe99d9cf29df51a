"""Hypothesis draws fresh examples on every run; how long one takes says nothing on a shared machine."""

from hypothesis import settings

settings.register_profile("flash-mla", deadline=None, print_blob=True)
settings.load_profile("flash-mla")
