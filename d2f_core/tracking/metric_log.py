"""Queue of metrics and pictures for MLflow, so that a training neither waits for the server nor fails with it.

The run gets each (metric, step) exactly once, whichever process is killed: points wait in memory until the server
confirms them, a checkpoint stores unconfirmed ones, and points that the server already has are not sent again.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from d2f_core.retry import delays, one_line
from d2f_core.tracking.runs import RunHandle
from d2f_core.tracking.server import TrackingError, UnreachableTrackingError, client_for, is_away, metric_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL import Image

logger = logging.getLogger(__name__)

BATCH_POINTS = 1000
"""MLflow's limit for one request."""
MAX_PICTURES = 16
"""Most pictures waiting in memory; when there are more, the oldest is dropped."""
WARN_SECONDS = 30.0
"""Shortest time between two warnings."""
CLOSING_DELAY = 1.0
"""Longest pause in seconds between attempts while the log is being closed."""
REFUSED = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST"}
"""Error codes that are permanent. Others may be temporary: a token is renewed, a gateway finds its server again."""


class Point(NamedTuple):
    """One value of a metric; `timestamp` (ms) is when it was logged, not when it is sent."""

    name: str
    value: float
    timestamp: int
    step: int


class Picture(NamedTuple):
    name: str
    image: "Image.Image"
    step: int


class MetricLog:
    """Metrics and pictures of one run, sent in order by a thread that retries until they arrive.

    Args:
        pending: what `pending()` returned before the run was resumed.
    """

    def __init__(self, handle: RunHandle, *, pending: Sequence[Sequence[Any]] = ()) -> None:
        self._handle = handle
        self._points = deque(Point(str(name), float(value), int(at), int(step)) for name, value, at, step in pending)
        self._pictures: deque[Picture] = deque()
        self._written: dict[str, tuple[int, set[int]]] = {}
        """Per metric: the first step that the server was asked for, and the steps from there on that it has."""
        self._changed = threading.Condition()
        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._refusal: TrackingError | None = None
        self._trouble = "no answer yet"
        self._in_time = time.monotonic()
        """Time of the last successful send, or when the oldest waiting item was queued."""
        self._warned = self._in_time - WARN_SECONDS
        self._thread = threading.Thread(target=self._run, name="metric-log", daemon=True)
        if self._points:
            self._put(())

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics of a step; never blocks on the network.

        Raises:
            TrackingError: MLflow refused earlier points permanently, e.g. because the run was deleted.
        """
        now = int(time.time() * 1000)
        self._put(Point(metric_name(name), float(value), now, step) for name, value in metrics.items())

    def log_image(self, name: str, image: "Image.Image", step: int) -> None:
        """Queue a picture of the series `name`, as `RunHandle.log_image` writes it; never blocks on the network."""
        self._put((), Picture(name, image, step))
        with self._changed:
            while len(self._pictures) > MAX_PICTURES:
                old = self._pictures.popleft()
                logger.warning("%d pictures wait for MLflow; dropping %s of step %d", MAX_PICTURES, old.name, old.step)

    def pending(self) -> list[list[str | float | int]]:
        """The points that the server has not confirmed, as JSON lists [name, value, timestamp in ms, step]."""
        with self._changed:
            return [list(point) for point in self._points]

    def close(self, timeout: float) -> None:
        """Send what is queued, for at most `timeout` seconds; nothing is sent afterwards.

        Raises:
            UnreachableTrackingError: points remain.
            TrackingError: MLflow refused some.
        """
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._abandoned.set()
        if self._refusal:
            raise self._refusal
        with self._changed:
            points, pictures = len(self._points), len(self._pictures)
        if pictures:
            logger.warning("%d pictures were not written to MLflow in %g s (%s)", pictures, timeout, self._trouble)
        if points:
            raise UnreachableTrackingError(
                f"{points} metric points were not written to MLflow in {timeout:g} s ({self._trouble}). Check that "
                f"{self._handle.tracking_uri} is up; those that a checkpoint holds are sent when the run is resumed."
            )

    def _put(self, points: Iterable[Point], *pictures: Picture) -> None:
        with self._changed:
            if self._refusal:
                raise self._refusal
            if self._closing.is_set():
                raise TrackingError("This metric log is closed. Log before `close`.")
            if not self._points and not self._pictures:
                self._in_time = time.monotonic()
            self._points.extend(points)
            self._pictures.extend(pictures)
            if self._thread.ident is None:  # not started
                self._thread.start()
            self._changed.notify_all()
        if time.monotonic() - self._in_time >= WARN_SECONDS:  # the thread may hang in a request
            self._warn()

    def _warn(self) -> None:
        with self._changed:
            now, points, pictures = time.monotonic(), len(self._points), len(self._pictures)
            if now - self._warned < WARN_SECONDS:
                return
            self._warned = now
        logger.warning(
            "MLflow at %s does not take metrics (%s): %d points and %d pictures wait; the training goes on",
            self._handle.tracking_uri, self._trouble, points, pictures,
        )  # fmt: skip

    def _run(self) -> None:
        pauses = delays()
        while not self._abandoned.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._points or self._pictures or self._closing.is_set())
                batch = list(islice(self._points, BATCH_POINTS))
                picture = self._pictures[0] if self._pictures else None
            if not batch and picture is None:
                return
            try:
                client = client_for(self._handle.tracking_uri)
                if batch:
                    self._send(client, batch)
                elif picture:
                    self._send_picture(client, picture)
            except Exception as error:
                if not self._outlasts(error, None if batch else picture):
                    return
                pause = next(pauses)
                if self._closing.wait(pause):
                    self._abandoned.wait(min(pause, CLOSING_DELAY))
            else:
                pauses = delays()
                self._sent(len(batch), None if batch else picture)

    def _sent(self, points: int, picture: Picture | None) -> None:
        with self._changed:
            for _ in range(points):
                self._points.popleft()
            if picture is not None and self._pictures and self._pictures[0] is picture:
                self._pictures.popleft()
            self._in_time = time.monotonic()

    def _outlasts(self, error: Exception, picture: Picture | None) -> bool:
        """Handle an error of a send, which may still have arrived; returns whether to continue."""
        self._written.clear()
        self._trouble = one_line(error)
        waits = is_away(error) or getattr(error, "error_code", None) not in (*REFUSED, None)
        if picture is not None and not waits:
            logger.warning("dropping %s of step %d: MLflow refused it: %s", picture.name, picture.step, self._trouble)
            self._sent(0, picture)
        elif waits:
            self._warn()
        else:
            self._refusal = TrackingError(
                f"MLflow refused metrics of {self._handle.url}: {self._trouble}. Restore the run or correct the "
                "metric, and resume the training."
            )
        return self._refusal is None

    def _send(self, client: "MlflowClient", batch: list[Point]) -> None:
        """Send the points that the server does not have."""
        from mlflow.entities import Metric

        first: dict[str, int] = {}
        for point in batch:
            first[point.name] = min(point.step, first.get(point.name, point.step))
        new: dict[tuple[str, int], Metric] = {}
        for point in batch:
            if point.step not in self._steps(client, point.name, first[point.name]):
                metric = Metric(point.name, point.value, point.timestamp, point.step)
                new.setdefault((point.name, point.step), metric)
        if new:
            client.log_batch(self._handle.run_id, metrics=list(new.values()))

    def _steps(self, client: "MlflowClient", name: str, first: int) -> set[int]:
        """Steps from `first` on for which the server has the metric."""
        asked, steps = self._written.get(name, (None, set()))
        if asked is None or first < asked:
            history = client.get_metric_history(self._handle.run_id, name)
            steps = {metric.step for metric in history if metric.step >= first}
            self._written[name] = (first, steps)
        return steps

    def _send_picture(self, client: "MlflowClient", picture: Picture) -> None:
        run, series = self._handle.run_id, f"images/{picture.name.replace('/', '~')}+step+{picture.step}+"
        there = [file.path for file in client.list_artifacts(run, "images") if file.path.startswith(series)]
        if not any(path.endswith(".webp") for path in there):  # the thumbnail, which MLflow writes last
            client.log_image(run, picture.image, key=picture.name, step=picture.step)
        client.log_image(run, picture.image, f"{picture.name}.png")
