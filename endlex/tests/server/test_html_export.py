"""The exported file's text; browser/test_exported_file.py opens one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from endlex.server.web import export, export_shell, pages

HOSTILE = "</script><script>alert(1)</script><!--"
RUN = {"run": "abcdefgh12", "name": HOSTILE, "metrics": [{"name": "a"}, {"name": HOSTILE}]}


def page(name: str, *texts: dict[str, Any]) -> str:
    values = {"x": [0, 1], "y": [1.5, None], "count": 2}
    series = {"a": {"step": values}, HOSTILE: {"time": values}}
    return export.render(name, {"run": RUN, "series": series, "texts": texts})


def test_the_data_inside_is_what_was_given() -> None:
    text = {"step": 1, "name": HOSTILE, "text": HOSTILE}
    inside = re.search(r'id="endlex-data">(.*?)</script>', page(HOSTILE, text), re.DOTALL)
    assert inside is not None
    data = json.loads(inside[1])
    assert data["run"] == RUN
    assert data["texts"] == [text]
    assert data["series"]["a"]["step"] == {"x": [0, 1], "y": [1.5, None], "count": 2}
    assert data["series"][HOSTILE]["time"]["x"] == [0, 1]


def test_a_run_of_many_metrics_gets_fewer_points_of_each() -> None:
    assert [export.points_of_each(count) for count in (0, 1, 400, 5000)] == [
        2000,
        2000,
        500,
        200,
    ]


def test_nothing_given_ends_an_element_or_asks_for_anything() -> None:
    plain, hostile = page("plain"), page(HOSTILE, {"step": 1, "name": "x", "text": HOSTILE})
    elements = re.compile(r"</?(?:script|style|title)\b|<!--", re.IGNORECASE)
    assert elements.findall(hostile) == elements.findall(plain)
    assert "default-src 'none'" in hostile
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=", hostile)


def test_every_module_comes_once_after_what_it_imports() -> None:
    script = export_shell.bundle(export_shell.ENTRY)
    modules = re.findall(r"^const module_(\w+) = ", script, re.MULTILINE)
    assert len(modules) == len(set(modules)) > 15
    assert modules[-1] == "export_page"
    for place, name in enumerate(modules):
        source = (pages.STATIC / f"js/{name}.js").read_text()
        needed = re.findall(r'from "\./(\w+)\.js"', source)
        assert set(needed) <= set(modules[:place]), name
    assert not re.search(r"^(?:import|export) ", script, re.MULTILINE)


def test_the_bundle_is_a_script(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on PATH; the browser tests run the bundle")
    file = tmp_path / "bundle.mjs"
    file.write_text(export_shell.bundle(export_shell.ENTRY))
    checked = subprocess.run([node, "--check", str(file)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_modules_that_import_each_other_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "js").mkdir()
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"js/{one}.js").write_text(f'import {{ x }} from "./{other}.js";\n')
    monkeypatch.setattr(export_shell, "STATIC", tmp_path)
    with pytest.raises(AssertionError, match=r"a\.js -> b\.js -> a\.js"):
        export_shell.bundle("a.js")


def test_an_edited_source_is_in_the_next_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout keeps no built page that could grow old; a wheel's is in ../test_packaging.py."""
    assert not export.BUILT_SHELL.exists()
    static = shutil.copytree(pages.STATIC, tmp_path / "static")
    monkeypatch.setattr(export_shell, "STATIC", static)
    page("before")
    for name in ("js/dom.js", "run.css"):
        (static / name).write_text((static / name).read_text() + f"\n/* $edited {name} */\n")
    assert {"/* $edited js/dom.js */", "/* $edited run.css */"} <= {*page("after").splitlines()}
