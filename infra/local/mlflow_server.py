"""The MLflow server: runs and registry in `DIRECTORY/mlflow.db`, artifacts in the stack's S3 through the server."""

from infra.local.part import Part, command, get
from infra.local.seaweed import s3_variables
from infra.local.state import BUCKET, State


def mlflow_variables(state: State) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": state.url("mlflow"), "MLFLOW_DISABLE_TELEMETRY": "true"}


def mlflow_part(state: State) -> Part:
    # Artifacts pass through the server, so that no stored address names a port that may change.
    argv = (
        command("mlflow"), "server", "--host", "127.0.0.1", "--port", str(state.ports["mlflow"]), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{state.directory / 'mlflow.db'}",
        "--serve-artifacts", "--artifacts-destination", f"s3://{BUCKET}/mlflow",
    )  # fmt: skip
    variables = {
        **s3_variables(state),
        "MLFLOW_S3_ENDPOINT_URL": state.url("s3"),
        # Disables job runners of unused features: 2 processes and 0.5 GB instead of 10 and 1.8 GB.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return Part(
        name="mlflow",
        argv=argv,
        variables=variables,
        problem=lambda: get(f"{state.url('mlflow')}/health"),
        address=state.url("mlflow"),
        start_seconds=180.0,
        stop_seconds=10.0,
    )
