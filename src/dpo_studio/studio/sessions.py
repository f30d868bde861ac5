"""Who may talk to the studio: a token that is used once, a cookie that lasts, a password where the network can ask.

Only hashes are kept: whoever reads the file can log in nowhere.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dpo_studio.studio.api_errors import Refused
from dpo_studio.studio.store import Store

__all__ = ["SESSION_SECONDS", "Sessions", "cookie_name"]

TOKEN_SECONDS = 24 * 3600
SESSION_SECONDS = 30 * 24 * 3600
_GUESSES, _GUESS_SECONDS = 5, 60.0
"""Wrong passwords that are answered in this time."""


def cookie_name(port: int, folder: Path) -> str:
    """Two studios on one machine share a host, and cookies do not know ports: each has a name of its own."""
    return f"dpo-studio-{port}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


@dataclass
class Sessions:
    """Tokens, cookies and the password of one folder."""

    store: Store
    password: str | None = None
    clock: Callable[[], float] = time.time
    _wrong: list[float] = field(default_factory=list)

    def new_token(self) -> str:
        """A token that logs one browser in, once, within a day."""
        token = secrets.token_urlsafe(32)
        with self.store.writing() as db:
            db.execute("DELETE FROM tokens WHERE made < ?", (self.clock() - TOKEN_SECONDS,))
            db.execute("INSERT INTO tokens (hash, made) VALUES (?, ?)", (_hash(token), self.clock()))
        return token

    def with_token(self, token: str) -> str | None:
        """The secret of a new session; None for a token that is unknown, used or old."""
        with self.store.writing() as db:
            used = db.execute(
                "UPDATE tokens SET used = 1 WHERE hash = ? AND used = 0 AND made > ?",
                (_hash(token), self.clock() - TOKEN_SECONDS),
            ).rowcount
        return self._new_session() if used else None

    def with_password(self, password: str) -> str:
        """The same for the password.

        Raises:
            Refused: it is wrong, there is none, or too many wrong ones came within a minute.
        """
        now = self.clock()
        self._wrong = [at for at in self._wrong if at > now - _GUESS_SECONDS]
        if len(self._wrong) >= _GUESSES:
            raise Refused("too many wrong passwords", status=429, hint="wait a minute", field="password")
        if self.password is None or not hmac.compare_digest(_hash(password), _hash(self.password)):
            self._wrong.append(now)
            raise Refused(
                "the password is wrong", status=401, hint="the link in the terminal works too", field="password"
            )
        return self._new_session()

    def is_known(self, secret: str) -> bool:
        """Whether a cookie's secret is one of ours."""
        with self.store.reading() as db:
            found = db.execute(
                "SELECT 1 FROM sessions WHERE hash = ? AND made > ?", (_hash(secret), self.clock() - SESSION_SECONDS)
            )
            return found.fetchone() is not None

    def _new_session(self) -> str:
        secret = secrets.token_urlsafe(32)
        with self.store.writing() as db:
            db.execute("DELETE FROM sessions WHERE made < ?", (self.clock() - SESSION_SECONDS,))
            db.execute("INSERT INTO sessions (hash, made) VALUES (?, ?)", (_hash(secret), self.clock()))
        return secret


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
