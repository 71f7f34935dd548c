"""Regenerates kgraph/codegen/cpu/polynomials.py: `python tests/codegen/fit_polynomials.py > ...` (needs mpmath).

Each polynomial interpolates its function at the Chebyshev nodes of the interval, in 60-digit arithmetic, which is
within a small factor of the best polynomial of the same degree. Coefficients are rounded to float64 and stand from the
constant term upwards. The error printed next to each is the largest relative error of the rounded polynomial.
"""

from mpmath import acos, atan, cos, erf, erfc, erfinv, exp, expm1, log, log1p, mp, mpf, pi, polyval, sin, sqrt

mp.dps = 60
LN2 = log(2)
TINY = mpf(10) ** -25


def chebyshev_fit(function, low, high, degree):
    """Monomial coefficients of the interpolant, constant first."""
    low, high = mpf(low), mpf(high)
    count = degree + 1
    nodes = [cos(pi * (2 * k + 1) / (2 * count)) for k in range(count)]
    points = [(low + high) / 2 + (high - low) / 2 * t for t in nodes]
    # Newton's divided differences, then expansion into monomials.
    table = [function(p) for p in points]
    for level in range(1, count):
        for k in range(count - 1, level - 1, -1):
            table[k] = (table[k] - table[k - 1]) / (points[k] - points[k - level])
    out = [table[-1]]
    for k in range(count - 2, -1, -1):
        shifted = [mpf(0), *out]
        out = [s - points[k] * o for s, o in zip(shifted, [*out, mpf(0)])]
        out[0] += table[k]
    return out


def largest_error(function, coefficients, low, high):
    rounded = [mpf(float(c)) for c in coefficients][::-1]
    worst = mpf(0)
    for k in range(401):
        x = mpf(low) + (mpf(high) - mpf(low)) * k / 400
        value = function(x)
        if value:
            worst = max(worst, abs(polyval(rounded, x) / value - 1))
    return worst


def avoid_zero(function):
    """The function with its removable singularity at 0 stepped over."""
    return lambda x: function(x if abs(x) > TINY else TINY)


def sqrt_argument(function):
    """f(sqrt z) / sqrt z as a function of z, for odd f."""
    return avoid_zero(lambda z: function(sqrt(z)) / sqrt(z))


def asin_tail(z):
    x = sqrt(z)
    return ((pi / 2 - acos(x)) / x - 1) / z


def erfc_scaled(t):
    """erfc(x) exp(x^2) (1 + 2x) with x given by t = (x - 4) / (x + 4)."""
    if t > 1 - mpf(10) ** -20:
        return 2 / sqrt(pi)
    x = 4 * (1 + t) / (1 - t)
    return erfc(x) * exp(x * x) * (1 + 2 * x)


def log_erfc(x):
    """log(erfc(x)) / x"""
    return log(erfc(x)) / x


HALF_LN2 = float(LN2 / 2) * 1.002
SQRT_HALF = sqrt(mpf(1) / 2)
LOG_LOW, LOG_HIGH = SQRT_HALF - 1, 2 * SQRT_HALF - 1
S_HIGH = (LOG_HIGH / (2 + LOG_HIGH)) ** 2
QUARTER = (pi / 4) ** 2 * mpf("1.001")


def log_tail(f):
    """(log1p(f) - f + f^2/2) / f^3"""
    if abs(f) < mpf(10) ** -12:
        return mpf(1) / 3 - f / 4
    return (log1p(f) - f + f * f / 2) / f**3


def log2_tail(f):
    """(log2(1 + f) / f - log2(e)) / f"""
    if abs(f) < mpf(10) ** -20:
        return -1 / (2 * LN2)
    return (log1p(f) / LN2 / f - 1 / LN2) / f


def atanh_tail(z):
    """(2 atanh(s) / s - 2) / z at z = s^2"""
    if z < mpf(10) ** -20:
        return mpf(2) / 3
    s = sqrt(z)
    return (log((1 + s) / (1 - s)) / s - 2) / z


def atanh_tail2(z):
    """(2 atanh(s) / s - 2 - 2 z / 3) / z^2 at z = s^2"""
    if z < mpf(10) ** -14:
        return mpf(2) / 5
    return (atanh_tail(z) - mpf(2) / 3) / z


def sin_tail(z):
    if z < mpf(10) ** -20:
        return -mpf(1) / 6
    x = sqrt(z)
    return (sin(x) / x - 1) / z


def cos_tail(z):
    if z < mpf(10) ** -14:
        return mpf(1) / 24
    return (cos(sqrt(z)) - 1 + z / 2) / z**2


def atan_tail(z):
    if z < mpf(10) ** -20:
        return -mpf(1) / 3
    x = sqrt(z)
    return (atan(x) / x - 1) / z


def exp_tail(r):
    """(exp(r) - 1 - r) / r^2"""
    if abs(r) < mpf(10) ** -20:
        return mpf(1) / 2 + r / 6
    return (expm1(r) - r) / r**2


def exp2_tail(r):
    """(2^r - 1) / r"""
    return expm1(r * LN2) / r if r else LN2


def erf_odd(z):
    """erf(x) / x - 1 at z = x^2"""
    return sqrt_argument(erf)(z) - 1


def erf_inv_odd(z):
    """erf_inv(x) / x at z = x^2"""
    if z < mpf(10) ** -30:
        return sqrt(pi) / 2
    return erfinv(sqrt(z)) / sqrt(z)


def erf_inv_tail(q):
    """erf_inv(1 - exp(-q^2)) / q"""
    p = exp(-q * q)
    y = sqrt(-log(p * q * sqrt(pi)))  # leading term of the asymptotic series; Newton does the rest
    for _ in range(60):
        step = (erfc(y) - p) / (2 / sqrt(pi) * exp(-y * y))
        y += step
        if abs(step) < mpf(10) ** -45:
            break
    return y / q


FITS = [
    # name, function, low, high, degree, comment
    ("EXP_F32", exp_tail, -HALF_LN2, HALF_LN2, 4, "(exp(r) - 1 - r) / r^2"),
    ("EXP_F64", exp_tail, -HALF_LN2, HALF_LN2, 9, "(exp(r) - 1 - r) / r^2"),
    ("EXP2_F32", exp2_tail, -0.501, 0.501, 5, "(2^r - 1) / r"),
    ("EXP2_F64", exp2_tail, -0.501, 0.501, 11, "(2^r - 1) / r"),
    ("LOG_F32", log_tail, LOG_LOW, LOG_HIGH, 8, "(log1p(f) - f + f^2/2) / f^3"),
    ("LOG2_F32", log2_tail, LOG_LOW, LOG_HIGH, 8, "(log2(1+f)/f - log2(e)) / f"),
    ("LOG_F64", atanh_tail, 0, S_HIGH, 6, "(2 atanh(s)/s - 2) / z, z = s^2"),
    ("POW_LOG_F64", atanh_tail2, 0, S_HIGH, 7, "(2 atanh(s)/s - 2 - 2z/3) / z^2, z = s^2"),
    ("SIN_F32", sin_tail, 0, QUARTER, 2, "(sin(x)/x - 1) / z, z = x^2"),
    ("SIN_F64", sin_tail, 0, QUARTER, 5, "(sin(x)/x - 1) / z, z = x^2"),
    ("COS_F32", cos_tail, 0, QUARTER, 2, "(cos(x) - 1 + z/2) / z^2, z = x^2"),
    ("COS_F64", cos_tail, 0, QUARTER, 5, "(cos(x) - 1 + z/2) / z^2, z = x^2"),
    ("ATAN_F32", atan_tail, 0, 1, 8, "(atan(x)/x - 1) / z, z = x^2"),
    ("ATAN_F64", atan_tail, 0, 1, 20, "(atan(x)/x - 1) / z, z = x^2"),
    ("ASIN_F64", avoid_zero(asin_tail), 0, 0.2501, 12, "(asin(x)/x - 1) / z, z = x^2"),
    ("ERF_SMALL_F32", erf_odd, 0, 1, 6, "erf(x)/x - 1, z = x^2, |x| <= 1"),
    ("ERFC_F32", avoid_zero(log_erfc), 0, 3.95, 9, "log(erfc(x)) / x"),
    ("ERF_SMALL_F64", erf_odd, 0, 1, 13, "erf(x)/x - 1, z = x^2, |x| <= 1"),
    ("CBRT_START", lambda x: x ** (mpf(1) / 3), SQRT_HALF * mpf("0.99"), 5.7, 4, "cube root"),
    ("ERF_INV_SMALL", erf_inv_odd, 0, 0.5627, 22, "erf_inv(x)/x, z = x^2, |x| <= 0.75"),
    ("ERF_INV_MIDDLE", lambda t: erf_inv_tail(t + 2), -0.83, 1.1, 24, "erf_inv(1 - exp(-q^2)) / q, t = q - 2"),
    ("ERF_INV_LARGE", lambda t: erf_inv_tail(t + 4.5), -1.5, 1.6, 20, "erf_inv(1 - exp(-q^2)) / q, t = q - 4.5"),
    ("ERFC_F64", erfc_scaled, -0.8, 0.75, 22, "erfc(x) exp(x^2) (1 + 2x), t = (x-4)/(x+4), 0.44 <= x <= 28"),
]


def erf_pieces() -> list[list]:
    """Coefficients of erf(k/4 + t) - t in t for |t| <= 1/8, k = 0..15, as rows of coefficients of one power."""
    pieces = []
    for k in range(16):
        centre = mpf(k) / 4
        value = erf(centre)
        slope = lambda t, centre=centre, value=value: (erf(centre + t) - value) / t - 1
        pieces.append([value, *chebyshev_fit(avoid_zero(slope), -0.125, 0.125, 4)])
    return [list(row) for row in zip(*pieces)]


def two_over_pi_words(count: int) -> list[int]:
    """2/pi in 64-bit words, after one word of zeros."""
    mp.prec = 64 * count + 64
    value = int(mp.floor(2 / +pi * mpf(2) ** (64 * count)))
    mp.dps = 60
    return [0] + [(value >> (64 * (count - 1 - k))) & (2**64 - 1) for k in range(count)]


def main():
    print('"""Coefficients for vector_*.py, constant term first; made by tests/codegen/fit_polynomials.py."""')
    for name, function, low, high, degree, comment in FITS:
        coefficients = chebyshev_fit(function, low, high, degree)
        error = largest_error(function, coefficients, low, high)
        print(f"\n# {comment} on [{float(low):.4g}, {float(high):.4g}], relative error {float(error):.1e}")
        print(f"{name} = (")
        for c in coefficients:
            print(f"    {float(c)!r},")
        print(")")
    print("\n# erf(k/4 + t) - t for |t| <= 1/8: per power of t its coefficient for k = 0..15")
    print("ERF_PIECES = (")
    for row in erf_pieces():
        print("    (" + ", ".join(repr(float(c)) for c in row) + "),")
    print(")")
    print("\n# The bits of 2/pi in words of 64, after one word of zeros.")
    print("TWO_OVER_PI = (")
    for word in two_over_pi_words(21):
        print(f"    0x{word:016X},")
    print(")")


if __name__ == "__main__":
    main()
