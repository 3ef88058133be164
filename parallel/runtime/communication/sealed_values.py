"""Values that ranks exchange, pickled behind a digest that is compared before anything is unpickled.

If the job has a secret, the digest is keyed with it: a process that does not know it cannot make a rank unpickle anything.
Otherwise, as in another trainer's job, the digest detects values that were changed in transit.
"""

from __future__ import annotations

import hashlib
import hmac
import pickle
from typing import Any

_DIGEST_BYTES = 32
_PURPOSE = b"distattn's values between ranks"
# keys of this process: all ranks of a job have the same
_KEYS = [b""]


def use_secret(secret: bytes) -> None:
    """Use a job's secret as the key of digests from now on. All ranks call this between the same two exchanges."""
    _KEYS[0] = hmac.digest(secret, _PURPOSE, "sha256")


def seal(value: Any) -> bytes:
    """Serialize a picklable value for `unseal`."""
    data = pickle.dumps(value)
    return _digest(data) + data


def unseal(data: bytes) -> Any:
    """Deserialize a value that `seal` has made in this job. Raise RuntimeError, and unpickle nothing, for anything else."""
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if not hmac.compare_digest(digest, _digest(content)):
        # the error of gloo for a broken connection, which all ranks handle
        raise RuntimeError(
            "a value from another rank does not match its digest: it was changed in transit, or is not from a rank of "
            "this job; nothing of it was unpickled."
        )
    return pickle.loads(content)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=_KEYS[0]).digest()
