"""Disjoint groups of one card's multiprocessors, each with a stream: CUDA's green contexts.

Called by their C names in ``libcuda.so.1``; structures and signatures are those of CUDA 13.0's
``cuda.h`` (CUDA 12.4 and newer have them). A call that does not succeed is an error that names it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_ubyte, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

SM_RESOURCE = 1  # CU_DEV_RESOURCE_TYPE_SM
DEFAULT_STREAM = 1  # CU_GREEN_CTX_DEFAULT_STREAM: required
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: required


class GreenContextError(RuntimeError):
    """A call of the driver did not succeed."""


class SmResource(ctypes.Structure):
    """``CUdevSmResource``."""

    _fields_ = (
        ("sm_count", c_uint),
        ("min_partition", c_uint),
        ("alignment", c_uint),
    )


class _ResourceUnion(ctypes.Union):
    _fields_ = (("sm", SmResource), ("oversize", c_ubyte * 48))


class Resource(ctypes.Structure):
    """``CUdevResource``, ABI version 1."""

    _fields_ = (
        ("type", c_int),
        ("padding", c_ubyte * 92),
        ("of", _ResourceUnion),
    )


SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetDevResource": [c_int, POINTER(Resource), c_int],
    "cuDevSmResourceSplitByCount": [
        POINTER(Resource),
        POINTER(c_uint),
        POINTER(Resource),
        POINTER(Resource),
        c_uint,
        c_uint,
    ],
    "cuDevResourceGenerateDesc": [POINTER(c_void_p), POINTER(Resource), c_uint],
    "cuGreenCtxCreate": [POINTER(c_void_p), c_void_p, c_int, c_uint],
    "cuGreenCtxStreamCreate": [POINTER(c_void_p), c_void_p, c_uint, c_int],
    "cuStreamDestroy_v2": [c_void_p],
    "cuGreenCtxDestroy": [c_void_p],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
}


class Driver:
    """The driver's calls; each raises unless it returns 0.

    Raises:
        OSError: there is no driver.
        GreenContextError: it is too old to know a call.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = ctypes.CDLL("libcuda.so.1") if library is None else library
        for name, arguments in SIGNATURES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError:
                raise GreenContextError(f"the driver has no {name}") from None
            function.argtypes, function.restype = arguments, c_int

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = c_char_p()
            self._library.cuGetErrorName(code, byref(text))
            known = text.value.decode() if text.value else "an error without a name"
            raise GreenContextError(f"{name} returned {code} ({known})")


@dataclass(frozen=True)
class Groups:
    """``sizes`` in multiprocessors, out of ``whole``, and a ``cudaStream_t`` on each."""

    whole: int
    sizes: list[int]
    streams: list[int]


def group_size(whole: int, groups: int, smallest: int, alignment: int) -> int:
    """Multiprocessors of each of ``groups`` equal parts, rounded down to what the card can do.

    Raises:
        GreenContextError: the parts would be too small.
    """
    size = whole // groups
    if alignment > 1:
        size -= size % alignment
    if size < max(smallest, 1):
        raise GreenContextError(
            f"{whole} multiprocessors in {groups} groups are {size} each, the least is {smallest}"
        )
    return size


@contextmanager
def green_groups(count: int, ordinal: int = 0, driver: Driver | None = None) -> Iterator[Groups]:
    """``count`` equal disjoint groups of device ``ordinal``; their streams end with the block.

    Raises:
        GreenContextError, OSError: which call returned what.
    """
    driver = driver or Driver()
    if torch.cuda.is_available():
        torch.cuda.synchronize(ordinal)  # the primary context, of which they become parts, exists
    device, whole = c_int(), Resource()
    driver.call("cuInit", 0)
    driver.call("cuDeviceGet", byref(device), ordinal)
    driver.call("cuDeviceGetDevResource", device, byref(whole), SM_RESOURCE)
    sm = whole.of.sm
    size = group_size(sm.sm_count, count, sm.min_partition, sm.alignment)
    parts, made = (Resource * count)(), c_uint(count)
    rest = Resource()
    driver.call(
        "cuDevSmResourceSplitByCount", parts, byref(made), byref(whole), byref(rest), 0, size
    )
    if made.value < count:
        raise GreenContextError(
            f"cuDevSmResourceSplitByCount made {made.value} of {count} groups of {size} "
            f"multiprocessors out of {sm.sm_count}"
        )
    with ExitStack() as ends:
        streams = [_stream_on(driver, part, device, ends) for part in parts]
        yield Groups(sm.sm_count, [part.of.sm.sm_count for part in parts], streams)


def _stream_on(driver: Driver, part: Any, device: c_int, ends: ExitStack) -> int:
    description, context, stream = c_void_p(), c_void_p(), c_void_p()
    driver.call("cuDevResourceGenerateDesc", byref(description), byref(part), 1)
    driver.call("cuGreenCtxCreate", byref(context), description, device, DEFAULT_STREAM)
    ends.callback(driver.call, "cuGreenCtxDestroy", context)
    driver.call("cuGreenCtxStreamCreate", byref(stream), context, NON_BLOCKING, 0)
    ends.callback(driver.call, "cuStreamDestroy_v2", stream)
    assert stream.value is not None
    return stream.value
