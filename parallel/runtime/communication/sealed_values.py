"""Pickled values exchanged by ranks, each preceded by a digest that is checked before anything is unpickled.

If the job has a secret, the digest is keyed with it, so that no process without the secret can make a rank unpickle anything.
Otherwise, for example in another trainer's job, the digest only detects values that were changed in transit.
"""

from __future__ import annotations

import hashlib
import hmac
import pickle
from typing import Any

_DIGEST_BYTES = 32
_PURPOSE = b"distattn's values between ranks"
# the key of digests in this process; all ranks of a job have the same key
_KEYS = [b""]


def use_secret(secret: bytes) -> None:
    """Use a job's secret as the key of digests from now on. All ranks must call this between the same two exchanges."""
    _KEYS[0] = hmac.digest(secret, _PURPOSE, "sha256")


def seal(value: Any) -> bytes:
    """Serialize a picklable value for `unseal`."""
    data = pickle.dumps(value)
    return _digest(data) + data


def unseal(data: bytes) -> Any:
    """Deserialize a value serialized by `seal` in this job. For anything else, raise RuntimeError without unpickling."""
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if not hmac.compare_digest(digest, _digest(content)):
        # the type of error that gloo raises for a broken connection, which callers already handle
        raise RuntimeError(
            "a value from another rank does not match its digest: it was changed in transit, or is not from a rank of "
            "this job; nothing of it was unpickled."
        )
    return pickle.loads(content)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=_KEYS[0]).digest()
