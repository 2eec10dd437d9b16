"""The package; importing it limits how long OpenMP threads spin, which torch's OpenMP reads when it is loaded.

A thread that has finished its share of an operation waits for the others: first spinning, then asleep. On cores shared
with other programs, long spinning occupies the core that the other threads need, and a training step takes ten times as
long. Without any spinning, a small network's step takes 1.5 times as long on dedicated cores.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # for GNU OpenMP, which torch uses on Linux; default: 300,000
