"""The architecture's one rule: imports go strictly down, and each foreign library has one door."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ali_dist
import kernels

ROOT = Path(__file__).resolve().parent.parent
LEVELS = (  # a module may import those of the rows above its own; a new module gets its place here
    # words
    "recipe tables published levers streams",
    "patience cli data.parts",
    "watchdog data.store data.patient",
    "run",
    "recipes",
    # parts
    "dist losses optim seeds data.types data.lossless",
    "data.block data.cache finite",
    "layers meter pictures data.digits data.unpickle data.spool data.matlab data.files data.images data.fingerprint",
    "nets data.write data.processes data.progress data.download data.cifar10 data.svhn data.celeba data.tinyimagenet",
    "data.folder data.imagenet64_batches",
    "data.imagenet64",
    "data.table",
    "data.index",
    "data.shards data.pack data.source",
    "data.stream",
    "data.labelled",
    "objective",
    # step
    "state",
    "step views",
    "supervised",
    "fast",
    # loop
    "checkpoint watch",
    "loop exported remote",
    # judge
    "model mirror",
    "evaluate.work evaluate.inception",
    "evaluate.data evaluate.features evaluate.logistic",
    "evaluate.classes evaluate.classification evaluate.knn evaluate.linear evaluate.posterior",
    "evaluate.linear_layers evaluate.svm evaluate.seen",
    "evaluate.distances evaluate.reconstruction",
    "evaluate.table",
    # edge
    "settings cluster prometheus elastic room lookout interface",
    "encoding",
    "worker describe prepare figures evaluate.__main__ status encode",
    "simulate repeats export",
    "launch",
    # the toy study, with a loop of its own
    "toy.tables toy.data toy.ops toy.terms",
    "toy.nets toy.metrics",
    "toy.recipe toy.models",
    "toy.judge toy.plan",
    "toy.stack",
    "toy.train",
    "toy.figure toy.report toy.markdown",
    "toy.__main__",
    # benchmarks
    "bench bench.plain bench.floors bench.toy_plain bench.order bench.about bench.processes bench.bars bench.memory",
    "bench.children bench.inputs bench.start_job bench.nodes",
    "bench.ways bench.toy bench.peers",
    "bench.step bench.reader bench.start bench.job",
    "bench.data bench.scale bench.inflict",
    "bench.faults",
    "bench.soak",
    "bench.__main__",
)
LEVEL = {name: level for level, row in enumerate(LEVELS) for name in row.split()}
JUDGES = {
    "model",
    "figures",
    "encoding",
    "encode",
    "exported",
    "export",
    *(name for name in LEVEL if name.startswith("evaluate.")),
}
TRAINER = {"repeats", "step", "supervised", "watch", "loop", "meter", "worker", "launch"}
EDGE = {"worker", "launch", "cluster", "bench.start_job", "bench.scale"}
DOORS = {  # foreign library -> the modules that may name it, besides kernels/ for triton
    "triton": set(),
    "ray": {"launch", "cluster", "elastic", "room", "lookout", "interface", "prometheus", "bench.start_job"},
    "webdataset": {"bench.peers", *(name for name in LEVEL if name.startswith("data."))},
    "pyarrow": {"data.store", "data.lossless", "encoding"},
    "requests": {"data.store"},
    "torch.utils.tensorboard": {"meter"},
    "tensorboard": {"meter"},
    "torch.distributed": {"dist", *EDGE},
    "torch.nn.parallel": {"state", "bench.scale"},  # DistributedDataParallel
    "matplotlib": {"toy.figure"},
    "torchmetrics": {"evaluate.reconstruction", "evaluate.distances"},
    "safetensors": {"checkpoint", "evaluate.seen", "exported", "toy.stack", "toy.train"},
    "pickle": {"data.unpickle"},  # official archives' format, without its objects
    "torch.load": {"evaluate.features"},  # one file, known by its checksum
    "os.environ": {"cli", "launch", "worker", "cluster", "interface", "bench.children", "bench.nodes", "bench.start"},
    "sys.argv": {"settings", "bench.about", "bench.reader", "bench.start_job", "toy.__main__"},
}


def modules(package: str) -> dict[str, ast.Module]:
    """Name below the package -> syntax tree; '' is the package itself."""
    trees = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        trees[".".join(parts)] = ast.parse(path.read_text(), str(path))
    return trees


def names(tree: ast.Module) -> Iterator[str]:
    """Full names of all that a module imports, and of `torch.x.y` and the like where it uses them."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide what is imported"
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name) and node.id in aliases:
                yield ".".join([aliases[node.id], *reversed(parts)])


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def imported_modules(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of ali_dist, '' for the package's own names, that a tree imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {
                f"{node.module}.{a.name}"
                if f"{node.module}.{a.name}".removeprefix("ali_dist.") in known
                else node.module
                for a in node.names
            }
    return {name.removeprefix("ali_dist").removeprefix(".") for name in found if below(name, "ali_dist")}


OURS = modules("ali_dist")
PACKAGES = {"", "data", "evaluate", "toy"}


def test_every_module_has_its_level():
    assert OURS.keys() - PACKAGES <= LEVEL.keys()
    assert len(OURS) > 20
    assert len(LEVEL) == sum(len(row.split()) for row in LEVELS)  # none twice


@pytest.mark.parametrize("name", sorted(OURS.keys() - PACKAGES))
def test_imports_go_strictly_down(name):
    for target in imported_modules(OURS[name], set(OURS)):
        assert target in LEVEL, f"{name} imports {target or 'the package itself'}"
        assert LEVEL[target] < LEVEL[name], f"{name} imports {target}, which is not below it"


def test_packages_import_nothing_of_the_others():
    assert imported_modules(OURS[""], set(OURS)) <= {"model"}  # `ali_dist.load`
    assert not any(imported_modules(OURS[name], set(OURS)) for name in PACKAGES - {""})


def test_judges_know_no_trainer():
    for name in JUDGES & OURS.keys():
        assert not imported_modules(OURS[name], set(OURS)) & TRAINER, name


@pytest.mark.parametrize("library", sorted(DOORS))
def test_foreign_libraries_have_one_door(library):
    users = {name for name, tree in OURS.items() if any(below(used, library) for used in names(tree))}
    assert users <= DOORS[library]
    assert users or not DOORS[library] or library in {"tensorboard"}, f"nobody uses {library}: is its row right?"


def test_kernels_know_only_torch_and_triton():
    for name, tree in modules("kernels").items():
        tops = {used.split(".")[0] for used in names(tree)} - set(sys.stdlib_module_names)
        assert tops <= {"torch", "triton", "kernels", "numpy"}, name


def test_the_packages_are_the_repositorys():
    assert Path(kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"
    assert Path(ali_dist.__file__).resolve() == ROOT / "ali_dist" / "__init__.py"


def test_the_rule_catches_what_it_should():
    tree = ast.parse(
        "import torch\nfrom torch import nn\nimport ray.train as rt\n"
        "def f():\n    from ali_dist import loop\n    from ali_dist.recipe import Recipe\n    import ali_dist\n"
        "    torch.distributed.barrier()\n    nn.parallel.DistributedDataParallel\n"
    )
    assert imported_modules(tree, set(OURS)) == {"", "loop", "recipe"}
    used = set(names(tree))
    assert {"ray.train", "torch.distributed.barrier", "torch.nn.parallel.DistributedDataParallel"} <= used
