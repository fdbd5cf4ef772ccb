"""The outcome of `mmc check` for machines that read JUnit and for people who read a pull request."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from mmcompress.jobs.check import Checked

SUMMARY = "GITHUB_STEP_SUMMARY"


def junit(checked: Checked) -> str:
    """Return JUnit XML: one test case per comparison."""
    suite = ElementTree.Element(
        "testsuite",
        name="mmc check",
        tests=str(len(checked.cases)),
        failures=str(len(checked.failed)),
        errors="0",
        skipped="0",
    )
    for case in checked.cases:
        node = ElementTree.SubElement(suite, "testcase", classname=f"mmc.check.{case.kind}", name=_legal(case.name))
        if case.passed:
            ElementTree.SubElement(node, "system-out").text = _legal(case.text)
        else:
            ElementTree.SubElement(node, "failure", message=_legal(case.text)).text = f"limit: {case.limit:g}"
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def markdown(checked: Checked) -> str:
    """Return a table for a pull request, failures first."""
    failed = len(checked.failed)
    verdict = f"**failed**: {failed} of {len(checked.cases)}" if failed else f"passed: all {len(checked.cases)}"
    lines = [
        f"### mmc check: {_cell(checked.run)} against {_cell(checked.baseline)}",
        "",
        verdict,
        "",
        "| | what | measured |",
        "|---|---|---|",
    ]
    lines += [
        f"| {'pass' if case.passed else '**FAIL**'} | {case.kind} | {_cell(case.text)} |" for case in checked.cases
    ]
    return "\n".join(lines) + "\n"


def write_junit(checked: Checked, path: Path) -> None:
    """Write JUnit XML, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(junit(checked), encoding="utf-8")


def write_markdown(checked: Checked, path: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Write the table, replacing an older one; also append it to the job summary where GitHub Actions names one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(checked), encoding="utf-8")
    summary = environment.get(SUMMARY)
    if summary and Path(summary).resolve() != path.resolve():
        with open(summary, "a", encoding="utf-8") as file:
            file.write(markdown(checked))


def _cell(text: str) -> str:
    """Names may come from elsewhere: nothing in a cell may end it or become markup."""
    for sign in "\\|`*_<>[]":
        text = text.replace(sign, f"&#{ord(sign)};")
    return " ".join(text.split())


def _legal(text: str) -> str:
    """XML 1.0 has no control characters, escaped or not."""
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")
