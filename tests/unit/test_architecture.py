"""The shape of the house: floors, light imports, short files, nothing unsafe."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
SOURCES = sorted(
    path for room in ("fedssl", "server", "client", "simulations") for path in (HOUSE / room).rglob("*.py")
)


def test_a_module_imports_only_from_the_floors_below():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=HOUSE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_fedssl_and_its_command_import_without_flower_opacus_hydra_or_torch():
    program = (
        "import sys, fedssl, fedssl.cli; print([m for m in ('flwr', 'opacus', 'hydra', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_library_imports_without_flower_or_hydra():
    program = (
        "import sys, fedssl.site.agent, fedssl.build, fedssl.label_efficiency\n"
        "print([m for m in ('flwr', 'opacus', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_a_file_stays_below_250_lines_and_a_function_near_40(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.end_lineno - node.body[0].lineno + 1
            assert body <= 45, f"{node.name}: {body} lines"


def test_no_pickle_and_no_unsafe_loading():
    for path in SOURCES:
        text = path.read_text()
        assert "import pickle" not in text
        assert "torch.load(" not in text


def test_rooms_without_a_noun_do_not_exist():
    forbidden = {"utils", "common", "core", "helpers", "misc"}
    assert not [path for path in SOURCES if path.stem in forbidden or path.parent.name in forbidden]
