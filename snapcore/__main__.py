"""`python -m snapcore` is the `snapcore` command."""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path[0] == str(Path.cwd()):
        del sys.path[0]  # `-m` puts it before all else: what lies in a run's directory is not to be imported
    from snapcore.lab import main

    main()
