"""The command line: `kgraph compile|inspect|export|run|explain|bench`."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kgraph.ir import Dim
from kgraph.ir.dims import evaluate

application = typer.Typer(no_args_is_help=True, add_completion=False, help="Compile Keras models to native kernels.")

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="a .keras file, a saved .kgraph file, `module:function` giving a model, or the name of a "
        "keras.applications model"
    ),
]
BatchOption = Annotated[int, typer.Option("--batch", help="rows per call")]


def load_model(source: str):
    """The model that a command names: a `.keras` file, `module:function`, or an architecture of keras.applications."""
    import keras

    import kgraph  # noqa: F401  (installs the backend before Keras is imported)

    if source.endswith(".keras"):
        if not Path(source).exists():
            raise typer.BadParameter(f"no such file: {source}")
        return keras.saving.load_model(source, compile=False)
    if ":" in source:
        module, _, name = source.partition(":")
        sys.path.insert(0, ".")
        try:
            found = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name not in (module, module.partition(".")[0]):
                raise  # the module is there, one that it imports is not
            raise typer.BadParameter(f"there is no module {module!r} on the path or in this folder") from None
        except AttributeError:
            if name in vars(sys.modules.get(module, object)):
                raise
            raise typer.BadParameter(f"module {module!r} has no {name!r}") from None
        model = found() if callable(found) and not isinstance(found, keras.Layer) else found
        if not isinstance(model, keras.Layer):
            raise typer.BadParameter(f"{source} gives {model!r}, which is no Keras model")
        return model
    builder = getattr(keras.applications, source, None)
    if not callable(builder):
        raise typer.BadParameter(f"{source!r} is no .keras file, no module:function and no keras.applications model")
    return builder(weights=None)


def compile_or_load(source: str):
    """The model that a command names, compiled, or loaded from a `.kgraph` file; and the Keras model, or None."""
    import kgraph

    if source.endswith(".kgraph"):
        if not Path(source).exists():
            raise typer.BadParameter(f"no such file: {source}")
        return kgraph.load(source), None
    model = load_model(source)
    return kgraph.compile(model), model


def random_inputs(compiled, batch: int, size: int, seed: int = 0) -> list[np.ndarray]:
    """Arrays for the inputs of one call: floats in [0, 1), small integers for integer inputs; free axes get `size`."""
    rng = np.random.default_rng(seed)

    def one(type_):
        sizes = {
            symbol: batch if symbol == "N" else size
            for d in type_.shape
            if isinstance(d, Dim)
            for symbol in d.symbols()
        }
        shape = [evaluate(d, sizes) for d in type_.shape]
        if type_.dtype == "bool":
            return rng.random(shape) < 0.5
        if type_.is_float:
            return rng.random(shape).astype(type_.np_dtype)
        return rng.integers(0, 10, shape).astype(type_.np_dtype)

    return [one(type_) for type_ in compiled.inputs.types]


def flatten(value) -> list:
    """The arrays in nested tuples, lists and dicts, in the order that Keras flattens them."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in flatten(value[key])]
    return [leaf for item in value for leaf in flatten(item)] if isinstance(value, (tuple, list)) else [value]


def read_inputs(path: Path, names: list[str]) -> list[np.ndarray]:
    """The arrays of an .npy file, or of an .npz file by the names of the inputs (else in its order)."""
    try:
        data = np.load(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} is no .npy or .npz file: {error}") from None
    if isinstance(data, np.ndarray):
        return [data]
    return [data[name] for name in (names if set(names) == set(data.files) else data.files)]


@application.command("compile")
def compile_command(
    model: ModelArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="a .kgraph file to save it to")] = None,
    level: Annotated[
        list[str] | None,
        typer.Option(help="kind of machine to save code for (repeatable): native, x86-64-v4, x86-64-v3, x86-64-v2"),
    ] = None,
    graph: Annotated[bool, typer.Option(help="save the graph too, to compile it again on other machines")] = True,
) -> None:
    """Compile a model (fills the kernel cache), print what it became, and save it if asked to."""
    import kgraph

    start = time.perf_counter()
    compiled = kgraph.compile(load_model(model))
    stats = compiled.stats()
    typer.echo(
        f"{compiled.name}: compiled in {stats['compile_seconds']:.2f} s ({time.perf_counter() - start:.2f} s in all)"
    )
    for key in ("native_steps", "host_steps", "kernels", "code_bytes", "kernel_cache"):
        typer.echo(f"  {key}: {stats.get(key)}")
    if output is not None:
        start = time.perf_counter()
        size = compiled.save(output, levels=level or None, rebuildable=graph)
        typer.echo(f"saved {output}: {size:,} bytes in {time.perf_counter() - start:.2f} s")


@application.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a saved .kgraph file")],
    check: Annotated[bool, typer.Option(help="compare all checksums")] = True,
) -> None:
    """Show what is in a saved model; nothing in it is executed."""
    from kgraph.runtime.artifact_inspect import describe

    typer.echo(describe(path, check=check))


@application.command("export")
def export_command(
    model: ModelArgument,
    path: Annotated[Path, typer.Argument(help="the directory of the C library; the .onnx file, or its directory")],
    form: Annotated[str, typer.Option("--format", help="c (header, shared and static library) or onnx")] = "c",
    as_c: Annotated[bool, typer.Option("--c", help="the same as --format c")] = False,
    as_onnx: Annotated[bool, typer.Option("--onnx", help="the same as --format onnx")] = False,
    name: Annotated[str | None, typer.Option(help="c: what functions and files are called")] = None,
    machine: Annotated[str | None, typer.Option(help="c: x86_64 (default) or aarch64")] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="c: instruction set (repeatable): x86-64-v4, x86-64-v3, x86-64-v2")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="c: inside of the library (default), in a file, or as state of the caller")
    ] = None,
    optimised: Annotated[bool, typer.Option(help="onnx: with normalisations folded, or as captured")] = True,
) -> None:
    """Write a model for programs without kgraph: as a C library, or as an ONNX file."""
    import kgraph

    given = {"name": name, "machine": machine, "levels": level or None, "weights": weights}
    options = {key: value for key, value in given.items() if value is not None}
    if as_c and as_onnx:
        raise typer.BadParameter("--c and --onnx: expected one of them")
    form = "c" if as_c else "onnx" if as_onnx else form
    if form not in ("c", "onnx"):
        raise typer.BadParameter(f"--format {form}: expected c or onnx")
    if form == "onnx" and options:
        raise typer.BadParameter(f"--format onnx takes no {', '.join(options)}")
    if model.endswith(".kgraph"):
        raise typer.BadParameter(f"{model} is compiled already; export takes the Keras model")
    compiled = kgraph.compile(load_model(model))
    try:
        if form == "c":
            files = compiled.export(path, **options)
            written = [files.header, files.shared, files.static, files.source, files.weights]
        else:
            if path.suffix != ".onnx":
                path.mkdir(parents=True, exist_ok=True)
                path = path / f"{compiled.name}.onnx"
            compiled.export(path, format="onnx", optimised=optimised)
            written = [path]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for file in written:
        if file is not None:
            typer.echo(f"wrote {file}: {file.stat().st_size:,} bytes")


@application.command("run")
def run_command(
    model: ModelArgument,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", exists=True, help="an .npy or .npz file; random inputs by default")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="an .npz file for the results")] = None,
    batch: BatchOption = 1,
    size: Annotated[int, typer.Option(help="value of free axes of random inputs")] = 32,
    check: Annotated[bool, typer.Option(help="compare with Keras' own result")] = True,
) -> None:
    """Compile a model, or load it, call it once, show the results against Keras' own and the time."""
    compiled, original = compile_or_load(model)
    leaves = random_inputs(compiled, batch, size) if inputs is None else read_inputs(inputs, compiled.inputs.names)
    if len(leaves) != compiled.inputs.num_leaves:
        raise typer.BadParameter(f"{inputs} holds {len(leaves)} arrays, the model's inputs are {compiled.inputs.names}")
    arguments, keywords = compiled.inputs.pack_call(leaves)
    result = compiled(*arguments, **keywords)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        compiled(*arguments, **keywords)
        times.append(time.perf_counter() - start)
    leaves = flatten(result)
    for leaf in leaves:
        typer.echo(f"output {leaf.dtype}{list(leaf.shape)}: min {leaf.min():.6g}, max {leaf.max():.6g}")
    typer.echo(f"median time of a call: {sorted(times)[len(times) // 2] * 1e3:.3f} ms")
    if check and original is not None:
        start = time.perf_counter()
        expected = flatten(original(*arguments, **keywords))
        seconds = time.perf_counter() - start
        for got, want in zip(leaves, expected):
            difference = np.abs(np.asarray(got, "float64") - np.asarray(want, "float64")).max() if got.size else 0.0
            typer.echo(f"largest difference from Keras run op by op on NumPy ({seconds:.2f} s): {difference:.3g}")
    if output is not None:
        np.savez(output, *leaves)


@application.command("explain")
def explain_command(
    model: ModelArgument,
    profile: Annotated[bool, typer.Option(help="measure the time of each kernel too")] = False,
    batch: BatchOption = 1,
    size: Annotated[int, typer.Option(help="value of free axes of random inputs")] = 32,
) -> None:
    """Show the kernels of a model, what was fused and what was not."""
    compiled, _ = compile_or_load(model)
    typer.echo(str(compiled.explain()))
    if profile:
        arguments, keywords = compiled.inputs.pack_call(random_inputs(compiled, batch, size))
        typer.echo(str(compiled.profile(*arguments, **keywords)))


@application.command("bench")
def bench_command(
    model: ModelArgument,
    batch: BatchOption = 1,
    size: Annotated[int, typer.Option(help="value of free axes of random inputs")] = 32,
    seconds: Annotated[float, typer.Option(help="how long to measure")] = 3.0,
) -> None:
    """Time calls of a compiled model."""
    compiled, _ = compile_or_load(model)
    stats = compiled.stats()
    prepared = stats["compile_seconds"] if "compile_seconds" in stats else sum(stats["seconds"].values())
    start = time.perf_counter()
    arguments, keywords = compiled.inputs.pack_call(random_inputs(compiled, batch, size))
    compiled(*arguments, **keywords)
    typer.echo(f"compile and first call: {prepared + time.perf_counter() - start:.2f} s")
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times) < 5:
        start = time.perf_counter()
        compiled(*arguments, **keywords)
        times.append(time.perf_counter() - start)
    times.sort()
    typer.echo(
        f"{len(times)} calls of {batch} rows: median {times[len(times) // 2] * 1e3:.4f} ms, "
        f"best {times[0] * 1e3:.4f} ms, p90 {times[int(len(times) * 0.9)] * 1e3:.4f} ms"
    )


def main() -> None:
    """Entry point of the `kgraph` command."""
    from kgraph.errors import KGraphError
    from kgraph.frontend.install import install

    install()  # whatever backend the environment names: these commands are about kgraph
    try:
        application()
    except KGraphError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
