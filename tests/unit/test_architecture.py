"""The laws of the house, read from the syntax trees of all its files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgekit

ROOT = Path(__file__).resolve().parents[2]

# Where every module stands. A folder's name stands for all modules in it.
_FLOORS = """
0  errors _fs _yaml _proc
1  registry quant formats unsafe_config model_folder hub intervals
1  typed_json
2  source recipe artifact device target exporter converter runtime report receipt
2  llama_library ggml_tensor machine scorer model_cost
2  language_model language_header preprocess image_processor image_input text_input sample_inputs
2  latency_report latency_text telemetry report_text board_agent board_link upload device_config
3  exporters runtimes devices
4  serve training bench plan evaluate tune doctor plot proof probe roofline profile
4  tasks needle sensitivity sensitivity_subject sensitivity_report sensitivity_plot advice
2  tensor_figures labelled_inputs tensor_types model_shape vision_cost onnx_shapes onnx_cost
2  tflite_cost graph_file
4  predictor plan_memory plan_validate remote remote_tensors far_side wheelhouse device_setup
2  network_folder beside export_again
4  peak_loops proof_files proof_tensors agreement latency latency_files
4  bench_plan bench_models bench_side bench_worker bench_verdict bench_files bench_plot compare
4  cross_format language_layers
4  planned_model vision_predictor measured_profile device_probe storage page_cache bench_prediction
5  cli __main__
"""
FLOORS = {
    room: int(floor)
    for floor, *rooms in map(str.split, _FLOORS.split("\n")[1:-1])
    for room in rooms
}
SHELVES = ("exporters", "runtimes", "devices")
# The doors: what a module below floor 3 may import from outside, inside functions only.
DOORS = {
    "edgekit.hub": {"huggingface_hub"},
    "edgekit.llama_library": {"llama_cpp"},
    "edgekit.image_input": {"numpy", "PIL"},
    "edgekit.text_input": {"numpy", "tokenizers"},
    "edgekit.sample_inputs": {"numpy"},
}
LAZY = ("numpy", "torch", "onnx", "onnxruntime", "gguf", "llama_cpp", "transformers")
LAZY += ("ai_edge_litert", "litert_torch")
# What the files of training/ may import at load time: they are loaded by name, and no one else's.
TRAINS = {"torch", "accelerate", "safetensors", "numpy", "tokenizers", "transformers", "peft"}
TRAINS |= {"optuna", "torch_pruning"}
RUNS_CODE = (
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
)
# Beside the one that starts it: where it is the name of a field, and of an option.
SPEAK_OF_SSH = ("edgekit.target", "edgekit.device_config", "edgekit.cli.devices_list")
BAD_WORDS = ("utils", "util", "helpers", "helper", "manager", "common", "misc")


def _module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "edgekit":
        parts.insert(0, "edgekit")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


FILES = {
    _module_name(path): path
    for folder in ("edgekit", *SHELVES)
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
every_module = pytest.mark.parametrize("module", FILES)


def _floor(module: str) -> int | None:
    if module == "edgekit":
        return 6  # the door of the house: names only, loaded when asked for
    return FLOORS.get(module.split(".")[1])


def _parents(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _imports(module: str) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether a function (or TYPE_CHECKING) keeps it from load time."""
    tree = TREES[module]
    parents = _parents(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            base = node.module or ""
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base
                for alias in node.names
            ]
        else:
            continue
        above: ast.AST = node
        late = False
        while above in parents:
            above = parents[above]
            late |= isinstance(above, ast.FunctionDef | ast.AsyncFunctionDef)
            late |= isinstance(above, ast.If) and "TYPE_CHECKING" in ast.unparse(above.test)
        yield from ((name, late) for name in names)


def _calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@every_module
def test_every_module_stands_on_a_floor(module: str) -> None:
    assert _floor(module) is not None, f"{module} has no floor: name it in FLOORS"


@every_module
def test_imports_go_down(module: str) -> None:
    own = _floor(module)
    for name, _ in _imports(module):
        if name == "edgekit":
            continue  # __version__
        if name.startswith("edgekit."):
            other = _floor(name)
            assert own is not None and other is not None and other <= own, f"{module} -> {name}"


@every_module
def test_shelves_meet_only_in_the_artifact(module: str) -> None:
    shelf = module.split(".")[1] if "." in module else ""
    if shelf not in SHELVES:
        return
    for name, _ in _imports(module):
        parts = name.split(".")
        if parts[0] == "edgekit" and len(parts) > 1 and parts[1] in SHELVES:
            assert parts[1] == shelf, f"{module} -> {name}"


def test_what_trains_is_loaded_by_name() -> None:
    """Networks are classes, so training imports torch: nobody else loads it by importing that."""
    heavy = {
        module
        for module in FILES
        if module.startswith("edgekit.training.")
        and any(name.partition(".")[0] in TRAINS and not late for name, late in _imports(module))
    }
    assert heavy
    while more := {
        module
        for module in FILES
        if module not in heavy and any(n in heavy and not late for n, late in _imports(module))
    }:
        heavy |= more
    assert all(module.startswith("edgekit.training.") for module in heavy)


def test_no_import_circle_at_load_time() -> None:
    edges = {
        module: [name for name, late in _imports(module) if not late and name in FILES]
        for module in FILES
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import circle: {' -> '.join((*path, module))}"
        if module not in done:
            for name in edges[module]:
                # The package edgekit itself imports nothing at load time (asserted below).
                if name != "edgekit":
                    visit(name, (*path, module))
            done.add(module)

    assert edges["edgekit"] == []
    for module in FILES:
        visit(module, ())


@every_module
def test_lower_floors_and_the_command_line_import_no_engine(module: str) -> None:
    floor = _floor(module)
    allowed = {"edgekit", "yaml", "click"} if floor == 5 else {"edgekit", "yaml"}
    for name, late in _imports(module):
        package = name.partition(".")[0]
        if package in allowed or package in sys.stdlib_module_names or floor == 3:
            continue
        if module.startswith("edgekit.training."):
            assert late or package in TRAINS, f"{module} imports {package} at load time"
        elif floor == 4:
            assert late, f"{module} imports {package} at load time"
        else:
            assert late and package in DOORS.get(module, set()), f"{module} imports {package}"


@every_module
def test_only_formats_parses_foreign_bytes(module: str) -> None:
    if module == "edgekit.runtimes.prompt_cache":
        return  # its files are edgekit's own, and it checks their keyed hash first
    if module in ("edgekit.peak_loops", "edgekit.runtimes.signal_flag"):
        return  # they map memory of their own, and read nothing
    if module == "edgekit.page_cache":
        return  # it asks which pages of a file are in memory, and reads none
    parsers = {name for name, _ in _imports(module)} & {"struct", "mmap"}
    assert not parsers or module.startswith("edgekit.formats."), f"{module} uses {parsers}"


@every_module
def test_onnx_runtime_is_kept_from_stdout(module: str) -> None:
    # Where a session fails, its Python side says so on stdout, and tries the same again.
    for name, call in _calls(module):
        if name.rpartition(".")[2] == "InferenceSession":
            assert "enable_fallback" in {each.arg for each in call.keywords}, call.lineno


@every_module
def test_only_fs_writes_final_paths(module: str) -> None:
    # The hub's downloads grow, and get their names, in a work folder that _fs then commits. The
    # agent writes on a board, where there is no _fs. What machine writes is a word to the kernel.
    if module in ("edgekit._fs", "edgekit.hub", "edgekit.board_agent", "edgekit.machine"):
        return
    moves = ("os.rename", "os.replace", "os.renames", "shutil.move", "os.link", "os.symlink")
    # Exporters write into the staged folder that they are given, and _fs commits that.
    staged = module.startswith("edgekit.exporters.") or module == "edgekit.exporter"
    for name, call in _calls(module):
        verb = name.rpartition(".")[2]
        assert name not in moves and verb != "rename", f"{module}:{call.lineno}: {name}"
        if not staged:
            assert verb not in ("write_text", "write_bytes"), f"{module}:{call.lineno}: {name}"
            assert not _opens_for_writing(name, call), f"{module}:{call.lineno}: {name}"


def _opens_for_writing(name: str, call: ast.Call) -> bool:
    if name.rpartition(".")[2] != "open" or name == "os.open":
        return False
    position = 1 if name in ("open", "io.open") else 0
    modes = [argument for argument in call.args[position : position + 1]]
    modes += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    return any(
        isinstance(mode, ast.Constant)
        and isinstance(mode.value, str)
        and set("wax+") & set(mode.value)
        for mode in modes
    )


@every_module
def test_nothing_runs_foreign_code(module: str) -> None:
    for name, _ in _imports(module):
        assert name.partition(".")[0] not in RUNS_CODE, f"{module} imports {name}"
        if name == "subprocess":
            homes = ("edgekit._proc", "edgekit.board_agent")
            assert module in homes, f"{module} imports subprocess"
    for name, call in _calls(module):
        where = f"{module}:{call.lineno}: {name}"
        assert name not in ("eval", "exec", "os.system", "os.popen", "torch.load"), where
        assert name != "yaml.load" or module == "edgekit._yaml", where
        for keyword in call.keywords:
            risky = keyword.arg in ("shell", "trust_remote_code", "allow_pickle")
            assert not (risky and ast.unparse(keyword.value) != "False"), where


@every_module
def test_only_target_starts_ssh(module: str) -> None:
    words = {node.value for node in ast.walk(TREES[module]) if isinstance(node, ast.Constant)}
    assert not words & {"ssh", "sftp", "scp"} or module in SPEAK_OF_SSH


def test_the_agent_that_is_sent_to_boards_needs_nothing_beside_it() -> None:
    packages = {name.partition(".")[0] for name, _ in _imports("edgekit.board_agent")}
    assert packages <= sys.stdlib_module_names | {"__future__"}
    ast.parse(FILES["edgekit.board_agent"].read_text(), feature_version=(3, 9))


@every_module
def test_a_file_tells_one_story(module: str) -> None:
    text = FILES[module].read_text()
    assert text.count("\n") <= 500, f"{module} is two stories: split it"
    assert ast.get_docstring(TREES[module]), f"{module} does not say what it knows"
    words = module.rpartition(".")[2].split("_")
    assert not set(words) & set(BAD_WORDS) and words[0] != "base", f"{module} is a name for nothing"


def test_tests_and_benchmarks_tell_one_story_a_file_too() -> None:
    for folder in ("tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.read_text().count("\n") <= 500, f"{path} is two stories: split it"


def test_public_names_are_honest() -> None:
    assert set(edgekit.__all__) == {"__version__", *edgekit._HOMES}
    stubs = {
        alias.asname
        for node in ast.walk(TREES["edgekit"])
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert stubs == set(edgekit._HOMES), "what type checkers see is what exists"


def test_a_public_name_is_never_a_submodule() -> None:
    """`edgekit.source` is a function, even after somebody imported the module of that name."""
    code = (
        "import importlib, types, edgekit\n"
        "for home in set(edgekit._HOMES.values()): importlib.import_module(home)\n"
        "values = {name: getattr(edgekit, name) for name in edgekit.__all__}\n"
        "print([name for name in values if isinstance(values[name], types.ModuleType)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "code",
    ["import edgekit", "import edgekit.cli as c; c.cli(['--help'], standalone_mode=False)"],
    ids=["import edgekit", "edgekit --help"],
)
def test_a_cold_start_loads_no_engine(code: str) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(); print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[-1]
    assert not set(LAZY) & set(loaded.split())
