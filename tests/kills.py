"""A process that has imported everything and forks runs of the command line, to be killed cheaply."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

ZYGOTE = """
import json, os, sys
import sklearn.datasets, safetensors.torch, matplotlib.figure, matplotlib.backends.backend_agg
import fdg_cuda.train
from fdg_cuda.cli import main

print("ready", flush=True)
for line in sys.stdin:
    words = json.loads(line)
    pid = os.fork()
    if pid == 0:
        sys.argv = ["fdg-cuda", *words]
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        try:
            main()
        except SystemExit as ended:
            os._exit(ended.code or 0)
        os._exit(99)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Zygote:
    """Nothing parallel has run in it, so that forks of it start torch's threads themselves."""

    def __init__(self, folder: Path) -> None:
        self._errors = (folder / "errors.txt").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        assert self._answer() == "ready"

    def start(self, *words: str) -> int:
        """Begin ``fdg-cuda words...``; returns its process id."""
        assert self._process.stdin is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)
        return int(self._answer())

    def wait(self) -> int:
        """The exit code of what was started, negative for a signal."""
        return int(self._answer())

    def run(self, *words: str) -> int:
        self.start(*words)
        return self.wait()

    def errors(self) -> str:
        """What runs wrote to stderr."""
        self._errors.seek(0)
        return self._errors.read()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, self.errors()
        return line

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()
