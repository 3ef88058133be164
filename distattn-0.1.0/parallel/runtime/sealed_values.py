"""What ranks tell each other, pickled behind a digest that is compared before anything is unpickled.

Where the job has a secret the digest is keyed with it: whoever does not know it cannot have a rank unpickle anything. Else, as
in a trainer of somebody else's, it finds what was changed on its way.
"""

from __future__ import annotations

import hashlib
import hmac
import pickle
from typing import Any

_DIGEST_BYTES = 32
_PURPOSE = b"distattn's values between ranks"
# of this process: all ranks of a job have the same
_KEYS = [b""]


def use_secret(secret: bytes) -> None:
    """Key digests with a job's secret from now on. All ranks do so between the same two values that they tell each other."""
    _KEYS[0] = hmac.digest(secret, _PURPOSE, "sha256")


def seal(value: Any) -> bytes:
    """A picklable value as bytes that `unseal` takes."""
    data = pickle.dumps(value)
    return _digest(data) + data


def unseal(data: bytes) -> Any:
    """The value of what `seal` has made, in this job. Raises RuntimeError, and unpickles nothing, for anything else."""
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if not hmac.compare_digest(digest, _digest(content)):
        # as gloo does for a connection that breaks, which is told to all ranks
        raise RuntimeError(
            "what came from another rank does not match its digest: it was changed on its way, or does not come from a rank of "
            "this job; nothing of it was unpickled."
        )
    return pickle.loads(content)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=_KEYS[0]).digest()
