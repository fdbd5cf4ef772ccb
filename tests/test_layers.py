"""The house rules that a parser can see: who may import whom, and names that say nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "mmcompress"
ORDER = (
    {"errors", "progress", "recipe", "manifest", "staging", "card", "weights", "room", "kept", "packed"},
    {"ops"},
    {"surgery"},
    {"views"},
    {"bundle", "parts", "tokenizer"},
    {"families"},
    {"passes"},
    {"data"},
    {"preprocessing", "plainly", "checkpoint", "pipeline", "opened", "streamed"},
    {"evaluate"},
    {"export"},
    {"measure"},
    {"jobs"},
    {"cli"},
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# The front door with what it holds itself, and a folder of data with its path.
UNRANKED = {"__init__", "__version__", "demo"}
# Named for a type annotation only.
TYPES_ONLY = {("bundle", "data"), ("parts", "data"), ("families", "data"), ("passes", "data")}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(second part of the module name, whether under TYPE_CHECKING) of every mmcompress import."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module == "mmcompress":
            names = [f"mmcompress.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "mmcompress" and len(parts) > 1:
                found.append((parts[1], id(node) in typing_only))
    return found


def test_every_room_has_its_place() -> None:
    rooms = {path.relative_to(ROOT).with_suffix("").parts[0] for path in ROOT.rglob("*.py")}
    assert rooms - UNRANKED == set(RANK)


def test_imports_go_downward() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        here = parts[0]
        if here in UNRANKED:
            continue
        for target, typing_only in imports(path):
            if target in UNRANKED or target == here or (typing_only and (here, target) in TYPES_ONLY):
                continue
            if RANK[target] > RANK[here]:
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong


def test_passes_never_name_a_model_class() -> None:
    for folder in ("passes", "surgery", "ops"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                    assert "models" not in node.module, path
                    assert not any(alias.name.endswith(("Model", "Config")) for alias in node.names), path


def test_only_render_imports_rich() -> None:
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).as_posix().startswith("cli/render"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[0] == "rich" for name in names), path


def test_no_file_hides_behind_an_empty_name() -> None:
    empty = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
    assert not [path for path in ROOT.rglob("*.py") if path.name in empty]


def test_the_command_line_starts_without_torch() -> None:
    heavy = "bool({'torch', 'transformers', 'onnx'} & set(sys.modules))"
    script = f"import sys, mmcompress.cli.__main__, mmcompress.passes; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
