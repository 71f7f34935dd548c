import sys
from pathlib import Path

from tests.conformance.runner import Suite

backend, n, *folders = sys.argv[1:]
s = Suite(backend, Path("/work/main/.bench/conformance/bin/python"), Path("/work/conf/results"))
files = s.files(folders)


def rep(r):
    from collections import Counter

    print(r.file, dict(Counter(o for o, _ in r.tests.values())), r.seconds, flush=True)


s.run(files, int(n), report=rep, again="--again" in sys.argv)
