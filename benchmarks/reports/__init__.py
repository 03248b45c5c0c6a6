"""What the documents say about ``benchmarks/results``: a module of each result file's name.

``tables`` reads of each module:

* ``section() -> list[str]``: Markdown lines for docs/results.md. The first is ``**Title** (a note)``,
  unless the module has a ``TITLE``; without a result file the section has the line ``NOT_MEASURED``.
* ``goals() -> list[Goal]``, where there are any: what was aimed at, and whether it was reached.
* ``summary() -> list[str]``, of those that README shows.
* ``picture(results) -> Figure``, or ``PICTURES``, a name for each such function: become
  ``docs/results/<name>.png``, which the section shows as ``![...](results/<name>.png)``. Other modules
  that draw them are named in ``DRAWN_BY``.
* ``COMMAND``, where it is not ``python -m benchmarks.<name>`` that measures it.
"""
