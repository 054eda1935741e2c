"""The core's tests draw random inputs without a deadline: on a busy machine one that is slow says nothing.

`make check` draws fewer of them than `make test`.
"""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=10)
settings.load_profile("no deadline")
