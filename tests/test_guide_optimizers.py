"""The guide's examples run as written, one behind the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

GUIDE = Path(__file__).parent.parent / "docs" / "guide" / "optimizers.md"


def test_examples() -> None:
    examples = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    assert examples
    names: dict[str, Any] = {"__name__": "guide"}
    for example in examples:
        exec(compile(example, GUIDE.name, "exec"), names)
