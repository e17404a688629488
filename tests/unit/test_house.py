"""The house: floors, registry rows, the program's boundary, and that nothing heavy loads before it must."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hypersd_bench
from hypersd_bench import registry
from hypersd_bench.catalog.spec import ModelSpec
from hypersd_bench.cli.main import main
from hypersd_bench.contracts import MetricInfo, Verb
from hypersd_bench.errors import CheckFailed, HypersdBenchError, InputError, first_line
from hypersd_bench.prompts import PromptSource

ROOT = Path(hypersd_bench.__file__).resolve().parents[1]
HEAVY = ("torch", "numpy", "diffusers", "transformers", "gradio", "pandas", "scipy", "PIL", "sqlalchemy")
NO_TORCH = ("hypersd_bench.store", "metrics.stats", "metrics.preference", "metrics.comparison")


def python(
    *arguments: str, cwd: Path = ROOT, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def loaded_after(code: str) -> set[str]:
    done = python("-c", f"{code}\nimport sys\nsys.stderr.write('LOADED ' + ' '.join(sys.modules))")
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.rpartition("LOADED ")[2].split()}


# floors


def test_floors_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_package_that_is_imported_is_declared_and_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    extras = [need for needs in project["optional-dependencies"].values() for need in needs]
    declared = {canonicalize_name(Requirement(need).name) for need in [*project["dependencies"], *extras]}
    owners = packages_distributions()
    ours = {"hypersd_bench", "metrics", "distill", "user_study", "reports"}
    for package in sorted(ours):
        for file in sorted((ROOT / package).rglob("*.py")):
            for name in _imported(file) - ours - set(sys.stdlib_module_names):
                of = {canonicalize_name(owner) for owner in owners.get(name, [])}
                assert not of or of & declared, f"{file} imports {name}, of {of}"
    for need in project["dependencies"]:
        assert re.search(rf'"{re.escape(need)}", # \S', text), f"{need}: say in pyproject.toml why it is there"


def _imported(file: Path) -> set[str]:
    """The top packages that a file names in its imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list", "methods"], ["list", "--help"]])
def test_cheap_answers_load_nothing_heavy(arguments: list[str]) -> None:
    loaded = loaded_after(f"from hypersd_bench.cli.main import main\nassert main({arguments!r}) == 0")
    assert "click" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_study_reports_store_and_statistics_load_no_torch() -> None:
    code = f"""
from importlib import import_module
from pkgutil import walk_packages
names = list({NO_TORCH!r})
for package in ("user_study", "reports"):
    names += [m.name for m in walk_packages(import_module(package).__path__, package + ".")]
for name in names:
    import_module(name)
"""
    loaded = loaded_after(code)
    assert {"user_study", "reports", "metrics"} <= loaded
    assert loaded.isdisjoint({"torch", "diffusers", "transformers"})


# registry rows: a new one is tested without being named here


@pytest.mark.parametrize("name", registry.rows("verb"))
def test_verb_rows(name: str) -> None:
    command = registry.resolve("verb", name)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.help
    for leaf in leaves(command):
        options = {flag for parameter in leaf.params for flag in parameter.opts}
        assert "--json" in options, f"{leaf.name} can't print JSON"
        silent = [p.opts[0] for p in leaf.params if isinstance(p, click.Option) and not p.help]
        assert not silent, f"{leaf.name}: no help for {', '.join(silent)}"


def leaves(command: click.Command) -> Iterator[click.Command]:
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from leaves(child)
    else:
        yield command


@pytest.mark.parametrize("name", registry.rows("metric"))
def test_metric_rows(name: str) -> None:
    factory = registry.resolve("metric", name)
    assert isinstance(factory.info, MetricInfo)
    assert factory.info.id == name
    assert callable(factory)


@pytest.mark.parametrize("name", registry.rows("method"))
def test_method_rows(name: str) -> None:
    assert callable(registry.resolve("method", name))


@pytest.mark.parametrize("name", registry.rows("family"))
def test_family_rows(name: str) -> None:
    models = registry.resolve("family", name)()
    assert models
    assert all(isinstance(model, ModelSpec) for model in models)
    assert len({(model.base, model.name) for model in models}) == len(models)


@pytest.mark.parametrize("name", registry.rows("prompts"))
def test_prompt_rows(name: str) -> None:
    source = registry.resolve("prompts", name)
    assert isinstance(source, PromptSource)
    assert source.id == name
    assert source.count > 0
    assert source.license
    assert source.files or len(source.load().prompts) == source.count


@pytest.mark.parametrize("kind", ["models", "methods", "metrics", "prompts"])
def test_list_says_the_same_twice(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind]) == 0
    table = capsys.readouterr().out
    assert main(["list", kind, "--json"]) == 0
    items = json.loads(capsys.readouterr().out)
    assert len(items) == len(table.splitlines()) - 1  # the heading
    assert all(item["name"] in table for item in items)


# the boundary: one line, the right exit code


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Add a verb ``toy`` whose body is the given statement."""

    def add(body: str) -> None:
        imports = "import errno, click, hypersd_bench.errors as e"
        source = f"{imports}\n@click.command()\ndef toy():\n    {body}\n"
        (tmp_path / "toy_verb.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "toy_verb", raising=False)
        monkeypatch.setitem(registry.rows("verb"), "toy", Verb("toy_verb:toy", "A toy."))

    return add


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("return None", 0, ""),
        ("raise e.InputError('spec.yaml: no such\\nmodel')", 2, "error: spec.yaml: no such model\n"),
        ("raise e.CheckFailed('too blurred')", 1, "error: too blurred\n"),
        ("raise KeyboardInterrupt", 130, "interrupted; run the same command again to go on\n"),
        ("raise click.UsageError('no')", 2, "error: no (see hypersd-bench toy --help)\n"),
        ("raise OSError(errno.ENOSPC, 'No space left on device')", 2, "the disk is full"),
        ("raise RuntimeError('I/O error: No space left on device (os error 28)')", 2, "the disk is full"),
        ("raise MemoryError", 2, "out of memory (MemoryError); end what else uses the device"),
        ("raise type('OutOfMemoryError', (RuntimeError,), {})('full.\\nmore')", 2, "out of memory (full); end"),
        ("raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling')", 2, "a device with more memory"),
        ("raise RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED')", 2, "--batch-size"),
        ("1 / 0", 70, "error: ZeroDivisionError: division by zero (this is a bug; set HYPERSD_BENCH_DEBUG=1"),
        ("import no_such_package", 2, "error: the package 'no_such_package' is not installed"),
        ("import metrics.no_such_module", 70, "this is a bug"),
    ],
)
def test_every_end_is_one_line_and_a_code(
    body: str, code: int, message: str, toy: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    toy(body)
    assert main(["toy"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.strip().count("\n") == 0
    assert "Traceback" not in err


def test_debug_shows_the_traceback(
    toy: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HYPERSD_BENCH_DEBUG", "1")
    toy("1 / 0")
    assert main(["toy"]) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dmeo"], "error: unknown verb 'dmeo'; did you mean 'demo'?\n"),
        (["--vresion"], "No such option"),
        (["list", "modles"], "'modles'"),
        (["list", "models", "--jsno"], "--json"),
    ],
)
def test_wrong_words_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "distill" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to another process")
def test_a_real_interrupt_exits_130(tmp_path: Path) -> None:
    (tmp_path / "toy_verb.py").write_text(
        "import click, time\n@click.command()\ndef toy():\n    click.echo('started')\n    time.sleep(60)\n"
    )
    code = (
        "import signal, sys; from hypersd_bench import registry; from hypersd_bench.contracts import Verb\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job is born ignoring it
        "registry.rows('verb')['toy'] = Verb('toy_verb:toy', '')\n"
        "from hypersd_bench.cli.main import main; sys.exit(main(['toy']))"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "interrupted; run the same command again to go on"


@pytest.mark.skipif(os.name == "nt", reason="pipes differ")
def test_a_closed_pipe_is_silent() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "hypersd_bench", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# packages of our names elsewhere


@pytest.mark.parametrize("name", ["metrics/__init__.py", "reports.py", "user_study.py", "distill/__init__.py"])
def test_a_shadowing_package_is_named_with_the_way_out(name: str, tmp_path: Path) -> None:
    shadow = tmp_path / name
    shadow.parent.mkdir(exist_ok=True)
    shadow.write_text("raise SystemExit('imported')")
    done = python("-m", "hypersd_bench", "list", "metrics", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path.resolve() / name.partition("/")[0]) in done.stderr
    assert "start from another folder" in done.stderr


def test_the_installed_command_is_immune_to_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "metrics.py").write_text("raise SystemExit('imported')")
    command = Path(sys.executable).with_name("hypersd-bench")
    if not command.exists():
        pytest.skip("the command is not installed here")
    done = subprocess.run([command, "list", "methods"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("said", "line"), [(" one.\ntwo", "one"), ("one", "one"), (" \n", "ValueError")])
def test_an_errors_first_line(said: str, line: str) -> None:
    assert first_line(ValueError(said)) == line


def test_exit_codes_belong_to_errors() -> None:
    assert (HypersdBenchError.exit_code, InputError.exit_code, CheckFailed.exit_code) == (2, 2, 1)
