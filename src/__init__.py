"""The package. Importing anything of it comes before torch, whose OpenMP reads this when it is loaded.

A thread that has done its share of an operation waits for the others in a loop, for a moment only, then asleep. Where
other programs run on the same cores a long loop takes the very core that the others need, and a step on a CPU takes ten
times as long; without any loop a small network's step takes half as long again on cores of its own.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's OpenMP, of torch on Linux; its own default is 300,000
