"""Loading foreign weights into a module: strictly, with a report.

The naming is recognised by a characteristic key (``NAMINGS``). A new official naming needs one function and one line
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from net.foreign.mxnet import resnet38_from_mxnet
from net.foreign.pytorch import State, unwrap
from net.foreign.reading import read_tensors

Rename = Callable[[str], str | None]
"""Name in the file -> name in the module, None to drop the tensor."""

NAMINGS: dict[str, Rename] = {
    "arg:conv1a_weight": resnet38_from_mxnet,
}
"""Key that identifies an official naming -> its renaming function."""


@dataclass(frozen=True)
class LoadReport:
    """What ``load_tensors`` did, by names of the module (of the file, renamed, for ``unexpected``)."""

    source: str
    """The file, or the caller's label."""
    loaded: tuple[str, ...]
    """Tensors loaded from the file."""
    missing: tuple[str, ...]
    """Tensors that the file lacks; they keep their values."""
    unexpected: tuple[str, ...]
    """Tensors of the file that the module lacks; they were ignored."""
    wrong_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Tensors with another shape in the file: (there, in the module); they keep their values."""

    def __str__(self) -> str:
        """One line: the source, the counts, and the names of tensors that were not loaded."""
        shapes = [f"{name} {there} for {here}" for name, (there, here) in self.wrong_shape.items()]
        parts = [f"{len(self.loaded)} loaded"]
        for label, names in (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes)):
            parts.append(f"{len(names)} {label}" + (f" ({_listed(names)})" if names else ""))
        return f"{self.source}: {', '.join(parts)}"


def _listed(names: Sequence[str]) -> str:
    """At most ten of the names, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def load_tensors(
    module: nn.Module,
    source: str | Path | Mapping[str, object],
    *,
    rename: Rename | None = None,
    allow_missing: Sequence[str] = (),
    label: str | None = None,
) -> LoadReport:
    """Load foreign weights into a module: everything except its head must be in the file and fit.

    Wrapper prefixes are stripped, names are renamed, ``num_batches_tracked`` may be absent (files of PyTorch 0.4).
    The module is only changed if no error is found.

    Args:
        module: receives the weights; may be a part of a network (``net.backbone``).
        source: a weights file (see ``read_tensors``) or a checkpoint already in memory.
        rename: name in the file -> name in the module or None; by default what ``NAMINGS`` recognises.
        allow_missing: names or patterns with ``*`` and ``?`` ("fc8", "f8_*") of tensors that the file may lack or have
            in another shape, i.e. the head that is trained from random weights.
        label: name of a checkpoint in memory in report and errors: the file it came from.

    Raises:
        FileNotFoundError, ValueError: as ``read_tensors``.
        ValueError: two names in the file become one; more than ``allow_missing`` is missing or has another shape; a
            tensor is not finite.
    """
    from_file = isinstance(source, str | Path)
    label = label or (str(source) if from_file else "state dict")
    own = module.state_dict()
    if from_file:
        state = read_tensors(source)
    else:  # names that are the module's already may all begin like a wrapper's prefix
        state = dict(source) if any(name in own for name in source) else unwrap(source)  # type: ignore[assignment]
    state = _renamed(state, rename, label)

    def counter(name: str) -> bool:
        return name.endswith("num_batches_tracked")

    wrong_shape = {
        name: (tuple(state[name].shape), tuple(value.shape))
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    }
    report = LoadReport(
        source=label,
        loaded=tuple(name for name in own if name in state and name not in wrong_shape),
        missing=tuple(name for name in own if name not in state and not counter(name)),
        unexpected=tuple(name for name in state if name not in own and not counter(name)),
        wrong_shape=wrong_shape,
    )
    _refuse_gaps(report, allow_missing)
    bad = next((n for n in report.loaded if state[n].is_floating_point() and not bool(state[n].isfinite().all())), None)
    if bad is not None:
        raise ValueError(f"{label}: {bad} holds values that are not finite. Download it again, or give another file.")
    module.load_state_dict({**own, **{name: state[name] for name in report.loaded}})
    return report


def _renamed(state: State, rename: Rename | None, label: str) -> State:
    """``state`` under the module's names. Raises ValueError if two names become one."""
    if rename is None:
        rename = next((rename for key, rename in NAMINGS.items() if key in state), None)
    if rename is None:
        return state
    renamed: State = {}
    for old, value in state.items():
        new = rename(old)
        if new in renamed:
            raise ValueError(f"{label}: {old} and another tensor become {new}: this renaming doesn't fit the file.")
        if new is not None:
            renamed[new] = value
    return renamed


def _refuse_gaps(report: LoadReport, allow_missing: Sequence[str]) -> None:
    """Raises ValueError if more than the allowed is missing or has another shape, or if nothing fits at all."""

    def disallowed(names: Sequence[str]) -> list[str]:
        patterns = [p for pattern in allow_missing for p in (pattern, f"{pattern}.*")]
        return [name for name in names if not any(fnmatchcase(name, p) for p in patterns)]

    missing, misfits = disallowed(report.missing), disallowed(list(report.wrong_shape))
    head = f"Only {', '.join(allow_missing)} may differ." if allow_missing else "Nothing may differ."
    remedy = f"{head} Is this the checkpoint of another network, or of other options (width, depth, classes)?"
    if missing:
        found = f"; the file has {_listed(report.unexpected)} instead" if report.unexpected else ""
        raise ValueError(f"{report.source}: {len(missing)} tensors are missing: {_listed(missing)}{found}. {remedy}")
    if misfits:
        shapes = [f"{name} {report.wrong_shape[name][0]} for {report.wrong_shape[name][1]}" for name in misfits]
        raise ValueError(f"{report.source}: {len(misfits)} tensors have another shape: {_listed(shapes)}. {remedy}")
    if not report.loaded:
        raise ValueError(f"{report.source}: none of its tensors belongs to this network. {remedy}")
