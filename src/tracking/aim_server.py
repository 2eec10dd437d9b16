"""Whether an AIM server answers, asked without AIM's client."""

from __future__ import annotations

import urllib.error
import urllib.request

PROBE_TIMEOUT = 3.0  # s for a server's first answer


def probe_server(target: str) -> None:
    """Ask the server at `aim://host:port` for its status; aim's own client may wait for ever for one that is silent.

    Raises OSError when nobody listens, or nobody answers within PROBE_TIMEOUT.
    """
    for scheme in ("http", "https"):
        try:
            urllib.request.urlopen(target.replace("aim", scheme, 1).rstrip("/") + "/status/", timeout=PROBE_TIMEOUT)
            return
        except urllib.error.HTTPError:
            return  # it answers
        except (urllib.error.URLError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise TimeoutError(f"no answer within {PROBE_TIMEOUT:.0f} s") from error
            failure = reason
    raise OSError(str(failure))
