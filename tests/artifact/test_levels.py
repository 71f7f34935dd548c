"""Which stored code a machine runs."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import platform
import sys
from dataclasses import replace

import pytest

from kgraph.codegen.target import host_target, make_target
from kgraph.errors import ArtifactError
from kgraph.runtime import artifact_level
from kgraph.runtime.artifact_level import Requirement, host, requirement

X86_LINUX = pytest.mark.skipif(
    platform.machine() != "x86_64" or not sys.platform.startswith("linux"), reason="not x86-64 under Linux"
)


def features(target) -> list[str]:
    return [f[1:] for f in target.features.split(",") if f.startswith("+")]


@X86_LINUX
def test_a_machine_takes_the_best_level_that_it_runs(saved, monkeypatch):
    _, _, path = saved("dense")
    here = host()
    v4, v3 = (requirement(features(make_target(name, foreign=True))).flags for name in ("x86-64-v4", "x86-64-v3"))
    for flags, level in ((v4, "x86-64-v4"), (v3, "x86-64-v3"), (v3 | {"avx512f"}, "x86-64-v3")):
        if flags <= here.flags:
            monkeypatch.setattr(artifact_level, "host", lambda flags=flags: replace(here, flags=frozenset(flags)))
            assert kgraph.load(path).level == level
    monkeypatch.setattr(artifact_level, "host", lambda: replace(here, flags=v3 - {"avx2"}))
    with pytest.raises(ArtifactError, match=r"x86-64-v3 needs avx2$"):
        kgraph.load(path, level="x86-64-v3")
    monkeypatch.setattr(artifact_level, "host", lambda: replace(here, machine="aarch64"))
    with pytest.raises(ArtifactError, match="x86-64-v3 needs x86_64 on linux"):
        kgraph.load(path, level="x86-64-v3")


@X86_LINUX
def test_levels_hold_what_they_are_named_for():
    host_target()  # makes LLVM ready
    v2, v3, v4 = (requirement(features(make_target(f"x86-64-v{n}", foreign=True))) for n in (2, 3, 4))
    assert v2.flags < v3.flags < v4.flags
    assert {"avx2", "fma", "bmi1", "abm"} <= v3.flags
    assert {"avx512f", "avx512vl"} <= v4.flags
    assert not v4.model
    assert not requirement(features(host_target())).missing()


def test_a_feature_that_cannot_be_looked_up_asks_for_the_same_processor(monkeypatch):
    here = Requirement("linux", "x86_64", frozenset({"sse2", "avx"}), "Maker 1 2")
    monkeypatch.setattr(artifact_level, "host", lambda: here)
    assert requirement(["avx", "sse2", "xsave"]) == replace(here, model="")
    needs = requirement(["avx", "novelty"])
    assert needs == Requirement("linux", "x86_64", frozenset({"avx"}), "Maker 1 2")
    monkeypatch.setattr(artifact_level, "host", lambda: replace(here, model="Maker 1 3"))
    assert needs.missing() == ["the processor Maker 1 2"]


def test_descriptions_of_processors(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(
        "processor : 0\nvendor_id : V\ncpu family : 6\nmodel : 7\nflags : a b\n\nprocessor : 1\nflags : c\n"
    )
    assert host(str(path)) == Requirement(sys.platform, platform.machine(), frozenset("ab"), "V 6 7")
    path = tmp_path / "arm"
    path.write_text("processor\t: 0\nFeatures\t: fp asimd\n\n")
    assert host(str(path)).flags == {"fp", "asimd"}
    nothing = host(str(tmp_path / "none"))
    assert nothing.flags == frozenset()
    assert nothing.model


@pytest.mark.parametrize("wrong", [None, [], {}, {"system": 1}])
def test_json(wrong):
    needs = Requirement("linux", "x86_64", frozenset({"avx"}), "")
    data = needs.to_json()
    assert Requirement.from_json(data) == needs
    bad = wrong if not isinstance(wrong, dict) or not wrong else data | wrong
    with pytest.raises(ValueError, match="not stated"):
        Requirement.from_json(bad)
    with pytest.raises(ValueError, match="not stated"):
        Requirement.from_json(data | {"flags": "avx"})
