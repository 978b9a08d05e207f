"""What the trainers of both front ends do alike."""

from __future__ import annotations

from typing import Any


class SavedTrainer:
    """Everything about a trainer's state that front ends name alike.

    Attributes:
        hvd: the front end's module of Horovod's interface.
        state_class: its elastic state of a model and an optimizer.
        digest_of: what a rank has, from a model and its optimizer.
    """

    hvd: Any
    state_class: Any
    digest_of: Any
    model: Any
    optimizer: Any

    def digest(self) -> str:
        """Of everything that this rank has."""
        return type(self).digest_of(self.model, self.optimizer)

    def commit(self) -> Any:
        """An elastic state with what there is now."""
        state = self.state_class(self.model, self.optimizer)
        state.save()
        return state

    def save(self, folder: Any, step: int) -> None:
        self.hvd.save_checkpoint(folder, step, model=self.model, optimizer=self.optimizer)

    def load(self, folder: Any) -> int:
        return self.hvd.load_checkpoint(folder, model=self.model, optimizer=self.optimizer).step

    def report(self) -> dict[str, Any]:
        return self.optimizer.report()
