"""Symbolic sizes: integer polynomials over named sizes, with floor division as an atom.

A shape is a tuple of `int | Dim`. A `Dim` behaves like an int in arithmetic; what cannot be decided without the
run-time size (ordering, conversion to int) raises `DimDecisionError`, and the capture then specialises.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction

from kgraph.errors import DimDecisionError

# A sorted tuple of atoms (with repetition); an atom is a name or ("floordiv", numerator Dim, int).
Monomial = tuple


def _atom_key(atom) -> str:
    return atom if isinstance(atom, str) else f"~{atom[0]}({atom[1]},{atom[2]})"


class Dim:
    """A symbolic non-negative size such as `N`, `2*N+1` or `(L+1)//2`.

    Equality and hashing are structural on the canonical form, so `N + N == 2 * N`. Sizes with different canonical
    forms compare unequal (as in `N == 1`), which is the generic answer; where there is none for an int, as in
    `N % 2 == 0`, the comparison raises DimDecisionError.
    """

    __slots__ = ("_hash", "terms")
    __array_ufunc__ = None  # NumPy scalars leave arithmetic with a Dim to the Dim

    def __init__(self, terms: Mapping[Monomial, int]):
        self.terms: tuple[tuple[Monomial, int], ...] = tuple(
            sorted(((m, c) for m, c in terms.items() if c), key=lambda t: (-len(t[0]), [_atom_key(a) for a in t[0]]))
        )
        self._hash = hash(self.terms)

    @staticmethod
    def symbol(name: str) -> Dim:
        """The free size called `name`."""
        return Dim({(name,): 1})

    # -- construction -----------------------------------------------------------------------------------------
    @staticmethod
    def _terms(x) -> dict[Monomial, int]:
        if isinstance(x, Dim):
            return dict(x.terms)
        x = int(x)
        return {(): x} if x else {}

    @staticmethod
    def _make(terms: dict[Monomial, int]) -> Dim | int:
        terms = {m: c for m, c in terms.items() if c}
        if not terms:
            return 0
        if len(terms) == 1 and () in terms:
            return terms[()]
        return Dim(terms)

    def __add__(self, other):
        if not _is_size(other):
            return NotImplemented
        out = Dim._terms(self)
        for m, c in Dim._terms(other).items():
            out[m] = out.get(m, 0) + c
        return Dim._make(out)

    __radd__ = __add__

    def __neg__(self):
        return Dim._make({m: -c for m, c in self.terms})

    def __pos__(self):
        return self

    def __sub__(self, other):
        return self + (-other) if _is_size(other) else NotImplemented

    def __rsub__(self, other):
        return (-self) + other if _is_size(other) else NotImplemented

    def __mul__(self, other):
        if not _is_size(other):
            return NotImplemented
        out: dict[Monomial, int] = {}
        for m1, c1 in self.terms:
            for m2, c2 in Dim._terms(other).items():
                m = tuple(sorted(m1 + m2, key=_atom_key))
                out[m] = out.get(m, 0) + c1 * c2
        return Dim._make(out)

    __rmul__ = __mul__

    def __floordiv__(self, other):
        if not _is_size(other):
            return NotImplemented
        if isinstance(other, Dim):
            quotient = _exact_quotient(self, other)
            if quotient is None:
                raise DimDecisionError(f"{self} // {other}: the divisor is symbolic and does not divide exactly")
            return quotient
        other = int(other)
        if other == 0:
            raise ZeroDivisionError(f"{self} // 0")
        if other < 0:
            return (-self) // (-other)
        if other == 1:
            return self
        # Whole multiples leave the division: what stays has coefficients in [0, other), which makes the form canonical.
        whole = Dim._make({m: c // other for m, c in self.terms})
        rest = {m: c % other for m, c in self.terms if c % other}
        constant = rest.pop((), 0)
        if not rest:
            return whole
        if len(rest) == 1:
            ((monomial, coefficient),) = rest.items()
            if coefficient == 1 and len(monomial) == 1 and not isinstance(monomial[0], str):
                # (a // b + k) // c == (a + k * b) // (b * c)
                _, numerator, divisor = monomial[0]
                return whole + (numerator + constant * divisor) // (divisor * other)
        # (g * a + k) // (g * b) == (a + k // g) // b
        common = math.gcd(other, *rest.values())
        numerator = Dim._make({m: c // common for m, c in rest.items()}) + constant // common
        if other == common:
            return whole + numerator
        return whole + Dim({(("floordiv", numerator, other // common),): 1})

    def __rfloordiv__(self, other):
        if not _is_size(other):
            return NotImplemented
        quotient = _exact_quotient(other, self)
        if quotient is None:
            raise DimDecisionError(f"{other} // {self}: the divisor is symbolic")
        return quotient

    def __mod__(self, other):
        return self - (self // other) * other

    def __rmod__(self, other):
        return other - (other // self) * self

    def __divmod__(self, other):
        return self // other, self % other

    def __pow__(self, exponent):
        if not isinstance(exponent, int) or exponent < 0:
            raise DimDecisionError(f"({self}) ** {exponent} is not a symbolic size")
        out = 1
        for _ in range(exponent):
            out = self * out
        return out

    def __truediv__(self, other):
        raise DimDecisionError(f"({self}) / ({other}): true division needs the run-time size")

    def __rtruediv__(self, other):
        raise DimDecisionError(f"({other}) / ({self}): true division needs the run-time size")

    # -- questions --------------------------------------------------------------------------------------------
    def evaluate(self, sizes: Mapping[str, int]) -> int:
        """The size for concrete values of every symbol. Raises KeyError for a missing symbol."""
        total = 0
        for monomial, coefficient in self.terms:
            product = coefficient
            for atom in monomial:
                product *= sizes[atom] if isinstance(atom, str) else evaluate(atom[1], sizes) // atom[2]
            total += product
        return total

    def substitute(self, sizes: Mapping[str, int | Dim]) -> int | Dim:
        """The size with some symbols replaced."""
        total: int | Dim = 0
        for monomial, coefficient in self.terms:
            product: int | Dim = coefficient
            for atom in monomial:
                if isinstance(atom, str):
                    factor = sizes.get(atom, Dim.symbol(atom))
                else:
                    factor = substitute(atom[1], sizes) // atom[2]
                product = factor * product
            total = product + total
        return total

    def symbols(self) -> frozenset[str]:
        """Names of the free sizes that this size depends on."""
        out: set[str] = set()
        for monomial, _ in self.terms:
            for atom in monomial:
                out |= {atom} if isinstance(atom, str) else atom[1].symbols()
        return frozenset(out)

    def lower_bound(self) -> int | None:
        """A bound that holds when every symbol is at least 1, or None."""
        bounds = [b for b in (_shifted_bound(_relaxed(self)), _direct_bound(self)) if b is not None]
        return max(bounds, default=None)

    def upper_bound(self) -> int | None:
        """The same from above."""
        low = (-self).lower_bound()
        return None if low is None else -low

    def _at_least(self, other) -> bool | None:
        """Whether `self >= other` for all sizes of at least 1; None where that is not known."""
        difference = self - other
        if isinstance(difference, int):
            return difference >= 0
        if (low := difference.lower_bound()) is not None and low >= 0:
            return True
        if (high := difference.upper_bound()) is not None and high < 0:
            return False
        return None

    def _decide(self, answer, symbol: str, other) -> bool:
        if answer is None:
            raise DimDecisionError(f"`{self} {symbol} {other}` depends on the run-time size")
        return answer

    def __ge__(self, other):
        return self._decide(self._at_least(other), ">=", other)

    def __lt__(self, other):
        answer = self._at_least(other)
        return self._decide(None if answer is None else not answer, "<", other)

    def __gt__(self, other):
        answer = self._at_least(other + 1)
        return self._decide(answer, ">", other)

    def __le__(self, other):
        answer = self._at_least(other + 1)
        return self._decide(None if answer is None else not answer, "<=", other)

    def __eq__(self, other):
        if isinstance(other, Dim):
            return self._hash == other._hash and self.terms == other.terms
        if not _is_size(other):
            return NotImplemented
        if self._divides() and (low := self.lower_bound()) is not None and (high := self.upper_bound()) is not None:
            # A remainder takes few values and equals each of them for many sizes: "unequal" would be a wrong guess.
            if low <= other <= high:
                raise DimDecisionError(f"`{self} == {other}` depends on the run-time size")
        return False

    def _divides(self) -> bool:
        """Whether a floor division stands in the size."""
        return any(not isinstance(atom, str) for monomial, _ in self.terms for atom in monomial)

    def __ne__(self, other):
        answer = self.__eq__(other)
        return answer if answer is NotImplemented else not answer

    def __hash__(self):
        return self._hash

    def __bool__(self):
        positive = (low := self.lower_bound()) is not None and low > 0
        negative = (high := self.upper_bound()) is not None and high < 0
        return self._decide(True if positive or negative else None, "!=", 0)

    def __index__(self):
        raise DimDecisionError(f"the size {self} is symbolic and has no integer value at capture time")

    __int__ = __index__

    def __float__(self):
        raise DimDecisionError(f"the size {self} is symbolic and has no float value at capture time")

    def __str__(self):
        parts = []
        for monomial, coefficient in self.terms:
            atoms = [a if isinstance(a, str) else _division_text(a) for a in monomial]
            if not atoms:
                text = str(coefficient)
            elif coefficient == 1:
                text = "*".join(atoms)
            elif coefficient == -1:
                text = "-" + "*".join(atoms)
            else:
                text = "*".join([str(coefficient), *atoms])
            parts.append(text if not parts or text.startswith("-") else "+" + text)
        return "".join(parts)

    __repr__ = __str__

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return Dim, (dict(self.terms),)  # string hashes differ between processes: the cached one must not travel


def _is_size(x) -> bool:
    return isinstance(x, Dim) or (hasattr(x, "__index__") and not isinstance(x, bool) and getattr(x, "ndim", 0) == 0)


def _division_text(atom: tuple) -> str:
    numerator = atom[1]
    single = numerator.terms[0][1] == 1 and len(numerator.terms) == len(numerator.terms[0][0]) == 1
    return f"({numerator}//{atom[2]})" if single else f"(({numerator})//{atom[2]})"


def _exact_quotient(numerator, denominator: Dim):
    """numerator / denominator where that is an integer polynomial, else None: long division by the leading terms."""
    lead, lead_coefficient = denominator.terms[0]
    quotient: int | Dim = 0
    while isinstance(numerator, Dim):
        monomial, coefficient = numerator.terms[0]
        rest = Counter(monomial)  # a hash table: it compares atoms only where they are equal
        rest.subtract(lead)
        if min(rest.values(), default=0) < 0 or coefficient % lead_coefficient:
            return None
        left = tuple(sorted(rest.elements(), key=_atom_key))
        step = Dim._make({left: coefficient // lead_coefficient})
        quotient, numerator = quotient + step, numerator - step * denominator
    return quotient if numerator == 0 else None


# Bounds work on dictionaries from monomials to rational coefficients.


def _relaxed(size: Dim) -> dict[Monomial, Fraction] | None:
    """A polynomial without divisions that is nowhere above `size`; None where a division is multiplied by a symbol.

    a // b lies between (a - b + 1) / b and a / b.
    """
    out: dict[Monomial, Fraction] = {}
    pending = [(m, Fraction(c)) for m, c in size.terms]
    while pending:
        monomial, coefficient = pending.pop()
        if all(isinstance(atom, str) for atom in monomial):
            out[monomial] = out.get(monomial, Fraction(0)) + coefficient
            continue
        if len(monomial) > 1:
            return None
        _, numerator, divisor = monomial[0]
        scale = coefficient / divisor
        pending += [(m, scale * c) for m, c in numerator.terms]
        if coefficient > 0:
            pending.append(((), scale * (1 - divisor)))
    return out


def _shifted_bound(terms: dict[Monomial, Fraction] | None) -> int | None:
    """The least value where writing every symbol as 1 plus something non-negative leaves no negative coefficient."""
    if terms is None:
        return None
    shifted: dict[Monomial, Fraction] = {}
    for monomial, coefficient in terms.items():
        for chosen in itertools.product((False, True), repeat=len(monomial)):
            part = tuple(itertools.compress(monomial, chosen))
            shifted[part] = shifted.get(part, Fraction(0)) + coefficient
    constant = shifted.pop((), Fraction(0))
    return None if any(c < 0 for c in shifted.values()) else math.ceil(constant)


def _direct_bound(size: Dim) -> int | None:
    """The sum of the terms' own bounds, where every coefficient of a symbolic term is positive."""
    total = 0
    for monomial, coefficient in size.terms:
        product = 1
        for atom in monomial:
            if not isinstance(atom, str):
                inner = atom[1].lower_bound()
                if inner is None or (inner < 0 and len(monomial) > 1):
                    return None
                product *= inner // atom[2]
        if monomial and coefficient < 0:
            return None
        total += coefficient * product
    return total


def evaluate(size, sizes: Mapping[str, int]) -> int:
    """`size` as an int, for concrete values of its symbols."""
    return size.evaluate(sizes) if isinstance(size, Dim) else int(size)


def substitute(size, sizes: Mapping[str, int | Dim]):
    """`size` with symbols replaced; ints pass through."""
    return size.substitute(sizes) if isinstance(size, Dim) else size


def symbols(sizes: Iterable) -> frozenset[str]:
    """Names of all free sizes in a shape."""
    return frozenset().union(*(s.symbols() for s in sizes if isinstance(s, Dim)))


def is_static(shape: Iterable) -> bool:
    """Whether a shape holds no symbolic size."""
    return not any(isinstance(s, Dim) for s in shape)


def product(sizes: Iterable):
    """The product of sizes; 1 for none."""
    out: int | Dim = 1
    for size in sizes:
        out = size * out
    return out


def ceil_div(a, b: int):
    """Division rounded up."""
    return (a + (b - 1)) // b


# As JSON: an int stands for itself, a Dim is a list of [coefficient, atoms]; an atom is a symbol's name or
# [numerator, divisor] of a floor division.
_MAX_JSON_DEPTH = 16
_MAX_JSON_INT = 1 << 62


def to_json(size) -> int | list:
    """A size as a JSON value that `from_json` reads back."""
    if not isinstance(size, Dim):
        return int(size)
    return [
        [coefficient, [atom if isinstance(atom, str) else [to_json(atom[1]), atom[2]] for atom in monomial]]
        for monomial, coefficient in size.terms
    ]


def from_json(data, depth: int = 0) -> int | Dim:
    """The size that `to_json` wrote. Raises ValueError for anything else: the data may come from a damaged file."""
    if type(data) is int:
        if abs(data) > _MAX_JSON_INT:
            raise ValueError(f"the size {data} is out of range")
        return data
    if type(data) is not list or depth > _MAX_JSON_DEPTH:
        raise ValueError("a size must be an integer or a list of terms")
    terms: dict[Monomial, int] = {}
    for term in data:
        if type(term) is not list or len(term) != 2 or type(term[0]) is not int or type(term[1]) is not list:
            raise ValueError("a term of a size must be [coefficient, atoms]")
        if abs(term[0]) > _MAX_JSON_INT or len(term[1]) > _MAX_JSON_DEPTH:
            raise ValueError("a term of a size is out of range")
        terms[tuple([_atom_from_json(atom, depth + 1) for atom in term[1]])] = term[0]
    return Dim._make(terms)


def _atom_from_json(data, depth: int):
    if type(data) is str:
        return data
    if type(data) is not list or len(data) != 2 or type(data[1]) is not int or not 0 < data[1] <= _MAX_JSON_INT:
        raise ValueError("an atom of a size must be a name or [numerator, divisor]")
    numerator = from_json(data[0], depth)
    if not isinstance(numerator, Dim):
        raise ValueError("the numerator of a division must be symbolic")
    return ("floordiv", numerator, data[1])
