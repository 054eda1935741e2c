"""The core's tests draw random inputs without a deadline: on a busy machine one that is slow says nothing."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
