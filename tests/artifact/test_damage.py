"""Damaged, truncated, hostile and newer files are refused, and nothing in them is executed."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import contextlib
import hashlib
import json
import math
import struct
from unittest import mock

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kgraph.errors import ArtifactError, KGraphError
from kgraph.runtime import artifact_file
from kgraph.runtime.artifact_file import ArtifactFile, write_file
from kgraph.runtime.artifact_inspect import describe
from tests.artifact.test_save_load import Loops

FUZZ = settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Content(bytes):
    """The bytes of a file, which messages do not print."""

    def __repr__(self):
        return f"<{len(self)} bytes>"


@pytest.fixture(scope="session")
def small(saved, tmp_path_factory):
    """The content of a small saved model, all of which is used when it is loaded."""
    compiled, _, _ = saved("dense")
    path = tmp_path_factory.mktemp("damage") / "m.kgraph"
    compiled.save(path, levels="native", rebuildable=False)
    return Content(path.read_bytes())


def load_bytes(tmp_path, data: bytes, **options):
    path = tmp_path / "damaged.kgraph"
    path.unlink(missing_ok=True)  # an earlier one may still be mapped
    path.write_bytes(data)
    return kgraph.load(path, **options)


def contents(data: bytes, tmp_path) -> dict[str, bytes]:
    """The sections of a good file."""
    path = tmp_path / "good.kgraph"
    path.write_bytes(data)
    file = ArtifactFile(path)
    return {name: file.read(name) for name in file.sections}


def rewritten(tmp_path, sections: dict[str, bytes]):
    """A file with these sections and right checksums."""
    path = tmp_path / "rewritten.kgraph"
    write_file(path, [(name, [content]) for name, content in sections.items()])
    return path


# -- damage ----------------------------------------------------------------------------------------------------------
@FUZZ
@given(data=st.data())
def test_every_bit_counts(small, tmp_path, data):
    place = data.draw(st.integers(0, len(small) - 1) | st.integers(0, 2000))
    damaged = bytearray(small)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ArtifactError, match=r"damaged\.kgraph: "):
        load_bytes(tmp_path, bytes(damaged))


def test_every_bit_of_every_section_counts(small, tmp_path):
    (tmp_path / "good.kgraph").write_bytes(small)
    for section in ArtifactFile(tmp_path / "good.kgraph").sections.values():
        damaged = bytearray(small)
        damaged[section.offset + section.length // 2] ^= 4
        message = f"the section '{section.name}' is damaged: the checksum differs"
        with pytest.raises(ArtifactError, match=message):
            load_bytes(tmp_path, bytes(damaged))
        with pytest.raises(ArtifactError, match=message):
            describe(tmp_path / "damaged.kgraph")
        if section.name.startswith("weights/"):
            assert load_bytes(tmp_path, bytes(damaged), check_weights=False, self_test=False)


def test_damaged_code_is_never_mapped(small, tmp_path):
    """Neither the code nor anything else of a file is made executable before its checksum and the header's hold."""
    (tmp_path / "good.kgraph").write_bytes(small)
    sections = ArtifactFile(tmp_path / "good.kgraph").sections
    places = [40, 70, sections["code/0/native"].offset + 100, sections["manifest"].offset, len(small)]
    with mock.patch("kgraph.runtime.loader._map", side_effect=AssertionError("mapped")):
        for place in places:
            damaged = bytearray(small + b"\0")
            damaged[place] ^= 255
            with pytest.raises(ArtifactError):
                load_bytes(tmp_path, bytes(damaged[: max(len(small), place + 1)]))


@FUZZ
@given(data=st.data())
def test_truncated(small, tmp_path, data):
    length = data.draw(st.integers(0, len(small) - 1) | st.integers(0, 200))
    with pytest.raises(ArtifactError, match="truncated"):
        load_bytes(tmp_path, small[:length])


def test_other_files(small, tmp_path):
    with pytest.raises(ArtifactError, match="no model saved by kgraph"):
        load_bytes(tmp_path, b"PK\3\4" + bytes(500))
    newer = bytearray(small)
    newer[8] = 9
    with pytest.raises(ArtifactError, match=r"its format is 9, .* reads 1; a newer kgraph wrote it: upgrade kgraph"):
        load_bytes(tmp_path, bytes(newer))
    with pytest.raises(ArtifactError, match="it is truncated or damaged"):
        load_bytes(tmp_path, small + b"more")
    with pytest.raises(FileNotFoundError):
        kgraph.load(tmp_path / "none.kgraph")
    with pytest.raises(OSError, match="directory"):
        kgraph.load(tmp_path)


# -- hostile headers -------------------------------------------------------------------------------------------------
def signed(head: bytes, table: bytes, rest: bytes) -> bytes:
    return head + hashlib.sha256(head + table).digest() + table + rest


@FUZZ
@given(data=st.data())
def test_section_tables(small, tmp_path, data):
    """Offsets, lengths, counts, sizes and names that are wrong, under a checksum that is right."""
    magic, version, count, size, zero = artifact_file.HEADER.unpack_from(small)
    end = 64 + count * artifact_file.ENTRY.size
    entries = [list(e) for e in artifact_file.ENTRY.iter_unpack(small[64:end])]
    number = st.sampled_from([0, 1, 63, 64, 4095, 4096, 4097, len(small), 2**31, 2**32, 2**63, 2**64 - 1])
    change = data.draw(st.sampled_from(["count", "size", "zero", "name", "offset", "length", "swap"]))
    entry = entries[data.draw(st.integers(0, count - 1))]
    if change == "count":
        count = data.draw(st.integers(0, 2**32 - 1).filter(lambda n: n != count))
    elif change == "size":
        size = data.draw(number.filter(lambda n: n != size))
    elif change == "zero":
        zero = data.draw(number.filter(bool))
    elif change == "name":
        names = [b"", b"../../etc/passwd", b"/etc/passwd", b"\xff\xfe", b"a\0b", entries[0][0], b"\n", b"x" * 48]
        new = data.draw(st.sampled_from(names)).ljust(48, b"\0")
        if new == entry[0]:
            return
        entry[0] = new
    elif change == "swap":
        entries[1], entries[2] = entries[2], entries[1]
    else:
        index = 1 if change == "offset" else 2
        entry[index] = data.draw(number.filter(lambda n: n != entry[index]))
    table = b"".join(artifact_file.ENTRY.pack(*e) for e in entries)
    head = artifact_file.HEADER.pack(magic, version, count, size, zero)
    with pytest.raises(ArtifactError, match=r"damaged\.kgraph: "):
        load_bytes(tmp_path, signed(head, table, small[end:]))


# -- hostile content under right checksums ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        b"[" * 300_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"kind": ' + b"9" * 10_000 + b"}",
        b'{"kind": NaN}',
        b'{"kind": "model", "kind": "model"}',
        b"\xff\xfe\xfd",
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
    ],
    ids=range(11),
)
def test_json_bombs(small, tmp_path, text):
    for section in ("manifest", "plan/0/native"):
        path = rewritten(tmp_path, contents(small, tmp_path) | {section: text})
        with pytest.raises(ArtifactError):
            kgraph.load(path)


def places(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


def replaced(value, path, new):
    """A JSON value with the one at `path` replaced."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


NUMBERS = st.sampled_from([-1, 0, 1, 2, 7, 2**31, 2**53, 2**62, -(2**62), 2**64, 10**30, 1.5, True])
TEXTS = st.sampled_from("x N ../x weights/0 float64 bool bfloat16 input param constant dim temporary".split())
SIZES = st.sampled_from(
    [[[1, ["N"]]], [[-5, ["N"]]], [[2**61, ["N", "N"]]], [[1, ["M"]]], [[1, [[3, 4]]]], [[1, [[0, 0]]]]]
)
ODD = NUMBERS | TEXTS | SIZES | st.sampled_from([None, "", [], {}, [[]], [0], [-1]])


@FUZZ
@given(data=st.data())
def test_plans(small, tmp_path, data):
    """A plan with any one value replaced is refused, or runs with every operand inside of its memory."""
    sections = contents(small, tmp_path)
    section = data.draw(st.sampled_from(["manifest", "plan/0/native"]))
    value = json.loads(sections[section])
    path = data.draw(st.sampled_from(list(places(value))))
    sections[section] = json.dumps(replaced(value, path, data.draw(ODD))).encode()
    try:
        loaded = kgraph.load(rewritten(tmp_path, sections), self_test=False)
    except ArtifactError:
        return
    for form in loaded._forms.values():
        program = form.program
        for n in (0, 1, 5):
            try:
                binding = program.bind({"N": n, "M": 2})
            except (KGraphError, ValueError, KeyError, OverflowError, MemoryError):
                continue
            assert_within(program, binding)
    with contextlib.suppress(KGraphError, ValueError, KeyError, OverflowError, MemoryError):
        loaded(np.ones((3, 12), "float32"))


def test_a_plan_with_too_few_outputs_is_refused(small, tmp_path):
    sections = contents(small, tmp_path)
    plan = json.loads(sections["plan/0/native"])
    sections["plan/0/native"] = json.dumps({**plan, "outputs": []}).encode()
    with pytest.raises(ArtifactError, match="outputs"):
        kgraph.load(rewritten(tmp_path, sections), self_test=False)


def assert_within(program, binding):
    """Every operand of every step lies in the memory that it is said to lie in."""
    storage = binding.storage
    assert storage.arena_bytes >= 0
    shapes = [storage.shapes[b] for b in program.inputs], [storage.shapes[b] for b in program.outputs]
    for b, place in enumerate(storage.places):
        whole = {
            "arena": lambda _: storage.arena_bytes,
            "input": lambda i: math.prod(shapes[0][i]) * program.dtypes[program.inputs[i]].itemsize,
            "output": lambda i: math.prod(shapes[1][i]) * program.dtypes[program.outputs[i]].itemsize,
            "param": lambda i: program.values[i].nbytes,
            "constant": lambda i: binding.constants[i].nbytes,
        }[place.space](place.index)
        assert place.offset >= 0
        assert place.offset + storage.nbytes[b] <= max(whole, 0) or storage.nbytes[b] == 0
    slots = len(binding.table.slots)
    words = binding.table.words
    assert len(binding.table.patches) == 3 * binding.table.num_patches
    for record, step in enumerate(s for s in program.steps):
        assert len(step.operands) <= slots or binding.table.records[record] < 0
    assert len(words) * 8 == binding.table.num_records * 128
    for slot, external, _ in zip(*[iter(binding.table.patches)] * 3, strict=True):
        assert 0 <= slot < slots * 8
        assert 0 <= external < 8 * (len(program.inputs) + len(program.outputs))


@pytest.fixture(scope="session")
def looping(tmp_path_factory):
    """The content of a saved model with loops and branches."""
    x = keras.Input((None, 5))
    path = tmp_path_factory.mktemp("looping") / "m.kgraph"
    kgraph.compile(keras.Model(x, Loops()(x))).save(path, levels="native", rebuildable=False)
    return Content(path.read_bytes())


@FUZZ
@given(data=st.data())
def test_control(looping, tmp_path, data):
    """Loops with any one value replaced are refused, or run: nothing is read or written outside of the arrays."""
    sections = contents(looping, tmp_path)
    plan = json.loads(sections["plan/0/native"])
    paths = [path for path in places(plan) if _is_control(plan, path)]
    new = replaced(plan, data.draw(st.sampled_from(paths)), data.draw(ODD))
    sections["plan/0/native"] = json.dumps(new).encode()
    with contextlib.suppress(KGraphError, ValueError, TypeError, LookupError, OverflowError, MemoryError):
        kgraph.load(rewritten(tmp_path, sections), self_test=False)(np.ones((3, 4, 5), "float32"))


def loop_body(plan) -> tuple:
    """The path of the plan's first body of a while loop that overwrites carries."""
    return next(
        path
        for path in places(plan)
        if path[:1] == ("steps",) and path[2:] == (4, 2) and plan["steps"][path[1]][4][0] == "while"
    )


def test_bodies_overwrite_only_what_is_their_own(looping, tmp_path):
    """The operands of a loop may be arrays of the caller, or mapped out of the file."""
    sections = contents(looping, tmp_path)
    plan = json.loads(sections["plan/0/native"])
    path = loop_body(plan)
    first, again = (body[0] for body in plan["steps"][path[1]][4][1:3])
    assert again["donations"] == [[0, 0], [1, 1]]
    x = np.ones((3, 4, 5), "float32")
    wanted = kgraph.load(rewritten(tmp_path, sections))(x)
    counted_by_python = replaced(plan, (*path, 5), "")
    sections["plan/0/native"] = json.dumps(counted_by_python).encode()
    for got, one in zip(kgraph.load(rewritten(tmp_path, sections))(x), wanted, strict=True):
        np.testing.assert_array_equal(got, one)
    first = {**first, "donations": [[1, 0]]}
    for place, new in [((*path, 1, 0), ["output", 1]), ((*path, 1, 1), ["input", 1]), ((*path[:-1], 1, 0), first)]:
        sections["plan/0/native"] = json.dumps(replaced(plan, place, new)).encode()
        with pytest.raises(ArtifactError, match=r"overwrite operands|donated|another number of values"):
            kgraph.load(rewritten(tmp_path, sections), self_test=False)


def _is_control(plan, path) -> bool:
    """Whether a path leads into the function of a step that is no plan of its own, or its part that is."""
    if len(path) < 4 or path[0] != "steps" or path[2] != 4 or type(plan["steps"][path[1]][4]) is not list:
        return False
    value, inside = plan["steps"][path[1]][4], path[3:]
    for key in inside[:-1]:
        value = value[key]
        if isinstance(value, dict):
            return False
    return True


@FUZZ
@given(data=st.data())
def test_tensors(small, tmp_path, data):
    """Headers of tensors with any one value replaced: refused, or every tensor lies inside of its section."""
    sections = contents(small, tmp_path)
    section = data.draw(st.sampled_from([name for name in sections if name.startswith(("weights/", "code/", "test/"))]))
    (length,) = struct.unpack_from("<Q", sections[section])
    header = json.loads(sections[section][8 : 8 + length])
    path = data.draw(st.sampled_from(list(places(header))))
    text = json.dumps(replaced(header, path, data.draw(ODD | st.just("U8") | st.just([3, 5])))).encode()
    wrong = data.draw(st.sampled_from([0, 0, 0, 1, -1, 2**40, 2**63]))
    sections[section] = struct.pack("<Q", (len(text) + wrong) % 2**64) + text + sections[section][8 + length :]
    try:
        loaded = kgraph.load(rewritten(tmp_path, sections), self_test=False)
    except ArtifactError:
        return
    assert_within(loaded._forms[()].program, loaded._forms[()].program.bind({"N": 2}))


def test_self_test_sees_another_result(small, tmp_path):
    sections = contents(small, tmp_path)
    content = bytearray(sections["test/0/native"])
    content[-1] ^= 1
    path = rewritten(tmp_path, sections | {"test/0/native": bytes(content)})
    with pytest.raises(ArtifactError, match="its self-test failed: output 0 is not what it was"):
        kgraph.load(path)
    assert kgraph.load(path, self_test=False)


def test_a_kernel_for_other_operands(small, tmp_path):
    """A launch that the code was not made for is refused, though its buffers exist and fit."""
    sections = contents(small, tmp_path)
    plan = json.loads(sections["plan/0/native"])
    step = plan["steps"][0]
    extent = next(i for i in range(5, len(step)) if step[i] != step[4])
    assert step[extent]
    for index, new in ((0, step[0][::-1]), (extent, 10**9)):
        changed = replaced(plan, ("steps", 0, index), new)
        path = rewritten(tmp_path, sections | {"plan/0/native": json.dumps(changed).encode()})
        with pytest.raises(ArtifactError, match="was not made for these operands and sizes"):
            kgraph.load(path)
