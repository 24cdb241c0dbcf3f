"""The house's floors: imports go down or stay on their floor, never in a circle, and the scheduler's half stays free of torch.

Reads source text only, so that what counts is every import that is written: in functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("server", "adapters_store")

#: A module or, ending in ".*", a package with all that is in it -> its floor. The longest match counts, so a new module of
#: the engine or of the model has to be given its floor here.
FLOORS: Mapping[str, int] = {
    "adapters_store.*": 0,
    "server": 0,
    "server.audit": 0,
    "server.errors": 0,
    "server.logs": 0,
    "server.memory": 0,
    "server.metrics": 0,
    "server.host_memory": 0,
    "server.recipes": 0,
    "server.requests": 0,
    "server.settings": 0,
    "server.step_times": 0,
    "server.tenancy.policy": 0,
    "server.checkpoints.*": 1,
    "server.engine.footprint": 1,
    "server.engine.plan": 1,
    "server.methods.activations": 1,
    "server.methods.base": 1,
    "server.methods.grouped": 1,
    "server.methods.layout": 1,
    "server.methods.*": 2,
    "server.model.native.*": 2,
    "server.model.step": 2,
    "server.tenancy.*": 3,
    "server.engine.backoff": 3,
    "server.engine.derived": 3,
    "server.engine.inbox": 3,
    "server.engine.mailbox": 3,
    "server.engine.leaving": 3,
    "server.engine.warming": 3,
    "server.engine.watchdog": 3,
    "server.engine.budget": 3,
    "server.engine.prefill": 3,
    "server.engine.pages": 3,
    "server.engine.prefixes": 3,
    "server.engine.residency": 3,
    "server.engine.results": 3,
    "server.engine.speculation": 3,
    "server.model.attention": 3,
    "server.model.cuda.*": 3,
    "server.model.fused": 3,
    "server.model.fused_layer": 3,
    "server.model.program": 3,
    "server.model.drawing": 3,
    "server.model.kernels": 3,
    "server.model.linear": 3,
    "server.model.loader": 3,
    "server.model.outline": 3,
    "server.model.pull": 3,
    "server.model.quantized": 3,
    "server.model.readout": 3,
    "server.model.sampling": 3,
    "server.model.scales": 3,
    "server.model.sites": 3,
    "server.model.text": 3,
    "server.engine.checks": 4,
    "server.engine.scheduler": 4,
    "server.engine.slots": 4,
    "server.model.batch": 4,
    "server.model.graphs": 4,
    "server.model.runner": 4,
    "server.model.pace": 5,
    "server.engine.client": 5,
    "server.engine.engine": 5,
    "server.engine.loading": 5,
    "server.engine.passes": 5,
    "server.engine.placing": 5,
    "server.engine.scoring": 5,
    "server.api.*": 6,
    "server.assembly": 6,
    "server.check": 6,
    "server.demo.*": 6,
    "server.metrics_port": 6,
    "server.serving": 6,
    "server.supported": 6,
    "server.__main__": 7,
    "server.bench.*": 7,
    "server.cli": 7,
    "server.commands.*": 7,
    "server.report": 7,
    # Packages that span floors: their __init__ may import nothing that is not on the ground.
    "server.engine": 0,
    "server.tenancy": 0,
    "server.model": 0,
}

#: Pure state machines: neither they nor anything they import may load torch.
TORCH_FREE = (
    "server.recipes",
    "server.engine.backoff",
    "server.engine.derived",
    "server.engine.footprint",
    "server.engine.inbox",
    "server.engine.leaving",
    "server.engine.mailbox",
    "server.engine.pages",
    "server.engine.passes",
    "server.engine.plan",
    "server.engine.residency",
    "server.engine.scheduler",
    "server.engine.warming",
    "server.engine.watchdog",
    "server.tenancy.fairness",
    "server.tenancy.holdings",
    "server.tenancy.shares",
)

Graph = Mapping[str, frozenset[str]]


def source_files(root: Path) -> dict[str, Path]:
    """Module name -> file, for every module of the packages under `root`."""
    files = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return {module_name(path.relative_to(root)): path for path in files}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parents(module: str) -> list[str]:
    """The packages that importing `module` runs first, nearest first."""
    parts = module.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]


def imported(tree: ast.AST, package: str, modules: Collection[str]) -> Iterator[str]:
    """What the import statements in `tree` name: `from . import x` is the module x if there is one, else the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = [package, *parents(package)][node.level - 1] if node.level else ""
            origin = ".".join(filter(None, (above, node.module)))
            for alias in node.names:
                yield submodule if (submodule := f"{origin}.{alias.name}") in modules else origin


def import_graph(files: Mapping[str, Path]) -> Graph:
    """Module -> what it imports: the project's modules by their full names, anything else by its top-level name."""
    graph = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = imported(ast.parse(path.read_text(encoding="utf-8"), str(path)), package, files)
        graph[module] = frozenset(name if name in files else name.partition(".")[0] for name in names)
    return graph


def run_graph(graph: Graph) -> Graph:
    """The same with the packages that each import runs on its way, but for those that the importer is in itself."""
    return {
        module: names | ({parent for name in names for parent in parents(name)} - {module, *parents(module)})
        for module, names in graph.items()
    }


def floor_of(module: str) -> int | None:
    patterns = (module, *(f"{package}.*" for package in (module, *parents(module))))
    return next((FLOORS[pattern] for pattern in patterns if pattern in FLOORS), None)


def upward(graph: Graph) -> list[str]:
    """The imports that climb, one line each."""
    climbs = []
    for module, names in graph.items():
        floor = floor_of(module)
        for name in sorted(names & graph.keys()):
            above = floor_of(name)
            if floor is not None and above is not None and above > floor:
                climbs.append(f"{module} (floor {floor}) imports {name} (floor {above})")
    return climbs


def circle(graph: Graph) -> list[str]:
    """One import cycle, first module repeated at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def path_to(target: str, start: str, graph: Graph) -> list[str]:
    """A shortest chain of imports from `start` to `target`; empty if there is none."""
    chains = [[start], *([start, package] for package in parents(start))]
    seen = {chain[-1] for chain in chains}
    for chain in chains:  # grows while it is walked
        for name in sorted(graph.get(chain[-1], frozenset()) - seen):
            if name == target:
                return [*chain, name]
            seen.add(name)
            chains.append([*chain, name])
    return []


@pytest.fixture(scope="module")
def graph() -> Graph:
    return import_graph(source_files(ROOT))


def test_every_module_has_a_floor(graph: Graph) -> None:
    homeless = [module for module in graph if floor_of(module) is None]
    assert not homeless, f"give these modules a floor in {Path(__file__).name}: {homeless}"


def test_every_floor_is_lived_on(graph: Graph) -> None:
    empty = [name for name in FLOORS if name.removesuffix(".*") not in graph]
    assert not empty, f"no such module: {empty}"


def test_no_import_goes_up(graph: Graph) -> None:
    assert upward(graph) == []


def test_no_import_goes_in_a_circle(graph: Graph) -> None:
    assert circle(run_graph(graph)) == []


def test_the_store_knows_nothing_of_the_server(graph: Graph) -> None:
    stores = {module: names for module, names in graph.items() if module.partition(".")[0] == "adapters_store"}
    assert {
        f"{module} imports {name}" for module, names in stores.items() for name in names if name.partition(".")[0] == "server"
    } == set()


@pytest.mark.parametrize("module", TORCH_FREE)
def test_state_machines_name_no_torch(module: str, graph: Graph) -> None:
    assert module in graph
    assert path_to("torch", module, run_graph(graph)) == []


def test_state_machines_run_without_torch() -> None:
    """The same for what other libraries load on their behalf."""
    probe = f"import sys, {', '.join(TORCH_FREE)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=True, timeout=60)


# -- that the rules above can fail -----------------------------------------------------------------------------------


def graph_of(tmp_path: Path, **sources: str) -> Graph:
    """A project of modules `a_b=source` at server/a/b.py; `a___init__` is server/a/__init__.py."""
    for name, source in sources.items():
        path = tmp_path / "server" / Path(*name.split("_", 1)).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return import_graph(source_files(tmp_path))


@pytest.mark.parametrize(
    "source",
    [
        "from ..api import app",
        "from ..api.app import create_app",
        "from server.api import app",
        "import server.api.app",
        "def late():\n    from ..api import app",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..api.app import create_app",
    ],
)
def test_every_way_to_import_upwards_is_seen(source: str, tmp_path: Path) -> None:
    graph = graph_of(tmp_path, engine_pages=source, api_app="")
    assert upward(graph) == ["server.engine.pages (floor 3) imports server.api.app (floor 6)"]


def test_a_module_nobody_placed_has_no_floor() -> None:
    assert floor_of("server.engine.newcomer") is None
    assert floor_of("server.methods.newcomer") == floor_of("server.methods") == 2
    assert floor_of("server.methods.base") == 1


def test_a_circle_through_a_package_is_seen(tmp_path: Path) -> None:
    """a.one -> b.two runs b/__init__ first, and that imports a.one."""
    graph = graph_of(tmp_path, a_one="from ..b.two import x", b_two="x = 1", b___init__="from ..a import one")
    assert circle(graph) == []
    assert set(circle(run_graph(graph))) == {"server.a.one", "server.b"}


def test_torch_is_found_behind_other_modules(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, engine_pages="from . import plan", engine_plan="import torch.nn as nn")
    assert path_to("torch", "server.engine.pages", graph) == ["server.engine.pages", "server.engine.plan", "torch"]
