"""README.md says what the program says."""

from __future__ import annotations

import pytest

from bench import matrix, measured_tokens, readme


def test_the_readme_is_up_to_date(found: list[matrix.Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails: make readme."""
    monkeypatch.setattr(matrix, "rows", lambda: found)
    text = readme.README.read_text(encoding="utf-8")
    assert readme.updated(text) == text
    for path, drawing in measured_tokens.drawings().items():
        assert path.read_text(encoding="utf-8") == drawing


def test_the_width_of_the_terminal_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    narrow = readme.section()
    monkeypatch.setenv("COLUMNS", "200")
    assert readme.section() == narrow


def test_a_document_without_markers_gets_the_section_at_its_end() -> None:
    made = readme.updated("# Title\n")
    assert made.startswith("# Title\n\n## Commands\n\n<!-- commands -->")
    assert readme.updated(made) == made


def test_only_what_is_between_the_markers_changes() -> None:
    made = readme.updated(f"before {readme.BEGIN} old {readme.END} after")
    assert made.startswith("before ")
    assert made.endswith(" after")
    assert " old " not in made


@pytest.mark.parametrize("text", ["<!-- end --> <!-- commands -->", "<!-- commands -->"])
def test_markers_in_disorder_are_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        readme.updated(text)
