"""What the models of the benchmarks cost, in numbers that need no clock, against those written down."""

from __future__ import annotations

import json
import platform

import pytest

from benchmarks import counts

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the counts are of x86 code")
WRITTEN = json.loads(counts.FILE.read_text())
# A drop of more than this has to be written down too, so that it is not lost again unseen.
SLACK = 0.98


def check(key: str, level: str) -> None:
    kind, _, name = key.partition("/")
    record = counts.inference_graph if kind == "infer" else counts.training_graph
    cases = counts.cases()[key]
    found = counts.counts(record(name), [case.batch for case in cases], level)
    for batch, row in found.items():
        wanted = WRITTEN[f"{kind} {name}@{batch} {level}"]
        worse = {f: (wanted[f], row[f]) for f in counts.FIELDS if row[f] > wanted[f]}
        better = {f: (wanted[f], row[f]) for f in counts.FIELDS if row[f] < wanted[f] * SLACK}
        assert not worse, f"{key} at batch {batch} costs more than written down: {worse}"
        assert not better, f"{key} at batch {batch} costs less: write it down (python -m benchmarks.counts --write)"


@pytest.mark.parametrize("key", list(counts.cases()))
def test_no_model_costs_more(key):
    check(key, "x86-64-v4")


@pytest.mark.long
@pytest.mark.parametrize("key", list(counts.cases()))
def test_no_model_costs_more_on_avx2(key):
    check(key, "x86-64-v3")


def test_every_case_is_written_down():
    names = {
        f"{c.name} {c.model}@{c.batch} {level}" for cs in counts.cases().values() for c in cs for level in counts.LEVELS
    }
    assert set(WRITTEN) == names
