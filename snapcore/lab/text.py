"""Words for people: counts, and text from elsewhere made safe for a terminal."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural but for 1.

    Example:
        >>> counted(1, "member"), counted(1347, "training image")
        ('1 member', '1347 training images')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    r"""Return text on one line, with every character escaped that is not to be seen.

    Names and numbers come from files that somebody else may have made: what a terminal would obey, or what would
    feign a line of ours, is shown as it stands in Python's source.

    Example:
        >>> print(printable("torch\x1b[31m\nmember 2: verified"))
        torch\x1b[31m\nmember 2: verified
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
