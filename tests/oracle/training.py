"""Training against Keras on JAX: `python -m tests.oracle.training [run, model, optimizer, optimizers, objectives ...]`.

Every model of `training_models` with every optimizer of `training_runs`, 50 steps each from the same weights and data;
then the cases of `optimizer_runs` and of `objective_runs`. Prints a line per run, and the worst run of each optimizer;
fails if one falls short of the criterion of `judge`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import keras
import numpy as np

from tests.oracle import comparison, objective_runs, optimizer_runs, training_runs
from tests.oracle.training_models import ROWS

# How often JAX's own rounding error kgraph's may be, and what counts as rounding where JAX happens to be closer.
FACTOR = 4
FLOOR = 1e-6
# A run in which the criterion would allow more shows nothing. Only bfloat16 comes near it.
MOST_ALLOWED = 0.06
# Metrics that count rows: one row more or less is all that rounding can do.
COUNTING = ("accuracy", "top_2", "auc")
ONE_ROW = 1.01 / ROWS


@dataclass
class Finding:
    """The deviation of one curve or of the final weights, and that of JAX; both relative to the float64 reference."""

    what: str
    error: float
    jax_error: float
    allowed: float

    @property
    def excess(self) -> float:
        """The deviation in units of what is allowed."""
        return self.error / self.allowed


def judge(name: str, ours: Mapping, wide: Mapping, narrow: Mapping) -> list[Finding]:
    """Findings about a run: one per curve (loss, metrics) and the worst variable of the weights.

    ours, narrow, wide: the results of kgraph, of JAX in float32 and in float64.

    A curve in float32 deviates from the one in float64 by rounding that training amplifies. How much is measured by
    JAX's own deviation: ours may be FACTOR times that, in the norm over all steps, and FLOOR in any case. A metric that
    counts rows may differ by one row more in each step. Every variable's final value is compared by the same rule in
    units of its own movement; where JAX is lucky with one variable, its mean deviation over all variables counts.
    """
    if set(ours) != set(wide) or set(wide) != set(narrow):
        raise AssertionError(f"{name}: kgraph gives {sorted(ours)}, JAX {sorted(wide)}")
    findings = [*_curves(ours, wide, narrow), _weights(name.split("-")[-1], ours, wide, narrow)]
    loosest = max((f for f in findings if not f.what.endswith(COUNTING)), key=lambda f: f.allowed)
    if loosest.allowed > MOST_ALLOWED:
        raise AssertionError(f"{name}: JAX's own deviation is too large to compare with: {loosest}")
    return findings


def _curves(ours, wide, narrow) -> list[Finding]:
    findings = []
    for key in (k for k in wide if k.startswith("log.")):
        reference, jax, own = wide[key], narrow[key], ours[key]
        if not np.isfinite(reference).all() or (key == "log.loss" and reference[-1] >= reference[0]):
            raise AssertionError(f"the reference of {key} is not finite or does not fall; it shows nothing")
        if key.endswith(COUNTING):
            error, jax_error = (float(np.max(np.abs(v - reference))) for v in (own, jax))
            findings.append(Finding(key, error, jax_error, ONE_ROW + jax_error))
            continue
        error, jax_error = (float(np.linalg.norm(v - reference) / np.linalg.norm(reference)) for v in (own, jax))
        findings.append(Finding(key, error, jax_error, max(FACTOR * jax_error, FLOOR)))
    return findings


def _weights(optimizer: str, ours, wide, narrow) -> Finding:
    keys = [k for k in wide if k.startswith("weight.")]
    references = {k: wide[k].astype("float64") for k in keys}
    away = lambda side, key: float(np.linalg.norm(side[key].astype("float64") - references[key]))
    count = sum(references[k].size for k in keys)
    jax_mean = np.sqrt(sum(away(narrow, k) ** 2 for k in keys) / count)
    worst = Finding("weights", 0.0, 0.0, 1.0)
    for key in keys:
        start = wide[key.replace("weight", "initial")]
        moved = float(np.linalg.norm(references[key] - start))
        if not moved:
            raise AssertionError(f"{key} does not move in the reference; it shows nothing")
        size = references[key].size
        jax_error = max(away(narrow, key), jax_mean * np.sqrt(size))
        floor = FLOOR * float(np.linalg.norm(references[key]))
        if optimizer == "lion":
            floor += np.sqrt(2) * training_runs.LION_STEP
        own = away(ours, key)
        found = Finding(f"weights ({key})", own / moved, jax_error / moved, max(FACTOR * jax_error, floor) / moved)
        worst = max(worst, found, key=lambda f: f.excess)
    return worst


def judge_values(ours: Mapping, wide: Mapping, narrow: Mapping) -> list[Finding]:
    """One finding per array of a short run (weights, slots, logs): its error in the norm, relative to the reference."""
    if set(ours) != set(wide) or set(wide) != set(narrow):
        raise AssertionError(f"kgraph gives {sorted(ours)}, JAX {sorted(wide)}")
    findings = []
    for key, reference in wide.items():
        scale = float(np.linalg.norm(reference.astype("float64"))) or 1.0
        error, jax_error = (
            float(np.linalg.norm(side[key].astype("float64") - reference)) / scale for side in (ours, narrow)
        )
        findings.append(Finding(key, error, jax_error, max(FACTOR * jax_error, FLOOR)))
    return findings


def references(stored_names: Iterable[str]) -> dict[str, tuple]:
    """(results in float64, in float32) of JAX by stored name; computes what is missing."""
    stored_names = list(stored_names)
    comparison.ensure_outputs(stored_names)
    load = lambda name, precision: dict(np.load(comparison.FOLDER / f"{name}.{precision}.npz"))
    return {name: (load(name, "float64"), load(name, "float32")) for name in stored_names}


def _judge_curves(names: list[str]) -> int:
    """Prints a line per run and the worst of each optimizer; gives the number of failures."""
    by_jax, worst, failed = references(map(training_runs.stored_name, names)), {}, 0
    for name in names:
        keras.backend.clear_session()
        start = time.perf_counter()
        try:
            findings = judge(name, training_runs.run(name), *by_jax[training_runs.stored_name(name)])
        except Exception as error:
            print(f"{name:28s} FAILED {type(error).__name__}: {error}", flush=True)
            failed += 1
            continue
        seconds = time.perf_counter() - start
        bad = max(findings, key=lambda f: f.excess)
        failed += bad.excess > 1
        loss, weights = next(f for f in findings if f.what == "log.loss"), findings[-1]
        for what, finding in (("loss", loss), ("weights", weights)):
            key = name.split("-")[1], what
            worst[key] = max(worst.get(key, (0.0, 0.0, "")), (finding.error, finding.jax_error, name))
        print(
            f"{name:28s} loss {loss.error:.1e} (JAX {loss.jax_error:.1e}), movement of weights {weights.error:.1e} "
            f"(JAX {weights.jax_error:.1e}), {bad.excess:4.2f} of the allowed, {seconds:.1f} s "
            f"{f'FAILED {bad}' if bad.excess > 1 else 'ok'}",
            flush=True,
        )
    for (optimizer, what), (error, jax_error, name) in sorted(worst.items()):
        print(f"worst of {optimizer:8s} {what:8s} {error:.1e} (JAX {jax_error:.1e}) {name}")
    print(f"{len(names) - failed} of {len(names)} runs of {training_runs.STEPS} steps follow Keras on JAX")
    return failed


def _judge_values(what: str, runs) -> int:
    """The same for the cases of a module of short runs."""
    by_jax, failed = references(map(runs.stored_name, runs.CASES)), 0
    for case in runs.CASES:
        keras.backend.clear_session()
        try:
            bad = max(judge_values(runs.run(case), *by_jax[runs.stored_name(case)]), key=lambda f: f.excess)
        except Exception as error:
            print(f"{case:60s} FAILED {type(error).__name__}: {error}", flush=True)
            failed += 1
            continue
        failed += bad.excess > 1
        verdict = "FAILED" if bad.excess > 1 else "ok"
        print(f"{case:60s} {bad.what}: {bad.error:.1e} (JAX {bad.jax_error:.1e}) {verdict}", flush=True)
    print(f"{len(runs.CASES) - failed} of {len(runs.CASES)} {what} follow Keras on JAX")
    return failed


def main() -> int:
    wanted = sys.argv[1:]
    known = {"optimizers", "objectives", *training_runs.RUNS, *(w for n in training_runs.RUNS for w in n.split("-"))}
    unknown = [w for w in wanted if w not in known]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; runs, models, optimizers and sets: {', '.join(sorted(known))}")
        return 2
    names = [n for n in training_runs.RUNS if not wanted or n in wanted or set(n.split("-")) & set(wanted)]
    failed = _judge_curves(names) if names else 0
    for what, runs in (("optimizers", optimizer_runs), ("objectives", objective_runs)):
        if not wanted or what in wanted:
            failed += _judge_values(what, runs)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
