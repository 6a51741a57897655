"""What a machine can check of CONTRIBUTING.md: layers, module openings, names, version, errors and their reasons."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tandem
from tandem.api.types.v1 import error_pb2
from tandem.rpc.status import ERROR_BY_REASON

REPOSITORY = Path(__file__).parents[2]
LIBRARY = REPOSITORY / "src" / "tandem"
SERVICES = {path.name: path for path in sorted((REPOSITORY / "services").glob("*/tandem_*")) if path.is_dir()}
GENERATED = LIBRARY / "api"
MODULES = [
    path
    for root in (LIBRARY, *SERVICES.values())
    for path in sorted(root.rglob("*.py"))
    if GENERATED not in path.parents and "standins" not in path.parts
]
NAMELESS = {"utils", "util", "common", "helpers", "helper", "manager", "misc", "base"}
LINES_MAX = 500


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


@functools.cache
def imports(path: Path) -> list[str]:
    """Top-level and nested imports, dotted."""
    found: list[str] = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.append(node.module)
    return found


def imports_any(path: Path, *packages: str) -> list[str]:
    return [name for name in imports(path) if name.split(".")[0] in packages]


def under(path: Path, *parts: str) -> bool:
    return LIBRARY.joinpath(*parts) in path.parents


def identifier(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_the_walk_found_the_project() -> None:
    assert set(SERVICES) == {"tandem_frontend", "tandem_prefill", "tandem_decode", "tandem_registry", "tandem_edge"}
    assert len(MODULES) > 60


# A test walks all modules by itself: a test for each of 350 modules costs ten times what it checks.
def test_module_says_what_it_owns() -> None:
    for path in MODULES:
        assert ast.get_docstring(tree_of(path)), f"{identifier(path)} does not say what it owns and refuses to own"
        assert path.stem not in NAMELESS, identifier(path)
        assert len(text_of(path).splitlines()) <= LINES_MAX, identifier(path)


def test_layers() -> None:
    wrong = {identifier(path): names for path in MODULES if (names := [*imports_across_layers(path)])}
    assert wrong == {}


def imports_across_layers(path: Path) -> Iterator[str]:
    """Imports that the layer of a module may not have."""
    if not under(path, "engine", "sglang"):
        yield from imports_any(path, "sglang", "nixl", "torch", "transformers", "triton")
    if under(path, "domain"):
        yield from (n for n in imports(path) if n.split(".")[0] not in {*sys.stdlib_module_names, "tandem"})
        yield from (
            n for n in imports(path) if n.startswith("tandem.") and not n.startswith(("tandem.domain", "tandem.errors"))
        )
    speaks_grpc = any(under(path, folder) for folder in ("rpc", "client", "discovery", "cli"))
    may_speak_grpc = speaks_grpc or path.stem == "servicer"
    if not may_speak_grpc:
        yield from imports_any(path, "grpc", "grpc_status", "grpc_health")
    if not under(path, "observability"):
        yield from imports_any(path, "opentelemetry", "prometheus_client")
    if not under(path, "tls"):
        yield from imports_any(path, "cryptography")
    if "tandem_registry" not in path.parts:
        yield from imports_any(path, "consul")
    if not under(path, "rpc", "http2"):
        yield from imports_any(path, "h2", "hpack", "hyperframe")


REPLAY_COMMANDS = {
    LIBRARY / "cli" / "replay.py": {"tandem_frontend.replay.command"},
    LIBRARY / "cli" / "plan.py": {"tandem_frontend.replay.planning.command"},
}
"""They run the frontend's own policies in their process (docs/adr/0022-replay.md)."""


def test_services_do_not_know_each_other() -> None:
    for path in MODULES:
        own = next((name for name, root in SERVICES.items() if root in path.parents), None)
        others = {name for name in imports_any(path, *SERVICES) if name.split(".")[0] != own}
        assert others <= REPLAY_COMMANDS.get(path, set()), identifier(path)


def test_a_serving_frontend_does_not_import_the_replay() -> None:
    frontend = SERVICES["tandem_frontend"]
    for path in (path for path in MODULES if frontend in path.parents and frontend / "replay" not in path.parents):
        assert not [name for name in imports(path) if name.startswith("tandem_frontend.replay")], identifier(path)


def test_services_have_the_same_plumbing() -> None:
    for name, root in SERVICES.items():
        # What a worker does is the same for both roles: src/tandem/worker.
        app = set() if name in {"tandem_prefill", "tandem_decode"} else {"app.py"}
        assert {"__main__.py", "config.py", *app} <= {path.name for path in root.glob("*.py")}, name
        assert (root.parent / "README.md").is_file(), name
        assert (root.parent / "Dockerfile").is_file(), name


STAGES = ("preparation", "admission", "routing", "execution", "response")
"""Folders of the frontend, in the order of a request."""


def test_the_frontends_folders_are_a_requests_stages() -> None:
    folders = {path.name for path in SERVICES["tandem_frontend"].iterdir() if (path / "__init__.py").is_file()}
    assert folders == {*STAGES, "models", "openai", "anthropic", "batches", "admin", "console", "processes", "replay"}


def dotted(path: Path) -> str:
    roots = (LIBRARY.parent, *(root.parent for root in SERVICES.values()))
    root = next(root for root in roots if root in path.parents)
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports_at_the_top(path: Path, modules: set[str]) -> Iterator[str]:
    """Modules of ours that are imported when this one is."""
    for node in tree_of(path).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in names)


def test_modules_import_each_other_in_no_circle() -> None:
    modules = {dotted(path): path for path in MODULES}
    graph = {name: {*imports_at_the_top(path, {*modules})} & {*modules} for name, path in modules.items()}
    # Take away what imports nothing that is left, again and again: what stays is in a circle, or imports one.
    while free := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph


def test_every_error_has_its_reason_in_the_contract() -> None:
    names = [value.name for value in error_pb2.ErrorReason.DESCRIPTOR.values]
    contract = {name.removeprefix("ERROR_REASON_") for name in names} - {"UNSPECIFIED"}
    # Errors of a start never travel.
    raised = set(ERROR_BY_REASON) - {"START_FAILED", "CONFIG_INVALID"}
    assert raised == contract


def test_changelog_knows_the_version() -> None:
    assert re.search(rf"^## {re.escape(tandem.__version__)}\b", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_a_broad_except_gives_its_reason() -> None:
    """Beside it, or in the first line of its body."""
    for path in MODULES:
        lines = text_of(path).splitlines()
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
                assert "#" in lines[node.lineno - 1] or lines[node.lineno].lstrip().startswith("#"), (
                    f"{identifier(path)}, line {node.lineno}: why is it broad?"
                )


def _is_broad(caught: ast.expr | None) -> bool:
    return caught is None or (isinstance(caught, ast.Name) and caught.id in {"Exception", "BaseException"})
