"""What a training starts from, as the ``weights`` option says it: parsed, checked, loaded and told in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from misc.files import store

if TYPE_CHECKING:
    from net.contract import Network

NONE = "none"
"""Random weights."""
CAM = "cam"
"""The CAM network that the run trained."""
PRETRAINED = "pretrained"
"""What timm, or open_clip, fetches from the internet, by the names that the network gives
(``Network.pretrained_names``)."""
REQUIRED = "required"
"""Only in recipes: the user has to say which file."""


@dataclass(frozen=True)
class StartWeights:
    """A word (one of those above), or files in the order in which they are loaded."""

    word: str | None
    files: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> StartWeights:
        """The option's text: a word, FILE, or FILE,FILE. Raises ValueError where a file's name is empty."""
        if text in (NONE, CAM, PRETRAINED, REQUIRED):
            return cls(text)
        files = tuple(text.split(","))
        if not all(files):
            raise ValueError(f"weights = {text!r} is not possible: it must be a word or files, separated by commas.")
        return cls(None, files)

    def check(self, flag: str, cam: Path | None) -> None:
        """Refuse, before any work, what cannot be loaded.

        Args:
            flag: the option's name on the command line, such as ``--cam.weights``.
            cam: the file of the run's CAM network; None where the run is to train it yet.

        Raises:
            ValueError: a file has to be named. FileNotFoundError: it isn't there.
        """
        if self.word == REQUIRED:
            raise ValueError(
                f"This recipe starts from trained weights: give {flag} FILE (the published systems' files in scripts/ "
                f"say which), or {flag} {NONE} to start from random ones (the published scores are out of reach then)."
            )
        if self.word == CAM and cam is not None and not cam.exists():
            raise FileNotFoundError(
                f"{flag} {CAM}: {cam} does not exist. Run train_cam first, or give another run's: {flag} "
                "OTHER/weights/cam.pt"
            )
        for file in self.files:
            if not Path(file).is_file():
                raise FileNotFoundError(f"{flag} {file}: there is no such file.")

    def load(self, network: Network, cam: Path) -> list[str]:
        """Give a network these weights; returns a line for each source. ``cam``: the file of the run's CAM network.

        Raises ValueError where the weights do not fit or are no file, FileNotFoundError where one is missing.
        """
        return [f"{source}: {network.load_weights(source)}" for source in self._sources(network, cam)]

    def _sources(self, network: Network, cam: Path) -> tuple[str, ...]:
        if self.word == NONE:
            return ()
        if self.word == CAM:
            if not cam.exists():
                raise FileNotFoundError(f"{cam} does not exist: run train_cam first.")
            return (str(cam),)
        if self.word == PRETRAINED:
            names = network.pretrained_names()
            if not names:
                raise ValueError(f"{type(network).__name__} has no weights that timm fetches: give a FILE.")
            return tuple(name if ":" in name else f"timm:{name}" for name in names)
        if self.word == REQUIRED:
            raise ValueError(f"{type(network).__name__} starts from trained weights: give a FILE, or {NONE}.")
        return self.files

    def tell(self, trained_on: str, cam: str | None) -> str:
        """What it is, in words, for the provenance of scores.

        Args:
            trained_on: what the file was trained on, "" for unknown (``Phase.init``).
            cam: the same words of the CAM network, where ``word`` may mean it.
        """
        if self.word == NONE:
            return "random"
        if self.word == CAM and cam is not None:
            return f"CAM network (from {cam})"
        name = self.word or Path(self.files[-1]).name
        return f"{trained_on} ({name})" if trained_on else name

    def identity(self) -> str:
        """The option's text with each file's content in place of its path: the same file is the same setting wherever
        it lies. A file that is not there (any more) keeps its path."""
        files = (store.fingerprint(Path(file)) if Path(file).is_file() else file for file in self.files)
        return self.word or ",".join(files)
