"""`python -m snapcore` is the `snapcore` command."""

from snapcore.lab import main

if __name__ == "__main__":
    main()
