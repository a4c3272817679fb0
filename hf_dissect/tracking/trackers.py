"""Sends pairs and alerts to the trackers that `report_to` names; a tracker that fails never ends the run."""

import html
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from hf_dissect.cards.privacy import leave_out_places
from hf_dissect.report.data import THUMBNAIL_SIZE, PairSample, open_thumbnail
from hf_dissect.report.tables import format_number
from hf_dissect.tracking.alerts import Alert

logger = logging.getLogger(__name__)

COLUMNS = ("picture", "caption", "correlation", "differential", "truth", "sample_id")
MAX_CAPTION = 400
STEP = "train/global_step"
"""Name under which transformers logs the step to wandb and trackio."""

_EMPTY = Image.new("RGB", (8, 8), "#808080")

Pairs = Mapping[str, Sequence[PairSample]]


class Trackers:
    """Senders for the trackers of a run.

    Nothing that `hf_dissect.cards.privacy` keeps off a card is sent: local paths, URLs and tokens in captions and
    alerts are left out, and pictures are thumbnails without metadata.

    Args:
        handler: Holder of the callbacks of the trainer, those of the trackers among them.
    """

    def __init__(self, handler: CallbackHandler) -> None:
        self._handler = handler
        self._failed: set[str] = set()

    def send_pairs(self, pairs: Pairs, step: int) -> None:
        """Send a table for each named group of pairs, and their pictures."""
        pairs = {name: group for name, group in pairs.items() if group}
        if pairs:
            self._send("pairs", {name: [_clean(pair) for pair in group] for name, group in pairs.items()}, step)

    def send_alert(self, alert: Alert, step: int) -> None:
        """Send an alert, to TensorBoard as a text."""
        cleaned = Alert(alert.subject, leave_out_places(alert.title), leave_out_places(alert.text))
        self._send("alert", cleaned, step)

    @property
    def used(self) -> bool:
        """True if the run has one of the trackers."""
        return any(isinstance(callback, tuple(_SENDERS)) for callback in self._handler.callbacks)

    def _send(self, what: str, content: Any, step: int) -> None:
        for callback in self._handler.callbacks:
            for kind, senders in _SENDERS.items():
                if isinstance(callback, kind):
                    self._try(kind.__name__.removesuffix("Callback"), senders[what], callback, content, step)

    def _try(self, name: str, send: Callable[[Any, Any, int], None], *arguments: Any) -> None:
        try:
            send(*arguments)
        except Exception as error:  # whatever a tracker raises, such as without a network: training matters more
            if "DataLoader worker" in str(error):
                raise  # a signal raises it wherever the process is just then
            if name not in self._failed:
                self._failed.add(name)
                logger.warning("%s did not take what was sent (%s: %s); training continues.", name, *_name(error))


def _name(error: Exception) -> tuple[str, str]:
    return type(error).__name__, (str(error).splitlines() or [""])[0]


def _clean(pair: PairSample) -> PairSample:
    caption = leave_out_places(pair.caption)
    caption = caption if len(caption) <= MAX_CAPTION else caption[:MAX_CAPTION] + "…"
    # Lone surrogates cannot be sent as UTF-8.
    caption = caption.encode("utf-8", "replace").decode("utf-8")
    return PairSample(
        int(pair.sample_id),
        caption,
        pair.correlation,
        pair.differential,
        pair.is_clean,
        open_thumbnail(pair.image),
    )


def _list_values(pair: PairSample) -> list[Any]:
    """Return the values of a row after its picture; an unknown differential is NaN, as a column has one type."""
    truth = "not known" if pair.is_clean is None else "matched" if pair.is_clean else "mismatched"
    differential = float("nan") if pair.differential is None else float(pair.differential)
    return [pair.caption, float(pair.correlation), differential, truth, str(pair.sample_id)]


def _send_pairs_to_wandb(callback: Any, pairs: Pairs, step: int) -> None:
    wandb = callback._wandb  # the module, which is not a dependency of this package
    tables: dict[str, Any] = {}
    for name, group in pairs.items():
        # A column has the type of its first value, so that a pair without a picture has an empty one.
        rows = [[wandb.Image(pair.image or _EMPTY), *_list_values(pair)] for pair in group]
        tables[f"pairs/{name}"] = wandb.Table(columns=list(COLUMNS), data=rows)
    wandb.run.log({**tables, STEP: step})


def _send_alert_to_wandb(callback: Any, alert: Alert, step: int) -> None:
    wandb = callback._wandb
    wandb.run.alert(title=alert.title, text=f"Step {step}: {alert.text}", level=wandb.AlertLevel.WARN)


def _send_pairs_to_trackio(callback: Any, pairs: Pairs, step: int) -> None:
    trackio = callback._trackio
    tables: dict[str, Any] = {}
    for name, group in pairs.items():
        rows = []
        for pair in group:
            caption, correlation, differential, *rest = _list_values(pair)
            picture = None if pair.image is None else trackio.Image(pair.image)
            # JSON has no NaN.
            numbers = [None if np.isnan(value) else round(value, 3) for value in (correlation, differential)]
            rows.append([picture, caption, *numbers, *rest])
        tables[f"pairs/{name}"] = trackio.Table(columns=list(COLUMNS), data=rows)
    trackio.log({**tables, STEP: step})


def _send_alert_to_trackio(callback: Any, alert: Alert, step: int) -> None:
    trackio = callback._trackio
    trackio.alert(alert.title, text=f"Step {step}: {alert.text}", level=trackio.AlertLevel.WARN)


def _send_pairs_to_tensorboard(callback: Any, pairs: Pairs, step: int) -> None:
    writer = callback.tb_writer
    if writer is None:
        return
    for name, group in pairs.items():
        pictures = np.stack([_fit(pair.image) for pair in group])
        writer.add_images(f"pairs/{name}", pictures, step, dataformats="NHWC")
        rows = [_format_row(["place", *COLUMNS[1:]]), _format_row(["---"] * len(COLUMNS))]
        for place, pair in enumerate(group, 1):
            caption, correlation, differential, *rest = _list_values(pair)
            figures = [format_number(correlation, "correlation"), format_number(differential, "differential")]
            rows.append(_format_row([str(place), _escape_markdown(caption), *figures, *rest]))
        writer.add_text(f"pairs/{name}", "\n".join(rows), step)
    writer.flush()


def _send_alert_to_tensorboard(callback: Any, alert: Alert, step: int) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_text(f"alerts/{alert.subject}", _escape_markdown(f"{alert.title}. {alert.text}"), step)
        callback.tb_writer.flush()


def _fit(picture: Image.Image | None) -> np.ndarray:
    """Return a picture in the middle of a grey square, uint8 `(side, side, 3)`; TensorBoard makes one of all."""
    square = Image.new("RGB", (THUMBNAIL_SIZE, THUMBNAIL_SIZE), "#808080")
    if picture is not None:
        scale = THUMBNAIL_SIZE / max(picture.size)
        fitted = picture.convert("RGB").resize([max(1, round(side * scale)) for side in picture.size])
        square.paste(fitted, ((THUMBNAIL_SIZE - fitted.width) // 2, (THUMBNAIL_SIZE - fitted.height) // 2))
    return np.asarray(square)


def _escape_markdown(text: str) -> str:
    """Return `text` as Markdown that shows it as it is, without links, pictures or HTML of its own, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def _format_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_SENDERS: dict[type[TrainerCallback], dict[str, Callable[[Any, Any, int], None]]] = {
    WandbCallback: {"pairs": _send_pairs_to_wandb, "alert": _send_alert_to_wandb},
    TrackioCallback: {"pairs": _send_pairs_to_trackio, "alert": _send_alert_to_trackio},
    TensorBoardCallback: {"pairs": _send_pairs_to_tensorboard, "alert": _send_alert_to_tensorboard},
}
