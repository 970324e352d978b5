"""Start weights of a training, the ``weights`` option: parsing, checking, loading and describing it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from misc.files import store

if TYPE_CHECKING:
    from net.contract import Network

NONE = "none"
"""The word for random weights."""
CAM = "cam"
"""The word for the CAM network that the run trained."""
PRETRAINED = "pretrained"
"""The word for weights that timm or open_clip downloads, by the names that the network gives
(``Network.pretrained_names``)."""
REQUIRED = "required"
"""Only in recipes: the user must name a file."""


@dataclass(frozen=True)
class StartWeights:
    """A word (one of those above), or files in the order in which they are loaded."""

    word: str | None
    files: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> StartWeights:
        """Parse the option: a word, FILE, or FILE,FILE. Raises ValueError if a file's name is empty."""
        if text in (NONE, CAM, PRETRAINED, REQUIRED):
            return cls(text)
        files = tuple(text.split(","))
        if not all(files):
            raise ValueError(f"weights = {text!r} is not possible: it must be a word or files, separated by commas.")
        return cls(None, files)

    def check(self, flag: str, cam: Path | None) -> None:
        """Check before any work that the weights can be loaded.

        Args:
            flag: the option's name on the command line, such as ``--cam.weights``.
            cam: the weights file of the run's CAM network; None if the run will train it.

        Raises:
            ValueError: a file must be named. FileNotFoundError: it does not exist.
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
        """Load these weights into a network; returns one line per source. ``cam``: the weights file of the run's CAM
        network.

        Raises ValueError if the weights do not fit or are not a file, FileNotFoundError if one is missing.
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
                raise ValueError(f"{type(network).__name__} has no weights to download: give a FILE.")
            return tuple(name if ":" in name else f"timm:{name}" for name in names)
        if self.word == REQUIRED:
            raise ValueError(f"{type(network).__name__} starts from trained weights: give a FILE, or {NONE}.")
        return self.files

    def tell(self, trained_on: str, cam: str | None) -> str:
        """Description in words, for the provenance of scores.

        Args:
            trained_on: what the file was trained on, "" for unknown (``Phase.init``).
            cam: the same description of the CAM network, if the word may be ``cam``.
        """
        if self.word == NONE:
            return "random"
        if self.word == CAM and cam is not None:
            return f"CAM network (from {cam})"
        name = self.word or Path(self.files[-1]).name
        return f"{trained_on} ({name})" if trained_on else name

    def identity(self) -> str:
        """The option's text with paths replaced by fingerprints of the files' content: the same file is the same
        setting in any place. A file that does not exist (any more) keeps its path."""
        files = (store.fingerprint(Path(file)) if Path(file).is_file() else file for file in self.files)
        return self.word or ",".join(files)
