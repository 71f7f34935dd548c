"""The command line: `kgraph compile|run|explain|bench`."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

application = typer.Typer(no_args_is_help=True, add_completion=False, help="Compile Keras models to native kernels.")

ModelArgument = Annotated[
    str,
    typer.Argument(help="a .keras file, `module:function` giving a model, or the name of a keras.applications model"),
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
        found = getattr(importlib.import_module(module), name)
        return found() if callable(found) and not isinstance(found, keras.Model) else found
    builder = getattr(keras.applications, source, None)
    if not callable(builder):
        raise typer.BadParameter(f"{source!r} is no .keras file, no module:function and no keras.applications model")
    return builder(weights=None)


def random_inputs(model, batch: int, size: int, seed: int = 0):
    """Arrays for one call: floats in [0, 1), small integers for integer inputs; free axes get `size`."""
    import keras

    rng = np.random.default_rng(seed)

    def one(tensor):
        shape = [batch if axis == 0 else (size if d is None else d) for axis, d in enumerate(tensor.shape)]
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if "int" in dtype:
            return rng.integers(0, 10, shape).astype(dtype)
        if dtype == "bool":
            return rng.random(shape) < 0.5
        return rng.random(shape).astype(dtype)

    return keras.tree.map_structure(one, model.inputs[0] if len(model.inputs) == 1 else model.inputs)


@application.command("compile")
def compile_command(model: ModelArgument) -> None:
    """Compile a model (fills the kernel cache) and print what it became."""
    import kgraph

    start = time.perf_counter()
    compiled = kgraph.compile(load_model(model))
    stats = compiled.stats()
    typer.echo(
        f"{compiled.name}: compiled in {stats['compile_seconds']:.2f} s ({time.perf_counter() - start:.2f} s in all)"
    )
    for key in ("native_steps", "host_steps", "kernels", "code_bytes", "kernel_cache"):
        typer.echo(f"  {key}: {stats.get(key)}")


@application.command("run")
def run_command(
    model: ModelArgument,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", help="an .npy or .npz file; random inputs by default")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="an .npz file for the results")] = None,
    batch: BatchOption = 1,
    size: Annotated[int, typer.Option(help="value of free axes of random inputs")] = 32,
    check: Annotated[bool, typer.Option(help="compare with Keras' own result")] = True,
) -> None:
    """Compile a model, call it once, show the results against Keras' own and the time."""
    import keras

    import kgraph

    loaded = load_model(model)
    compiled = kgraph.compile(loaded)
    if inputs is None:
        x = random_inputs(loaded, batch, size)
    else:
        data = np.load(inputs)
        x = data if isinstance(data, np.ndarray) else [data[k] for k in data.files]
        x = x[0] if isinstance(x, list) and len(x) == 1 else x
    result = compiled(x)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        compiled(x)
        times.append(time.perf_counter() - start)
    leaves = keras.tree.flatten(result)
    for leaf in leaves:
        typer.echo(f"output {leaf.dtype}{list(leaf.shape)}: min {leaf.min():.6g}, max {leaf.max():.6g}")
    typer.echo(f"median time of a call: {sorted(times)[len(times) // 2] * 1e3:.3f} ms")
    if check:
        start = time.perf_counter()
        expected = keras.tree.flatten(loaded(x, training=False))
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
    import kgraph

    loaded = load_model(model)
    compiled = kgraph.compile(loaded)
    typer.echo(str(compiled.explain()))
    if profile:
        typer.echo(str(compiled.profile(random_inputs(loaded, batch, size))))


@application.command("bench")
def bench_command(
    model: ModelArgument,
    batch: BatchOption = 1,
    size: Annotated[int, typer.Option(help="value of free axes of random inputs")] = 32,
    seconds: Annotated[float, typer.Option(help="how long to measure")] = 3.0,
) -> None:
    """Time calls of a compiled model."""
    import kgraph

    loaded = load_model(model)
    start = time.perf_counter()
    compiled = kgraph.compile(loaded)
    x = random_inputs(loaded, batch, size)
    compiled(x)
    typer.echo(f"compile and first call: {time.perf_counter() - start:.2f} s")
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times) < 5:
        start = time.perf_counter()
        compiled(x)
        times.append(time.perf_counter() - start)
    times.sort()
    typer.echo(
        f"{len(times)} calls of {batch} rows: median {times[len(times) // 2] * 1e3:.4f} ms, "
        f"best {times[0] * 1e3:.4f} ms, p90 {times[int(len(times) * 0.9)] * 1e3:.4f} ms"
    )


def main() -> None:
    """Entry point of the `kgraph` command."""
    from kgraph.errors import KGraphError

    try:
        application()
    except KGraphError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
