"""A group of one."""

from snapcore.run import Alone, Group


def test_who_is_alone_leads_and_hears_only_itself():
    group: Group = Alone()
    assert (group.rank, group.size) == (0, 1)
    value = object()
    assert group.gather(value) == [value]
