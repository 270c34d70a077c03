"""Where each room of the package stands, and what it may know of the others; read by ast."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "vpcodec"
FLOORS = [  # from the ground up: a room, and the rooms that it imports, all on floors below
    {
        "threads": "",
        "usage": "",
        "checks": "",
        "progress": "",
        "config": "",
        "terminal": "",
    },
    {
        "entropy": "threads",
        "media": "checks threads",
        "recipe": "config",
        "quantizers": "config progress usage",
        "packets": "checks",
    },
    {
        "metrics": "media",
        "tokenfile": "media",
        "model_folder": "config entropy media",
        "models": "config quantizers",
    },
    {
        "hub": "config entropy model_folder tokenfile",
        "records": "media tokenfile",
        "backends": "config model_folder models threads",
        "graphs": "config model_folder models",
    },
    {"published": "backends checks config graphs hub media model_folder models quantizers threads"},
    {
        "codec": "backends checks config entropy hub media model_folder packets progress published "
        "threads tokenfile"
    },
    {
        "scoring": "backends codec hub media metrics progress terminal tokenfile usage",
        "corpus": "codec media model_folder records usage",
        "lm": "codec config media model_folder progress",
    },
    {
        "training": "backends codec config corpus entropy hub lm media metrics model_folder models "
        "progress quantizers recipe records scoring terminal tokenfile usage"
    },
    {
        "export": "backends codec config graphs hub media model_folder models quantizers recipe "
        "training"
    },
    {
        "cli": "backends codec config corpus export graphs hub lm media metrics model_folder "
        "progress published records recipe scoring terminal tokenfile training"
    },
    {"__main__": "cli"},
]
ROOMS = {room: set(others.split()) for floor in FLOORS for room, others in floor.items()}
MAY_USE_TORCH = (
    "models",
    "quantizers",
    "training",
    "export",
    "graphs",
    "lm",
    "published.convert",
    "published.network",
    "published.tensors",
    "published.tiling",
    "published.weights",
    "backends.torch",
    "corpus.datasets",
    "metrics.distillmos",
    "metrics.ge2e",
    "metrics.neural",
)
TORCH = {"torch", "torchaudio", "torchvision"}
MAY_USE_RAY = ("corpus.engine",)


def find_modules(package: Path) -> dict[str, Path]:
    """Dotted name below the package ("" is the package itself) -> file."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports(name: str, modules: dict[str, Path], *, lazy: bool) -> tuple[set[str], set[str]]:
    """What a module imports: (modules of the package, top-level names of other packages).

    Args:
        lazy: also count imports inside functions.
    """
    path = modules[name]
    package = name.split(".") if name else []
    if path.name != "__init__.py":
        package = package[:-1]
    own, others = set(), set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*(["vpcodec"] if node.level else []), *base]
            for alias in node.names:
                add([*base, *(node.module or "").split("."), alias.name])
        for child in ast.iter_child_nodes(node):
            visit(child)

    def add(parts: list[str]) -> None:
        parts = [part for part in parts if part]
        if parts[0] != "vpcodec":
            others.add(parts[0])
            return
        while ".".join(parts[1:]) not in modules:
            parts.pop()
        own.add(".".join(parts[1:]))

    visit(ast.parse(path.read_text()))
    return own - {name}, others


def neighbours(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Room -> the other rooms that its modules import; the package's own face may name anyone."""
    found: dict[str, set[str]] = {}
    for name in filter(None, modules):
        room = name.split(".")[0]
        targets = {target.split(".")[0] for target in imports(name, modules, lazy=True)[0]}
        found.setdefault(room, set()).update(targets - {room, ""})
    return found


def trespasses(modules: dict[str, Path]) -> list[str]:
    """Private names of one room that another uses: imported, or as an attribute of an object."""
    trees = {name: ast.parse(path.read_text()) for name, path in modules.items()}
    own: dict[str, set[str]] = {}
    for name, tree in trees.items():
        own.setdefault(name.split(".")[0], set()).update(_defined(tree))
    found = []
    for name, tree in trees.items():
        here = own[name.split(".")[0]]
        elsewhere = {x for names in own.values() for x in names if _is_private(x)} - here
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
                names = [node.attr]
            else:
                continue
            found += [f"{name}: {x}" for x in names if x in elsewhere]
    return found


def _is_private(name: str) -> bool:
    public = ("_replace", "_asdict")  # of named tuples
    return name.startswith("_") and not name.endswith("__") and name not in public


def _defined(tree: ast.AST) -> set[str]:
    """Names of functions, classes, variables and attributes that a module makes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def circles(modules: dict[str, Path]) -> list[str]:
    """Modules that can be reached from themselves, lazy imports included."""
    graph = {name: imports(name, modules, lazy=True)[0] for name in modules if name}
    return [name for name in graph if name in reach(name, graph)]


def reach(name: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    todo = list(graph[name])
    while todo:
        target = todo.pop()
        if target not in found:
            found.add(target)
            todo += graph.get(target, ())
    return found


def uses_torch(name: str) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in MAY_USE_TORCH)


MODULES = find_modules(PACKAGE)


def test_every_room_knows_those_that_are_written_down():
    assert neighbours(MODULES) == ROOMS


def test_no_room_knows_one_of_its_own_floor_or_above():
    below: set[str] = set()
    for floor in FLOORS:
        assert [room for room in floor if not ROOMS[room] <= below] == []
        below |= set(floor)


def test_no_room_uses_private_names_of_another():
    assert trespasses(MODULES) == []


def test_no_import_runs_in_a_circle():
    assert circles(MODULES) == []


@pytest.mark.parametrize("name", [name for name in MODULES if not uses_torch(name)])
def test_only_the_torch_parts_import_torch(name):
    assert not imports(name, MODULES, lazy=True)[1] & TORCH


def test_only_the_engine_of_corpora_imports_ray_and_only_when_it_runs():
    users = [name for name in MODULES if "ray" in imports(name, MODULES, lazy=True)[1]]
    assert users == list(MAY_USE_RAY)
    assert [name for name in MODULES if "ray" in imports(name, MODULES, lazy=False)[1]] == []


@pytest.mark.parametrize("name", [name for name in MODULES if not uses_torch(name)])
def test_importing_a_light_module_loads_no_torch_part(name):
    graph = {name: imports(name, MODULES, lazy=False)[0] for name in MODULES}
    assert [target for target in reach(name, graph) if uses_torch(target)] == []


def test_the_package_itself_imports_nothing_of_its_own():
    assert imports("", MODULES, lazy=False)[0] == set()


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("cli")])
def test_errors_of_the_library_name_no_options_of_the_command_line(name):
    raised = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if _raises(node)]
    texts = [part.value for node in raised for part in ast.walk(node) if _is_text(part)]
    assert [text for text in texts if re.search(r"(?<!\w)--[a-z]", text)] == []


def _raises(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_the_check_sees_private_names(tmp_path):
    files = {
        "__init__.py": "",
        "hub.py": "_cache = {}\nclass Hub:\n    def _open(self): self._open()",
        "codec.py": "from .hub import Hub, _cache\n_own = Hub()._open()",
        "cli.py": "from . import codec\ncodec._own = sys._getframe()",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert trespasses(find_modules(tmp_path)) == ["codec: _cache", "codec: _open"]


def test_the_check_sees_rooms_circles_and_lazy_imports(tmp_path):
    files = {
        "__init__.py": "",
        "config.py": "def late():\n    from .codec import Codec\n",
        "codec.py": "from vpcodec.hub import x\nfrom . import backends",
        "hub.py": "import torch.nn",
        "backends/__init__.py": "from ..entropy import y",
        "backends/onnx.py": "from . import torch\nfrom .. import config as c",
        "backends/torch.py": "from .onnx import z",
        "entropy.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    modules = find_modules(tmp_path)
    assert neighbours(modules)["config"] == {"codec"}
    assert neighbours(modules)["backends"] == {"entropy", "config"}
    assert sorted(circles(modules)) == ["backends.onnx", "backends.torch"]
    assert imports("hub", modules, lazy=True)[1] == {"torch"}
    assert imports("config", modules, lazy=False) == (set(), set())
    assert imports("backends.onnx", modules, lazy=True)[0] == {"backends.torch", "config"}
