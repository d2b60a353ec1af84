"""What dvc.yaml declares is what a stage uses, file by file and parameter by parameter, and no more.

Each stage runs in a process of its own, in a finished clone, under a driver that notes which files of the project it
imports or opens and which parameters it reads. A file or parameter that is used and not declared must stand below,
with the reason why it cannot change an output.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from ruamel.yaml import YAML

from tests.pipeline import run, stages_run
from tests.test_pipeline import OFFLINE
from tests.tracking import copy_workspace

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARY = "src/mnist_vae"
PIPELINE = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"]
STAGES = list(PIPELINE)

# Files that a stage uses and dvc.yaml need not name, each with the reason why it cannot change an output.
RUNNER = "runs the stage's own file; what it gives back after a failure has the hash that dvc.lock names"
TRACKING = "tells MLflow what happened; nothing of it flows back"
PUBLIC_API = "the names for people who import the library; no stage takes one from here"
UNDECLARED = {
    "stages/__init__.py": "names stages and folders; the files that download takes from one have known hashes",
    "stages/stage.py": RUNNER,
    "stages/outputs.py": RUNNER,
    "stages/key.py": "of other stages than train: says where in the journal the records belong",
    f"{LIBRARY}/__init__.py": PUBLIC_API,
    f"{LIBRARY}/compat.py": "lets torchvision be imported; declares operators that nothing calls",
    f"{LIBRARY}/fingerprint.py": "of other stages than train: see stages/key.py",
    **{f"{LIBRARY}/tracking/{name}.py": TRACKING for name in ("journal", "logger", "process", "provenance", "session")},
}
UNDECLARED_IN_TRAIN = UNDECLARED.keys() - {"stages/key.py", f"{LIBRARY}/fingerprint.py"}

# Parameters that a stage reads and dvc.yaml does not give to it.
ONLY_RECORDED = "stands among the parameters of the MLflow run and nowhere else: the data set's own hash decides"
UNDECLARED_PARAMS = {"train": {"data.dataset": ONLY_RECORDED, "data.fallback": ONLY_RECORDED}}

DRIVER = """
import json, runpy, sys
from pathlib import Path

stage, report = sys.argv[1:]
here, opened, read = Path.cwd(), set(), set()


def within(name):  # the path in the project of a file under src/ or stages/
    path = Path(name).absolute()
    inside = path.is_relative_to(here / "src") or path.is_relative_to(here / "stages")
    return path.relative_to(here).as_posix() if inside else None


def note_open(event, arguments):
    if event != "open" or not isinstance(arguments[0], str) or "__pycache__" in arguments[0]:
        return
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "digest_of_code":  # which opens what dvc.yaml declares
        frame = frame.f_back
    if frame is None:
        opened.add(within(arguments[0]))


from mnist_vae import params

getattribute, model_dump, load_params = params.Section.__getattribute__, params.Section.model_dump, params.load_params


def note_read(section, name):
    if name in type(section).model_fields and type(section) is not params.Params:
        read.add(f"{type(section).__name__.lower()}.{name}")
    return getattribute(section, name)


def note_dump(section, **options):
    content = model_dump(section, **options)
    prefix = "" if type(section) is params.Params else type(section).__name__.lower()
    for name, value in content.items():
        read.update([f"{prefix}.{name}"] if prefix else [f"{name}.{entry}" for entry in value])
    return content


def load_and_forget(path):  # what is read while parameters are checked changes nothing but whether they pass
    loaded = load_params(path)
    read.clear()
    return loaded


params.Section.__getattribute__, params.Section.model_dump = note_read, note_dump
params.load_params = load_and_forget
sys.addaudithook(note_open)
sys.argv = ["stages", stage]
runpy.run_module("stages", run_name="__main__", alter_sys=True)

modules = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
used = {within(name) for name in modules if name} | opened | {"stages/__main__.py"}
Path(report).write_text(json.dumps({"files": sorted(used - {None}), "params": sorted(read)}))
"""


class Use(NamedTuple):
    """What a stage used."""

    files: set[str]
    params: set[str]


class Declared(NamedTuple):
    """What dvc.yaml gives to a stage: files or folders of the project, parameters or sections of them."""

    deps: set[str]
    params: set[str]

    def names_file(self, file: str) -> bool:
        """Whether a change of the file makes the stage run again."""
        return any(file == dep or file.startswith(f"{dep}/") for dep in self.deps)

    def names_param(self, param: str) -> bool:
        """Whether a change of the parameter makes the stage run again."""
        return param in self.params or param.partition(".")[0] in self.params


def declared(stage: str) -> Declared:
    deps = {dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("src/", "stages/"))}
    return Declared(deps, set(PIPELINE[stage]["params"]))


def project_files() -> list[str]:
    """Every file under src/ and stages/ that git has or would take."""
    listed = run(REPOSITORY, "git", "ls-files", "--cached", "--others", "--exclude-standard", "src", "stages").stdout
    return sorted(name for name in set(listed.splitlines()) if (REPOSITORY / name).is_file())


@pytest.fixture(scope="module")
def uses(finished_pipeline, tmp_path_factory) -> dict[str, Use]:
    """What each stage used, run in a copy of the finished pipeline as DVC runs it."""
    folder = tmp_path_factory.mktemp("declared")
    clone = copy_workspace(finished_pipeline, folder / "mnist-vae")
    # So that download looks for MNIST in vain, and then takes the digits: it uses all that it can use.
    params = clone / "params.yaml"
    params.write_text(params.read_text().replace("dataset: digits", "dataset: mnist"))
    found = {}
    # Before that, download takes a folder of images, which no other stage can tell from other images.
    images = folder / "images"
    images.mkdir()
    for name in ("x_train", "x_test"):
        np.save(images / f"{name}.npy", np.zeros((6, 28, 28), np.uint8))
    mnist = params.read_text()
    params.write_text(mnist.replace("dataset: mnist", f"dataset: {images}"))
    run(clone, sys.executable, "-c", DRIVER, "download", folder / "own.json", env=OFFLINE | {"PYTHONPATH": "src"})
    params.write_text(mnist)
    for stage in STAGES:
        report = folder / f"{stage}.json"
        run(clone, sys.executable, "-c", DRIVER, stage, report, env=OFFLINE | {"PYTHONPATH": "src"})
        content = json.loads(report.read_text())
        found[stage] = Use(set(content["files"]), set(content["params"]))
    found["download"].files.update(json.loads((folder / "own.json").read_text())["files"])
    return found


def is_docstring_only(file: str) -> bool:
    """Whether a module does nothing."""
    body = ast.parse((REPOSITORY / file).read_text()).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_file_that_a_stage_uses_is_declared_or_cannot_change_an_output(uses, stage):
    assert f"stages/{stage}.py" in uses[stage].files
    exempt = UNDECLARED_IN_TRAIN if stage == "train" else UNDECLARED.keys()
    undeclared = {file for file in uses[stage].files if not declared(stage).names_file(file)}
    rooms = {file for file in undeclared if file.endswith("/__init__.py") and is_docstring_only(file)}
    assert undeclared - rooms - exempt == set()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_that_a_stage_reads_is_declared_or_only_recorded(uses, stage):
    assert uses[stage].params
    undeclared = {param for param in uses[stage].params if not declared(stage).names_param(param)}
    assert undeclared == UNDECLARED_PARAMS.get(stage, {}).keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_uses_every_file_and_every_parameter_that_is_declared_for_it(uses, stage):
    unused = {file for file in project_files() if declared(stage).names_file(file)} - uses[stage].files
    assert unused == set()
    assert {dep for dep in declared(stage).deps if not (REPOSITORY / dep).exists()} == set()
    read = uses[stage].params
    assert {
        param for param in declared(stage).params if not any(f"{name}.".startswith(f"{param}.") for name in read)
    } == set()


@pytest.mark.slow
def test_nothing_is_exempt_that_no_stage_uses(uses):
    used = set.union(*(use.files for use in uses.values()))
    assert UNDECLARED.keys() <= used


def test_every_file_belongs_to_a_stage_or_stands_apart_with_a_reason():
    """Tracking is sent by a process beside the stages; of its files, UNDECLARED has those that a stage imports."""
    unnamed = {file for file in project_files() if not any(declared(stage).names_file(file) for stage in STAGES)}
    rooms = {file for file in unnamed if file.endswith("/__init__.py") and is_docstring_only(file)}
    apart = {file for file in unnamed if file.startswith(f"{LIBRARY}/tracking/")} | {f"{LIBRARY}/py.typed"}
    assert unnamed - rooms - apart - UNDECLARED.keys() == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("src/mnist_vae/pictures/figures.py", {"evaluate", "render_samples", "render_grid"}),
        ("src/mnist_vae/pictures/explorer.html", {"render_grid"}),
        ("src/mnist_vae/training/module.py", {"train"}),
        ("src/mnist_vae/evaluation/likelihood.py", {"evaluate"}),
        ("src/mnist_vae/files.py", set(STAGES)),
        ("src/mnist_vae/tracking/session.py", set()),
        ("stages/stage.py", set()),
    ],
)
def test_dvc_status_names_the_stages_whose_outputs_a_file_can_change(pipeline, file, stages):
    with (pipeline / file).open("a") as opened:
        opened.write("\n" if file.endswith(".html") else "# a comment\n")
    status = json.loads(run(pipeline, "dvc", "status", "--json").stdout)
    assert status.keys() == stages


@pytest.mark.slow
def test_a_changed_figure_does_not_train_again(pipeline):
    with (pipeline / "src/mnist_vae/pictures/figures.py").open("a") as opened:
        opened.write("# a comment\n")
    planned = run(pipeline, "dvc", "repro", "--dry").stdout
    assert stages_run(planned) == ["evaluate", "render_samples", "render_grid"]


def test_no_parameter_of_a_section_that_is_declared_whole_has_a_name_that_dvc_overlooks():
    """DVC's run cache takes these for facts about a file, and would give back results of another value."""
    params = YAML(typ="safe").load(REPOSITORY / "params.yaml")
    whole = {param for stage in STAGES for param in declared(stage).params if param in params}
    assert {"model", "train"} <= whole
    assert not {name for section in whole for name in params[section]} & {"size", "nfiles"}


# imports


# The rooms in levels: one may import from its own room and from any of a level before its own. "" is beside the rooms.
LEVELS = [{""}, {"params"}, {"data", "model"}, {"sources", "training", "evaluation"}, {"pictures", "tracking"}]
RANKS = {room: rank for rank, rooms in enumerate(LEVELS) for room in rooms}


def imports(file: str) -> Iterator[str]:
    """The modules of the project that a file imports, at its top or within a function; as names with dots."""
    for node in ast.walk(ast.parse((REPOSITORY / file).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in {"mnist_vae", "stages"})


def module_file(name: str) -> str:
    """The file of what was imported: of a module, or of the module that has the name."""
    while True:
        base = name.replace(".", "/") if name.startswith("stages") else f"src/{name.replace('.', '/')}"
        for file in (f"{base}.py", f"{base}/__init__.py"):
            if (REPOSITORY / file).is_file():
                return file
        name = name.rpartition(".")[0]


def room_of(file: str) -> str:
    """The room of a file of the library; "" for what lies beside the rooms."""
    return file.removeprefix(f"{LIBRARY}/").rpartition("/")[0]


def graph() -> dict[str, set[str]]:
    """Each file of the project and the files that it imports; without the public API, which imports nothing itself."""
    files = [file for file in project_files() if file.endswith(".py") and file != f"{LIBRARY}/__init__.py"]
    return {file: {module_file(name) for name in imports(file)} for file in files}


def test_the_public_api_imports_for_type_checkers_only():
    body = ast.parse((REPOSITORY / LIBRARY / "__init__.py").read_text()).body
    eager = [ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert eager == ["from importlib import import_module", "from typing import TYPE_CHECKING, Any"]


def test_every_room_has_a_rank():
    assert {room_of(file) for file in graph() if file.startswith(LIBRARY)} == RANKS.keys()


def test_imports_between_rooms_run_one_way():
    for file, imported in graph().items():
        for other in imported:
            if file.startswith("stages/"):
                continue
            assert other.startswith(LIBRARY), f"{file} of the library imports {other}"
            assert other != f"{LIBRARY}/__init__.py", f"{file} takes a name from the public API; name its module"
            here, there = room_of(file), room_of(other)
            assert here == there or RANKS[there] < RANKS[here], f"{file} imports {other}"


def test_stages_do_not_import_each_other():
    for file, imported in graph().items():
        if file.startswith("stages/"):
            own = {f"stages/{stage}.py" for stage in STAGES}
            assert imported.isdisjoint(own - {file}), f"{file} imports {imported & own}"


def test_imports_of_files_have_no_circle():
    TopologicalSorter({file: imported - {file} for file, imported in graph().items()}).prepare()


def test_nothing_is_patched():
    """No mock, no import hook, no edited path; the garbage collector is set up where a stage's process begins."""
    patching = re.compile(r"\bmock\b|__import__|\bgc\.|\bsys\.path(\s*(\[|\+?=[^=])|\.\w)")
    for folder in ("src", "stages", "benchmarks"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            if file != REPOSITORY / "stages/__main__.py":
                assert not patching.search(file.read_text()), file
