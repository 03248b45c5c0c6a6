"""The C++ core: streams, events, scheduler and fused updates."""

from collections.abc import Callable, Sequence
from typing import final

backends: tuple[str, ...]

def fit_begins() -> int:
    """The end of the interpreter waits (ten seconds at most) until ``fit_ends`` was called with what
    this returns, this thread, and from then on (one second at most) until the thread has ended.

    Raises:
        RuntimeError: the interpreter is ending.
    """

def fit_ends(thread: int) -> None:
    """See ``fit_begins``."""

def keeps_blocks() -> bool:
    """Whether blocks that torch frees can be kept: its calls of the C allocator lead through a cache
    then, from the first call of this on. Else the allocator's own means are used."""

def kept_bytes() -> int:
    """Of freed blocks, now."""

def keep_freed_memory() -> None:
    """Keep blocks that torch frees for those it allocates, for good. Where that cannot be
    (``keeps_blocks``) the C allocator is told to keep them."""

@final
class FreedMemory:
    """Likewise, until all that were made are closed, or gone: then what is kept goes back to the system,
    and from then on what is freed."""

    def close(self) -> None:
        """Does nothing the second time."""

def openmp_threads() -> int:
    """How many the calling thread computes with; 0 if there is no OpenMP in this process."""

def set_openmp_threads(threads: int) -> None:
    """From now on; of the calling thread alone, and not of threads to come."""

def end_idle_openmp_threads() -> None:
    """End the calling thread's own, but itself; its next parallel operation starts them again."""

class Work:
    """Something native a scheduler can run without Python."""

class FlatSgd:
    """The fused update over one stage's flat memory; all addresses stay the caller's.

    ``segments``: (offset, size, parameter group) of every parameter, in elements. ``gradients``:
    address of one uint64 per segment, itself the address of a dense gradient or 0. ``hyper``:
    (address, rows, groups, columns) of a float64 table; ``[batch % rows, group]`` is [lr, momentum,
    weight_decay, nesterov, shrink of stage 0, shrink of stage 1, ...]. ``gain``: address of one
    float64, where the update runs, that gradients are multiplied by, or 0; if it is not finite when
    the update runs, weights are copied and momentum stays. ``progress``: address of two int64, the
    newest weight copy and the number of updates made.
    """

    def __init__(
        self,
        *,
        dtype: str,
        stage: int,
        segments: Sequence[tuple[int, int, int]],
        weights: Sequence[int],
        momentum: int,
        gradients: int,
        hyper: tuple[int, int, int, int],
        gain: int,
        progress: int,
        threads: int,
    ) -> None: ...
    def update(self, source: int, target: int) -> Work: ...
    def copy(self, source: int, target: int) -> Work: ...
    def run_update(self, source: int, target: int, batch: int) -> None: ...

class Scheduler:
    """Runs ticks of actions on the streams of one backend (``"cpu"``, ``"trace"`` or ``"cuda"``).

    ``devices``: cuda only, the ordinal of every stream's device. ``handles``: cuda only, per stream a
    ``cudaStream_t`` to use, which stays the caller's and must outlive the scheduler, or 0 to make one.

    One Python thread at a time may use it, except for ``cancel``, ``close`` and ``busy_seconds``, which
    may be called by any. What another thread is waiting for when it is cancelled or closed ends with
    RuntimeError, and the streams' threads soon after; otherwise they have ended when ``close``
    returns. All are closed, and their threads joined, before the interpreter ends.
    """

    def __init__(
        self,
        backend: str,
        streams: Sequence[str],
        *,
        max_ticks_in_flight: int = 4,
        devices: Sequence[int] = ...,
        handles: Sequence[int] = ...,
        delay_seed: int = 0,
        max_delay_us: int = 0,
    ) -> None: ...
    def add_buffer(self, name: str, *, shared: bool) -> int: ...
    def add_action(
        self,
        *,
        code: str,
        stage: int,
        slot: int,
        stream: int,
        reads: Sequence[int],
        writes: Sequence[int],
        work: Callable[[int], None] | Work | None,
    ) -> int: ...
    def add_tick(self, actions: Sequence[tuple[int, int]]) -> int: ...
    def submit(self, tick_id: int, tick: int) -> None: ...
    def synchronize(self) -> None: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...
    def record_spans(self, on: bool) -> None:
        """Whether the actions of ticks submitted from now on are measured."""

    def take_spans(self) -> list[Span]:
        """What was measured since the last call, stream by stream, in each stream's order.

        Waits until nothing runs, and raises no failure of an action.
        """

    def busy_seconds(self) -> list[float] | None:
        """Per stream, how long its actions were at work so far, those that have ended.

        Waiting for the GIL is work. Always 0 on ``"trace"``; None on ``"cuda"``, where only spans
        are measured.
        """

    @property
    def ticks_in_flight(self) -> int:
        """Submitted and not finished at this moment."""

    @property
    def buffer_names(self) -> list[str]: ...
    def operations(self) -> list[Operation]: ...
    def stream_handle(self, stream: int) -> int: ...

class Span:
    """When an action was at work: seconds on one clock of all streams."""

    @property
    def code(self) -> str: ...
    @property
    def stage(self) -> int: ...
    @property
    def slot(self) -> int: ...
    @property
    def stream(self) -> int: ...
    @property
    def tick(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def begin_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...

@final
class OperationKind:
    run: OperationKind
    record: OperationKind
    wait: OperationKind
    def __init__(self, value: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    def __hash__(self) -> int: ...

class Operation:
    """One enqueued operation of the trace backend; plain data, free to be altered."""

    kind: OperationKind
    stream: int
    code: str
    stage: int
    slot: int
    tick: int
    batch: int
    reads: list[int]
    writes: list[int]
    event: int
    ticket: int
    def __init__(self) -> None: ...

class HappensBeforeReport:
    @property
    def races(self) -> list[str]: ...
    @property
    def deadlocks(self) -> list[str]: ...
    @property
    def reads_from(self) -> list[list[int]]: ...
    @property
    def clean(self) -> bool: ...

def check_happens_before(operations: Sequence[Operation]) -> HappensBeforeReport: ...

class PeriodicStep:
    """What happens on ``stream`` in every tick far from either end of an epoch, to the batch that
    entered ``offset`` ticks ago; with ``every`` above 1 once for so many batches, with the last of them.

    ``reads`` and ``writes``: (ring, shift); in tick t buffer ``(t + shift) % size`` of the ring.
    """

    def __init__(
        self,
        *,
        stream: int,
        duration_s: float,
        offset: int,
        every: int,
        reads: Sequence[tuple[int, int]],
        writes: Sequence[tuple[int, int]],
    ) -> None: ...

class SimulatedTimes:
    """Seconds since the first action began, had there been any work."""

    @property
    def tick_ends_s(self) -> list[float]:
        """[tick] when the last of its actions ended."""

    @property
    def stream_busy_s(self) -> list[float]:
        """[stream] how long its actions were at work."""

    @property
    def spans(self) -> list[tuple[int, int, float, float]]:
        """(index of the step, tick, begin, end) of the window, in the order of enqueuing."""

def simulate(
    steps: Sequence[PeriodicStep],
    *,
    rings: Sequence[int],
    streams: int,
    batches: int,
    ticks: int,
    max_ticks_in_flight: int | None,
    window: tuple[int, int],
) -> SimulatedTimes:
    """When the actions of an epoch begin and end on streams whose waits are those of ``Scheduler``.

    ``steps``: of one tick, in the order of enqueuing. ``rings``: how many buffers each has.
    ``max_ticks_in_flight``: as of ``Scheduler``; None enqueues everything at once. ``window``: the ticks
    whose spans are kept, the second excluded.
    """

# -- only where `backends` has "cuda" ---------------------------------------------------------------

CUDA_HOST: int

def cuda_peer_copies_work(source: int, target: int) -> bool:
    """Whether device ``source`` can copy straight into the memory of ``target``: asked, and proved
    with a copy."""

class CudaSgd:
    """As :class:`FlatSgd`, on a device. ``gradients`` has a row of addresses per slot;
    ``gradient_dtype`` is that of the weights, or ``"bfloat16"`` or ``"float16"`` with float32
    weights; ``ticks_in_flight`` bounds the ticks that are enqueued and unfinished."""

    def __init__(
        self,
        *,
        dtype: str,
        gradient_dtype: str,
        stage: int,
        segments: Sequence[tuple[int, int, int]],
        weights: Sequence[int],
        momentum: int,
        gradients: int,
        hyper: tuple[int, int, int, int],
        gain: int,
        progress: int,
        device: int,
        slots: int,
        ticks_in_flight: int,
    ) -> None: ...
    def update(self, source: int, target: int, slot: int) -> Work: ...
    def copy(self, source: int, target: int) -> Work: ...
    def run_update(
        self, *, source: int, target: int, slot: int, batch: int, stream: int
    ) -> None: ...

class CudaCopy(Work):
    """Copies ``bytes`` from ``source`` to ``target``, each looked up, when the copy is enqueued, in
    uint64 words: (address of the first, how many take turns with the batches). Devices are ordinals
    or ``CUDA_HOST``."""

    def __init__(
        self,
        *,
        source: tuple[int, int],
        source_device: int,
        target: tuple[int, int],
        target_device: int,
        bytes: tuple[int, int],
    ) -> None: ...

class CudaGraphWork(Work):
    """Calls ``eager``, or replays a graph for batches whose ``regular[batch % rows]`` (uint8) is set.

    An intake is (address of the word that says where something arrived, where the graph reads it,
    bytes, address of the word that says how many bytes arrived, or 0); words are (address, values).
    """

    def __init__(self, *, eager: Callable[[int], None] | Work, regular: int, rows: int) -> None: ...
    def prepare_with(self, prepare: Callable[[int], None] | None) -> None: ...
    def use_graph(
        self,
        *,
        graph: int,
        replay: Callable[[int], None] | None,
        intakes: Sequence[tuple[int, int, int, int]],
        words: Sequence[tuple[int, Sequence[int]]],
    ) -> None: ...
    def drop_graph(self) -> None: ...
    @property
    def has_graph(self) -> bool: ...
