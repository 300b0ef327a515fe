r"""Serve images of one model over HTTP, on the running cluster, until Ctrl-C.

    python -m pipelines.serve --model models:/emoji-flow@champion
    curl -H "Authorization: Bearer $(cat ~/.cache/diff2flow/serve_token)" -H "Accept: image/png" \
         -d '{"prompt": "red heart", "seed": 1}' http://127.0.0.1:8000/v1/images > heart.png
"""

import signal
import sys
import time

from d2f_core.flow.serve.config import ServeConfig, ServeError
from pipelines.cli import run_job
from pipelines.cluster import connect

WATCH_SECONDS = 5.0
RECIPES = {"champion": ServeConfig()}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stop(*_: object) -> None:
    """Signal handler that ends the service, then the command; a second Ctrl-C is ignored, as it would leave the service
    running.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def check(config: ServeConfig) -> None:
    from d2f_core.flow.serve.service import check_serve

    check_serve(config)


def main(config: ServeConfig) -> None:
    from d2f_core.flow.serve.service import check_serve, is_running, obtain_token, service

    token = obtain_token(config)
    job = check_serve(config)
    connect(reads={"model": config.model}, writes={})
    for number in STOP_SIGNALS:  # after Ray has set its own handlers
        signal.signal(number, stop)
    try:
        with service(job, token) as url:
            print(f"{job.model_uri} at {url}/v1/images; the token is in {token.source}; Ctrl-C ends it", flush=True)
            while is_running():
                time.sleep(WATCH_SECONDS)
            raise ServeError("the service was ended from elsewhere. Start it again.")
    except KeyboardInterrupt:
        print("the service has ended", flush=True)


if __name__ == "__main__":
    if not sys.argv[1:] or (sys.argv[1].startswith("-") and not any(a.startswith("--config") for a in sys.argv[1:])):
        sys.argv.insert(1, "champion")  # the name of the only recipe may be omitted
    run_job("serve", RECIPES, main, check)
