"""Who asks: AWS keys from the environment, a profile or a file, never from ``winnow.toml`` and never in a message.

The order is that of AWS's own tools: what the section of ``winnow.toml`` says, else ``AWS_ACCESS_KEY_ID`` in the
environment, else ``AWS_PROFILE``, else the profile ``default``, else the machine's role (which obstore asks by itself).
Profiles with static keys are read here; those that need a sign-in or a role go through boto3.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from winnow.config import StorageConfig
from winnow.errors import CallError

Provider = Callable[[], Mapping[str, Any]]
"""Gives obstore's ``S3Credential``: access_key_id, secret_access_key, token, expires_at."""

_SIGN_IN = {"role_arn", "sso_session", "sso_start_url", "credential_process", "web_identity_token_file"}
"""Settings of profiles that hold no keys but say how to get some."""
_REREAD = timedelta(minutes=5)
"""Credentials files are read again this often: tools that renew temporary keys rewrite them."""


@dataclass(frozen=True)
class S3Access:
    """How to reach S3 or a server like it.

    Attributes:
        endpoint: address of the server; None is AWS.
        region: never empty.
        anonymous: send unsigned requests.
        provider: gives the keys; None leaves them to the machine's role.
    """

    endpoint: str | None
    region: str
    anonymous: bool
    provider: Provider | None

    @property
    def allow_http(self) -> bool:
        """Whether requests may go unencrypted: only to an endpoint that says ``http://``."""
        return self.endpoint is not None and self.endpoint.startswith("http://")


def resolve(config: StorageConfig, base_dir: Path) -> S3Access:
    """What the section, the environment and AWS's files say together.

    Raises:
        CallError: the file or the profile is missing or incomplete, or boto3 is needed and not installed.
    """
    env = os.environ
    endpoint = config.endpoint or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or None
    region = config.region or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")
    if config.anonymous:
        return S3Access(endpoint and endpoint.rstrip("/"), region or "us-east-1", True, None)
    provider: Provider | None
    named = config.profile is not None or config.credentials_file is not None
    if not named and env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY"):
        provider = _EnvironmentKeys()
    else:
        files = ProfileFiles(
            credentials=_path(config.credentials_file, base_dir)
            or Path(env.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser(),
            config=Path(env.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser(),
            profile=config.profile or env.get("AWS_PROFILE") or "default",
        )
        if config.credentials_file is not None and not files.credentials.is_file():
            raise CallError(f"credentials_file {files.credentials} does not exist; mend [storage] in winnow.toml")
        section = files.section()
        region = config.region or section.get("region") or region
        if section.get("aws_access_key_id"):
            provider = _FileKeys(files)
            provider()
        elif _SIGN_IN & set(section):
            provider = _boto3_provider(files)
        elif named or env.get("AWS_PROFILE"):
            raise CallError(
                f"profile {files.profile!r} holds no keys in {files.credentials}; "
                f"profiles there: {', '.join(files.names()) or 'none'}"
            )
        else:
            provider = None
    return S3Access(endpoint and endpoint.rstrip("/"), region or "us-east-1", False, provider)


def _path(name: str | None, base_dir: Path) -> Path | None:
    return base_dir / Path(name).expanduser() if name is not None else None


@dataclass(frozen=True)
class ProfileFiles:
    """AWS's two INI files and the profile meant in them."""

    credentials: Path
    config: Path
    profile: str

    def section(self) -> dict[str, str]:
        """All settings of the profile; what the credentials file says wins. Empty when it stands nowhere."""
        in_config = self.profile if self.profile == "default" else f"profile {self.profile}"
        settings: dict[str, str] = {}
        for path, name in ((self.config, in_config), (self.credentials, self.profile)):
            parser = _parse(path)
            if parser.has_section(name):
                settings.update(parser.items(name))
        return settings

    def names(self) -> list[str]:
        """The profiles of the credentials file."""
        return _parse(self.credentials).sections()


def _parse(path: Path) -> configparser.RawConfigParser:
    # No interpolation: keys may hold %. No default section: [default] is a profile like the others.
    parser = configparser.RawConfigParser(default_section="\0", strict=False)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return parser
    except (OSError, UnicodeDecodeError) as error:
        raise CallError(f"credentials file {path} cannot be read: {getattr(error, 'strerror', 'not UTF-8')}") from None
    except configparser.Error:  # its text quotes lines of the file
        raise CallError(f"credentials file {path} is not in AWS's INI format: [profile], then key = value") from None
    return parser


class _EnvironmentKeys:
    """Keys from the environment of the process that asks."""

    def __call__(self) -> Mapping[str, Any]:
        return {
            "access_key_id": os.environ["AWS_ACCESS_KEY_ID"].strip(),
            "secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"].strip(),
            "token": os.environ.get("AWS_SESSION_TOKEN") or None,
            "expires_at": None,
        }


@dataclass(frozen=True)
class _FileKeys:
    """Static or renewed keys from a credentials file."""

    files: ProfileFiles

    def __call__(self) -> Mapping[str, Any]:
        section = self.files.section()
        if not section.get("aws_access_key_id") or not section.get("aws_secret_access_key"):
            raise CallError(
                f"profile {self.files.profile!r} in {self.files.credentials} "
                "needs both aws_access_key_id and aws_secret_access_key"
            )
        return {
            "access_key_id": section["aws_access_key_id"],
            "secret_access_key": section["aws_secret_access_key"],
            "token": section.get("aws_session_token"),
            "expires_at": datetime.now(UTC) + _REREAD,
        }


def _boto3_provider(files: ProfileFiles) -> Provider:
    try:
        import botocore.exceptions
        import botocore.session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise CallError(
            f"profile {files.profile!r} signs in or assumes a role, which needs boto3; "
            "install it: pip install 'winnow-vision[aws]'"
        ) from None
    session = botocore.session.Session(profile=files.profile)
    session.set_config_variable("credentials_file", str(files.credentials))
    session.set_config_variable("config_file", str(files.config))
    try:
        provider: Provider = Boto3CredentialProvider(session)
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise CallError(
            f"profile {files.profile!r} gives no keys: {type(error).__name__}; try `aws sts get-caller-identity`"
        ) from None
    return provider
