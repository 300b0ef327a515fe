"""SeaweedFS (`weed mini`) as the S3 server: one process, data in `DIRECTORY/s3`."""

import functools
import hashlib
from pathlib import Path

import botocore.exceptions
import botocore.session
from botocore.config import Config

from infra.local.part import Part, command, get
from infra.local.state import BUCKET, REGION, State


def s3_variables(state: State) -> dict[str, str]:
    """Environment variables of an S3 client; boto, s3fs, pyarrow and Ray Data all read these names."""
    return {
        "AWS_ACCESS_KEY_ID": state.access_key,
        "AWS_SECRET_ACCESS_KEY": state.secret_key,
        "AWS_ENDPOINT_URL": state.url("s3"),
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def s3_part(state: State) -> Part:
    ports = state.ports
    data = state.directory / "s3"
    argv = (
        command("weed"), "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-s3.port={ports['s3']}", f"-master.port={ports['s3_master']}", f"-filer.port={ports['s3_filer']}",
        f"-volume.port={ports['s3_volume']}", f"-admin.port={ports['s3_admin']}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false",
        "-master.telemetry=false", "-volume.preStopSeconds=0", f"-bucket={BUCKET}",
    )  # fmt: skip
    return Part(
        name="s3",
        argv=argv,
        variables={**s3_variables(state), **_internal_keys(state)},
        problem=lambda: get(f"{state.url('s3')}/healthz") or _bucket_problem(state),
        address=state.url("s3"),
        start_seconds=60.0,
        stop_seconds=5.0,  # after traffic it needs up to 29 s to stop; the data survive SIGKILL
        before_start=lambda: data.mkdir(exist_ok=True),
    )


def _internal_keys(state: State) -> dict[str, str]:
    """Keys for SeaweedFS's internal ports: without them, the filer and volume ports serve all data to any local
    user.
    """
    key = hashlib.sha256(f"seaweed internal {state.secret_key}".encode()).hexdigest()
    names = [f"WEED_JWT_{kind}SIGNING_{read}" for kind in ("", "FILER_") for read in ("", "READ_")]
    expiry = {f"{name}EXPIRES_AFTER_SECONDS": "3600" for name in names}  # the default, 10 s, is too short
    return {**{f"{name}KEY": key for name in names}, **expiry}


@functools.cache
def _session():
    """A cached session: creating one reads the endpoints of all AWS services, which takes 0.1 s."""
    return botocore.session.Session(profile=None)


def make_client(endpoint: str, access_key: str, secret_key: str, *, seconds: float = 10.0):
    """A low-level S3 client that waits at most `seconds` for an answer, without retries."""
    config = Config(connect_timeout=3, read_timeout=seconds, retries={"total_max_attempts": 1})
    return _session().create_client(
        "s3", endpoint_url=endpoint, region_name=REGION, config=config, verify=False,
        aws_access_key_id=access_key, aws_secret_access_key=secret_key,
    )  # fmt: skip


def download(uri: str, target: Path, state: State) -> None:
    """Copy one object of the stack's S3 to a local file."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    client = make_client(state.url("s3"), state.access_key, state.secret_key)
    target.write_bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())


def _bucket_problem(state: State) -> str | None:
    """Send a signed request, which checks the credentials, and create the bucket if it was deleted; returns the
    problem.
    """
    client = make_client(state.url("s3"), state.access_key, state.secret_key)
    try:
        if BUCKET not in {b["Name"] for b in client.list_buckets().get("Buckets", [])}:
            client.create_bucket(Bucket=BUCKET)
        client.list_objects_v2(Bucket=BUCKET, MaxKeys=1)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        return f"bucket {BUCKET}: {error}"
    return None
