"""A gate's promotion: the champion's alias moves to a candidate that passed, if it still names what was compared.

The order of one story: hold the lease of the registered model, read the alias afresh, move it, read it back; and only
then write the report, which says what came of it.
"""

import logging
from dataclasses import dataclass

from d2f_core.evaluation.pins import PINS_NAME, PinError, Pins, registered_name
from d2f_core.retry import UnreachableError
from d2f_core.storage import file_exists, join
from d2f_core.tracking import HeldAlias, check_leases, complete_version, holding, rolled_back_to

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What came of a promotion."""

    text: str
    """For the report: where the alias is, or why it is not known."""
    error: ValueError | None = None
    """Why the candidate was not promoted, or why that is not known; raise it when the results are written."""

    @property
    def unknown(self) -> bool:
        """Whether registry or storage did not answer: the same command goes on from there."""
        return isinstance(self.error, UnreachableError)


def check_may_promote(pins: Pins, output: str, *, alias: str, flags: str = "") -> None:
    """Refuse, before anything is measured, an evaluation whose candidate could not be promoted when it passes.

    Args:
        output: of the evaluation.
        flags: what stands before the names of its flags, such as "gate.".

    Raises:
        PinError: the alias names another version than the one that is compared, or the candidate was rolled back from.
        ValueError: the lease of the registered model cannot be kept where it belongs.
    """
    name, version = registered_name(pins.candidate), _version(pins.candidate)
    if not name:
        return
    if pins.champion_at_start not in (None, pins.candidate):
        _check_compared(pins, alias, flags)
    # A mark of the version that the alias names is a killed rollback's. Where pins are, results may be, too, and are
    # written with the reason.
    if pins.champion_at_start != pins.candidate and not file_exists(join(output, PINS_NAME)):
        _check_not_rolled_back(name, version, alias)
    check_leases(name, output=output)


def promote_candidate(pins: Pins, output: str, *, alias: str, flags: str = "") -> Promotion:
    """Move the alias to the candidate, a registered version, if it names what it named when the evaluation began, and
    if that was compared. What prevents it is returned, not raised: results are to be written first.

    Args:
        output, flags: as of `check_may_promote`.
    """
    name, version = registered_name(pins.candidate), _version(pins.candidate)
    held: HeldAlias | None = None
    try:
        with holding(name, alias, f"promote {name}@{alias} to version {version}, by a gate", output=output) as held:
            text = _promote(held, pins, alias, flags)
    except ValueError as error:
        reason, unreachable = str(error).rstrip("."), isinstance(error, UnreachableError)
        if unreachable and held and held.move_requested:
            text = f"Unknown whether {name}@{alias} moved to version {version}: {reason}"
        elif unreachable:  # of an earlier run that was killed here, this one knows nothing
            text = f"Not promoted: this run did not ask {name}@{alias} to move: {reason}"
        else:
            text = f"Not promoted: {reason}"
        logger.error("%s", text)
        return Promotion(text=text, error=error)
    logger.info("%s", text)
    return Promotion(text=text)


def _promote(held: HeldAlias, pins: Pins, alias: str, flags: str) -> str:
    """What came of it. Raises PinError when it may not be, and as `HeldAlias.promote`."""
    name, version = registered_name(pins.candidate), _version(pins.candidate)
    before = held.current()
    if before == version:
        return f"{name}@{alias} is version {version} already"
    now, then = f"version {before}" if before else "no version", _version(_at_start(pins))
    if (before or "") != then:
        raise PinError(
            f"{name}@{alias} moved to {now} while this evaluation ran against {pins.champion or 'none'}. Evaluate "
            "again at another output."
        )
    _check_compared(pins, alias, flags)
    _check_not_rolled_back(name, version, alias)
    held.promote(version)
    return f"{name}@{alias} moved to version {version} (before: {now})"


def _at_start(pins: Pins) -> str:
    """The version that the alias named when the evaluation began; "" if it named none."""
    if pins.champion_at_start is not None:
        return pins.champion_at_start
    return pins.champion if registered_name(pins.champion) == registered_name(pins.candidate) else ""


def _check_compared(pins: Pins, alias: str, flags: str) -> None:
    """Raise PinError unless the alias named no version, or the one that is compared."""
    if (at_start := _at_start(pins)) not in ("", pins.champion):
        raise PinError(
            f"{registered_name(at_start)}@{alias} is version {_version(at_start)}, and the candidate is compared with "
            f"{pins.champion or 'no champion'}: a gate may replace only what it has compared. Give --{flags}champion "
            f"auto, or --{flags}no-promote."
        )


def _check_not_rolled_back(name: str, version: str, alias: str) -> None:
    found = complete_version(name, version)
    if to := rolled_back_to(found, alias):
        raise PinError(
            f"version {version} of {name} was rolled back from: {name}@{alias} went back to version {to}. A gate does "
            f"not promote it again; `python -m pipelines.promote emoji-flow --name {name} --version {version}` does."
        )


def _version(uri: str) -> str:
    return uri.rsplit("/", 1)[-1]
