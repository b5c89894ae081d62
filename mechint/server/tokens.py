"""Hub tokens of waiting jobs: encrypted in the database, blanked when the job ends, useless without the key file."""

import contextlib
import os
import time
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken

from mechint.errors import MechintError
from mechint.provenance import fsync_dir, make_dir
from mechint.server.settings import Settings

TOKEN_SECONDS = 24 * 3600.0
KEY_FILE = "secret.key"


def hide(settings: Settings, token: str | None) -> tuple[str | None, float | None]:
    """`(cipher, until when it is kept)` of a request's token, for `Job.token_cipher` and `Job.token_until`."""
    if not token:
        return None, None
    return _fernet(settings).encrypt(token.encode()).decode(), time.time() + TOKEN_SECONDS


def reveal(settings: Settings, cipher: str | None) -> str | None:
    """The token again. None for none, for one that is too old, and for one that another key encrypted."""
    if not cipher:
        return None
    try:
        return _fernet(settings).decrypt(cipher.encode(), ttl=int(TOKEN_SECONDS)).decode()
    except InvalidToken:
        return None


def secret_bytes(settings: Settings) -> bytes:
    """The server's secret, from which other keys can be derived. Raises `MechintError` for one that is none."""
    key = settings.secret_key or _key_of(settings.data_dir / KEY_FILE)
    _fernet(settings)
    return key.encode()


def _fernet(settings: Settings) -> Fernet:
    key = settings.secret_key or _key_of(settings.data_dir / KEY_FILE)
    try:
        return Fernet(key)
    except ValueError:
        raise MechintError(
            "MECHINT_SECRET_KEY should be 32 bytes in URL-safe base64; this makes one:"
            " python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'"
        ) from None


def _key_of(path: Path) -> str:
    """The key in a file that only this user can read, made on first use by whichever process comes first."""
    make_dir(path.parent)
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="ascii").strip()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, Fernet.generate_key())
        os.fsync(handle)
    finally:
        os.close(handle)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename, the first one stays
    finally:
        temporary.unlink()
    fsync_dir(path.parent)
    return path.read_text(encoding="ascii").strip()
