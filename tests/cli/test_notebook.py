"""The notebook runs from its first cell to its last, on the bundled toy and a tiny budget."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "convert_and_chat.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OPDLM_NOTEBOOK_MODEL", "bundled:teacher")
    monkeypatch.setenv("OPDLM_NOTEBOOK_STEPS", "1")
    monkeypatch.setenv("OPDLM_NOTEBOOK_TOKENS", "16")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    printed = "".join(output.get("text", "") for output in outputs)
    assert "lossless" in printed and printed.count("tokens per forward]") == 2
