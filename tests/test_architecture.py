"""Checks of the code base's structure: imports between folders, public names, packages and file lengths."""

import ast
import os
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("distattn", "parallel", "kernels", "cluster", "launch", "configs")
# levels from the bottom up: a folder may import only from itself and from folders on lower levels
LEVELS = {
    "ir": 0,
    "kernels": 1,
    "cluster": 1,
    "supervision": 1,
    "parallel.tables": 2,
    # neither imports the other: parallel.make_plan chooses between a strategy's candidates by bytes or by simulation
    "parallel.strategies": 3,
    "parallel.analysis": 3,
    "parallel.runtime": 4,
    "parallel": 5,
    "ops": 6,
    "batch": 7,
    "data": 8,
    "driver": 8,
    "memory": 8,
    "checkpoints": 9,
    "adapters": 10,
    "pages": 9,
    "models": 11,
    "training": 12,
    "doctor": 12,
    "planning": 13,
    "preflight": 13,
    "launch": 14,
}
NUMPY_ONLY = ("ir",)


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: " + listed.stderr.strip())
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def folder_of(module: str) -> str:
    """Return the key of LEVELS for the folder that contains the module distattn.X.Y."""
    parts = module.split(".")[1:]
    return max((name for name in LEVELS if parts[: name.count(".") + 1] == name.split(".")), key=len, default="")


def imports(file: Path) -> set[str]:
    """Return the distattn modules that a file imports anywhere except in type-checking blocks."""
    tree = ast.parse((ROOT / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "distattn":
            imported |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            imported |= {name.name for name in node.names if name.name.split(".")[0] == "distattn"}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: relative import"
    return imported


def modules() -> dict[Path, str]:
    """Return the package's source files, mapped to their module names."""
    files = [file for file in tracked("*.py") if file.parts[0] in ROOMS]
    return {
        file: ".".join([*([] if file.parts[0] == "distattn" else ["distattn"]), *file.with_suffix("").parts])
        for file in files
    }


def test_imports_only_look_down():
    assert len(modules()) > 20
    for file, module in modules().items():
        if module == "distattn.__init__":
            # the public module may import from all folders
            continue
        assert folder_of(module), f"{file} lies in no folder of LEVELS"
        here = folder_of(module)
        for imported in imports(file):
            there = folder_of(imported)
            below = LEVELS[there] < LEVELS[here] or there == here
            assert below, f"{file} imports {imported}: {there} is not below {here}"


def test_no_module_imports_itself_in_a_circle():
    all_modules = set(modules().values())
    edges = {
        module: {
            name
            for imported in imports(file)
            for name in (imported, imported.rpartition(".")[0])
            if name in all_modules
        }
        - {module}
        for file, module in modules().items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "circle: " + " -> ".join([*path, module])
        if module not in done:
            for other in edges[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_the_intermediate_representation_needs_numpy_and_the_standard_library_only():
    for file in [file for file, module in modules().items() if folder_of(module) in NUMPY_ONLY]:
        tree = ast.parse((ROOT / file).read_text())
        lazy = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
        }
        lazy |= {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in lazy:
                top = (
                    {n.name.split(".")[0] for n in node.names}
                    if isinstance(node, ast.Import)
                    else {str(node.module).split(".")[0]}
                )
                assert all(t in sys.stdlib_module_names or t in ("numpy", "distattn") for t in top), (file, top)


def test_planning_verifying_and_explaining_never_import_torch():
    code = """
import sys, distattn as da
mask, layout = da.Mask.documents([9, 4]), da.Layout.zigzag([9, 4], 2)
plan = da.make_plan(mask, layout, strategy="ring", heads=2, kv_heads=1, head_dim=4, dtype="bfloat16")
da.verify(plan); str(da.explain(plan))
assert "torch" not in sys.modules and "tyro" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_public_interface_is_complete_and_hides_no_module():
    import distattn as da

    for name in da.__all__:
        assert getattr(da, name) is not None and name in dir(da)
        assert not (ROOT / "distattn" / f"{name}.py").exists() and not (ROOT / "distattn" / name).is_dir()
    with pytest.raises(AttributeError, match="no attribute 'perfetto'"):
        da.perfetto  # noqa: B018
    tree = ast.parse((ROOT / "distattn" / "__init__.py").read_text())
    typed = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert typed == set(da.__all__)


def test_top_level_folders_are_linked_into_the_package_and_shadow_no_other_package():
    for room in ROOMS[1:]:
        link = ROOT / "distattn" / room
        assert link.is_symlink() and os.readlink(link) == f"../{room}"
        # a top-level `kernels` package would shadow Hugging Face's wherever the root is on sys.path
        assert not (ROOT / room / "__init__.py").exists()


def test_no_object_is_unpickled_that_has_not_matched_its_digest():
    """Refuse PyTorch's object collectives, which unpickle whatever arrives. `sealed_values` replaces them."""
    sealed = {Path("parallel/runtime/communication/sealed_values.py"), Path("distattn/checkpoints/rank_sockets.py")}
    # this file lists the names that pickled data may contain
    listed = {Path("distattn/checkpoints/pickled_names.py")}
    theirs = ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "recv_object_list")
    for file in modules():
        names = set()
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Attribute):
                names |= {node.attr, f"{ast.unparse(node.value)}.{node.attr}"}
            elif isinstance(node, ast.ImportFrom):
                names |= {name for alias in node.names for name in (alias.name, f"{node.module}.{alias.name}")}
        assert not names & set(theirs), file
        assert file in sealed | listed or not names & {"pickle.loads", "pickle.load", "pickle.Unpickler"}, file


def test_files_that_are_read_can_never_run_code():
    """Check that every reader that could run code named in a file forbids it, and that DCP's own readers are not used."""
    wanted = {
        "torch.load": "weights_only=True",
        "np.load": "allow_pickle=False",
        ".from_pretrained": "trust_remote_code=False",
    }
    never = (
        "FileSystemReader(",
        "DefaultLoadPlanner(",
        "yaml.load(",
        "pd.read_pickle(",
        "joblib.load(",
        "shelve.",
    )
    for file in modules():
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node)
                for name, keyword in wanted.items():
                    assert not ast.unparse(node.func).endswith(name) or keyword in called, f"{file}:{node.lineno}"
                assert not called.startswith(never), f"{file}:{node.lineno}"
                assert "dcp.load" not in ast.unparse(node.func) or "PlainLoadPlanner" in called, f"{file}:{node.lineno}"


def test_files_are_short():
    for file in tracked("*.py"):
        assert len((ROOT / file).read_text().splitlines()) <= 500, file


def test_no_two_files_of_tests_have_one_name():
    """Require unique names, because pytest imports each file as a top-level module and refuses a second file of the
    same name.
    """
    names = [file.name for file in tracked("tests/**/test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_links_of_the_long_description_lead_into_the_repository_where_it_is_known():
    long_description = runpy.run_path(str(ROOT / "setup.py"))["long_description"]
    text = "![a picture](docs/a.png)\n\n[a page](docs/a.md#b), [there](https://x.org), [here](#here)"
    assert long_description(text) == "a page, [there](https://x.org), [here](#here)"
    assert long_description(text, "https://h.org/r") == (
        "![a picture](https://h.org/r/raw/main/docs/a.png)\n\n[a page](https://h.org/r/blob/main/docs/a.md#b), "
        "[there](https://x.org), [here](#here)"
    )


def test_wheel_and_sdist_hold_every_tracked_source_and_nothing_else(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # this finds incomplete deletions, and new folders that pyproject.toml does not list
    wanted = {str(Path(*module.split(".")).with_suffix(".py")) for module in modules().values()}
    wanted |= {
        f"distattn/{file}"
        for file in tracked(
            "configs/*.toml",
            "configs/models/*.json",
            "cluster/descriptions/*.toml",
            "cluster/jobs/*.yaml",
            "launch/slurm/templates/*.j2",
        )
    }
    wanted |= {"distattn/py.typed", *map(str, tracked("distattn/pages/templates/*.j2"))}
    (wheel,) = tmp_path.glob("*.whl")
    archive_of_wheel = zipfile.ZipFile(wheel)
    members = {name for name in archive_of_wheel.namelist() if ".dist-info/" not in name}
    assert members == wanted
    (metadata,) = (name for name in archive_of_wheel.namelist() if name.endswith(".dist-info/METADATA"))
    described = archive_of_wheel.read(metadata).decode()
    # a page on a package index has no docs/ folder next to it, so links must be absolute
    assert "## Two commands" in described and not re.search(r"\]\((?!https?:|#)", described)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {Path(*Path(name).parts[1:]).as_posix() for name in archive.getnames()}
    assert {str(file) for file in modules()} <= names
    others = tracked(
        "docs/*", "examples/*", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt", "README.md"
    )
    assert {str(file) for file in others} <= names
