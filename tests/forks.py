"""Children of the test process that may be killed, or put under limits, in milliseconds."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """The process id of a child that does ``work`` and ends with 0, or with 1 on an exception.

    ``work`` keeps to tensors too small for the thread pool, which a fork does not copy.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)


def end_of(child: int) -> int:
    """The exit status of ``child``, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
