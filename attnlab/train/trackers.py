"""Where numbers go: metrics.jsonl always; TensorBoard and Weights & Biases by extra."""

from __future__ import annotations

import importlib
import json
import warnings
from typing import Any

from etils import epath

from attnlab.core.errors import ConfigError

Row = dict[str, Any]


class JsonLines:
    """``metrics.jsonl``: one object a logged step, complete lines only.

    Opening it after a resume drops the rows past the checkpoint, so none stands there twice.
    """

    def __init__(self, path: epath.Path, resume_at: int = 0):
        self.path = path
        self.rows = [r for r in read(path) if r["step"] <= resume_at] if resume_at else []
        self._remote = "://" in str(path)
        self._rewrite()

    def _rewrite(self) -> None:
        partial = self.path.parent / (self.path.name + ".part")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        partial.replace(self.path)

    def log(self, row: Row) -> None:
        self.rows.append(row)
        if not self._remote:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Object stores cannot append: the file is written whole, at checkpoints and at the end."""
        if self._remote:
            self._rewrite()

    close = flush


def read(path: epath.Path | str) -> list[Row]:
    """The complete rows of a ``metrics.jsonl``.

    A last line cut by a kill is left out; any other damaged line is, with a warning.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n") or not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            warnings.warn(f"attnlab: {path}, line {number} is damaged: left out", stacklevel=2)
    return rows


def check_installed(wanted: tuple[str, ...]) -> None:
    """Raise ConfigError unless the packages behind these trackers are there."""
    for name, package in (("tb", "tensorboardX"), ("wandb", "wandb")):
        if name in wanted:
            try:
                importlib.import_module(package)
            except ImportError:
                raise ConfigError(
                    f"--{name}", f"needs {package}", f'pip install "attnlab[{name}]"'
                ) from None


class TensorBoard:
    def __init__(self, directory: epath.Path, resume_at: int = 0):
        from tensorboardX import SummaryWriter

        # What an earlier process logged past the checkpoint is hidden.
        self.writer = SummaryWriter(
            str(directory), purge_step=resume_at + 1 if resume_at else None
        )

    def log(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, directory: epath.Path, name: str, config: dict):
        import wandb

        self.run = wandb.init(project="attnlab", name=name, dir=str(directory), config=config)

    def log(self, row: Row) -> None:
        self.run.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.run.finish()


def plot_loss(rows: list[Row], path: epath.Path, title: str) -> None:
    """``loss.png``: training and validation loss in nats against tokens."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([r["tokens"] for r in rows], [r["loss"] for r in rows], lw=1, label="train")
    val = [r for r in rows if r.get("val_loss") is not None]
    if val:
        axes.plot(
            [r["tokens"] for r in val], [r["val_loss"] for r in val], "o-", label="validation"
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    path.write_bytes(buffer.getvalue())
