"""The tests. Their first import is the package's, which settles how torch's threads wait before torch is loaded."""

import src  # noqa: F401
