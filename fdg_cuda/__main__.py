"""``python -m fdg_cuda``: the command line."""

from __future__ import annotations

from fdg_cuda.cli import main

if __name__ == "__main__":
    main()
