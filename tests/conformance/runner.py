"""Runs test files of Keras or KerasHub in pytest processes, a dozen each, and keeps what every test gave, file by file.

A process that ends before its files are done (a crash, native code that hangs) is followed by another one, for the
tests that are left. Files whose results are complete are not run again: an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / ".bench"
# Times the limit of a test: the silence, in seconds, after which a process counts as hanging. It ends itself at 5.
SILENCE = 5.5
# Files that one process runs: starting one takes as long as the tests of several files.
SHARE = 12


@dataclass(frozen=True)
class Project:
    """Whose tests run.

    environment: the one of `benchmarks.environments` with what they import. timeout: processor seconds of a test.
    """

    package: str
    environment: str
    flags: tuple[str, ...] = ()
    timeout: int = 180

    @property
    def results(self) -> Path:
        return BENCH / f"{self.environment}-results"


PROJECTS = {
    project.package: project
    # KerasHub's "large" tests save each model and load it again; those that download are "extra_large". Steps of `fit`
    # run op by op there, too, of models with up to a hundred million weights.
    for project in (Project("keras", "conformance"), Project("keras_hub", "keras-hub", ("--run_large",), 600))
}


def below_source(test: str) -> str:
    """A test's file or id below the package's folder `src`."""
    return test.split("/", 2)[2]


@dataclass
class FileResult:
    """What the tests of a file gave: test id -> (outcome, reason), and test id -> seconds of the processor."""

    file: str
    tests: dict[str, tuple[str, str]] = field(default_factory=dict)
    processor_seconds: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    done: bool = False

    @classmethod
    def load(cls, file: str, path: Path) -> FileResult:
        result = cls(file)
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            record = json.loads(line)
            if "done" in record:
                result.done, result.seconds = True, record["seconds"]
            else:
                result.tests[record["test"]] = (record["outcome"], record["reason"])
                if "seconds" in record:
                    result.processor_seconds[record["test"]] = record["seconds"]
        return result


class Suite:
    """A project's tests on one backend, with an interpreter that has what they import.

    source: the folder that holds the project's package; by default the site-packages of the interpreter.
    results: a folder for what each test gives; by default the project's below `.bench`.
    given: a suite on another backend; what passed there is not run here, its outcome is "given".
    """

    def __init__(
        self,
        backend: str,
        python: Path,
        results: Path | None = None,
        flags: tuple[str, ...] = (),
        given: Suite | None = None,
        project: Project = PROJECTS["keras"],
        source: Path | None = None,
    ):
        self.backend, self.python, self.given, self.project = backend, python, given, project
        self.flags = (*project.flags, *flags)
        self.folder = (results or project.results) / (backend if given is None else f"{backend}-beside-{given.backend}")
        self.folder.mkdir(parents=True, exist_ok=True)
        if source is None:
            where = f"import importlib.util as u; print(u.find_spec('{project.package}').submodule_search_locations[0])"
            found = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
            source = Path(found.stdout.strip()).parent
        self.source = source.resolve()

    def files(self, folders: Iterable[str] = ()) -> list[str]:
        """Test files relative to `source`; `folders` or files are given below the package's folder `src`."""
        source = self.source / self.project.package / "src"
        wanted = [source / name for name in folders] or [source]
        paths = [p for w in wanted for p in ([w] if w.suffix == ".py" else sorted(w.rglob("*_test.py")))]
        return list(dict.fromkeys(str(p.relative_to(self.source)) for p in paths))

    def path_of(self, file: str) -> Path:
        return self.folder / (below_source(file).removesuffix(".py").replace("/", ".") + ".jsonl")

    def result(self, file: str) -> FileResult:
        return FileResult.load(file, self.path_of(file))

    def run(
        self, files: list[str], processes: int = 2, again: bool = False, report: Callable = lambda result: None
    ) -> list[FileResult]:
        """Run the files that have no complete results (all of them with `again`); gives all results in order."""
        if again:
            for file in files:
                self.path_of(file).unlink(missing_ok=True)
        pending = [f for f in files if not self.result(f).done]
        shares = [pending[i : i + SHARE] for i in range(0, len(pending), SHARE)]

        def run_share(share: list[str]) -> None:
            self._run_share(share)
            for file in share:
                report(self.result(file))

        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(run_share, shares))
        return [self.result(file) for file in files]

    def _run_share(self, files: list[str]) -> None:
        """Processes until all files are done; a test in which a process dies counts as crashed."""
        while files:
            known = self._known(files)
            code = self._process(files)
            left = [file for file in files if not self.result(file).done]
            if self._known(files) == known or code in (0, 1, 2, 5):
                # Files without tests, or whose collection failed, have said so; a process that gets nowhere has not.
                for file in left:
                    if code not in (0, 1, 2, 5):
                        self._append(file, test=file, outcome="crashed", reason=f"pytest ended with {code}")
                    self._append(file, done=True, seconds=0.0)
                return
            files = left

    def _known(self, files: list[str]) -> int:
        return sum(len(self.result(file).tests) for file in files)

    def _append(self, file: str, **record) -> None:
        with self.path_of(file).open("a") as out:
            out.write(json.dumps(record) + "\n")

    def _process(self, files: list[str]) -> int:
        first = self.path_of(files[0])
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "KERAS_", "VIRTUAL_ENV"))},
            "KERAS_BACKEND": self.backend,
            "KERAS_HOME": str(self.folder / "keras-home"),
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(self.source))),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "CUDA_VISIBLE_DEVICES": "",
            "JAX_PLATFORMS": "cpu",
            "CONFORMANCE_PACKAGE": self.project.package,
            "CONFORMANCE_RESULTS": str(self.folder),
            "CONFORMANCE_TIMEOUT": str(self.project.timeout),
            **({} if self.given is None else {"CONFORMANCE_GIVEN": str(self.given.folder)}),
        }
        settings = [
            "-c",
            os.devnull,
            "--rootdir",
            str(self.source),
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
        ]
        quiet = ["-q", "--disable-warnings", "--tb=short", "-p", "tests.conformance.plugin"]
        command = ["nice", "-n", "10", self.python, "-m", "pytest", *settings, *quiet, *self.flags, *files]
        with first.with_suffix(".log").open("a") as log:
            process = subprocess.Popen(command, cwd=self.source, env=environment, stdout=log, stderr=log)
            last_sign, seen = time.monotonic(), -1
            while True:
                try:
                    return process.wait(timeout=2)
                except subprocess.TimeoutExpired:
                    size = sum(path.stat().st_size for file in files if (path := self.path_of(file)).exists())
                    if size != seen:
                        last_sign, seen = time.monotonic(), size
                    elif time.monotonic() - last_sign > SILENCE * self.project.timeout:
                        process.kill()
