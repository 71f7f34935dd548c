"""Decoding of connectionist temporal classification by beam search, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kgraph.ir import NotDifferentiable, Primitive, Sample, TensorType, bind, register
from kgraph.ops.common import require_size, uniform
from kgraph.ops.rules import dtype_error, require_float, shape_error

__all__ = ["ctc_beam_search"]


def _infer(log_probabilities, lengths, *, blank, beam_width, top_paths):
    types = (log_probabilities, lengths)
    require_float("ctc_beam_search", log_probabilities)
    if lengths.dtype != "int32":
        raise dtype_error("ctc_beam_search", types, "int32 lengths")
    if log_probabilities.rank != 3 or lengths.rank != 1:
        raise shape_error("ctc_beam_search", types, "log_probabilities[B, T, C] and lengths[B]")
    batch, steps, _ = log_probabilities.shape
    require_size("ctc_beam_search", types, "the number of lengths", lengths.shape[0], batch)
    return TensorType((top_paths, batch, steps), "int32"), log_probabilities.with_shape((batch, top_paths))


def _reference(log_probabilities, lengths, *, blank, beam_width, top_paths):
    batch, steps, _ = log_probabilities.shape
    paths = np.full((top_paths, batch, steps), -1, "int32")
    scores = np.full((batch, top_paths), -np.inf, log_probabilities.dtype)
    for row in range(batch):
        # The first step counts even for a length of 0.
        used = log_probabilities[row, : max(int(lengths[row]), 1)]
        for rank, (path, score) in enumerate(_search(used, beam_width, blank)[:top_paths]):
            paths[rank, row, : len(path)] = path
            scores[row, rank] = score
    return paths, scores


def _search(log_probabilities: np.ndarray, beam_width: int, blank: int) -> list[tuple[tuple, float]]:
    """Prefix beam search over [T, C]; gives (labels, log-probability), best first.

    A beam is a prefix of labels with the log-probabilities of its alignments that end in a blank and in its last label.
    """
    beams: dict[tuple, Sequence[float]] = {(): (0.0, -np.inf)}
    for row in log_probabilities.astype("float64"):
        extended: dict[tuple, list[float]] = {}
        for prefix, (in_blank, in_label) in beams.items():
            total = np.logaddexp(in_blank, in_label)
            stay = extended.setdefault(prefix, [-np.inf, -np.inf])
            stay[0] = np.logaddexp(stay[0], total + row[blank])
            if prefix:
                stay[1] = np.logaddexp(stay[1], in_label + row[prefix[-1]])
            for label in range(len(row)):
                if label == blank:
                    continue
                grown = extended.setdefault((*prefix, label), [-np.inf, -np.inf])
                # The same label again needs a blank between.
                source = in_blank if prefix and label == prefix[-1] else total
                grown[1] = np.logaddexp(grown[1], source + row[label])
        ranked = sorted(extended.items(), key=lambda item: (-np.logaddexp(item[1][0], item[1][1]), item[0]))
        beams = dict(ranked[:beam_width])
    out = [(prefix, float(np.logaddexp(score[0], score[1]))) for prefix, score in beams.items()]
    return sorted(out, key=lambda item: (-item[1], item[0]))


def _samples():
    scores = np.log(uniform((3, 5, 4), 0.1, 1))
    lengths = np.array([5, 3, 0], "int32")
    attrs = {"blank": 0, "beam_width": 8, "top_paths": 2}
    return [
        Sample((scores, lengths), attrs, "three lengths"),
        Sample((scores, lengths), {**attrs, "blank": 3, "beam_width": 1, "top_paths": 1}, "one beam"),
        Sample((scores[:0], lengths[:0]), attrs, "empty batch"),
    ]


CTC_BEAM_SEARCH = register(
    Primitive(
        name="ctc_beam_search",
        infer=_infer,
        reference=_reference,
        gradient=NotDifferentiable("the labels are a discrete choice"),
        traits=frozenset({"host"}),
        samples=_samples,
        tolerance=1e-5,
        results=2,
    )
)


def ctc_beam_search(log_probabilities, lengths, *, blank: int, beam_width: int, top_paths: int) -> tuple:
    """The most likely label sequences for log_probabilities[B, T, C] of which `lengths` [B] (int32) steps count.

    blank: the class that separates labels. beam_width: label prefixes that are kept at each step.
    Gives paths [top_paths, B, T] int32, best first, with -1 after their end, and scores [B, top_paths], the logarithm
    of the summed probability of the alignments found (-inf for paths that there are not).
    """
    attrs = {"blank": blank, "beam_width": beam_width, "top_paths": top_paths}
    return bind(CTC_BEAM_SEARCH, log_probabilities, lengths, **attrs)
