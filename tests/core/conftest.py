"""What the core's tests share: an example may take as long as a busy machine makes it, since timing is never asserted."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
