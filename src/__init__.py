"""The package. Importing anything of it comes before torch, whose OpenMP reads this when it is loaded.

A thread that has done its share of an operation waits for the others asleep and not in a loop: where other programs run
on the same cores, the loop takes the very core that the others need, and a step on a CPU takes ten times as long.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
