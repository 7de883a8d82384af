"""What README shows under "Testing your app" runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

from .projects import ROOT, run_pytest


def test_the_examples_run(tmp_path: Path) -> None:
    """Each block is a file of a small project, named in its first line."""
    readme = ROOT.joinpath("README.md").read_text("utf-8")
    section = readme.partition("\n## Testing your app\n")[2].partition("\n## ")[0]
    blocks: list[str] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    files = {block.partition("\n")[0].removeprefix("# "): block for block in blocks}
    assert list(files) == [
        "shop.py",
        "test_starlette.py",
        "test_httpx.py",
        "test_litestar.py",
        "test_fixtures.py",
    ]
    assert "5 passed" in run_pytest(tmp_path, files, "-p", "no:asyncio")
