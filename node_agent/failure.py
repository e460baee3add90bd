"""Says in a few plain words why a connection failed."""

from __future__ import annotations

import os


def plain(error: BaseException) -> str:
    """Return the system's own words where there are any, such as `connection refused`; always one line."""
    cause = error if isinstance(error, OSError) else getattr(error, "os_error", None)
    if cause is not None and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno).lower()
    return (str(error) or type(error).__name__).splitlines()[0]
