"""Rows that are tokenised already: `token_ids` or `input_ids`, with a `loss_mask` or with `labels`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip

IGNORED_LABEL = -100
"""The label of a position without loss, as PyTorch's cross-entropy and transformers have it."""

_ZERO_OR_ONE = "0, 1, false or true"


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A pre-tokenised row: `token_ids` uint32 [T], `loss_mask` bool [T], T > 0."""

    token_ids: np.ndarray
    loss_mask: np.ndarray


def parse_token_row(row: Mapping[str, Any]) -> TokenRow:
    """Parse a row that has `token_ids` or `input_ids`. Raises RowRejectedError.

    Beside `input_ids`, `labels` may stand in for a `loss_mask`, and an `attention_mask` of zeros at either end marks
    padding, which is dropped.
    """
    name = "token_ids" if row.get("token_ids") is not None else "input_ids"
    token_ids = _token_ids(row, name)
    if name == "input_ids" and row.get("loss_mask") is None and row.get("labels") is not None:
        loss_mask = _labelled(row["labels"], token_ids)
    elif name == "input_ids" and row.get("loss_mask") is None:
        raise RowRejectedError(
            "bad-loss-mask", expected="a key `loss_mask` or `labels` beside `input_ids`", found=f"keys {_keys(row)}"
        )
    else:
        loss_mask = _zeros_and_ones(row.get("loss_mask"), "loss_mask", token_ids, name)
    if name == "input_ids" and row.get("attention_mask") is not None:
        kept = _without_padding(_zeros_and_ones(row["attention_mask"], "attention_mask", token_ids, name))
        token_ids, loss_mask = token_ids[kept], loss_mask[kept]
    return TokenRow(token_ids=token_ids.astype(np.uint32), loss_mask=loss_mask)


def _token_ids(row: Mapping[str, Any], name: str) -> np.ndarray:
    token_ids = _integers(row[name], name, "iu", "integers >= 0")
    if len(token_ids) == 0:
        raise RowRejectedError("empty-conversation", expected="at least one token id", found=f"{name}: []")
    if token_ids.min() < 0 or token_ids.max() > np.iinfo(np.uint32).max:
        wrong = token_ids.min() if token_ids.min() < 0 else token_ids.max()
        raise RowRejectedError(_reason(name), expected=f"{name}: integers >= 0", found=str(wrong))
    return token_ids


def _zeros_and_ones(values: Any, name: str, token_ids: np.ndarray, ids_name: str) -> np.ndarray:
    mask = _integers(values, name, "iub", _ZERO_OR_ONE)
    _check_length(mask, name, token_ids, ids_name)
    if mask.dtype != np.bool_ and not np.isin(mask, (0, 1)).all():
        wrong = mask[~np.isin(mask, (0, 1))][0]
        raise RowRejectedError(_reason(name), expected=f"{name}: {_ZERO_OR_ONE}", found=str(wrong))
    return mask.astype(np.bool_)


def _labelled(values: Any, token_ids: np.ndarray) -> np.ndarray:
    """The loss mask [T] that these labels stand for."""
    labels = _integers(values, "labels", "iu", f"token ids, or {IGNORED_LABEL} where there is no loss")
    _check_length(labels, "labels", token_ids, "input_ids")
    wrong = np.flatnonzero((labels != IGNORED_LABEL) & (labels != token_ids))
    if len(wrong):
        first = wrong[0]
        raise RowRejectedError(
            "label-mismatch",
            expected=f"labels that are {IGNORED_LABEL} or the id at the same position (not shifted)",
            found=f"label {labels[first]} for id {token_ids[first]} at position {first}",
        )
    loss_mask: np.ndarray = labels != IGNORED_LABEL
    return loss_mask


def _without_padding(attention: np.ndarray) -> slice:
    """The positions that are no padding. Zeros among them are refused: such a row was packed or masked otherwise."""
    used = np.flatnonzero(attention)
    if len(used) == 0:
        raise RowRejectedError("empty-conversation", expected="at least one token id", found="attention_mask: all 0")
    kept = slice(int(used[0]), int(used[-1]) + 1)
    if not attention[kept].all():
        raise RowRejectedError(
            "bad-attention-mask",
            expected="attention_mask: zeros at either end only, as padding",
            found=f"a zero at position {used[0] + attention[kept].argmin()}",
        )
    return kept


def _integers(values: Any, name: str, kinds: str, expected: str) -> np.ndarray:
    """A flat array of one of the dtype `kinds`; a float or string among the values makes numpy choose another kind."""
    if not isinstance(values, list | tuple | np.ndarray):
        raise RowRejectedError(_reason(name), expected=f"{name}: a list of {expected}", found=clip(values))
    try:
        array = np.asarray(values) if len(values) else np.zeros(0, np.int64)
    except (ValueError, OverflowError, RecursionError) as exc:
        raise RowRejectedError(_reason(name), expected=f"{name}: a flat list of {expected}", found=str(exc)) from exc
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise RowRejectedError(_reason(name), expected=f"{name}: a flat list of {expected}", found=clip(values))
    return array


def _check_length(values: np.ndarray, name: str, token_ids: np.ndarray, ids_name: str) -> None:
    if len(values) != len(token_ids):
        what = "mask values" if name == "loss_mask" else f"values of {name}"
        raise RowRejectedError(
            "length-mismatch",
            expected=f"{name} as long as {ids_name} ({len(token_ids)})",
            found=f"{len(values)} {what}",
        )


def _reason(name: str) -> str:
    return f"bad-{name.replace('_', '-')}"


def _keys(row: Mapping[str, Any]) -> str:
    return clip(sorted(map(str, row)))
