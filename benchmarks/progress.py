"""What a run tells while it runs: one line a part, on standard error."""

import sys
import time

_BEGUN = time.monotonic()


def tell(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"{time.monotonic() - _BEGUN:5.0f} s  {text}", file=sys.stderr, flush=True)
