"""Makes `python -m lion8bit` the command line; the commands themselves are in `lion8bit.tools.cli`."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # -m puts the working directory before everything else, -P does not. Modules there are no part of this program,
    # unless lion8bit itself came from there.
    here, added = os.getcwd(), not getattr(sys.flags, "safe_path", False)
    if added and sys.path[0] in ("", here) and Path(__file__).resolve().parents[1] != Path(here).resolve():
        del sys.path[0]

    from lion8bit.tools.cli import main

    main()
